"""From a model to its graph."""

import ctypes
import gc
import weakref
from itertools import cycle
from typing import Any

import pytest
import torch
from every_method import alike
from small import Function, Wants
from torch import Tensor, nn

from captum_mipin import LRP, check
from captum_mipin.errors import CaptureError, UnsupportedOperationError
from captum_mipin.graph.capture import capture
from captum_mipin.methods import GuidedBackprop


def _values(model: nn.Module, inputs: tuple[Tensor, ...], extras: tuple[Any, ...] = ()) -> Tensor:
    """The captured graph's own output, run operation by operation."""
    captured = capture(model, inputs, extras)
    values = captured.values(model, inputs, extras)
    module = torch.fx.GraphModule(nn.Module(), captured.graph)
    (output,) = module.forward(
        *(values.get(node.name) for node in captured.graph.nodes if node.op == "placeholder")
    )
    return output


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("extras", ["none", "number", "per example", "shared"])
def test_the_graph_computes_what_the_model_does(batch: int, extras: str) -> None:
    model = Wants().eval()
    a, b = torch.randn(batch, 4), torch.randn(batch, 3)
    further: tuple[Any, ...] = {
        "none": (),
        "number": (None, None, 0.5),
        "per example": (torch.rand(batch, 5),),
        "shared": (None, torch.rand(5), 2),
    }[extras]
    assert torch.allclose(_values(model, (a, b), further), model(a, b, *further), atol=1e-6)


@pytest.mark.parametrize("batch", [4, 5, 6])
def test_a_shared_tensor_as_long_as_the_batch_is_still_shared(batch: int) -> None:
    model = Wants().eval()
    a, b, shared = torch.randn(batch, 4), torch.randn(batch, 3), torch.rand(5)
    captured = capture(model, (a, b), (None, shared), shared=True)
    module = torch.fx.GraphModule(nn.Module(), captured.graph)
    values = captured.values(model, (a, b), (None, shared))
    (output,) = module.forward(
        *(values[node.name] for node in captured.graph.nodes if node.op == "placeholder")
    )
    assert torch.allclose(output, model(a, b, None, shared), atol=1e-6)


def test_a_graph_captured_from_one_example_takes_any_batch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)).eval()
    captured = capture(model, (torch.randn(1, 1, 5, 5),))
    module = torch.fx.GraphModule(nn.Module(), captured.graph)
    for batch in (1, 2, 9):
        x = torch.randn(batch, 1, 5, 5)
        values = captured.values(model, (x,), ())
        (output,) = module.forward(
            *(values[node.name] for node in captured.graph.nodes if node.op == "placeholder")
        )
        assert torch.allclose(output, model(x), atol=1e-6)


def test_weights_are_read_as_they_are_at_each_call() -> None:
    model = nn.Linear(2, 2).eval()
    captured = capture(model, (torch.ones(1, 2),))
    shared = [source for source in captured.constants.values() if isinstance(source, str)]
    assert sorted(shared) == ["bias", "weight"]
    values = captured.values(model, (torch.ones(1, 2),), ())
    assert any(
        isinstance(v, Tensor) and v.data_ptr() == model.weight.data_ptr() for v in values.values()
    )


