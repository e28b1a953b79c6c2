"""The pass that writes complex values as their real and imaginary parts.

No signal goes through a complex number, but each linear operation on z = a + i b is one on a and b:

- a Fourier transform is a dense layer or a convolution, see
  :mod:`~captum_mipin.propagation.fourier`;
- a product is (a + i b) (c + i d) = (a c − b d) + i (a d + b c);
- the absolute value is the norm of the vector (a, b);
- an operation that only adds or rearranges values is done with a and with b.

All other operations on complex values are left as they are, and no rule covers them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import original, value_of
from captum_mipin.graph.nodes import argument, erase_unused, nodes_in, operation
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.forms import insert, stand_for
from captum_mipin.propagation.fourier import Fourier, Parts, call
from captum_mipin.propagation.marking import mark_varying
from captum_mipin.rules.base import varies

_aten = torch.ops.aten

#: Operations that do the same with the real and with the imaginary parts of their arguments.
_ON_EACH = (
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "expand", "expand_as", "clone",
    "contiguous", "alias", "detach", "unsqueeze", "squeeze", "permute", "transpose", "movedim",
    "select", "slice", "narrow", "index_select", "index", "roll", "flip", "repeat", "cat",
    "stack", "split", "split_with_sizes", "chunk", "unbind", "getitem", "diagonal",
    "slice_scatter", "select_scatter", "copy", "sum", "mean", "neg",
    "resolve_conj", "resolve_neg",
)  # fmt: skip
_PRODUCTS = ("mul", "matmul", "mm", "bmm", "mv", "einsum")
_TRANSFORMS = tuple(
    f"fft_{kind}fft{dims}" for kind in ("", "i", "r", "ir") for dims in ("", "2", "n")
)


@dataclass(frozen=True)
class _Graph:
    """What is known of a graph while its complex values are replaced.

    Attributes:
        fourier: Writes its transforms.
        parts: Complex node → its parts.
    """

    fourier: Fourier = field(default_factory=Fourier)
    parts: dict[fx.Node, Parts] = field(default_factory=dict)

    def of(self, before: fx.Node, value: Any) -> Parts:
        """Return the parts of an argument: of a complex value, a constant or a real value."""
        if isinstance(value, complex):
            return value.real, value.imag
        if not _is_complex(value):
            return value, 0
        if not varies(value):
            return call(before, _aten.real.default, value), call(before, _aten.imag.default, value)
        return self.parts[value]


def replace_complex(draft: Draft) -> None:
    """Replace complex values that depend on the model's inputs by their parts."""
    graph, rewritten = _Graph(), False
    for node in list(draft.graph.nodes):
        taken = [n for n in nodes_in((node.args, node.kwargs)) if varies(n)]
        complex_ones = [n for n in taken if _is_complex(n)]
        concerned = _is_complex(node) or complex_ones or operation(node) in _TRANSFORMS
        if not varies(node) or node in draft.starts or not concerned:
            continue
        rewrite = _REWRITES.get(operation(node))
        if rewrite is None or any(n not in graph.parts for n in complex_ones):
            continue  # it is refused, or an operation before it is
        parts = rewrite(graph, node)
        rewritten |= parts is not None
        if parts is not None and _is_complex(node):
            graph.parts[node] = parts
        elif parts is not None:
            stand_for(node, parts[0])
    if rewritten:
        erase_unused(draft.graph, draft.starts)
        mark_varying(draft)


def obstacle(node: fx.Node) -> str:
    """Return a text that names the operations because of which a node is left complex, or ""."""
    users = [n for n in node.users if n.op != "output"] if _is_complex(node) else []
    left = sorted({str(original(n)) for n in users if operation(n) not in _REWRITES})
    return f"; complex numbers go into {', '.join(left)}, which has no rule for them" * bool(left)


def _is_complex(node: Any) -> bool:
    """Return True for a complex number, and for the node of a complex tensor or of several."""
    value = value_of(node) if isinstance(node, fx.Node) else node
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex())


