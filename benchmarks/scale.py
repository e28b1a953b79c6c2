"""What fitting costs where layers are wide and classes are many: python benchmarks/scale.py.

The dense head of VGG-19 (25088-4096-4096-1000, torchvision's random weights) on 1,000 random feature vectors, zero where
ReLU leaves zero; the cost does not depend on the values. One process a row, so that each has its own peak of memory:
seconds to fit so many classes in one call, the peak beyond model and data, and the bytes of the file a class.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import show, write
from torch import nn

from captum_mipin import InverseNetwork

IMAGES, CLASSES = 1000, (1, 10, 100)


def resident() -> float:
    """The most memory this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def measure(classes: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 1000)
    ).eval()  # fmt: skip
    x = torch.empty(IMAGES, 25088).normal_().clamp_(min=0)
    before = resident()
    start = time.perf_counter()
    inverse = InverseNetwork(model).fit(x, list(range(classes)), progress=False)
    taken = time.perf_counter() - start
    peak = resident()
    with tempfile.TemporaryDirectory() as folder:
        inverse.save(Path(folder) / "inverse")
        size = (Path(folder) / "inverse").stat().st_size
    return {"classes": classes, "s": taken, "peak GiB": peak, "beyond model and data GiB": peak - before, "file MB": size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="measure so many classes, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    for classes in CLASSES:
        command = [sys.executable, __file__, "--one", str(classes)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        print(show(rows[-1:]).splitlines()[-1], flush=True)
    write("scale", rows, network="head of VGG-19", data=f"{IMAGES} random features", threads=torch.get_num_threads())
    print(show(rows))


if __name__ == "__main__":
    main()
