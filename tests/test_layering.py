"""Subpackages depend downwards only."""

import ast
from pathlib import Path

import pytest

import captum_mipin

PACKAGE = Path(captum_mipin.__file__).parent
BOTTOM = (
    "_captum",
    "calls",
    "errors",
    "version",
    "types",
    "options",
    "targets",
    "report",
    "copies",
    "training",
)
#: From the bottom up; each room may use those before it.
TOWER = (
    "graph",
    "storage",
    "rules",
    "propagation",
    "inverse",
    "methods",
    "bottleneck",
    "attribution",
    "photographs",
    "comparison",
    "cli",
)
#: Rooms that know no networks, or other methods only by calling them, and the rooms that use them.
ASIDE = {
    "regression": ("rules", "propagation", "inverse", "methods", "bottleneck"),
    "metrics": ("comparison", "cli"),
}


def allowed(room: str) -> set[str]:
    if room in BOTTOM:
        return set(BOTTOM)
    below = TOWER[: TOWER.index(room)] if room in TOWER else ()
    return {room, *BOTTOM, *below, *(one for one, users in ASIDE.items() if room in users)}


def imports(path: Path) -> set[str]:
    """The rooms that a module imports, also inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom)), path
    names = {
        f"{node.module}.{one.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for one in node.names
    }
    names |= {one.name for node in nodes if isinstance(node, ast.Import) for one in node.names}
    return {f"{name}.".split(".")[1] for name in names if f"{name}.".startswith("captum_mipin.")}


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("import captum_mipin", ""),
        ("import captum_mipin.cli", "cli"),
        ("from captum_mipin import LRP", "LRP"),
        ("from captum_mipin.graph import marks", "graph"),
        ("def f():\n    from captum_mipin.graph.marks import mark", "graph"),
    ],
)
def test_every_form_of_import_is_seen(line: str, room: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert imports(tmp_path / "module.py") == {room}


def test_rooms_depend_downwards_only() -> None:
    upwards = set()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        room = module.split("/")[0]
        if not room.startswith("__"):
            # the command line is a user of the package, and may import what users import
            names = set(captum_mipin.__all__) if room == "cli" else set()
            upwards |= {(module, other) for other in imports(path) - allowed(room) - names}
    assert not upwards


def test_every_room_has_its_floor() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert rooms <= {*TOWER, *ASIDE}