def _is_zero(part: Any) -> bool:
    return not isinstance(part, fx.Node) and part == 0


# ---------------------------------------------------------------- from complex to complex values


def _on_each(graph: _Graph, node: Any) -> Parts | None:
    """Do an operation with the real parts, and with the imaginary parts."""

    def run(at: int) -> fx.Node:
        def part(value: fx.Node) -> Any:
            return graph.of(node, value)[at] if _is_complex(value) else value

        return call(
            node, node.target, *fx.map_arg(node.args, part), **fx.map_arg(node.kwargs, part)
        )

    tensors = [n for n in nodes_in(node.args) if isinstance(value_of(n), Tensor)]
    real = [n for n in tensors if value_of(n).is_floating_point()]
    return None if real or "dtype" in node.kwargs else (run(0), run(1))


def _padded(graph: _Graph, node: Any) -> Parts | None:
    """Pad both parts, by zeros or by values of their own."""
    value = argument(node, 3 if operation(node) == "pad" else 2, "value")
    return _on_each(graph, node) if value in (None, 0) else None


def _sum(graph: _Graph, node: Any) -> Parts | None:
    """Add or subtract; a real value has the imaginary part 0."""
    if node.kwargs or len(node.args) > 2:
        return None
    (a, b), (c, d) = (graph.of(node, value) for value in node.args)
    if operation(node) == "rsub":  # it subtracts from its second argument
        (a, b), (c, d) = (c, d), (a, b)
    sign = 1 if operation(node) == "add" else -1
    return _whole(node, _plus(node, a, c, sign), _plus(node, b, d, sign))


def _plus(node: fx.Node, x: Any, y: Any, sign: int) -> Any:
    """Return x + y or x − y of two parts, each a node or a number."""
    if _is_zero(y):
        return x
    if isinstance(x, fx.Node):
        return call(node, _aten.add.Tensor if sign > 0 else _aten.sub.Tensor, x, y)
    if not isinstance(y, fx.Node):
        return x + sign * y
    if _is_zero(x):
        return y if sign > 0 else call(node, _aten.neg.default, y)
    return call(node, _aten.add.Tensor if sign > 0 else _aten.rsub.Scalar, y, x)


def _whole(node: fx.Node, real: Any, imaginary: Any) -> Parts | None:
    """Return two parts as nodes of the shape of a node's value."""
    parts = [part for part in (real, imaginary) if isinstance(part, fx.Node)]
    full = [part for part in parts if str(value_of(part).shape) == str(value_of(node).shape)]
    if not full:
        return None
    results = []
    for part in (real, imaginary):
        if not isinstance(part, fx.Node):
            part = call(node, _aten.full_like.default, full[0], part)
        elif part not in full:
            part = call(node, _aten.expand_as.default, part, full[0])
        results.append(part)
    return results[0], results[1]


def _product(graph: _Graph, node: Any) -> Parts | None:
    """Multiply: (a + i b) (c + i d) = (a c − b d) + i (a d + b c)."""
    listed = operation(node) == "einsum"
    factors: Sequence[Any] = node.args[1] if listed else node.args
    if len(factors) != 2 or node.kwargs:
        return None

    def times(x: Any, y: Any) -> Any:
        if _is_zero(x) or _is_zero(y):
            return 0
        first = isinstance(x, fx.Node)
        args = (node.args[0], [x, y]) if listed else (x, y) if first else (y, x)
        return call(node, node.target, *args)

    return _multiplied(node, times, *(graph.of(node, factor) for factor in factors))


def _multiplied(
    node: fx.Node, times: Callable[[Any, Any], Any], x: Parts, y: Parts
) -> Parts | None:
    """Return the parts of a product, given a function that multiplies two real values."""
    (a, b), (c, d) = x, y
    real = _plus(node, times(a, c), times(b, d), -1)
    return _whole(node, real, _plus(node, times(a, d), times(b, c), 1))


