"""Cost of ``check`` beside the cost of ``torch.export.export`` alone, in the same process.

    python benchmarks/speed_capture.py [NAMES]
    python benchmarks/speed_capture.py fresh

Both take the same model, with random weights, and the same inputs with a dynamic batch. Seconds
are of processor time on one thread, medians of three rounds in turn. ``fresh`` measures LRP by the
first object of a model, by fresh objects of the same model, and by one object again.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from common import parser_of, write
from torch import Tensor, nn
from torch.export import Dim, export
from torchvision import models

from captum_mipin import check
from captum_mipin.methods import LRP

ROUNDS = 3
NAMES = (
    "resnet50", "mobilenet_v3_large", "densenet121", "vit_b_16", "swin_t", "maxvit_t", "lstm-20",
    "lstm-80", "lstm-500",
)  # fmt: skip


class Recurrent(nn.Module):
    """A classifier of sequences: an LSTM and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in evaluation mode and a batch of three inputs.

    Args:
        name: A network of torchvision, or "lstm-" and the number of steps.
    """
    torch.manual_seed(0)
    kind, _, steps = name.partition("-")
    if kind == "lstm":
        return Recurrent().eval(), torch.randn(3, int(steps), 8)
    return models.get_model(name, weights=None).eval(), torch.randn(3, 3, 224, 224)


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(name: str) -> dict[str, str | float]:
    """Return one row: a network, and the seconds of its export and of ``check``."""
    model, x = network(name)
    sizes = ({0: Dim.DYNAMIC},)
    exports, checks = [], []
    for _ in range(ROUNDS):
        exports.append(seconds(lambda: export(model, (x,), dynamic_shapes=sizes, strict=False)))
        checks.append(seconds(partial(check, copy.deepcopy(model), x)))  # a copy has no graphs yet
    one, other = statistics.median(exports), statistics.median(checks)
    shape = "x".join(map(str, x.shape))
    return {"network": name, "input": shape, "export s": one, "check s": other}


def fresh(name: str) -> dict[str, str | float]:
    """Return one row: the seconds of maps by the first, a fresh and the same object of LRP."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    model = (small if name == "mlp" else models.get_model(name, weights=None)).eval()
    x = torch.randn(4, 10) if name == "mlp" else torch.randn(2, 3, 64, 64)
    LRP(copy.deepcopy(model)).attribute(x, target=1)  # to warm up
    first = seconds(lambda: LRP(model).attribute(x, target=1))
    others = [seconds(lambda: LRP(model).attribute(x, target=1)) for _ in range(9)]
    same = LRP(model)
    again = [seconds(lambda: same.attribute(x, target=1)) for _ in range(10)]
    return {
        "network": name,
        "input": "x".join(map(str, x.shape)),
        "first s": first,
        "fresh s": statistics.median(others),
        "same s": statistics.median(again),
    }


def main() -> None:
    """Measure all networks and write the results."""
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    names = parser.parse_args().names
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch.export, on recurrent layers
    if names == ["fresh"]:
        rows = [fresh(name) for name in ("mlp", "resnet18")]
        write("speed-fresh", rows)
    else:
        rows = [measure(name) for name in names]
    for row in rows:
        print(row, flush=True)
    if tuple(names) == NAMES:
        write("speed-capture", rows, rounds=ROUNDS)


if __name__ == "__main__":
    main()
