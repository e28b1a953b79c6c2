"""Reading a model."""

import gc
import weakref

from torch import nn

from captum_mipin.graph.modules import tree


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
