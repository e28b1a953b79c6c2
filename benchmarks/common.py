"""Places of results, and how tables and environments are written down."""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import captum_mipin

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def pages() -> list[Path]:
    """Return the paths of all pages of text: those at the top, README.md among them, and docs/."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the command line that shows the docstring of a module as it is."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def write(name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> Path:
    """Write ``results/<name>.json``: the environment, the settings and one dictionary a row."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    environment = {
        "captum_mipin": captum_mipin.__version__,
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    contents = {"environment": environment, "settings": settings, "rows": list(rows)}
    written = path.with_suffix(".part")
    written.write_text(json.dumps(contents, indent=1) + "\n")
    return written.replace(path)  # at once: another process may read the old file until then


def read(name: str) -> Any:
    """Return the contents of ``results/<name>.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table, one column a key."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        header,
        ["---"] * len(header),
        *[[_cell(row.get(key, "")) for key in header] for row in rows],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
