"""A layer that is called for each slice of a tensor is explained like one call of the layer."""

from itertools import product

import pytest
import torch
from every_method import alike
from small import Function, normal
from torch import nn

from captum_mipin import InverseNetwork
from captum_mipin.methods import (
    Deconvnet,
    DeepTaylor,
    GuidedBackprop,
    PatternAttribution,
    Patterns,
)

X = normal(60, 4, 3, dtype=torch.float64)


def backwards(m, x):
    found = [m["a"](x[:, at]) for at in reversed(range(4))]
    return torch.stack(found[::-1], 1)


#: h = a(x) in other words.
SLICES = {
    "index": lambda m, x: torch.stack([m["a"](x[:, at]) for at in range(4)], 1),
    "unbind": lambda m, x: torch.stack([m["a"](part) for part in x.unbind(1)], 1),
    "sequence first": lambda m, x: torch.stack([m["a"](part) for part in x.transpose(0, 1)], 1),
    "chunk": lambda m, x: torch.cat([m["a"](part) for part in x.chunk(4, 1)], 1),
    "unequal parts": lambda m, x: torch.cat([m["a"](x[:, :3]), m["a"](x[:, 3:])], 1),
    "backwards": backwards,
}


@pytest.mark.parametrize("name", SLICES)
def test_a_dense_layer_of_each_slice_is_one_layer(name):
    torch.manual_seed(0)
    modules = {"a": nn.Linear(3, 5), "last": nn.Linear(20, 2)}
    runs = [
        lambda m, x, way=way: m["last"](way(m, x).relu().flatten(1))
        for way in (lambda m, x: m["a"](x), SLICES[name])
    ]
    alike(runs, X, **modules)


def test_slices_that_are_not_the_whole_tensor_have_layers_of_their_own():
    torch.manual_seed(0)
    some = Function(
        lambda m, x: m["last"](torch.cat([m["a"](x[:, at]) for at in (0, 2)], 1).relu()),
        a=nn.Linear(3, 5), last=nn.Linear(10, 2),
    ).double().eval()  # fmt: skip
    features = Function(
        lambda m, x: m["last"](torch.cat([m["a"](x[..., :1]), m["a"](x[..., 1:2])], 1).flatten(1)),
        a=nn.Linear(1, 5), last=nn.Linear(40, 2),
    ).double().eval()  # fmt: skip
    for model, x in ((some, X), (features, X[..., :2])):
        report = InverseNetwork(model).fit(x, 0, progress=False).report
        assert len([one for one in report.layers if "a/linear" in one.layer]) == 2


def pattern_attribution(model):
    return PatternAttribution(model, Patterns(model, estimator="linear").fit(X, progress=False))


CELLS = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}


def whole(m, x, cell):
    return m["last"](m["layer"](x)[0][:, -1])


def without_state(m, x, cell):
    state = None
    for at in range(x.shape[1]):
        state = cell(x[:, at], state)
    return m["last"](state[0] if isinstance(state, tuple) else state)


def from_zeros(m, x, cell):
    h = c = x.new_zeros(len(x), 5)
    for part in x.unbind(1):
        if isinstance(cell, nn.LSTMCell):
            h, c = cell(part, (h, c))
        else:
            h = cell(part, h)
    return m["last"](h)


def outputs_of_all_steps(m, x, cell):
    state, found = None, []
    for part in x.transpose(0, 1):
        state = cell(part, state)
        found.append(state[0] if isinstance(state, tuple) else state)
    return m["last"](torch.stack(found, 1)[:, -1])


LOOPS = without_state, from_zeros, outputs_of_all_steps
#: Every cell and every loop; other pairs of them for runs with ``-m full``.
CELLS_IN_LOOPS = [
    pair if pair in zip(CELLS, LOOPS, strict=True)
    else pytest.param(*pair, marks=pytest.mark.full)
    for pair in product(CELLS, LOOPS)
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.DataWarning")
@pytest.mark.parametrize(("kind", "loop"), CELLS_IN_LOOPS)
def test_a_loop_over_cells_is_the_recurrent_layer(kind, loop):
    """The cell has the weights of the layer, as the same objects."""
    torch.manual_seed(0)
    layer, cell = kind(3, 5, batch_first=True), CELLS[kind](3, 5)
    for name, weight in list(layer.named_parameters()):
        setattr(cell, name.removesuffix("_l0"), weight)
    modules = {"layer": layer, "cell": cell, "last": nn.Linear(5, 2)}
    nn.init.ones_(modules["last"].bias)  # so that all logits are positive in some examples
    runs = [lambda m, x, way=way: way(m, x, m["cell"]) for way in (whole, loop)]
    alike(runs, X, **modules)
    for method in (DeepTaylor, GuidedBackprop, Deconvnet, pattern_attribution):
        a, b = (method(Function(run, **modules).double().eval()).attribute(X, 1) for run in runs)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(a.abs().max()))
        assert a.any()
