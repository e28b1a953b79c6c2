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

pytest.importorskip("sklearn", reason="the digits come with it; the package does not need it")
pytest.importorskip("torchvision", reason="networks to test on; the package does not need it")
pytest.importorskip("matplotlib", reason="pictures are for those who have it")
pytest.importorskip("nbclient", reason="notebooks are run by developers")

import nbformat
from execute import FURTHER, NOTEBOOKS, client_of, missing, run
from jupyter_core.utils import run_sync

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, nbformat.NO_CONVERT)


def code(notebook):
    """The cells with code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(output):
    """What an output says in words."""
    return output.text if "text" in output else output.data["text/plain"]


def pictures(path):
    found = (
        output.get("data", {}).get("image/png")
        for cell in code(read(path))
        for output in cell.outputs
    )
    return [base64.b64decode(picture) for picture in found if picture]


def agrees(now, before):
    """Whether words are the same, and numbers but for rounding, which differs between machines."""
    words = [NUMBER.sub("#", text).split() for text in (now, before)]
    numbers = [map(float, NUMBER.findall(text)) for text in (now, before)]
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=0.1, abs_tol=0.05) for a, b in zip(*numbers, strict=False)
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel for all notebooks, which imports torch once; there are no weights at hand."""
    folder = tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        client = client_of(nbformat.v4.new_notebook(), folder)
        client.execute(cleanup_kc=False)
    yield client
    client.kc.stop_channels()
    run_sync(client.km.shutdown_kernel)(now=True)


@notebooks
def test_it_runs_and_shows_what_it_was_committed_with(path, kernel, tmp_path):
    if lacking := missing(path):
        pytest.skip(f"needs further packages: {', '.join(lacking)}")
    committed = code(read(path))
    for number, (cell, now) in enumerate(
        zip(committed, code(run(read(path), tmp_path, kernel)), strict=True), 1
    ):
        assert cell.execution_count == number
        kinds = [[output.output_type for output in c.outputs] for c in (now, cell)]
        assert kinds[0] == kinds[1]
        for found, expected in zip(now.outputs, cell.outputs, strict=True):
            assert agrees(text(found), text(expected)), (
                f"cell {number} shows\n{text(found)}\nand was committed with\n{text(expected)}"
            )
            assert found.get("data", {}).keys() == expected.get("data", {}).keys()


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
        written
        == json.dumps(json.loads(written), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )  # as Jupyter writes it
    for picture in pictures(path):
        width, height = struct.unpack(">II", picture[16:24])
        assert 100 < width < 1200
        assert 50 < height < 1000  # a line of text is short
    for target in re.findall(r"\]\((?!http)([^)]+)\)", written):
        assert (path.parent / target).exists(), target


@notebooks
def test_every_cell_was_run_from_top_to_bottom(path):
    """Also of a notebook that this environment cannot run."""
    cells = code(read(path))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)


def test_what_a_notebook_needs_further_stands_in_its_first_cell():
    assert FURTHER.keys() <= {path.stem for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        first = read(path).cells[0].source.replace("-", "_")
        assert all(name in first for name in FURTHER.get(path.stem, ())), path.name


def test_there_are_six_and_most_have_pictures():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_", "6_"]
    assert [len(pictures(path)) for path in NOTEBOOKS] == [2, 2, 3, 0, 1, 7]


def test_pretrained_weights_take_the_place_of_the_small_network(kernel, tmp_path):
    """Those at hand are used; here they are random."""
    from torchvision.models import SqueezeNet1_0_Weights, squeezenet1_0

    weights = tmp_path / "hub" / "checkpoints" / Path(SqueezeNet1_0_Weights.DEFAULT.url).name
    weights.parent.mkdir(parents=True)
    torch.save(squeezenet1_0().state_dict(), weights)
    sources = [cell.source for cell in code(read(NOTEBOOKS[2]))]
    imports = re.findall(r"^(?:from|import) .*$", "\n".join(sources), re.MULTILINE)
    imports += ["import os", "home = os.environ['TORCH_HOME']"]
    imports.append(f"os.environ['TORCH_HOME'] = {str(tmp_path)!r}")
    lines = "\n".join([*imports, sources[-1]]), "os.environ['TORCH_HOME'] = home"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(part) for part in lines])
    (output,) = code(run(notebook, tmp_path, kernel))[0].outputs
    assert output.output_type == "execute_result"
    # two photographs by image, MIP-IN and Grad-CAM, and the legend
    assert re.fullmatch(r"<Figure size [\d.]+x[\d.]+ with 7 Axes>", text(output))


def test_outputs_that_differ_are_noticed():
    assert agrees("APC 9.01\n  n 3", "APC  9.0\nn 3")
    assert not agrees("APC 9.0", "APC 19.0")
    assert not agrees("APC 9.0", "MAE 9.0")
    assert not agrees("1 2", "1 2 3")


def test_progress_is_not_kept(tmp_path):
    cell = nbformat.v4.new_code_cell("import sys\nprint('a', file=sys.stderr)\nprint('b')\n1")
    outputs = code(run(nbformat.v4.new_notebook(cells=[cell]), tmp_path))[0].outputs
    assert [text(output) for output in outputs] == ["b\n", "1"]
