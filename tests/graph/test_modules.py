"""Reading a model."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from captum_mipin.graph.modules import tree
from captum_mipin.graph.state import State


def test_the_tree_of_modules_is_torchs_and_keeps_none_of_them() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), shared), shared, nn.ModuleDict({"a": nn.Linear(2, 1)})
    )
    model.register_module("none", None)
    assert tree(model) == list(model.named_modules(remove_duplicate=False))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


class Rich(nn.Module):
    """A module with attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.share, self.name = 2, float("nan"), "a"
        self.sizes, self.nested = (1, 2), {"a": [1, (2.0, None)]}
        self.tensors, self.shape = [torch.ones(2)], torch.Size([1, 2])


CHANGES: dict[str, Callable[[Any], object]] = {
    "number": lambda m: setattr(m, "number", 3),
    "sign of zero": lambda m: setattr(m, "share", 0.0),
    "tuple": lambda m: setattr(m, "sizes", (1, 3)),
    "tuple of floats": lambda m: setattr(m, "sizes", (1.0, 2.0)),
    "nested list": lambda m: m.nested["a"].append(3),
    "key": lambda m: m.nested.update(b=1),
    "tensor in a list": lambda m: m.tensors[0].add_(1),
    "other tensor in a list": lambda m: m.tensors.append(torch.ones(1)),
    "shape": lambda m: setattr(m, "shape", torch.Size([1, 3])),
    "hook": lambda m: m.register_forward_hook(lambda *arguments: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_differs_after_any_change_and_only_then(change: str) -> None:
    model = Rich()
    before = State(model)
    assert before.holds() and not before.changes(State(model))
    CHANGES[change](model)
    assert not before.holds() and before.changes(State(model))
