"""Large containers of numbers cost no call per entry, and each of their entries is seen."""

import sys
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_mipin.errors import CaptureError
from captum_mipin.graph.plain import digest_of
from captum_mipin.graph.state import State
from captum_mipin.methods import LRP, GuidedBackprop

pytestmark = pytest.mark.captured_anew

COUNT = 1000
X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))

#: Kind → function that makes a container of some numbers.
KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "values": lambda numbers: dict(enumerate(numbers)),
    "keys": lambda numbers: dict.fromkeys(enumerate(numbers)),
    "set": lambda numbers: set(enumerate(numbers)),
    "frozenset": lambda numbers: frozenset(enumerate(numbers)),
    "pairs": lambda numbers: [(number, "a") for number in numbers],
    "lists": lambda numbers: {index: [number] for index, number in enumerate(numbers)},
    "deep": lambda numbers: [{"a": [(number,)]} for number in numbers],
    "bytes": lambda numbers: bytearray(b"".join(str(number).encode() for number in numbers)),
    "array": lambda numbers: array("d", numbers),
}


class Holds(nn.Module):
    """A network with a large container, which forward may read and write."""

    def __init__(self, held: Any, run: Callable[..., Any] = lambda m, h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.held, self.run, self.calls = nn.Linear(4, 3), held, run, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h: Tensor = self.run(self, self.body(x))
        return h


@pytest.mark.parametrize("at", [0, 1, COUNT // 2, COUNT - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_entry_is_seen_wherever_it_is(kind: str, at: int) -> None:
    numbers: list[Any] = [float(n) for n in range(COUNT)]
    model = Holds(KINDS[kind](numbers))
    before = State(model)
    assert before.holds()
    model.held = KINDS[kind](list(numbers))
    assert not before.changes(State(model))
    numbers[at] = 0.5
    model.held = KINDS[kind](numbers)
    assert not before.holds()
    assert {path[0] for path in before.changes(State(model))} == {"held"}


@pytest.mark.parametrize("at", [0, COUNT // 2, COUNT - 1])
def test_an_entry_that_is_written_to_the_same_container_is_seen(at: int) -> None:
    held, nested = list(range(COUNT)), {n: [n] for n in range(COUNT)}
    model = Holds((held, nested))
    for write in (
        lambda: held.__setitem__(at, -1),
        lambda: held.append(0),
        lambda: held.pop(at),
        lambda: nested[at].append(7),
        lambda: nested.pop(at),
        lambda: held.reverse(),
    ):
        before = State(model)
        write()
        assert not before.holds()
        assert before.changes(State(model))


@pytest.mark.parametrize(
    ("old", "new"),
    [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), (b"a", "a"), ((1,), [1]), (None, 0), (1, 2**70)],
)
def test_entries_of_other_types_differ(old: Any, new: Any) -> None:
    rest = list(range(COUNT))
    assert digest_of([old, *rest]) == digest_of([old, *rest])
    assert digest_of([old, *rest]) != digest_of([new, *rest])


def test_equal_contents_have_one_digest_whichever_objects_they_are() -> None:
    one = ["ab"] * COUNT
    assert digest_of(one) is digest_of(["".join(["a", "b"]) for _ in range(COUNT)])
    assert digest_of([*one, object()]) is None
    assert digest_of([*one, torch.ones(1)]) is None
    assert digest_of([*one, [len]]) is None
    one.append(one)  # type: ignore[arg-type]
    assert digest_of(one) is None


def _calls(run: Callable[[], Any]) -> int:
    """Return the number of calls of Python and C functions during a call."""
    count, before = 0, sys.getprofile()

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("kind", ["list", "tuple", "values", "set", "array", "pairs"])
def test_a_hundred_times_more_entries_cost_no_more_calls(kind: str) -> None:
    LRP(Holds([]).eval()).attribute(X, 0)
    counts = []
    for size in (COUNT, 100 * COUNT):
        held = [float(n) for n in range(size)]
        held_too = set(held) if kind == "set" else KINDS[kind](held)
        model = Holds(held_too).eval()
        lrp = LRP(model)

        def count_and_explain(model: Any = model, lrp: Any = lrp) -> None:
            model.calls += 1
            lrp.attribute(X, 0)

        counts.append([_calls(lambda lrp=lrp: lrp.attribute(X, 0)), _calls(count_and_explain)])
    for few, many in zip(*counts, strict=True):
        assert many < 1.1 * few + 1000


def test_what_forward_writes_to_a_large_container_is_undone() -> None:
    def run(m: Any, h: Tensor) -> Tensor:
        m.held[0].append(1.0)
        m.held[1][m.calls] = h.detach()
        return h * torch.tensor(m.held[0][:3], dtype=h.dtype)

    numbers, table = [float(n) for n in range(COUNT)], {-n: n for n in range(1, COUNT)}
    model = Holds((numbers, table), run).eval()
    before = list(numbers), dict(table)
    expected = (model.body.weight[2] * 2).detach().expand(3, 4)
    torch.testing.assert_close(GuidedBackprop(model).attribute(X, 2), expected)
    assert (numbers, table) == before
    assert [type(held) for held in model.held] == [list, dict]
    numbers[2] = 5.0
    torch.testing.assert_close(GuidedBackprop(model).attribute(X, 2), expected * 2.5)


def test_a_large_container_that_the_next_call_reads_is_refused() -> None:
    def run(m: Any, h: Tensor) -> Tensor:
        result = h + m.held[-1]
        m.held.append(h.detach())
        return result

    with pytest.raises(CaptureError, match="an entry of a list"):
        LRP(Holds([0.0] * COUNT, run).eval()).attribute(X, 0)