class _Pairs(nn.Module):
    """Products of all pairs of features; ``choose`` takes those of the upper triangle."""

    def __init__(self, choose: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.choose, self.last = nn.Linear(5, 4), choose, nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        y: Tensor = self.last(self.choose(h[:, :, None] * h[:, None], torch.ones(4, 4).triu()))
        return y


@pytest.mark.parametrize(
    "choose",
    [
        lambda y, mask: y[:, mask.bool()],
        lambda y, mask: y.flatten(1).index_select(1, mask.flatten().nonzero().squeeze(1)),
        lambda y, mask: y.flatten(1).gather(1, mask.flatten().nonzero().T.expand(y.shape[0], -1)),
    ],
    ids=["mask", "index_select", "gather"],
)
def test_the_count_of_a_constant_mask_is_a_size(choose: Any) -> None:
    rows, columns = torch.triu_indices(4, 4)
    expected = _Pairs(lambda y, mask: y[:, rows, columns]).eval()
    model, x = _Pairs(choose).eval(), torch.randn(3, 5)
    torch.testing.assert_close(_values(model, (x,)), model(x))
    for method in (LRP, GuidedBackprop):
        torch.testing.assert_close(
            method(model).attribute(x, target=1), method(expected).attribute(x, target=1)
        )


def test_an_index_of_rows_may_be_spelled_index_select() -> None:
    """The last token of each example, by one index of all tokens."""
    runs = [
        lambda m, x: m["last"](m["p"](x)[:, -1]),
        lambda m, x: m["last"](m["p"](x).flatten(0, 1)[torch.arange(len(x)) * 3 + 2]),
        lambda m, x: m["last"](
            m["p"](x).flatten(0, 1).index_select(0, torch.arange(len(x)) * 3 + 2)
        ),
        lambda m, x: m["last"](m["p"](x).index_select(-2, torch.tensor([2])).squeeze(1)),
    ]
    torch.manual_seed(0)
    parts = {"p": nn.Linear(4, 5), "last": nn.Linear(5, 2)}
    alike(runs, torch.randn(20, 3, 4, dtype=torch.float64), more=True, **parts)
    rows = check(Function(runs[2], **parts).double().eval(), torch.randn(3, 3, 4).double()).rows
    assert "aten.index_select.default" in [row.operation for row in rows]


def test_a_mask_that_depends_on_the_input_is_refused_by_its_operation() -> None:
    model = _Pairs(lambda y, mask: y.flatten(1)[:, :10] + y[y > 1].sum()).eval()
    with pytest.raises(UnsupportedOperationError, match=r"aten\.index\.Tensor in the model itself"):
        LRP(model).attribute(torch.randn(3, 5), target=1)


def test_the_last_token_by_a_mask_of_the_input_is_refused_by_its_operation() -> None:
    """As in BART, which reads the score where a text ends."""
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def run(layers: Any, tokens: Tensor) -> Tensor:
        h = layers["embedding"](tokens)
        chosen = h[tokens.eq(2), :].view(h.shape[0], -1, h.shape[-1])
        scores: Tensor = layers["head"](chosen[:, -1])
        return scores

    model = Function(run, embedding=embedding, head=head).eval()
    tokens = torch.tensor([[3, 4, 2], [5, 6, 2]])
    with pytest.raises(UnsupportedOperationError, match=r"depends on the values of the input"):
        check(model, tokens, layer=embedding)


@pytest.mark.captured_anew
def test_equal_tuples_that_the_export_writes_are_no_change() -> None:
    """Else each convolutional network would be called once more, to see what it writes."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=(1, 2)), nn.AdaptiveAvgPool2d((1, 1))).eval()
    assert not capture(model, (torch.randn(2, 1, 6, 6),)).writes


def _flipped(h: Tensor) -> Tensor:
    return h.view(-1, 2, 4).flip(1).reshape(-1, 4)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m["b"](_flipped(m["a"](x)) if x.shape[0] % 2 == 0 else m["a"](x)),
        lambda m, x: m["b"](_flipped(m["a"](x)) if len(x) % 2 == 0 else m["a"](x)),
        lambda m, x: m["a"](x) if x.shape[0] > 1 else m["b"](x),
    ],
    ids=["even", "even length", "one example"],
)
@pytest.mark.captured_anew
def test_what_depends_on_the_batch_size_is_refused(run: Any) -> None:
    model = Function(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    with pytest.raises(CaptureError, match="depend on the other examples of its batch or on their"):
        capture(model, (torch.randn(3, 4),))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m["b"](m["a"](x) + 0 if x.shape[0] % 2 == 0 else m["a"](x)),
        lambda m, x: m["b"](m["a"](x).squeeze(0) if x.shape[0] == 1 else m["a"](x)).view(-1, 4),
    ],
    ids=["even", "one example"],
)
def test_a_branch_on_the_batch_size_may_compute_the_same(run: Any) -> None:
    model = Function(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    for count in (1, 3, 4):
        x = torch.randn(count, 4)
        torch.testing.assert_close(_values(model, (x,)), model(x))


class _Odd(nn.Module):
    """Models that cannot be captured, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if self.kind == "branch":
            return y if x.sum() > 0 else -y
        if self.kind == "buffer":
            self.calls += 1
        if self.kind == "input":
            x.mul_(2)
        return {
            "pair": (y, y),
            "one-tuple": (y,),
            "dict": {"logits": y},
            "nothing": None,
            "number": 1.0,
            "buffer": y * self.calls,
        }.get(self.kind, y)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "branch",
            r"(?s)torch\.export cannot capture _Odd for inputs \(4, 3\) torch\.float32 on cpu.*"
            "depends on the values of a tensor",
        ),
        ("buffer", r"writes to 'calls' while it runs"),
        ("input", r"writes to 'x' while it runs"),
        ("pair", r"returns a tuple, expected one tensor.*rap the model"),
        ("one-tuple", r"expected one tensor.*rap the model"),
        ("dict", r"expected one tensor.*rap the model"),
        ("nothing", r"expected one tensor"),
        ("number", r"expected one tensor"),
    ],
)
def test_models_that_cannot_be_captured_are_refused_with_a_reason(
    untouched: Any, kind: str, message: str
) -> None:
    model, x = _Odd(kind).eval(), torch.randn(4, 3)
    with pytest.raises(CaptureError, match=message), untouched(model, x):
        capture(model, (x,))


