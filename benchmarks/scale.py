"""The cost of a fit where layers are wide and classes are many.

    python benchmarks/scale.py [wide] [thousand --data FOLDER]

- wide: the dense head of VGG-19 (25088-4096-4096-1000, torchvision's random weights) on 1,000
  random feature vectors, zero where ReLU leaves zero; the cost does not depend on the values. Each
  row has a process of its own, and so its own peak of memory: seconds to fit some classes in one
  call, the peak beyond model and data, and the bytes of the file a class. The last row is of
  classes that are fitted when they are explained.
- thousand: all 1,000 classes of MobileNetV2 with its published weights, explained one after the
  other at a layer (--layer): the input of its last convolution, or its output. One lazy fit on
  photographs, of which each class explains some.

Times are processor times on one thread, since the machine may be busy; wall times stand beside
them.
"""

import argparse
import csv
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import parser_of, show, write
from torch import Tensor, nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution

IMAGES, CLASSES, LATE = 1000, (1, 10, 100), 10


def resident() -> float:
    """Return the most memory this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


@contextmanager
def timed(row: dict[str, Any], name: str) -> Iterator[None]:
    """Add processor and wall seconds to a row."""
    start = time.process_time(), time.perf_counter()
    yield
    row[f"{name} s"] = row.get(f"{name} s", 0.0) + time.process_time() - start[0]
    row[f"{name} wall s"] = row.get(f"{name} wall s", 0.0) + time.perf_counter() - start[1]


def head() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = (
        nn.Linear(25088, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(),
    )
    return nn.Sequential(*layers, nn.Linear(4096, 1000)).eval(), torch.empty(
        IMAGES, 25088
    ).normal_().clamp_(min=0)


def measure(classes: int) -> dict[str, Any]:
    model, x = head()
    InverseNetwork(model).fit(x[:2], 0, progress=False)  # to warm up
    before, row = resident(), dict[str, Any](classes=classes)
    with timed(row, "fit"):
        inverse = InverseNetwork(model).fit(x, list(range(classes)), progress=False)
    row["beyond model and data GiB"] = resident() - before
    with tempfile.TemporaryDirectory() as folder:
        inverse.save(Path(folder) / "inverse")
        row["file MB"] = (Path(folder) / "inverse").stat().st_size / 1e6
    return row


def measure_late() -> dict[str, Any]:
    """Measure classes of the same head, each fitted when it is explained."""
    model, x = head()
    InverseNetwork(model).fit(x[:2], 0, progress=False)  # to warm up
    before, row = resident(), dict[str, Any](classes=f"{LATE}, lazy")
    with timed(row, "look"):
        inverse = InverseNetwork(model).fit(x, progress=False, lazy=True)
    with timed(row, "first class"):
        inverse.source_signal(x[:1], 0)
    with timed(row, "further classes"):
        for target in range(1, LATE):
            inverse.source_signal(x[:1], target)
    row["beyond model and data GiB"] = resident() - before
    return row


def wide(arguments: argparse.Namespace) -> None:
    rows = []
    for classes in (*CLASSES, 0):
        command = [sys.executable, __file__, "--one", str(classes)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        print(show(rows[-1:]).splitlines()[-1], flush=True)
    write(
        "scale",
        rows,
        network="head of VGG-19",
        data=f"{IMAGES} random features",
        threads=torch.get_num_threads(),
    )
    print(show(rows))


def photographs(folder: Path, count: int) -> Tensor:
    """Return photographs of several hundred classes of ImageNet, in [0, 1], 224 x 224."""
    from localization_grid import _image

    with zipfile.ZipFile(folder / "nips17_imagenet_compatible_600.zip") as archive:
        names = archive.namelist()
        table = next(name for name in names if name.endswith("labels_and_attribution.csv"))
        rows = len(list(csv.DictReader(io.TextIOWrapper(archive.open(table), "utf-8"))))
        files = sorted(name for name in names if name.endswith(".jpg"))
        assert len(files) == rows, "one row a photograph"
        return torch.stack([_image(archive, name, 224) for name in files[:count]])


def thousand(arguments: argparse.Namespace) -> None:
    import pretrained

    model, prepare = pretrained.load("mobilenet_v2", Path(arguments.data) / "weights")
    x = prepare(photographs(Path(arguments.data), arguments.images))
    layer = model.get_submodule(arguments.layer)
    row: dict[str, Any] = {
        "network": "mobilenet_v2",
        "layer": arguments.layer,
        "fit images": len(x),
        "classes": arguments.classes,
    }
    before, explained = resident(), x[: arguments.explained]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        with timed(row, "look"):
            inverse = InverseNetwork(model, layer=layer).fit(
                x, range(arguments.classes), batch_size=50, progress=False, lazy=True, keep=kept
            )
        row["kept MB"] = sum(path.stat().st_size for path in kept.iterdir()) / 1e6
        method = LayerMIPINAttribution(model, inverse)
        finite, target = True, 0
        for target in range(arguments.classes):
            with timed(row, "fit and explain"):
                finite &= bool(torch.isfinite(method.attribute(explained, target)).all())
            if target % 50 == 49:
                print(f"{target + 1} classes: {row['fit and explain s']:.0f} s", flush=True)
        with timed(row, "explain again"):
            method.attribute(explained, target)
    assert finite, "an attribution that is not finite"
    row |= {"explained by each": len(explained), "beyond model and data GiB": resident() - before}
    fitted = [layer for layer in inverse.report.layers if layer.target == target]
    row["R² of the last class"] = {layer.layer: layer.explained_variance for layer in fitted}
    inverses = inverse._classes(inverse._fitted(), [(target,)])[target,]
    row["inverse MB a class"] = (
        sum(part.nbytes for i in inverses.values() for part in vars(i).values() if part is not None)
        / 1e6
    )
    write(f"scale-mobilenet_v2-{arguments.layer}", [row], threads=torch.get_num_threads())
    print(show([row]))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("parts", nargs="*", default=[], help="wide, thousand; default: wide")
    parser.add_argument(
        "--one", type=int, help="measure so many classes, in this process; 0 for those fitted late"
    )
    parser.add_argument("--data", help="folder with the photographs and weights")
    parser.add_argument("--images", type=int, default=200, help="photographs to fit on")
    parser.add_argument(
        "--explained", type=int, default=10, help="photographs explained by each class"
    )
    parser.add_argument("--layer", default="features.17", help="where the inverse stops")
    parser.add_argument("--classes", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one) if arguments.one else measure_late()))
        return
    for name, part in (("wide", wide), ("thousand", thousand)):
        if name in (arguments.parts or ["wide"]):
            part(arguments)


if __name__ == "__main__":
    main()
