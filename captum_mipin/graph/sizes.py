"""The sizes of results, found faster than torch finds them while it exports a model.

With a free batch size torch runs most operations in Python, step by step, to learn what their
results look like: a batch norm takes twenty steps. Most results just look like the first tensor.
What is not plain (other layouts than rows, other dtypes, sizes that would have to be compared) is
left to torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten = torch.ops.aten
_DTYPES = torch.float32, torch.float64


def _rows(*tensors: Any) -> bool:
    """Return whether all are tensors of one plain dtype, whose values lie row by row."""
    return all(
        type(x) is FakeTensor
        and (x.dtype, x.device) == (tensors[0].dtype, tensors[0].device)
        and x.dtype in _DTYPES
        and str(x.stride()) == str(make_contiguous_strides_for(x.shape))
        for x in tensors
    )


def _numbers(*sizes: Any) -> bool:
    """Return whether no size is free."""
    return all(type(size) is int for size in sizes)


def _new(mode: FakeTensorMode, like: Tensor, sizes: Sequence[Any]) -> Tensor:
    result = torch.empty(sizes, dtype=like.dtype, device="meta")
    return FakeTensor(mode, result, device=like.device)


def _elementwise(mode: FakeTensorMode, x: Any, *options: Any) -> Any:
    plain = all(type(option) in (int, float) for option in options)
    return _new(mode, x, x.shape) if plain and _rows(x) else NotImplemented


def _in_place(mode: FakeTensorMode, x: Any, *options: Any) -> Any:
    plain = all(type(option) in (int, float) for option in options)
    return x if plain and _rows(x) else NotImplemented


def _along(mode: FakeTensorMode, x: Any, dim: Any, converts: Any = False) -> Any:
    plain = converts is False and _numbers(dim) and _rows(x) and -x.ndim <= dim < x.ndim
    return _new(mode, x, x.shape) if plain else NotImplemented


def _batch_norm(mode: FakeTensorMode, x: Any, *options: Any) -> Any:
    given = [tensor for tensor in options[:4] if tensor is not None]  # weight, bias, mean, variance
    if x.device.type != "cpu" or x.ndim < 2 or not _rows(x, *given):
        return NotImplemented
    if not _numbers(x.shape[1]) or any(tensor.shape != x.shape[1:2] for tensor in given):
        return NotImplemented
    return _new(mode, x, x.shape), _new(mode, x, (0,)), _new(mode, x, (0,))


def _layer_norm(mode: FakeTensorMode, x: Any, sizes: Any, *options: Any) -> Any:
    given = [tensor for tensor in options[:2] if tensor is not None]  # weight and bias
    before, normed = x.shape[: -len(sizes)], x.shape[-len(sizes) :]
    if not (_numbers(*normed, *sizes) and _rows(x, *given)):
        return NotImplemented
    if any(tuple(found) != tuple(sizes) for found in (normed, *(t.shape for t in given))):
        return NotImplemented
    moments = [_new(mode, x, (*before, *(1,) * len(sizes))) for _ in range(2)]
    return _new(mode, x, x.shape), *moments


def _dense(mode: FakeTensorMode, bias: Any, x: Any, weight: Any) -> Any:
    # b + x W: the rows of x may be free
    if not _rows(x, bias) or (weight.dtype, weight.device) != (x.dtype, x.device):
        return NotImplemented
    sizes = x.shape[1], *bias.shape
    if not _numbers(*sizes) or tuple(weight.shape) != sizes:
        return NotImplemented
    return _new(mode, x, (x.shape[0], *bias.shape))


def _joined(mode: FakeTensorMode, tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    dim = dim + first.ndim if dim < 0 else dim
    if not _rows(*tensors) or not 0 <= dim < first.ndim:
        return NotImplemented
    # sizes of the other dimensions, which are free by the same symbol or the same numbers
    others = {(*map(str, x.shape[:dim]), dim, *map(str, x.shape[dim + 1 :])) for x in tensors}
    lengths = [x.shape[dim] if x.ndim == first.ndim else None for x in tensors]
    if len(others) > 1 or not _numbers(*lengths):
        return NotImplemented
    return _new(mode, first, (*first.shape[:dim], sum(lengths), *first.shape[dim + 1 :]))


_ELEMENTWISE = (
    aten.relu, aten.gelu, aten.silu, aten.mish, aten.elu, aten.leaky_relu, aten.hardtanh,
    aten.hardswish, aten.hardsigmoid, aten.sigmoid, aten.tanh, aten.exp, aten.clamp_min,
)  # fmt: skip
_IN_PLACE = aten.relu_, aten.silu_, aten.hardtanh_, aten.hardswish_, aten.hardsigmoid_
_ALONG = aten.cumsum, aten._softmax, aten._log_softmax


def _or_torch(operation: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule that takes torch's own way where it does not apply."""

    def run(mode: FakeTensorMode, *args: Any, **kwargs: Any) -> Any:
        # of named options, GELU's word alone leaves the result as it is
        plain = all(type(option) is str for option in kwargs.values())
        found = rule(mode, *args) if plain else NotImplemented
        if found is not NotImplemented:
            return found
        with mode:
            return decomposition_table[operation](*args, **kwargs)

    return run


_BY_RULE: dict[Callable[..., Any], Sequence[Any]] = {
    _elementwise: _ELEMENTWISE,
    _in_place: _IN_PLACE,
    _along: _ALONG,
    _batch_norm: [aten._native_batch_norm_legit_no_training],
    _layer_norm: [aten.native_layer_norm],
    _dense: [aten.addmm],
    _joined: [aten.cat],
}
#: Operation → what its result looks like, for those alone that torch takes apart in Python.
RULES = {
    operation.default: _or_torch(operation.default, rule)
    for rule, operations in _BY_RULE.items()
    for operation in operations
    if operation.default in decomposition_table
}


@contextmanager
def quick_sizes() -> Iterator[None]:
    """Let torch find the sizes of common results by the rules of this module."""
    table = fake_impls.get_fast_op_impls()
    added = {operation: rule for operation, rule in RULES.items() if operation not in table}
    table.update(added)
    try:
        yield
    finally:
        for operation in added:
            table.pop(operation, None)
