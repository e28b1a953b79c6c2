"""Exported graphs made functional node by node: same values, no writes, else a second trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.nn import functional as F

from captum_mipin.errors import CaptureError
from captum_mipin.graph import exporting
from captum_mipin.graph.capture import capture
from captum_mipin.graph.functional import NotRewritableError, functional
from captum_mipin.graph.nodes import operation


class Model(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exported(function: Callable[[Tensor], Tensor], x: Tensor) -> fx.Graph:
    model = Model(function).eval()
    return export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False).graph


def run(graph: fx.Graph, x: Tensor) -> Any:
    (value,) = fx.GraphModule(nn.Module(), graph)(x)
    return value


def chain(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(x).relu_()
    return y + y.mul_(3)  # both terms are the tensor after the product


def slices(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:4][:, 0] = x[:, 0]
    y[:, 2:].mul_(5)
    y[:, :1].fill_(7.0)
    return y * x


def whole(x: Tensor) -> Tensor:
    y = x + 1
    y.view(-1)  # a view that nobody reads later
    y.clamp_(min=0)
    return y


def shared(x: Tensor) -> Tensor:
    y = x + 1
    view = y.view(-1)
    y.relu_()
    return view.sum() + y  # the view shows what was written


def transposed(x: Tensor) -> Tensor:
    y = x + 1
    y.t().mul_(2)
    return y


def an_input(x: Tensor) -> Tensor:
    return x.relu_()


def an_input_through_a_view(x: Tensor) -> Tensor:
    return torch.relu_(x.flatten(1)) + 1


def an_input_through_dropout(x: Tensor) -> Tensor:
    return torch.relu_(F.dropout(x, 0.5, False))


def a_slice_of_a_slice(x: Tensor) -> Tensor:
    h = (x * 2).unflatten(1, (5, 1)).expand(-1, 5, 3).clone()
    part = h[:, 0]
    part[:, 1:3].mul_(3)
    return torch.cat([part, h[:, 1]], 1)


def a_composite(x: Tensor) -> Tensor:
    return (x * 2).clip_(0)


def a_power(x: Tensor) -> Tensor:
    y = x + 1
    y **= 2  # pow_.Scalar writes to a tensor, pow.Scalar is a number to the power of a tensor
    return y


def alpha(x: Tensor) -> Tensor:
    return torch.atleast_2d(F.alpha_dropout(x, 0.5, False))


def smaller(x: Tensor) -> Tensor:
    return (x > 0).float().add_(x.double())


def equal_parts(x: Tensor) -> Tensor:
    """Multiply the results of two equal operations, all three made of parts."""
    a, b = (torch.einsum("bi,io->bo", x, torch.ones(5, 3) * n) for n in (2, 3))
    return torch.einsum("bo,bo->b", a, b)


@pytest.mark.parametrize("function", [chain, slices, whole])
def test_writes_become_values(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 5)
    before = exported(function, x)
    names = [str(node) for node in before.nodes]
    after = functional(before, {})
    assert not any(
        str(node.target).split(".")[-2].endswith("_")
        for node in after.nodes
        if node.op == "call_function" and "aten" in str(node.target)
    )
    y = torch.randn(7, 5)
    assert torch.equal(run(after, y.clone()), function(y.clone()))
    assert [str(node) for node in before.nodes] == names, "the exported graph stays as it is"


@pytest.mark.parametrize(
    "function",
    [
        shared,
        transposed,
        an_input,
        an_input_through_a_view,
        an_input_through_dropout,
        smaller,
        a_slice_of_a_slice,
        a_composite,
        a_power,
        alpha,
    ],
)
def test_what_is_in_doubt_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotRewritableError):
        functional(exported(function, torch.randn(3, 5)), {})


@pytest.mark.parametrize(
    "function",
    [
        chain,
        slices,
        whole,
        shared,
        transposed,
        smaller,
        a_slice_of_a_slice,
        a_composite,
        a_power,
        alpha,
        equal_parts,
    ],
)
def test_captured_graphs_have_the_values_of_the_model(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5)
    model = Model(function).eval()
    graph = capture(model, (x,))
    assert not any(
        node.target._schema.is_mutable
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    assert torch.equal(run(graph.graph, x.clone()), function(x.clone()))


@pytest.mark.parametrize("function", [an_input, an_input_through_a_view, an_input_through_dropout])
def test_a_model_that_writes_to_its_input_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    if function is an_input_through_dropout and torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 takes the result of dropout for a copy of its argument")
    with pytest.raises(CaptureError, match="the model writes to"):
        capture(Model(function).eval(), (torch.randn(4, 5),))


@pytest.mark.parametrize("view", [lambda n: n.view(-1), lambda n: n.detach(), lambda n: n[1:]])
def test_a_model_that_writes_to_a_buffer_is_refused(view: Callable[[Tensor], Tensor]) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.n
            view(self.n).add_(1)
            return y

    with pytest.raises(CaptureError, match="the model writes to"):
        capture(Counts().eval(), (torch.randn(4, 5),))


class Net(nn.Module):
    """All that is rewritten: batch norm, activations in place, dropout, einsum, swapaxes, LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lstm = nn.BatchNorm1d(6), nn.LSTM(4, 6, batch_first=True)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(x)[0].swapaxes(1, 2)
        h = F.hardswish(self.norm(h), inplace=True)
        h = F.dropout(torch.einsum("nct,dc->ndt", h, self.last.weight), 0.5, False)
        return h.mean(2)


def test_both_ways_give_the_same_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().eval(), torch.randn(3, 5, 4)
    here = capture(model, (x,))

    def in_doubt(*arguments: Any) -> fx.Graph:
        raise NotRewritableError

    monkeypatch.setattr(exporting, "functional", in_doubt)
    there = capture(model, (x,))

    def named(graph: fx.Graph) -> list[str]:
        shapes = (
            "view",
            "_unsafe_view",
            "reshape",
            "clone",
            "contiguous",
            "chunk",
            "split",
            "getitem",
            "sym_size",
        )
        names = [operation(node) for node in graph.nodes if node.op == "call_function"]
        return [name for name in names if name not in shapes]

    assert "lstm" not in named(here.graph)
    assert sorted(named(here.graph)) == sorted(named(there.graph))
    values = here.values(model, (x,), ())
    order = [values[node.name] for node in here.graph.nodes if node.op == "placeholder"]
    (value,) = fx.GraphModule(nn.Module(), here.graph)(*order)
    torch.testing.assert_close(value, model(x))


def test_dropout_at_work_stays_in_the_graph() -> None:
    graph = capture(Model(lambda x: F.dropout(x, 0.5, True)).eval(), (torch.randn(3, 5),))
    names = {operation(node) for node in graph.graph.nodes}
    assert names & {"dropout", "native_dropout", "bernoulli", "rand_like"}
