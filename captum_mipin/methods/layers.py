"""Operations with weights in one form, y = A(x; W) + b, for methods that treat values and weights apart.

Dense layers, convolutions and their transposes, in any spelling, become a :class:`Layer` each; a batch norm right behind one
is folded into its weights, for the two are one linear map; any other batch norm is a layer of its own, with one weight a
channel. The graph is rewritten, never the model: weights are read, and folded, as they are at each call.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.graph.marks import mark, marks, module_stack, original, set_module_stack, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.regression.geometry import Geometry
from captum_mipin.rules.geometry import ConvolutionArguments

#: Scale, shift, mean, variance and ε of a batch norm.
Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]


#: Entries of dense weights that are made at a time.
_PART = 1 << 19


@dataclass(frozen=True)
class Made:
    """Weights of a dense layer that follow from others entry by entry, such as their positive parts.

    There may be more of them than of all else, so they are made some rows at a time, each time they are used.
    """

    of: Callable[..., Tensor]
    weights: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Rows made at a time."""
        return max(1, _PART // max(1, self.weights[0].shape[1]))

    def __iter__(self) -> Iterator[Tensor]:
        return (
            self.of(*parts)
            for parts in zip(*(weight.split(self.rows) for weight in self.weights), strict=True)
        )


@dataclass(frozen=True)
class Layer:
    """A linear map with weights, as an operation of the graph on x, its weight and bias as they were given, and a batch norm.

    Attributes:
        kind: "dense", "convolution", "transposed" convolution, or "scale": one weight a channel, dimension 1.
        key: Module path and operation: the layer's name.
        name: Of the operation that it was made of.
        rule: Name of the rule that it goes by.
        transposed: Whether a dense weight is given as (inputs, outputs).
        factors: What a dense bias and weight are multiplied by.
        geometry: Of a convolution or a transposed one; None for other kinds.
    """

    kind: Literal["dense", "convolution", "transposed", "scale"]
    key: str
    name: str
    rule: str = ""
    transposed: bool = False
    factors: tuple[float, float] = (1, 1)
    geometry: Geometry | None = None

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.rule

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> Tensor:
        """A(x; W) + b."""
        return self.apply(x, *self.parameters(weight, bias, norm))

    def parameters(
        self, weight: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        """W and b, a batch norm folded in; W of a dense layer is (outputs, inputs)."""
        if weight is not None and self.kind == "dense":
            weight = weight.mT if self.transposed else weight
            weight = weight if self.factors[1] == 1 else weight * self.factors[1]
            bias = bias if bias is None or self.factors[0] == 1 else bias * self.factors[0]
        if norm is None:
            assert weight is not None  # for mypy: only a batch norm alone has none
            return weight, bias
        scale, shift, mean, variance, eps = norm
        factor = (variance + eps).rsqrt() * (1 if scale is None else scale)
        if weight is None:
            weight, bias = factor, -mean * factor
        else:
            weight, bias = (
                weight * self.spread(factor, weight),
                ((0 if bias is None else bias) - mean) * factor,
            )
        return weight, bias if shift is None else bias + shift

    def made(self, of: Callable[..., Tensor], *weights: Tensor) -> Tensor | Made:
        """Weights that follow from these, shaped like W, entry by entry."""
        return Made(of, weights) if self.kind == "dense" else of(*weights)

    def apply(self, x: Tensor, weight: Tensor | Made, bias: Tensor | None = None) -> Tensor:
        """A(x; W) + b."""
        if isinstance(weight, Made):
            return self.shifted(torch.cat([F.linear(x, part) for part in weight], -1), bias)
        if self.kind == "dense":
            return F.linear(x, weight, bias)
        if self.kind == "scale":
            return self.shifted(x * self._channels(weight, x), bias)
        return self._convolution().forward(x, weight, bias)

    def shifted(self, value: Tensor, bias: Tensor | None) -> Tensor:
        """``value`` + b."""
        if bias is None:
            return value
        return value + (bias if self.kind == "dense" else self._channels(bias, value))

    def adjoint(self, s: Tensor, x: Tensor, weight: Tensor | Made) -> Tensor:
        """Σ_j W_ij s_j, shaped like ``x``."""
        if isinstance(weight, Made):
            found = torch.zeros_like(x)
            for s_part, part in zip(s.split(weight.rows, -1), weight, strict=True):
                found += s_part @ part
            return found
        if self.kind == "dense":
            return s @ weight
        if self.kind == "scale":
            return s * self._channels(weight, s)
        return self._convolution().gradient(s, x, weight, of=0)

    def products(self, x: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        """Σ over samples (and places) of x_i s_j, for each weight W_ij."""
        if self.kind == "dense":
            return s.reshape(-1, s.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        if self.kind == "scale":
            return (x * s).transpose(0, 1).flatten(1).sum(1)
        return self._convolution().gradient(s, x, weight, of=1)

    def of_outputs(self, weights: Tensor) -> Tensor:
        """What is shaped like W as (outputs, weights of each)."""
        if self.kind == "transposed":
            found: Tensor = (
                weights.unflatten(0, (self._convolution().groups, -1))
                .transpose(1, 2)
                .flatten(0, 1)
                .flatten(1)
            )
            return found
        return weights.reshape(len(weights), -1)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """One value an output, shaped to multiply W."""
        ones = (1,) * (weight.ndim - 2)
        if self.kind == "transposed":
            groups = self._convolution().groups
            each_group = values.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
            return each_group.reshape(len(weight), -1, *ones)
        return values.view(-1, *(1,) * (weight.ndim - 1))

    def outputs(self, value: Tensor) -> Tensor:
        """``value`` as (rows, outputs): each sample, and each place, is a row."""
        return (
            value.reshape(-1, value.shape[-1])
            if self.kind == "dense"
            else value.transpose(0, 1).flatten(1).mT
        )

    def _channels(self, values: Tensor, like: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (like.ndim - 2))

    def _convolution(self) -> Geometry:
        assert self.geometry is not None  # for mypy: only convolutions come here
        return self.geometry


#: (layer, whether the input goes there before any other, whether the output comes from there) → name of the layer's rule.
Choose = Callable[[Layer, bool, bool], str]

_CONVOLUTIONS = {f"conv{dims}d": dims for dims in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{dims}d": dims for dims in (1, 2, 3)}
_DENSE = ("linear", "mm", "addmm")
_BATCH_NORM = "_native_batch_norm_legit_no_training"


def layers(
    graph: fx.Graph, batch: str, starts: Sequence[fx.Node], choose: Choose, fold: bool = True
) -> None:
    """Rewrite a marked copy of a graph: every operation with weights becomes a :class:`Layer`.

    Args:
        graph: See :class:`captum_mipin.propagation.draft.Draft`.
        batch: The symbol of the batch size.
        starts: Where the signal is wanted; no batch norm is folded past it.
        choose: The rule that each goes by.
        fold: Whether batch norms are folded into the layer before. Else, and where there is none, they are left.
    """
    found: dict[Any, Layer] = {}
    node: Any
    for node in list(graph.nodes):
        made = _weighted(node)
        if made is not None:
            found[node], node.args = made
            mark(node, original=original(node))
    if fold:
        for node in list(graph.nodes):
            if (
                node not in found
                and operation(node) == _BATCH_NORM
                and value_of(node.args[0]).ndim > 1
            ):
                norm, layer = _normed(graph, node, starts, found)
                found[norm] = layer
    inputs = [
        node for node in graph.nodes if node.op == "placeholder" and _per_example(node, batch)
    ]
    weighted = {node for node, layer in found.items() if layer.kind != "scale"}
    first = _next(inputs, weighted, lambda node: list(node.users))
    last = _next(
        [node for node in graph.nodes if node.op == "output"],
        weighted,
        lambda node: node.all_input_nodes,
    )
    for node, layer in found.items():
        node.target = replace(layer, rule=choose(layer, node in first, node in last))


def _weighted(node: Any) -> tuple[Layer, tuple[Any, ...]] | None:
    """The layer that an operation is, and what it takes; None for one without weights."""
    name = operation(node)
    if node.op != "call_function" or name not in (*_DENSE, *_CONVOLUTIONS, *_TRANSPOSED):
        return None
    key: str = marks(node).key
    if name in _DENSE:
        at = 1 if name == "addmm" else 0
        if value_of(argument(node, at + 1, "weight")).ndim != 2:
            return None
        bias = {"linear": argument(node, 2, "bias"), "mm": None, "addmm": node.args[0]}[name]
        factors = (node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1))
        args = (node.args[at], argument(node, at + 1, "weight"), bias, None)
        node.kwargs = {}
        return Layer("dense", key, "linear", transposed=name != "linear", factors=factors), args
    dims = _CONVOLUTIONS.get(name) or _TRANSPOSED[name]
    if value_of(node.args[0]).ndim != dims + 2:
        return None
    transposed = name in _TRANSPOSED
    parsed = ConvolutionArguments.of(node.args[1:], node.kwargs, transposed=transposed)
    kind: Literal["transposed", "convolution"] = "transposed" if transposed else "convolution"
    node.kwargs = {}
    args = (node.args[0], parsed.weight, parsed.bias, None)
    return Layer(kind, key, name, geometry=parsed.geometry), args


def _normed(
    graph: fx.Graph, node: Any, starts: Sequence[fx.Node], found: dict[Any, Layer]
) -> tuple[Any, Layer]:
    """The node that takes a batch norm's place, and its layer."""
    x, scale, shift, mean, variance, _, eps = node.args
    norm = scale, shift, mean, variance, eps
    (value,) = (user for user in node.users if user.args[1] == 0)
    before = found.get(x)
    alone = (
        before is None
        or x in starts
        or len(x.users) > 1
        or (before.kind == "dense" and value_of(x).ndim != 2)
    )
    if alone:
        layer, args = Layer("scale", marks(node).key, _BATCH_NORM), (x, None, None, norm)
        mark(value, key=marks(node).key, original=node.target)
    else:
        layer, args = found.pop(x), (*x.args[:3], norm)
        set_module_stack(value, module_stack(x))
        mark(value, key=layer.key, original=marks(x).original)
    value.target, value.args = layer, args
    for user in [user for user in node.users if user is not value]:
        if not user.users:
            graph.erase_node(user)
    graph.erase_node(node)
    if not alone:
        graph.erase_node(x)
    return value, layer


def _next(nodes: list[Any], found: Collection[Any], near: Callable[[Any], list[Any]]) -> set[Any]:
    """Those of ``found`` that are next to these nodes in one direction, with none between."""
    result, seen = set[Any](), set[Any](nodes)
    while nodes:
        for node in near(nodes.pop()):
            if node in found:
                result.add(node)
            elif node not in seen and isinstance(value_of(node), (Tensor, tuple, list)):  # no sizes
                seen.add(node)
                nodes.append(node)
    return result


def _per_example(node: Any, batch: str) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.ndim > 0 and str(value.shape[0]) == batch
