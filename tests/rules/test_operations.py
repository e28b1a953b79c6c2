"""Every operation of the table carries signal, exactly where it says so; docs have the table."""

import ast
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from captum_mipin import InverseNetwork, check
from captum_mipin.report import CheckRow
from captum_mipin.rules import MIPIN, Passes

ROOT = Path(__file__).parents[2]

#: Those of PyTorch; what stands for several of them together is tested where the method is.
TORCHS = [name for name in MIPIN if name.startswith("aten.")]
Operation = Callable[..., Any]


class Case(NamedTuple):
    """An operation between an input of this shape and a linear layer.

    Attributes:
        shape: One example of the input.
        step: (operation, x) → y; by default the operation of x alone.
    """

    shape: tuple[int, ...]
    step: Callable[[Operation, Tensor], Tensor] = lambda op, x: op(x)


def _weight(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _on(shape: tuple[int, ...], *arguments: Any, first: bool = False) -> Case:
    """The operation of x and these arguments; its first result where there are several."""
    return Case(shape, lambda op, x: op(x, *arguments)[0] if first else op(x, *arguments))


FLAT, SEQUENCE, IMAGE, VOLUME = (6,), (4, 8), (4, 6, 6), (4, 4, 4, 4)
SIZES = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}
ONES = torch.ones(4, dtype=torch.float64)
EVEN, BIAS, WEIGHT = torch.tensor([True, False, True]), _weight(5), _weight(6, 5)

_CONVOLUTIONS = {
    **{f"conv{d}d.default": _on(SIZES[d], _weight(3, 4, *(2,) * d)) for d in SIZES},
    **{
        f"conv{d}d.padding": _on(SIZES[d], _weight(3, 4, *(3,) * d), None, [1], "same")
        for d in SIZES
    },
    **{
        f"conv_transpose{name}": _on(SIZES[d], _weight(4, 3, *(2,) * d))
        for d, name in enumerate(("1d.default", "2d.input", "3d.input"), 1)
    },
}
_ACTIVATIONS = {
    **dict.fromkeys(
        (
            "relu",
            "hardtanh",
            "relu6",
            "silu",
            "gelu",
            "hardswish",
            "leaky_relu",
            "elu",
            "celu",
            "selu",
            "mish",
            "tanh",
            "rrelu",
            "sigmoid",
            "hardsigmoid",
            "softplus",
            "log_sigmoid",
        ),
        Case(FLAT),
    ),
    "clamp": _on(FLAT, -1, 2),
    "clamp_min": _on(FLAT, 0),
    "clamp_max": _on(FLAT, 1),
    "threshold": _on(FLAT, -1, 0),
    "glu": _on(SEQUENCE),
    "prelu": _on(FLAT, ONES[:1] / 3),
    "_prelu_kernel": _on(FLAT, ONES[:1, None] / 3),
}
_POOLS = {
    **{f"max_pool{d}d": _on(SIZES[d], [2] * d) for d in SIZES},
    **{f"max_pool{d}d_with_indices": _on(SIZES[d], [2] * d, first=True) for d in SIZES},
    **{f"adaptive_max_pool{d}d": _on(SIZES[d], [2] * d, first=True) for d in SIZES},
    **{f"avg_pool{d}d": _on(SIZES[d], [2] * d) for d in SIZES},
    **{
        f"{under}adaptive_avg_pool{d}d": _on(SIZES[d], [2] * d)
        for d in SIZES
        for under in ("", "_")
    },
}

