"""Linear operations without weights that copy, add up or mix values: y = L x.

The signal S of y goes back by the adjoint of L. An input that several outputs are made of gets
their weighted mean, and the signal of an output that is made of several inputs is divided:

    S_x = Lᵀ (S / |L| 1) / |L|ᵀ 1

|L| contains the absolute values of the coefficients of L, and 1 is a tensor of ones: |L| 1 is the
sum of the coefficients of each output, |L|ᵀ 1 that of each input. For copies, such as upsampling to
the nearest neighbour, |L| 1 = 1, and S_x is the mean over all copies of x. For coefficients of at
least 0, the signal of a constant x is x. No |S_x| is larger than the largest |S|, also for bicubic
interpolation, which has negative coefficients. S_x is the first step, from 0, of the iteration SIRT
for the solution of L x = S (Gregor and Benson, IEEE Transactions on Medical Imaging 2008).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import Options, Recorded, Rule, depends, derivative, ratio

#: Function: x → L x. x is the tuple of all arguments that carry signal.
Operator = Callable[[tuple[Tensor, ...]], Tensor]


def copied(options: Options, run: Any, x: tuple[Tensor, ...], *arguments: Any, **named: Any) -> Any:
    """Send back to each element the mean of the signals of all its copies."""
    value, back = derivative(lambda parts: run(parts, *arguments, **named), x)

    def mean(s: Tensor) -> tuple[Tensor, ...]:
        # S_x = Lᵀ S / Lᵀ 1
        return tuple(map(ratio, back(s), back(torch.ones_like(s))))

    return value, mean


def mixed(
    sizes: Callable[..., Operator],
    averages: bool,
    options: Options,
    run: Any,
    x: tuple[Tensor, ...],
    *arguments: Any,
    **named: Any,
) -> Any:
    """Send back Lᵀ (S / |L| 1) / |L|ᵀ 1, or without ``averages`` Lᵀ (S / |L| 1).

    Args:
        sizes: Function (operation, x, \\*arguments) → the operator |L|.
        averages: Whether an input gets the mean, and not the sum, over the outputs.
        options: The options of the pass, which have no influence.
        run: The operation.
        x: All arguments that carry signal.
        arguments: The other positional arguments.
        named: The arguments by name.
    """
    value, back = derivative(lambda parts: run(parts, *arguments, **named), x)
    size = sizes(run, x, *arguments, **named)

    def mean(s: Tensor) -> tuple[Tensor, ...]:
        total, spread = derivative(size, tuple(map(torch.ones_like, x)))
        # an operation may also add constants, as where only a part of a tensor is replaced
        total = total - size(tuple(map(torch.zeros_like, x)))
        # S_x = Lᵀ (S / |L| 1) / |L|ᵀ 1
        signals = back(ratio(s, total))
        return tuple(map(ratio, signals, spread(torch.ones_like(s)))) if averages else signals

    return value, mean


def _unsigned(run: Any, x: tuple[Tensor, ...], *arguments: Any, **named: Any) -> Operator:
    """Return the operator |L| of an operation whose coefficients are all at least 0."""
    return lambda parts: run(parts, *arguments, **named)


def _bicubic(run: Any, x: tuple[Tensor, ...], *arguments: Any, **named: Any) -> Operator:
    """Return the operator |L| of an interpolation that has coefficients of both signs.

    It interpolates rows and columns one after the other: y = Aᵀ x B, so |L| x = |A|ᵀ x |B|.
    """
    height, width = (torch.eye(n).to(x[0]) for n in x[0].shape[-2:])
    # each row of the unit matrix is an image of one column, which is copied to all columns
    a = run((height[None, :, :, None],), *arguments, **named)[0, :, :, 0].abs()
    b = run((width[None, :, None, :],), *arguments, **named)[0, :, 0, :].abs()
    return lambda parts: a.mT @ parts[0] @ b


def among(
    *positions: int, counts: Callable[[Any], bool] = depends
) -> Callable[[fx.Node], tuple[int, ...]]:
    """Return a function for ``carriers=`` that selects arguments among ``positions``.

    Args:
        positions: Positions of the arguments in which an operation is linear.
        counts: Function: argument → True if the argument gets a signal.
    """
    return partial(_among, positions, counts)


def _among(
    positions: Sequence[int], counts: Callable[[Any], bool], node: fx.Node
) -> tuple[int, ...]:
    return tuple(at for at in positions if at < len(node.args) and counts(node.args[at]))


def _polynomial(node: fx.Node) -> str | None:
    if argument(node, 2, "interpolation_mode") != 2:
        return None
    return "it interpolates by mode='bicubic', expected mode='bilinear' or 'nearest'"


def _reduced(node: fx.Node) -> str | None:
    reduce = argument(node, 4, "reduce")
    if reduce != "prod":
        return None
    return "it multiplies values that depend on the input, expected reduce='sum', 'mean' or 'amax'"


_VEC = ("vec", "default")
_COPYING = (
    *(f"{kind}{dims}d.{form}" for kind in ("upsample_nearest", "_upsample_nearest_exact")
      for dims in (1, 2, 3) for form in _VEC),
    *(f"{kind}_pad{dims}d.default" for kind in ("reflection", "replication") for dims in (1, 2, 3)),
    "pad.default", "_pad_circular.default", "unfold.default", "im2col.default", "gather.default",
    "index.Tensor", "_unsafe_index.Tensor", "index_select.default", "repeat.default",
    "repeat_interleave.self_int",
)  # fmt: skip
_BICUBIC = (
    *(f"{name}.{form}" for name in ("upsample_bicubic2d", "_upsample_bicubic2d_aa")
      for form in _VEC),
)  # fmt: skip
#: Operation that mixes values → positions of the arguments in which it is linear.
_MIXING: dict[str, tuple[int, ...]] = {
    **{f"upsample_{kind}.{form}": (0,) for kind in ("linear1d", "bilinear2d", "trilinear3d")
       for form in _VEC},
    **dict.fromkeys((f"_upsample_bilinear2d_aa.{form}" for form in _VEC), (0,)),
    **dict.fromkeys(_BICUBIC, (0,)),
    **dict.fromkeys(("grid_sampler.default", "grid_sampler_2d.default"), (0,)),
    "col2im.default": (0,), "cumsum.default": (0,), "index_put.default": (0, 2),
    "scatter_add.default": (0, 3), "index_add.default": (0, 3), "scatter_reduce.two": (0, 3),
}  # fmt: skip

_REFUSED = {
    **dict.fromkeys(("grid_sampler.default", "grid_sampler_2d.default"), _polynomial),
    "scatter_reduce.two": _reduced,
}

#: Operation with coefficients of both signs → function that returns its operator |L|.
SIZES: Mapping[str, Callable[..., Operator]] = dict.fromkeys(
    (f"aten.{name}" for name in _BICUBIC), _bicubic
)


def sizes(name: str) -> Callable[..., Operator]:
    """Return the function (operation, x, \\*arguments) → |L| for an operation of :data:`MIXES`."""
    return SIZES.get(name, _unsigned)


def linear_in(name: str) -> tuple[int, ...]:
    """Return the positions of the arguments in which an operation of :data:`MIXES` is linear."""
    return _MIXING[name.removeprefix("aten.")]


#: Each element of the result is a copy of one element of x, or a constant.
COPIES = {
    f"aten.{name}": Recorded(
        run=copied, note="the mean over all copies", several=True, records=True, carriers=among(0),
        exact=True,
    )
    for name in _COPYING
}  # fmt: skip
#: Each element of the result is a weighted sum of elements of x.
MIXES = {
    f"aten.{name}": Recorded(
        run=partial(mixed, sizes(f"aten.{name}"), True),
        note="the mean over all outputs, weighted by their coefficients",
        several=True,
        records=True,
        restores=name not in _BICUBIC,
        carriers=among(*positions),
        refuse=_REFUSED.get(name, Rule.refuse),
    )
    for name, positions in _MIXING.items()
}
