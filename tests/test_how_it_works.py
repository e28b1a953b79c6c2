"""The page "How it works" names files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| .*? \| `(captum_mipin/[^`]+)`: `([^`]+)` \|$", PAGE, re.MULTILINE)
FOLDERS = re.findall(r"`(captum_mipin/\w+/)`", PAGE)


@pytest.mark.parametrize(("title", "path", "name"), ROWS)
def test_each_equation_leads_to_code_that_exists(title: str, path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    definitions = {
        node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    assert name in definitions, f"{title}: {path} defines no {name}"


def test_all_equations_and_the_algorithm_are_named() -> None:
    titles = " ".join(title for title, _, _ in ROWS)
    assert all(f"eq. {number}" in titles for number in range(5, 12))
    assert "algorithm 1" in titles


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_exist(folder: str) -> None:
    assert (ROOT / folder).is_dir()