class Hides(nn.Module):
    """Holds modules and a tensor in plain containers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.known, self.hidden, self.unused = (
            [self.last],
            {"a": [nn.Linear(4, 4)]},
            [nn.Linear(4, 4)],
        )
        self.factors = [torch.ones(2000)]
        self.uses = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden["a"][0](x) if self.uses else x
        return self.known[0](x) * self.factors[0][1000:1002]


def test_weights_that_nobody_would_see_change_are_refused() -> None:
    model = Hides().eval()
    capture(model, (torch.ones(2, 4),))
    model.uses = True
    with pytest.raises(
        CaptureError, match=r"a Linear in 'hidden' that is not registered.* nn.ModuleList"
    ):
        capture(nn.Sequential(model).eval()[0], (torch.ones(2, 4),))
    with pytest.raises(CaptureError, match=r"'0.hidden'"):
        capture(nn.Sequential(model).eval(), (torch.ones(2, 4),))


def test_a_tensor_in_a_list_that_changes_has_the_model_captured_again() -> None:
    model, x = Hides().eval(), torch.randn(20, 4)
    lrp = LRP(model)
    before = lrp.attribute(x, 0)
    model.factors[0][1000] = -3
    torch.testing.assert_close(lrp.attribute(x, 0), -3 * before)


def test_weights_are_the_models_own_memory_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    values = capture(model, (torch.ones(1, 2),)).weights(model)
    found = {value.data_ptr() for value in values.values()}
    assert (
        {p.data_ptr() for p in model.parameters()}
        <= found
        <= {t.data_ptr() for t in model.state_dict().values()}
    )
    assert not any(value.requires_grad for value in values.values())


@pytest.mark.captured_anew
def test_a_graph_does_not_keep_its_model_alive():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    check(model, torch.randn(2, 4))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


class Activated(nn.Module):
    """A model whose code reads an attribute that Captum writes to modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(4, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        CALLS[type(x) is Tensor] += 1
        return self.activation(self.layer(x))


CALLS = (ctypes.c_int * 2)()  # with traced values, with numbers; a list would be restored


@pytest.mark.captured_anew
def test_a_capture_calls_the_model_once_with_numbers() -> None:
    CALLS[:] = 0, 0
    capture(Activated().eval(), (torch.rand(3, 4),))
    assert list(CALLS) == [1, 1]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_numbers_that_come_in_turn_are_told(count: int, fixed: bool) -> None:
    turns = cycle(range(count))

    def forward(_: Any, x: Tensor) -> Tensor:
        x = x.reshape(1, 4).reshape(-1, 4) if fixed else x
        return x * next(turns)

    with pytest.raises(CaptureError, match=r"takes the next value of the iterator 'turns' \(cycle"):
        capture(Function(forward).eval(), (torch.rand(1, 4),))
    assert next(turns) == 0


def test_a_capture_restores_what_it_switches_off() -> None:
    seen, before = (ctypes.c_int * 1)(), vars(torch.fx.config).copy()

    def forward(_: Any, x: Tensor) -> Tensor:
        seen[0] |= gc.isenabled()
        return x * 2

    capture(Function(forward).eval(), (torch.rand(1, 4),))
    assert not seen[0], "the collector pauses"
    assert gc.isenabled() and vars(torch.fx.config) == before
    gc.disable()
    try:
        capture(Function(lambda _, x: x * 3).eval(), (torch.rand(1, 4),))
        assert not gc.isenabled()
    finally:
        gc.enable()
