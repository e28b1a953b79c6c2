"""Modules, functions and the first page of names stay small enough to read."""

import ast
from pathlib import Path

import pytest

import captum_mipin

PACKAGE = Path(captum_mipin.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_package_itself_has_a_dozen_names_and_none_is_a_module() -> None:
    names = set(captum_mipin.__all__)
    assert len(names) <= 13
    assert not names & {path.stem for path in PACKAGE.iterdir()}
    assert all(hasattr(captum_mipin, name) for name in names)
