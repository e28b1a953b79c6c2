"""One small network for each operation of the table of rules."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    **dict.fromkeys(
        (
            "square",
            "abs",
            "expm1",
            "erf",
            "erfc",
            "sin",
            "cos",
            "tan",
            "atan",
            "sinh",
            "cosh",
            "asinh",
            "softshrink",
            "hardshrink",
            "nan_to_num",
        ),
        Case(FLAT),
    ),
    **{
        name: Case(FLAT, lambda op, x: op(torch.sigmoid(x) / 2))
        for name in ("sqrt", "log1p", "asin", "acos", "atanh")
    },
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

INDEX = torch.tensor([3, 0, 3])
FIELD = torch.tensor([[[0, 2, 1, 3, 1, 0, 2, 2]]])


def _like(index: Tensor, x: Tensor) -> Tensor:
    """The index, once per example."""
    return index.expand(x.shape[0], *index.shape[1:])


def _enlarged(kind: str, dims: int, *flags: bool) -> dict[str, Case]:
    """Both forms of an interpolation, to the double size and to a given size."""
    return {
        f"{kind}.vec": _on(SIZES[dims], None, *flags, [2.0] * dims),
        f"{kind}.default": _on(SIZES[dims], [7] * dims, *flags),
    }


_COPIES = {
    **{
        name: case
        for kind in ("upsample_nearest", "_upsample_nearest_exact")
        for d in SIZES
        for name, case in _enlarged(f"{kind}{d}d", d).items()
    },
    **{
        f"{kind}_pad{d}d.default": _on(SIZES[d], [1, 2] * d)
        for kind in ("reflection", "replication")
        for d in SIZES
    },
    "pad.default": _on(SEQUENCE, [1, 2], "reflect"),
    "_pad_circular.default": _on(SEQUENCE, [1, 2]),
    "unfold.default": _on(SEQUENCE, 2, 3, 2),
    "im2col.default": _on(IMAGE, [3, 3], [1, 1], [1, 1], [2, 2]),
    "gather.default": Case(SEQUENCE, lambda op, x: op(x, 1, _like(FIELD, x))),
    **{f"{name}.Tensor": _on(SEQUENCE, [None, INDEX]) for name in ("index", "_unsafe_index")},
    "index_select.default": _on(SEQUENCE, 1, INDEX),
    "repeat.default": _on(SEQUENCE, [1, 2, 1]),
    "repeat_interleave.self_int": _on(SEQUENCE, 2, 1),
}
_GRID = (_weight(1, 5, 5, 2).tanh() * 0.9, 0, 0, False)
_MIXES = {
    **_enlarged("upsample_linear1d", 1, False),
    **_enlarged("upsample_trilinear3d", 3, True),
    **{
        name: case
        for kind in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
                     "_upsample_bicubic2d_aa")
        for name, case in _enlarged(kind, 2, False).items()
    },
    **{
        f"{name}.default": Case(IMAGE, lambda op, x: op(x, _like(_GRID[0], x), *_GRID[1:]))
        for name in ("grid_sampler", "grid_sampler_2d")
    },
    "col2im.default": _on((8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "cumsum.default": _on(SEQUENCE, 1),
    "index_put.default": Case(SEQUENCE, lambda op, x: op(x, [None, INDEX], x[:, :3], True)),
    "scatter_add.default": Case(SEQUENCE, lambda op, x: op(x, 1, _like(FIELD, x), x[:, 1:2])),
    "index_add.default": Case(SEQUENCE, lambda op, x: op(x, 1, INDEX, x[:, :3])),
    "scatter_reduce.two": Case(
        SEQUENCE, lambda op, x: op(x, 1, _like(FIELD, x), x[:, 1:2], "mean")
    ),
}  # fmt: skip
SELECTIONS = {
    **{f"{name}.dim": _on(SEQUENCE, 2, first=True)
       for name in ("max", "min", "median", "nanmedian")},
    **{f"{name}.default": _on(SEQUENCE, [2]) for name in ("amax", "amin")},
    "linalg_vector_norm.default": _on(SEQUENCE, 2, [2]),
    "sort.default": _on(SEQUENCE, 1, first=True),
    "sort.stable": Case(SEQUENCE, lambda op, x: op(x, stable=True, dim=1)[0]),
    "topk.default": _on(SEQUENCE, 3, 2, first=True),
    "kthvalue.default": _on(SEQUENCE, 3, 2, first=True),
    "mode.default": _on(SEQUENCE, 2, first=True),
    **{f"{name}.default": _on(SEQUENCE, 2, first=True) for name in ("cummax", "cummin")},
}  # fmt: skip
_REPLACED = {
    "slice_scatter.default": Case(SEQUENCE, lambda op, x: op(x[:, :2], x[:, 2:3], 1, 0, 1)),
    "select_scatter.default": Case(SEQUENCE, lambda op, x: op(x[:, :2], x[:, 2], 1, 0)),
    "diagonal_scatter.default": Case(IMAGE, lambda op, x: op(x[:, :2], x[:, 2:, 0], 0, 2, 3)),
    "scatter.src": Case(SEQUENCE, lambda op, x: op(x[:, :2], 1, _like(FIELD % 2, x), x[:, 2:3])),
    "scatter.value": Case(SEQUENCE, lambda op, x: op(x, 1, _like(FIELD, x), 0.0)),
    "index_copy.default": Case(SEQUENCE, lambda op, x: op(x[:, :2], 1, INDEX[1:2], x[:, 2:3])),
    "index_fill.int_Scalar": _on(SEQUENCE, 1, INDEX, 0.0),
}
#: Short name of an operation → a network that needs it.
CASES: dict[str, Case] = {
    "linear.default": _on(FLAT, _weight(5, 6)),
    "mm.default": _on(FLAT, _weight(6, 5)),
    "addmm.default": Case(FLAT, lambda op, x: op(BIAS, x, WEIGHT)),
    **_CONVOLUTIONS,
    **{f"{name}.default": case for name, case in (_ACTIVATIONS | _POOLS).items()},
    "pow.Tensor_Scalar": _on(FLAT, 3),
    "mean.dim": _on(IMAGE, [3]),
    "sum.dim_IntList": _on(IMAGE, [3]),
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
    "neg.default": Case(FLAT),
    "mul.Tensor": Case(FLAT, lambda op, x: op(x, torch.sigmoid(x.flip(1)))),
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
    "_to_copy.default": Case(FLAT, lambda op, x: op(x, memory_format=torch.contiguous_format)),
    **{
        f"{name}.default": Case(SEQUENCE, lambda op, x: op([x[:, 2:], x[:, :2]], 1))
        for name in ("cat", "stack")
    },
    "pixel_shuffle.default": _on(IMAGE, 2),
    "channel_shuffle.default": _on(IMAGE, 2),
    "expand.default": Case((1, 6), lambda op, x: op(x, [-1, 3, 6])),
    **_COPIES,
    **_MIXES,
    **SELECTIONS,
    "quantile.scalar": _on(SEQUENCE, 0.3, 2),
    "nanquantile.scalar": _on(SEQUENCE, 0.3, 2),
    "max_unpool2d.default": Case(
        IMAGE,
        lambda op, x: op(
            x, _like(4 * torch.arange(36).view(1, 1, 6, 6).repeat(1, 4, 1, 1), x), [12, 12]
        ),
    ),
    "max_unpool3d.default": Case(
        VOLUME,
        lambda op, x: op(
            x,
            _like(8 * torch.arange(64).view(1, 1, 4, 4, 4).repeat(1, 4, 1, 1, 1), x),
            [8] * 3,
            [2] * 3,
            [0] * 3,
        ),
    ),
    **_REPLACED,
    "pixel_unshuffle.default": _on(IMAGE, 2),
    "rot90.default": _on(IMAGE, 1, [2, 3]),
    **{f"{name}.default": _on(IMAGE, 1) for name in ("tril", "triu")},
    **{f"{name}.default": _on(IMAGE, 1, 2, 3) for name in ("diagonal", "diagonal_copy")},
    "diag_embed.default": _on(SEQUENCE, 1),
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


def step_of(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The step of a case, and data for it."""
    short, overload = name.split(".")[1:]
    operation = getattr(getattr(torch.ops.aten, short), overload)
    shape, step = CASES[f"{short}.{overload}"]
    x = torch.randn(24, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return lambda x: step(operation, x), x
