"""The cost of deletion and insertion against one forward pass a step and image, as ratios.

    python benchmarks/metrics.py [--data FOLDER]

16 images (one at 224 x 224), steps of one image row as in RISE, and torch's random weights, on
which the time does not depend. Three times are taken in turn:

- the metric;
- "one forward a step", the RISE protocol image by image: replace the next pixels in place, run the
  network, take the softmax. A check asserts that both give the same curves;
- "forwards alone", the network on the images of that loop, prepared beforehand, in batches of the
  fastest size. Nothing that runs the network on each of them can take less.

All run on one and on two threads, each for a tenth of a second or once. Wall and processor time (of
all threads) are reported as median and minimum of the repeats: the load of the machine only adds
time, and adds more to the loop, which depends more on its caches.

Random images with random maps change in every step. Real images with the maps of a method
(Input×Gradient) may not: steps that replace black pixels by black ones leave the image as it was,
and the metric runs it once. Photographs change in every step, so there the metrics of ``compare``
gain more from fewer steps: "32 steps at most" is their default, against the loop of one row a step.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # threads that wait leave the processor to others

import torch
from captum.attr import InputXGradient
from common import RESULTS, parser_of, show, write
from data import load
from networks import RECIPES
from torch import Tensor, nn

from captum_mipin.metrics import deletion, insertion
from captum_mipin.metrics.baselines import blur

IMAGES, TARGET = 16, 3
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Case:
    """A network, and the images to delete from."""

    network: str
    build: Callable[[], nn.Module]
    images: str
    x: Tensor
    sizes: tuple[int, ...] = (1, 4, 16, 64, 144, 256)
    repeats: int = 5


def cases(folder: str | None, names: Sequence[str]) -> Iterator[Case]:
    """Yield random images for all networks, or for some; real images where they are available."""
    import torchvision

    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    for name in ("cnn-digits", "mlp-mnist", "cnn-mnist", "cnn-cifar10"):
        build, data = RECIPES[name].build, RECIPES[name].data
        if not names or name in names:
            yield Case(name, build, "random", torch.rand(IMAGES, *shapes[data]))
            if data == "digits" or folder is not None:
                yield Case(name, build, data, load(data, folder).test[:IMAGES])
    if not names or "squeezenet1_1" in names:
        build = partial(torchvision.models.squeezenet1_1, weights=None)
        yield Case("squeezenet1_1", build, "random", torch.rand(1, 3, 224, 224), (1, 4, 16), 1)


def one_by_one(model: nn.Module, maps: Tensor, x: tuple[Tensor, Tensor], step: int) -> Tensor:
    """Return the probabilities of RISE's loop, (images, steps + 1).

    Args:
        model: The network.
        maps: Maps (images, height, width).
        x: The images that the loop begins and ends with.
        step: Number of pixels of a step.
    """
    curves = []
    for image, end, heat in zip(*x, maps, strict=True):
        order = heat.flatten().argsort(descending=True)
        now, finish = image.clone(), end.flatten(1)
        flat, curve = now.flatten(1), []
        with torch.no_grad():
            for start in range(-step, len(order), step):
                part = order[max(start, 0) : start + step]
                flat[:, part] = finish[:, part]
                curve.append(float(model(now[None]).softmax(1)[0, TARGET]))
        curves.append(curve)
    return torch.tensor(curves)


def forwards(model: nn.Module, x: Tensor, size: int) -> None:
    with torch.no_grad():
        for part in x.split(size):
            model(part)


def measure(case: Case, counts: Sequence[int], metric: Any) -> list[dict[str, Any]]:
    """Return one row for each number of threads."""
    torch.manual_seed(0)
    model, x = case.build().eval(), case.x
    maps = torch.rand(len(x), *x.shape[2:])
    if case.images != "random":
        maps = (
            InputXGradient(model)
            .attribute(x.clone().requires_grad_(), target=TARGET)
            .sum(1)
            .detach()
        )
        maps += 1e-9 * maps.abs().max() * torch.rand(maps.shape)  # both break ties alike
    ends = (x, torch.zeros_like(x)) if metric is deletion else (blur(x), x)
    inputs: list[Tensor] = []
    listening = Listening(model, inputs).eval()
    expected = one_by_one(listening, maps, ends, x.shape[-1])
    ready = torch.cat(inputs)
    inputs.clear()
    result = metric(maps, x, TARGET, model=listening)
    torch.testing.assert_close(result.curves.float(), expected, rtol=1e-4, atol=1e-6)
    calls: dict[str, Callable[[], Any]] = {
        "one forward a step": partial(one_by_one, model, maps, ends, x.shape[-1]),
        "metric": partial(metric, maps, x, TARGET, model=model),
        "32 steps at most": partial(metric, maps, x, TARGET, model=model, steps=32),
        **{f"forwards {size}": partial(forwards, model, ready, size) for size in case.sizes},
    }
    start = time.process_time()
    calls["one forward a step"]()
    often = max(1, round(0.1 / (time.process_time() - start)))  # in a row
    times: dict[tuple[int, str, str], list[float]] = {}
    for _ in range(case.repeats):
        for threads in counts:
            torch.set_num_threads(threads)
            for name, call in calls.items():
                begun = [now() for now in CLOCKS.values()]
                for _ in range(often):
                    call()
                for clock, start, now in zip(CLOCKS, begun, CLOCKS.values(), strict=True):
                    times.setdefault((threads, name, clock), []).append((now() - start) / often)
    torch.set_num_threads(1)
    about = {"network": case.network, "images": case.images, "count": len(x), "steps": x.shape[-1]}
    about |= {"metric": metric.__name__}
    about |= {"forwards, loop": len(ready), "forwards, metric": sum(map(len, inputs))}
    return [
        about | {"threads": threads} | ratios(times, threads) | {"repeats": case.repeats}
        for threads in counts
    ]


def ratios(times: dict[tuple[int, str, str], list[float]], threads: int) -> dict[str, float]:
    """Return the times and the ratios of the loop to them, by each clock, minimum and median."""
    row: dict[str, float] = {}
    for clock, which in product(CLOCKS, ("least", "median")):
        own = {
            name: min(found) if which == "least" else statistics.median(found)
            for (count, name, by), found in times.items()
            if (count, by) == (threads, clock)
        }
        loop, ours, few = (own.pop(name) for name in list(own)[:3])
        alone, said = min(own.values()), f"{which} {clock}"
        row |= {
            f"one forward a step, {said} s": loop,
            f"metric, {said} s": ours,
            f"32 steps at most, {said} s": few,
            f"forwards alone, {said} s": alone,
            f"times faster, {said}": loop / ours,
            f"32 steps at most times faster, {said}": loop / few,
            f"forwards alone times faster, {said}": loop / alone,
        }
    return row


class Listening(nn.Module):
    """A network, and the inputs that it has been given."""

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.clone())
        found: Tensor = self.model(x)
        return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help="networks, whose rows of the results file are written anew; by default all",
    )
    parser.add_argument(
        "--data",
        help="folder with the images of MNIST and CIFAR-10; without it, random ones and digits",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    file = RESULTS / "speed-metrics.json"
    rows = json.loads(file.read_text())["rows"] if arguments.names and file.exists() else []
    rows = [row for row in rows if row["network"] not in arguments.names]
    for case, metric in product(cases(arguments.data, arguments.names), (deletion, insertion)):
        rows += measure(case, arguments.threads, metric)
        shown = [
            {key: row[key] for key in row if "wall" not in key}
            for row in rows[-len(arguments.threads) :]
        ]
        print(show(shown), time.strftime("%X"), flush=True)
        write(
            "speed-metrics", rows, baseline="0, of insertion blur", score="softmax",
            step="one row of the image",
            maps="random for random images, Input×Gradient for others",
            threads_wait=os.environ["OMP_WAIT_POLICY"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
