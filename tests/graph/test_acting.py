"""Which code of hooks may write to a tensor. Each hook here writes above 1000, or only looks."""

import operator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from captum_mipin.graph.acting import Function, read


def double(t: Any) -> None:
    t.mul_(2)


def clear(t: Any) -> None:
    t[0] = 0


def clear_sometimes(t: Any) -> None:
    if t.max() > 1000:
        t[0] = 0


def helper(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        double(y)


def helper_with_a_branch(m: Any, a: Any, y: Any) -> None:
    clear_sometimes(y)


def helper_of_helpers(m: Any, a: Any, y: Any) -> None:
    helper_with_a_branch(m, a, y)


def mapped(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        list(map(double, a))


def table(m: Any, a: Any, y: Any) -> None:
    (float, double)[int(y.max() > 1000)](y)
    if y is None:
        return


def default(m: Any, a: Any, y: Any, act: Any = clear) -> None:
    if y.max() > 1000:
        act(y)


def nested(m: Any, a: Any, y: Any) -> None:
    def clear(t: Any) -> None:
        t[0] = 0

    if y.max() > 1000:
        clear(y)


def out(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        torch.mul(y, 2, out=y)


def out_in_a_dictionary(m: Any, a: Any, y: Any) -> None:
    named = {"out": y}
    if y.max() > 1000:
        torch.mul(y, 2, **named)


def in_place(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        nn.functional.relu(y, inplace=True)


RELU = nn.ReLU(inplace=True)


def module_in_place(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        RELU(y)


def loop(m: Any, a: Any, y: Any) -> None:
    for t in a:
        if t.max() > 1000:
            t[0] = 0


def loop_of_places(m: Any, a: Any, y: Any) -> None:
    for place in (y > 1000).nonzero():
        y[place] = 0


def comprehension(m: Any, a: Any, y: Any) -> None:
    [t.mul_(2) for t in a if t.max() > 1000]


def alias(m: Any, a: Any, y: Any) -> None:
    flat = y.view(-1)
    if float(y.max()) > 1000:
        flat[0] = 0


def lines(m: Any, a: Any, y: Any) -> None:
    if float(y.max()) > 1000:
        y[
            0,
            1,
        ] = 0


def augmented(m: Any, a: Any, y: Any) -> None:
    if float(y.max()) > 1000:
        y *= 2


def by_operator(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        operator.imul(y, 2)


def by_text(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        getattr(y, "mul_")(2)  # noqa: B009


def after_an_error(m: Any, a: Any, y: Any) -> None:
    try:
        float(y)
    except:  # noqa: E722
        y.mul_(2)


def data(m: Any, a: Any, y: Any) -> None:
    y.data.clamp_(max=1000)


def array(m: Any, a: Any, y: Any) -> None:
    values = y.numpy()
    values[values > 1000] = 0


def weight(m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        m.weight.data = 2 * m.weight


class Base:
    """Helpers, and a hook."""

    def double(self, t: Any) -> None:
        t.mul_(2)

    def hook(self, m: Any, a: Any, y: Any) -> None:
        if y.max() > 1000:
            clear(y)


class Methods(Base):
    """Hooks that write through other methods."""

    def __init__(self) -> None:
        self.inner = Base()

    def hook(self, m: Any, a: Any, y: Any) -> None:
        super().hook(m, a, y)

    def own(self, m: Any, a: Any, y: Any) -> None:
        if y.max() > 1000:
            self.double(y)

    def of_inner(self, m: Any, a: Any, y: Any) -> None:
        if y.max() > 1000:
            self.inner.double(y)

    def __call__(self, m: Any, a: Any, y: Any) -> None:
        if y.max() > 1000:
            y[0] = 0


def named(name: str, act: Any, m: Any, a: Any, y: Any) -> None:
    if y.max() > 1000:
        act(y)


WRITE = [
    helper, helper_with_a_branch, helper_of_helpers, mapped, table, default, nested, out,
    out_in_a_dictionary, in_place, module_in_place, loop, loop_of_places, comprehension, alias,
    lines, augmented, by_operator, by_text, after_an_error, data, array, weight, Methods().hook,
    Methods().own, Methods().of_inner, Methods(), partial(named, "y", double),
]  # fmt: skip

SEEN: list[Any] = []
NUMBERS: dict[str, Any] = {}


def keep(name: str, value: float) -> None:
    if len(SEEN) < 3:
        SEEN.append((name, value))


def looks(m: Any, a: Any, y: Any) -> None:
    if (y > 0).any():
        SEEN.append(float(y.sum()))


def looks_at_all(m: Any, a: Any, y: Any) -> None:
    for t in a:
        SEEN.append(float(t.mean()))  # noqa: PERF401


def looks_with_a_helper(m: Any, a: Any, y: Any) -> None:
    if len(SEEN) < 3:
        keep("mean", float(y.mean()))


def keeps_a_number(m: Any, a: Any, y: Any) -> None:
    if len(SEEN) < 3:
        mean = float(y.mean())
        largest = y.max().item()
        NUMBERS["mean"] = mean, largest


def keeps_by_name(m: Any, a: Any, y: Any) -> None:
    if len(SEEN) < 3:
        SEEN.append({"in": float(a[0].mean()), "out": float(y.mean())})


def adds(m: Any, a: Any, y: Any) -> None:
    NUMBERS["sum"] += y.sum()


def fails(m: Any, a: Any, y: Any) -> None:
    if y.isnan().any():
        raise ValueError("not a number")


LOOK = [
    looks, looks_at_all, looks_with_a_helper, keeps_a_number, keeps_by_name, adds, fails,
]  # fmt: skip


@pytest.mark.parametrize("hook", [*WRITE, *LOOK], ids=lambda hook: getattr(hook, "__name__", ""))
def test_a_hook_that_may_write_is_told_by_its_code(hook: Any) -> None:
    function = Function.of(hook)
    assert function is not None
    known = read(function)
    assert (known.writes and (known.branches or known.uncounted)) == (hook in WRITE)
