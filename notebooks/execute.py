"""Run notebooks from top to bottom and write what they show into them: python notebooks/execute.py [NOTEBOOK ...].

Needs no Jupyter: the cells run in this process, one after the other, and pictures are drawn as Jupyter would draw them.
"""

import ast
import base64
import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))

#: Pixels an inch of the pictures; as few as Jupyter's, for small files.
DPI = 72


def read(path: Path) -> Any:
    """A notebook, as its file has it."""
    return json.loads(path.read_text())


def code(notebook: Any) -> list[Any]:
    """Its cells with code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: Any) -> list[list[Any]]:
    """What each cell with code shows: all run in one new namespace, with random numbers that nothing else draws from."""
    plt.switch_backend("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        try:
            return [
                _shown("".join(cell["source"]), number, names)
                for number, cell in enumerate(code(notebook), 1)
            ]
        finally:
            plt.close("all")


def _shown(source: str, number: int, names: dict[str, Any]) -> list[Any]:
    """What one cell prints, the value of its last line, and the figures that it leaves open."""
    statements, place, value, printed = (
        ast.parse(source).body,
        f"<cell {number}>",
        None,
        io.StringIO(),
    )
    last = statements.pop() if statements and isinstance(statements[-1], ast.Expr) else None
    with redirect_stdout(printed):
        exec(compile(ast.Module(statements, []), place, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
    found: list[Any] = []
    if printed.getvalue():
        found.append(
            {
                "output_type": "stream",
                "name": "stdout",
                "text": printed.getvalue().splitlines(keepends=True),
            }
        )
    if value is not None:
        found.append(
            {
                "output_type": "execute_result",
                "execution_count": number,
                "metadata": {},
                "data": _data(value),
            }
        )
    found += [
        {"output_type": "display_data", "metadata": {}, "data": _data(plt.figure(open_))}
        for open_ in plt.get_fignums()
    ]
    plt.close("all")
    return found


def _data(value: Any) -> dict[str, Any]:
    if not isinstance(value, Figure):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    drawn = io.BytesIO()
    value.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return {
        "image/png": base64.b64encode(drawn.getvalue()).decode(),
        "text/plain": [f"<Figure with {len(value.axes)} axes>"],
    }


def write(path: Path) -> None:
    """Run a notebook and keep what it shows, in the form that Jupyter writes."""
    notebook = read(path)
    for number, (cell, found) in enumerate(zip(code(notebook), outputs(notebook), strict=True), 1):
        cell["outputs"], cell["execution_count"] = found, number
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def main() -> None:
    paths = [Path(name).resolve() for name in sys.argv[1:]] or NOTEBOOKS
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where notebooks leave their files
        for path in paths:
            write(path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
