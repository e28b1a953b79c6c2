"""Marks of nodes: one record, one module that keeps it."""

import ast
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from torch import fx

import captum_mipin
from captum_mipin.graph.layout import Layout
from captum_mipin.graph.marks import Marks, inherit, mark, marks, original, set_value, value_of


def test_one_module_touches_meta_of_its_graphs():
    package = Path(captum_mipin.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "meta"
    }
    # of graphs in the user's model, which it only reads, and of torchvision's weights
    users -= {"copies.py", "comparison/names.py"}
    assert users == {"graph/marks.py"}


def test_marks_are_kept_changed_and_copied():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert marks(x) == Marks()
    mark(x, key="x", depends=True, layout=Layout(1))
    set_value(x, 3)
    before = marks(x)
    inherit(y, x, signal=True)
    assert marks(y) == Marks(key="x", depends=True, layout=Layout(1), signal=True)
    assert value_of(y) == 3
    mark(y, key="y")
    set_value(y, 4)
    assert marks(x) is before and value_of(x) == 3
    with pytest.raises(FrozenInstanceError):
        before.key = "z"
    with pytest.raises(TypeError, match="unknown"):
        mark(x, unknown=1)


def test_the_operation_of_the_model_is_kept_through_rewrites():
    graph = fx.Graph()
    node = graph.call_function(len, (graph.placeholder("x"),))
    assert original(node) is len
    mark(node, original=len)
    node.target = sum
    assert original(node) is len
