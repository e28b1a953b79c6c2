"""Run notebooks and keep what they show: python notebooks/execute.py [NOTEBOOK ...]."""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def run(notebook: Any, folder: str | Path) -> Any:
    """Return a notebook with the outputs of its cells, run from top to bottom in a new kernel.

    What goes to stderr is dropped: progress bars, which differ from run to run.

    Args:
        notebook: As ``nbformat.read`` returns it.
        folder: Working directory of the kernel, where the notebook leaves its files.

    Raises:
        CellExecutionError: A cell raises an exception.
    """
    # pictures of 72 dots an inch, for small files; matplotlib reads this before all other settings
    Path(folder, "matplotlibrc").write_text("figure.dpi: 72\nsavefig.dpi: figure\n")
    metadata = copy.deepcopy(notebook.metadata)
    client = NotebookClient(
        notebook,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    executed = client.execute()
    executed.metadata = metadata  # the kernel has added its version of Python
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return executed


def main() -> None:
    """Run the notebooks named on the command line, by default all, and write them."""
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(nbformat.read(path, nbformat.NO_CONVERT), folder)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
