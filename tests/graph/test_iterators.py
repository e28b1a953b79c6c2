"""Iterators that a model holds: none is advanced, and no map depends on one."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_mipin import check
from captum_mipin.errors import CaptureError
from captum_mipin.graph.iterators import StandIn
from captum_mipin.methods import GuidedBackprop

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
SCALES = itertools.cycle([1.0, 1.0, 2.0])

MAKERS: dict[str, Callable[[], Any]] = {
    "cycle": lambda: itertools.cycle([1.0, 1.0, 2.0]),
    "list": lambda: iter([1.0, 1.0, 2.0]),
    "generator": lambda: (scale for scale in (1.0, 1.0, 2.0)),
    "map": lambda: map(float, ("1", "1", "2")),
}


class Scales(nn.Module):
    """A network that scales its features by the next value of an iterator."""

    def __init__(self, kind: str, values: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.body, self.head = kind, nn.Linear(4, 5), nn.Linear(5, 3)
        self.values = [values] if kind == "list" else values
        draws = {"partial": partial(next, values), "method": getattr(values, "__next__", None)}
        self.draw = draws.get(kind)
        if kind == "variable":
            self.enclosing = lambda: next(values)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        if self.kind == "attribute":
            h = h * next(self.values)
        elif self.kind == "list":
            h = h * next(self.values[0])
        elif self.kind == "variable":
            h = h * self.enclosing()
        elif self.kind == "global":
            h = h * next(SCALES)
        elif self.draw is not None:
            h = h * self.draw()
        elif self.training:
            h = h * next(self.values)
        return self.head(h)


@pytest.mark.captured_anew
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["attribute", "list", "variable", "partial", "method"])
def test_a_model_that_advances_an_iterator_is_refused_and_does_not_advance(
    kind: str, maker: str
) -> None:
    values = MAKERS[maker]()
    model = Scales(kind, values).eval()
    with pytest.raises(CaptureError, match="takes the next value of the iterator"):
        check(model, X)
    assert list(itertools.islice(values, 3)) == [1.0, 1.0, 2.0]


@pytest.mark.captured_anew
def test_an_iterator_in_a_global_variable_is_refused_and_does_not_advance() -> None:
    with pytest.raises(CaptureError, match="takes the next value of the iterator 'SCALES'"):
        check(Scales("global", None).eval(), X)
    assert [next(SCALES) for _ in range(3)] == [1.0, 1.0, 2.0]


@pytest.mark.captured_anew
@pytest.mark.parametrize("maker", MAKERS)
def test_an_iterator_that_no_call_advances_may_stay(maker: str) -> None:
    values = MAKERS[maker]()
    model = Scales("training", values).eval()
    found = GuidedBackprop(model).attribute(X, 1)
    assert torch.equal(found, GuidedBackprop(Scales("", None).eval()).attribute(X, 1))
    assert model.values is values
    assert list(itertools.islice(values, 3)) == [1.0, 1.0, 2.0]


@pytest.mark.captured_anew
@pytest.mark.parametrize("number", [itertools.count, lambda: iter(range(100))])
def test_a_hook_may_number_its_calls(number: Any) -> None:
    numbers, seen = number(), dict[int, Tensor]()
    model = Scales("", None).eval()
    model.numbers = numbers

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        seen[next(numbers)] = y.detach()

    model.body.register_forward_hook(hook)
    model(X)
    found = GuidedBackprop(model).attribute(X, 1)
    assert torch.equal(found, GuidedBackprop(Scales("", None).eval()).attribute(X, 1))
    assert list(seen) == [0]
    model(X)
    assert list(seen) == [0, 1]


@pytest.mark.captured_anew
def test_a_hook_that_takes_values_of_a_generator_is_refused_and_takes_none() -> None:
    numbers, seen = (n for n in range(100)), dict[int, Tensor]()
    model = Scales("", None).eval()
    model.body.register_forward_hook(lambda m, args, y: seen.update({next(numbers): y.detach()}))
    with pytest.raises(CaptureError, match=r"the iterator 'numbers' \(generator\)"):
        check(model, X)
    assert next(numbers) == 0 and not seen


def test_a_counter_is_copied_where_python_copies_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copy.deepcopy", None)
    numbers = itertools.count(3, -2)
    stand_in = StandIn("numbers", numbers)
    assert [next(stand_in) for _ in range(3)] == [3, 1, -1]
    assert next(numbers) == 3
