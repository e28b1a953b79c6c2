"""Recurrent layers in an export: three steps are traced, and stand for all others."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from designs import aside
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from captum_mipin.graph import exporting, recurrence
from captum_mipin.graph.capture import CapturedGraph, trace
from captum_mipin.graph.marks import module_stack, value_of
from captum_mipin.methods import GuidedBackprop

#: Name → a recurrent layer, and whether the model gives it its first state.
LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "LSTM": (lambda: nn.LSTM(4, 3), False),
    "LSTM, batch first, with state": (lambda: nn.LSTM(4, 3, batch_first=True), True),
    "LSTM, two layers both ways": (lambda: nn.LSTM(4, 3, 2, bidirectional=True), False),
    "LSTM, projected": (lambda: nn.LSTM(4, 3, 2, proj_size=2, dropout=0.5), True),
    "LSTM, projected without bias": (lambda: nn.LSTM(4, 3, proj_size=2, bias=False), False),
    "GRU": (lambda: nn.GRU(4, 3, batch_first=True), False),
    "GRU, without bias, with state": (lambda: nn.GRU(4, 3, 2, bias=False), True),
    "GRU, three layers": (lambda: nn.GRU(4, 3, 3, batch_first=True), False),
    "RNN, with state": (lambda: nn.RNN(4, 3), True),
    "RNN, relu, both ways": (
        lambda: nn.RNN(4, 3, nonlinearity="relu", bidirectional=True), False
    ),
}  # fmt: skip


class Net(nn.Module):
    """A recurrent layer; the output is made of all its results."""

    def __init__(self, layer: nn.Module, given: bool = False) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        sequence = x if layer.batch_first else x.transpose(0, 1)
        state = None
        if self.given:
            count = layer.num_layers * (1 + layer.bidirectional)
            state = x.mean(1)[:, : layer.hidden_size].expand(count, -1, -1).contiguous()
            if isinstance(layer, nn.LSTM):
                narrow = state[..., : layer.proj_size or layer.hidden_size]
                state = (narrow.contiguous(), state.tanh())
        y, end = layer(sequence, state)
        y = y if layer.batch_first else y.transpose(0, 1)
        h, c = end if isinstance(layer, nn.LSTM) else (end, end)
        return y.flatten(1).sum(1, True) + h.sum((0, 2))[:, None] * 2 + c.sum((0, 2))[:, None] * 3


def captured(model: nn.Module, x: Tensor) -> CapturedGraph:
    return trace(model, (x,), (), False, output=None, detached=False)


def written(graph: CapturedGraph) -> list[tuple[str, ...]]:
    """Return all that a graph says of each node, in order."""
    return [
        (n.name, str(n.target), str(n.args), str(n.kwargs), str(module_stack(n)),
         str(getattr(value_of(n), "shape", value_of(n))), str(getattr(value_of(n), "dtype", "")))
        for n in graph.graph.nodes
    ]  # fmt: skip


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Watch how long the sequences are that recurrent layers are traced with."""
    known, seen = exporting.decompositions(), list[int]()

    def watched(how: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *arguments: Any) -> Any:
            seen.append(x.shape[int(arguments[-1])])
            return how(x, *arguments)

        return run

    own = {op: watched(known[op]) for op in recurrence.WHOLE}
    monkeypatch.setattr(exporting, "decompositions", lambda: {**known, **own})
    yield seen


@pytest.mark.parametrize(
    "name",
    aside(
        LAYERS,
        "LSTM",
        "LSTM, projected",
        "LSTM, projected without bias",
        "GRU",
        "GRU, three layers",
        "RNN, with state",
    ),
)
def test_repeated_steps_are_those_that_torch_traces(
    name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, given = LAYERS[name]
    model, x = Net(make(), given).double().eval(), torch.randn(3, 5, 4).double()
    here = captured(model, x)
    assert lengths == [3]
    torch.testing.assert_close(here.run(here.values(model, (x,), ())), model(x).detach())
    monkeypatch.setattr(recurrence, "_short", lambda node: None)
    there = captured(model, x)
    assert lengths == [3, 5]
    assert written(here) == written(there)


def test_two_layers_with_the_same_weights_and_a_sequence_of_three() -> None:
    layer = nn.GRU(4, 4, batch_first=True)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.layer(x)
            result: Tensor = self.layer(y[:, 1:4], h)[0].mean(1)
            return result

    model, x = Twice().double().eval(), torch.randn(2, 7, 4).double()
    graph = captured(model, x)
    torch.testing.assert_close(graph.run(graph.values(model, (x,), ())), model(x).detach())


def loop(change: int) -> fx.Graph:
    """Return the graph of three steps, of which one is unlike the others if ``change`` is not 0."""

    def run(x: Tensor, h: Tensor) -> Tensor:
        results = []
        for at, entry in enumerate(x.unbind()):
            h = torch.tanh(h) + entry if at != 2 or change != 1 else torch.sigmoid(h) + entry
            results.append(h.unsqueeze(0))
        if change == 2:
            results[0], results[1] = results[1], results[0]
        y = torch.cat(results)
        return y + results[0] if change == 3 else y

    return make_fx(run, tracing_mode="fake")(torch.ones(3, 2), torch.ones(2)).graph


@pytest.mark.parametrize("change", range(4))
def test_steps_that_are_not_alike_are_not_repeated(change: int) -> None:
    graph = loop(change)
    values = [value_of(n) for n in graph.find_nodes(op="placeholder")]
    with values[0].fake_mode:
        longer = recurrence._lengthened(graph, [values[0].new_empty(9, 2), values[1]])
    assert (longer is None) == (change > 0)
    if longer is not None:
        x, h, results = torch.randn(9, 2), torch.randn(2), []
        y = fx.GraphModule(nn.Module(), longer)(x, h)
        for entry in x:
            h = torch.tanh(h) + entry
            results.append(h)
        assert torch.equal(y, torch.stack(results))


@pytest.mark.captured_anew
def test_a_sequence_of_five_hundred_entries(lengths: list[int]) -> None:
    """Without ReLU, Guided Backprop is the gradient, which torch computes by other kernels."""
    model, x = Net(nn.LSTM(4, 3, batch_first=True)).double().eval(), torch.randn(2, 500, 4).double()
    found = GuidedBackprop(model).attribute(x, target=0)
    assert lengths == [3]
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(found, expected)