#: Short name of an operation → a network that needs it.
CASES: dict[str, Case] = {
    "linear.default": _on(FLAT, _weight(5, 6)),
    "mm.default": _on(FLAT, _weight(6, 5)),
    "addmm.default": Case(FLAT, lambda op, x: op(BIAS, x, WEIGHT)),
    **_CONVOLUTIONS,
    **{f"{name}.default": case for name, case in (_ACTIVATIONS | _POOLS).items()},
    "mean.dim": _on(IMAGE, [3]),
    "sum.dim_IntList": _on(IMAGE, [2, 3]),
    "_native_batch_norm_legit_no_training.default": _on(
        IMAGE, ONES / 2, ONES, ONES / 3, 2 * ONES, 0.1, 1e-5, first=True
    ),
    "layer_norm.default": _on(SEQUENCE, [8]),
    "rms_norm.default": _on(SEQUENCE, [8]),
    "instance_norm.default": _on(IMAGE, None, None, None, None, True, 0.1, 1e-5, False),
    "group_norm.default": _on(IMAGE, 2),
    "add.Tensor": Case(FLAT, lambda op, x: op(x, torch.relu(x))),
    "sub.Tensor": Case(FLAT, lambda op, x: op(x, torch.relu(x))),
    **{f"{name}.Scalar": _on(FLAT, 2.0) for name in ("add", "sub", "rsub", "mul", "div")},
    "where.self": Case(FLAT, lambda op, x: op(EVEN, x[:, :3], x[:, 3:])),
    "where.ScalarOther": Case(FLAT, lambda op, x: op(x > 0, x, 0.0)),
    "where.ScalarSelf": Case(FLAT, lambda op, x: op(x > 0, 0.0, x)),
    "masked_fill.Scalar": _on((4, 3), EVEN, 1.0),
    **{
        f"{name}.{form}": Case(FLAT, lambda op, x: op(x[:, :3], x[:, 3:]))
        for name, form in (
            ("maximum", "default"),
            ("minimum", "default"),
            ("max", "other"),
            ("min", "other"),
        )
    },
    "baddbmm.default": Case(
        SEQUENCE, lambda op, x: op(x[:, :, :1], torch.softmax(x @ x.mT, -1), x)
    ),
    "neg.default": Case(FLAT),
    "mul.Tensor": Case(FLAT, lambda op, x: op(x, torch.sigmoid(x))),
    "div.Tensor": _on(FLAT, _weight(6)),
    **{
        f"{name}.default": Case(FLAT, lambda op, x: op(x, [x.shape[0], 3, 2]))
        for name in ("view", "_unsafe_view", "reshape")
    },
    "flatten.using_ints": _on(IMAGE, 1),
    "unflatten.int": _on(FLAT, 1, [2, 3]),
    "unsqueeze.default": _on(FLAT, 1),
    "squeeze.dim": _on((1, 6), 1),
    "squeeze.dims": _on((1, 6), [1]),
    "permute.default": _on(SEQUENCE, [0, 2, 1]),
    "transpose.int": _on(SEQUENCE, 1, 2),
    "t.default": Case(FLAT, lambda op, x: op(op(x))),
    **{
        f"{name}.default": Case(FLAT)
        for name in ("clone", "contiguous", "alias", "lift_fresh_copy")
    },
    "select.int": _on(SEQUENCE, 1, 2),
    "slice.Tensor": _on(SEQUENCE, 2, 1, 7, 2),
    "flip.default": _on(SEQUENCE, [1, 2]),
    **{f"{name}.Tensor": _on(SEQUENCE, 3, 2, first=True) for name in ("split", "unsafe_split")},
    "split_with_sizes.default": _on(SEQUENCE, [3, 5], 2, first=True),
    "chunk.default": _on(SEQUENCE, 2, 2, first=True),
    "unbind.int": _on(SEQUENCE, 1, first=True),
    "roll.default": _on(SEQUENCE, [2], [2]),
    "constant_pad_nd.default": _on(SEQUENCE, [1, 2], 0.0),
    "pad.default": _on(SEQUENCE, [1, 2]),
    "_to_copy.default": Case(FLAT, lambda op, x: op(x, memory_format=torch.contiguous_format)),
    **{
        f"{name}.default": Case(SEQUENCE, lambda op, x: op([x[:, :2], x[:, 2:]], 1))
        for name in ("cat", "stack")
    },
    "pixel_shuffle.default": _on(IMAGE, 2),
    "channel_shuffle.default": _on(IMAGE, 2),
    "expand.default": Case((1, 6), lambda op, x: op(x, [-1, 3, 6])),
    "scaled_dot_product_attention.default": Case(SEQUENCE, lambda op, x: op(x, x, x)),
    **{
        f"{name}.default": Case(SEQUENCE, lambda op, x: op(torch.softmax(x @ x.mT, -1), x))
        for name in ("matmul", "bmm")
    },
}


class Headed(nn.Module):
    """A step and a linear layer."""

    def __init__(self, step: Callable[[Tensor], Tensor], x: Tensor) -> None:
        super().__init__()
        self.step, self.last = step, nn.Linear(step(x).flatten(1).shape[1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(x).flatten(1))


class Together(nn.Module):
    """Many networks, each with its own input, with outputs summed up: one capture, one fit."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, *inputs: Tensor) -> Tensor:
        return reduce(
            torch.add, [part(x) for part, x in zip(self.parts.values(), inputs, strict=True)]
        )


def _of(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The step of a case, and data for it."""
    short, overload = name.split(".")[1:]
    operation = getattr(getattr(torch.ops.aten, short), overload)
    shape, step = CASES[f"{short}.{overload}"]
    x = torch.randn(24, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return lambda x: step(operation, x), x


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
    steps = {name: _of(name) for name in TORCHS}
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
SWITCHES = {"aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other"}
LINEAR = [
    name
    for name, rule in MIPIN.items()
    if isinstance(rule, Passes) and rule.exact and name not in SWITCHES
]


@pytest.mark.parametrize("name", LINEAR)
def test_what_passes_exactly_gives_back_what_was_kept(name: str) -> None:
    """P Pᵀ P = P: an exact adjoint returns what the operation kept, neither more nor less."""
    step, x = _of(name)
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


def test_the_table_names_tests_that_are_there(written: Any) -> None:
    for test in (*written.TESTS, written.PASSES, written.EVERY):
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
