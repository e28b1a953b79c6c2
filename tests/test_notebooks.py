"""The notebooks run from top to bottom, and show what they were committed with."""

import base64
import json
import math
import re
import struct
import sys
from pathlib import Path

import pytest
import torch

from captum_mipin.rules import table as rules

pytest.importorskip("sklearn", reason="the digits come with it; the package does not need it")
pytest.importorskip("torchvision", reason="networks to test on; the package does not need it")
pytest.importorskip("matplotlib", reason="pictures are for those who have it")

from execute import NOTEBOOKS, code, outputs, read  # needs matplotlib

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def text(output):
    """What an output says in words."""
    return "".join(output["text"] if "text" in output else output["data"]["text/plain"])


def pictures(path):
    found = (
        output.get("data", {}).get("image/png")
        for cell in code(read(path))
        for output in cell["outputs"]
    )
    return [base64.b64decode(picture) for picture in found if picture]


def agrees(now, before):
    """The same words, and the same numbers but for rounding in training, which differs between machines."""
    words = [NUMBER.sub("#", text).split() for text in (now, before)]
    numbers = zip(
        *([float(number) for number in NUMBER.findall(text)] for text in (now, before)),
        strict=False,
    )
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=0.1, abs_tol=0.05) for a, b in numbers
    )


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder for what notebooks write, no weights at hand, and the rules as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    known = dict(rules())
    yield tmp_path
    assert rules() == known


@notebooks
def test_it_runs_and_shows_what_it_was_committed_with(path, elsewhere):
    notebook = read(path)
    for number, (cell, found) in enumerate(zip(code(notebook), outputs(notebook), strict=True), 1):
        assert cell["execution_count"] == number
        assert [output["output_type"] for output in found] == [
            output["output_type"] for output in cell["outputs"]
        ]
        for now, before in zip(found, cell["outputs"], strict=True):
            assert agrees(text(now), text(before)), (
                f"cell {number} shows\n{text(now)}\nand was committed with\n{text(before)}"
            )
            assert now.get("data", {}).keys() == before.get("data", {}).keys()


@notebooks
def test_what_is_committed_is_small_and_whole(path):
    written = path.read_text()
    assert len(written) < 200_000
    assert '"output_type": "error"' not in written
    for machine in (
        str(Path.cwd()),
        sys.prefix,
        "site-packages",
        "/home/",
        "/tmp/",
        "/root/",
        "/Users/",
    ):
        assert machine not in written
    assert (
        written == json.dumps(read(path), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )  # as Jupyter writes it
    for picture in pictures(path):
        width, height = struct.unpack(">II", picture[16:24])
        assert 100 < width < 1200
        assert 100 < height < 1000
    for target in re.findall(r"\]\((?!http)([^)]+)\)", written):
        assert (path.parent / target).exists(), target


def test_there_are_five_and_most_have_pictures():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]
    assert [len(pictures(path)) for path in NOTEBOOKS] == [2, 2, 3, 0, 1]


def test_pretrained_weights_take_the_place_of_the_small_network(elsewhere):
    """Those at hand are used; here they are random."""
    from torchvision.models import SqueezeNet1_0_Weights, squeezenet1_0

    weights = elsewhere / "hub" / "checkpoints" / Path(SqueezeNet1_0_Weights.DEFAULT.url).name
    weights.parent.mkdir(parents=True)
    torch.save(squeezenet1_0().state_dict(), weights)
    cells = code(read(NOTEBOOKS[2]))
    imports = "\n".join(
        line for cell in cells for line in cell["source"] if re.match("(from|import) ", line)
    )
    (found,) = outputs(
        {"cells": [{"cell_type": "code", "source": [imports, "\n", *cells[-1]["source"]]}]}
    )
    assert [output["output_type"] for output in found] == ["execute_result"]
    assert (
        text(found[0]) == "<Figure with 7 axes>"
    )  # two photographs by image, MIP-IN and Grad-CAM, and the legend


def test_the_first_holds_the_ten_lines_of_the_readme():
    readme = (NOTEBOOKS[0].parents[1] / "README.md").read_text()
    lines = re.search(r"## Ten lines\n\n```python\n(.*?)```", readme, re.DOTALL)[1]
    squeezed = [" ".join(line.split()) for line in lines.splitlines() if line]
    cell = [" ".join(line.split()) for line in code(read(NOTEBOOKS[0]))[0]["source"]]
    assert [line for line in cell if line in squeezed] == squeezed


def test_outputs_that_differ_are_noticed():
    assert agrees("APC 9.01\n  n 3", "APC  9.0\nn 3")
    assert not agrees("APC 9.0", "APC 19.0")
    assert not agrees("APC 9.0", "MAE 9.0")
    assert not agrees("1 2", "1 2 3")


def test_cells_show_as_jupyter_does(elsewhere):
    sources = [
        "import torch\nfrom matplotlib import pyplot as plt, figure\nprint('a')\nx = torch.rand(3)",
        "len(x) + 1",
        "plt.subplots()\nprint('b')",
        "figure.Figure()",
        "x; None",
    ]
    before = torch.get_rng_state()
    found = outputs({"cells": [{"cell_type": "code", "source": [source]} for source in sources]})
    assert torch.get_rng_state().equal(before)
    kinds = [[output["output_type"] for output in cell] for cell in found]
    assert kinds == [
        ["stream"],
        ["execute_result"],
        ["stream", "display_data"],
        ["execute_result"],
        [],
    ]
    assert [text(cell[0]) for cell in found[:3]] == ["a\n", "4", "b\n"]
    assert "image/png" not in found[1][0]["data"]
    assert all("image/png" in cell[-1]["data"] for cell in found[2:4])
