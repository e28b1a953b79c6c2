"""Every operation of the table carries signal, exactly where it says so; docs have the table."""

import ast
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from operation_cases import SELECTIONS, Headed, Together, step_of
from torch import Tensor

from captum_mipin import InverseNetwork, check
from captum_mipin.report import CheckRow
from captum_mipin.rules import MIPIN, Passes

ROOT = Path(__file__).parents[2]

#: Those of PyTorch; what stands for several of them together is tested where the method is.
TORCHS = [name for name in MIPIN if name.startswith("aten.")]


class Outcome(NamedTuple):
    """What became of an operation.

    Attributes:
        rows: Its rows of ``check``.
        attribution: A of some examples.
        signal: S of these examples.
        alone: S of one of them, computed alone.
    """

    rows: list[CheckRow]
    attribution: Tensor
    signal: Tensor
    alone: Tensor


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    torch.manual_seed(0)
    steps = {name: step_of(name) for name in TORCHS}
    model = (
        Together({name.replace(".", " "): Headed(*steps[name]) for name in TORCHS}).double().eval()
    )
    inputs = tuple(x for _, x in steps.values())
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Using padding='same'"
        )  # torch's own, for even kernels
        rows = check(model, inputs).rows
        inverse = InverseNetwork(model).fit(inputs, 1, progress=False)
        few, one = (tuple(x[part] for x in inputs) for part in (slice(0, 4), slice(2, 3)))
        both = inverse.explain(few, 1, biases=(False, True)).signals
        results = zip(*both, inverse.source_signal(one, 1), strict=True)
    return {
        name: Outcome(
            [row for row in rows if row.path == f"parts.{name.replace('.', ' ')}"], *signals
        )
        for name, signals in zip(TORCHS, results, strict=True)
    }


@pytest.mark.parametrize("name", TORCHS)
def test_every_operation_carries_the_signal(name: str, outcomes: dict[str, Outcome]) -> None:
    rows, a, s, alone = outcomes[name]
    assert (name, MIPIN[name].note) in [(row.operation, row.note) for row in rows]
    assert torch.isfinite(s).all()
    assert (a != 0).flatten(1).any(1).all(), "each example gets something"
    torch.testing.assert_close(alone, s[2:3], rtol=1e-9, atol=1e-9)


#: Those that pass exactly by switches, which are other ones for what comes back;
#: tests/rules/test_selection.py compares them.
SWITCHES = {f"aten.{name}" for name in (*SELECTIONS, "maximum.default", "minimum.default",
                                        "max.other", "min.other")}  # fmt: skip
LINEAR = [
    name
    for name, rule in MIPIN.items()
    if isinstance(rule, Passes) and rule.exact and name not in SWITCHES
]


@pytest.mark.parametrize("name", LINEAR)
def test_what_passes_exactly_gives_back_what_was_kept(name: str) -> None:
    """P Pᵀ P = P: an exact adjoint returns what the operation kept, neither more nor less."""
    step, x = step_of(name)
    y = step(x.requires_grad_()) - step(torch.zeros_like(x))
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(step(back) - step(torch.zeros_like(x)), y.detach())


# -------------------------------------------------------------------------------------------------
# the table in docs


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script that writes the table."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import operations

    yield operations
    sys.modules.pop("operations", None)


def test_the_table_in_docs_is_that_of_the_rules(written: Any) -> None:
    assert written.TABLE.read_text() == written.text(), "run python docs/operations.py"


def test_every_operation_of_the_core_opset_has_a_rule_or_a_reason(written: Any) -> None:
    named = [name for names in written.REASONS.values() for name in names.split()]
    assert len(named) == len(set(named)), "one reason an operation"
    assert not {f"aten.{name}" for name in named} & MIPIN.keys()
    assert not {f"aten.{name}.default" for name in named} & MIPIN.keys()
    assert written.without_rule() <= set(named)


def test_the_table_names_tests_that_are_there(written: Any) -> None:
    for test in (*written.TESTS, written.MAPS, written.SWITCHES, written.PASSES, written.EVERY):
        module, _, name = test.partition("::")
        functions = [
            node.name
            for node in ast.parse((ROOT / "tests" / module).read_text()).body
            if hasattr(node, "name")
        ]
        assert name in functions, test
    names = [name for names in written.TESTS.values() for name in names.split()]
    known = {name.removeprefix("aten.").removesuffix(".default") for name in MIPIN}
    assert len(names) == len(set(names)), "one test an operation"
    assert set(names) <= known