def _shifted(graph: _Graph, node: Any) -> Parts | None:
    """Move the frequency 0 to the middle, or back, by ``roll``."""
    x, sign = node.args[0], 1 if operation(node) == "fft_fftshift" else -1
    dims = argument(node, 1, "dim")
    dims = list(range(value_of(x).ndim)) if dims is None else dims
    halves = [value_of(x).shape[dim] // 2 for dim in dims]
    if not all(isinstance(half, int) for half in halves):
        return None  # along the batch
    moves = [sign * half for half in halves]
    a, b = (call(node, _aten.roll.default, part, moves, dims) for part in graph.of(node, x))
    return a, b


def _ratio(graph: _Graph, node: Any) -> Parts | None:
    """Divide by a real value, or multiply by the reciprocal of a complex constant."""
    z, divisor = node.args[0], node.args[1]
    if node.kwargs or len(node.args) > 2 or (varies(divisor) and _is_complex(divisor)):
        return None
    a, b = graph.of(node, z)
    if not _is_complex(divisor):
        parts = [call(node, node.target, part, divisor) for part in (a, b)]
        return _whole(node, *parts)
    plain = isinstance(divisor, complex)
    inverse = 1 / divisor if plain else call(node, _aten.reciprocal.default, divisor)

    def times(x: Any, y: Any) -> Any:
        return 0 if _is_zero(x) or _is_zero(y) else call(node, _aten.mul.Tensor, x, y)

    return _multiplied(node, times, (a, b), graph.of(node, inverse))


def _conjugate(graph: _Graph, node: Any) -> Parts:
    a, b = graph.of(node, node.args[0])
    return a, call(node, _aten.neg.default, b)


def _converted(graph: _Graph, node: Any) -> Parts | None:
    """Convert to another dtype; a real value becomes complex."""
    named, (a, b) = dict(node.kwargs), graph.of(node, node.args[0])
    if not _is_complex(node) or named.get("dtype") is None:
        return None
    named["dtype"] = named["dtype"].to_real()
    real = call(node, node.target, a, **named)
    if _is_zero(b):
        return real, call(node, _aten.zeros_like.default, real)
    return real, call(node, node.target, b, **named)


# ------------------------------------------------------------- from real values, and to real values


def _from_vectors(graph: _Graph, node: Any) -> Parts:
    a, b = (call(node, _aten.select.int, node.args[0], -1, at) for at in (0, 1))
    return a, b


def _joined(graph: _Graph, node: Any) -> Parts:
    a, b = node.args
    return a, b


def _vectors(graph: _Graph, node: Any) -> Parts:
    return call(node, _aten.stack.default, list(graph.of(node, node.args[0])), -1), 0


def _absolute(graph: _Graph, node: Any) -> Parts:
    """Take the absolute value: |a + i b| is the norm of the vector (a, b)."""
    vectors, _ = _vectors(graph, node)
    return insert(node, _aten.linalg_vector_norm.default, vectors, 2, [-1]), 0


def _real(graph: _Graph, node: Any) -> Parts:
    return graph.of(node, node.args[0])[0], 0


def _imaginary(graph: _Graph, node: Any) -> Parts:
    return graph.of(node, node.args[0])[1], 0


def _transform(graph: _Graph, node: Any) -> Parts | None:
    return graph.fourier.transform(node, graph.of(node, node.args[0]))


def _short_time(graph: _Graph, node: Any) -> Parts | None:
    return graph.fourier.short_time(node)


_REWRITES: dict[str, Callable[[_Graph, Any], Parts | None]] = {
    **dict.fromkeys(_ON_EACH, _on_each),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(_PRODUCTS, _product),
    "div": _ratio,
    **dict.fromkeys(("fft_fftshift", "fft_ifftshift"), _shifted),
    **dict.fromkeys(("_conj", "conj_physical"), _conjugate),
    "_to_copy": _converted,
    "view_as_complex": _from_vectors,
    "complex": _joined,
    "view_as_real": _vectors,
    "abs": _absolute,
    "real": _real,
    "imag": _imaginary,
    **dict.fromkeys(_TRANSFORMS, _transform),
    "stft": _short_time,
}
