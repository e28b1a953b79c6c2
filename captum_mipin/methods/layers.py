"""Operations with weights in one form, y = A(x; W) + b, for methods that treat x and W apart.

Dense layers, convolutions and transposed convolutions, in any spelling, become one :class:`Layer`
each. A batch norm right behind one is folded into its weights, because the two are one linear map;
any other batch norm becomes a :class:`Scale`. The graph is rewritten, never the model: weights are
read and folded at each call.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.graph.marks import mark, marks, module_stack, original, set_module_stack, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.methods.base import NamedOperation
from captum_mipin.regression.geometry import Geometry
from captum_mipin.rules.geometry import ConvolutionArguments

#: Scale γ, shift β, mean μ, variance σ² and ε of a batch norm.
Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]

#: Number of entries of dense weights that :class:`Made` computes at a time.
_ENTRIES = 1 << 19


@dataclass(frozen=True)
class Made:
    """Dense weights that are computed from others entry by entry, such as their positive parts.

    All of them at once may take more memory than everything else, so each use computes them some
    rows at a time.

    Attributes:
        of: The function that computes them.
        weights: Its arguments, each (outputs, inputs).
    """

    of: Callable[..., Tensor]
    weights: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Return the number of rows that are computed at a time."""
        return max(1, _ENTRIES // max(1, self.weights[0].shape[1]))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.of, *(weight.split(self.rows) for weight in self.weights))


@dataclass(frozen=True, kw_only=True)
class Neurons(NamedOperation):
    """An operation whose outputs are neurons: each reads its inputs with weights of its own.

    Attributes:
        key: Name of the operation in fits and errors: module path and operation.
        dim: The dimension of the output along which neurons lie; all other dimensions are rows.
        last: Whether the model's output is made of its outputs by no further neurons.
    """

    key: str
    dim: int = 1
    last: bool = False

    def products(self, x: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        """Return Σ x_i s_j over samples and positions, for each weight w_ij: shaped like W."""
        raise NotImplementedError

    def channelwise(self, values: Tensor, like: Tensor) -> Tensor:
        """Return one value for each neuron, shaped to broadcast with ``like``."""
        shape = [1] * like.ndim
        shape[self.dim] = -1
        return values.view(shape)

    def shifted(self, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``value`` + b."""
        return value if bias is None else value + self.channelwise(bias, value)

    def outputs(self, value: Tensor) -> Tensor:
        """Return ``value`` as (rows, neurons); each sample and position is a row."""
        return value.movedim(self.dim, 0).flatten(1).mT

    def by_neuron(self, weights: Tensor) -> Tensor:
        """Return a tensor shaped like W as (neurons, weights of each neuron)."""
        return weights.reshape(len(weights), -1)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return one value for each neuron, shaped to broadcast with W."""
        return values.view(-1, *(1,) * (weight.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class Layer(Neurons):
    """A linear map with weights, y = A(x; W) + b.

    As an operation of the graph it takes x, its weight and bias, and a batch norm.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return y for x, weight, bias and batch norm."""
        x, *parameters = arguments
        return self.apply(x, *self.parameters(*parameters))

    def parameters(
        self, weight: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return W and b, with the batch norm folded in."""
        if norm is None:
            assert weight is not None  # for mypy: only a batch norm of its own has no weight
            return weight, bias
        scale, shift, mean, variance, eps = norm
        # g = γ / √(σ² + ε): the batch norm is z ↦ g (z − μ) + β
        factor = (variance + eps).rsqrt() * (1 if scale is None else scale)
        if weight is None:
            weight, bias = factor, -mean * factor
        else:
            # g (W x + b − μ) + β = (g W) x + g (b − μ) + β
            weight = weight * self.spread(factor, weight)
            bias = ((0 if bias is None else bias) - mean) * factor
        return weight, bias if shift is None else bias + shift

    def made(self, of: Callable[..., Tensor], *weights: Tensor) -> Any:
        """Return of(*weights), shaped like W, for :meth:`apply` and :meth:`adjoint`."""
        return of(*weights)

    def apply(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return A(x; W) + b."""
        raise NotImplementedError

    def adjoint(self, s: Tensor, x: Tensor, weight: Any) -> Tensor:
        """Return Σ_j w_ij s_j for each element i of x; only the shape of ``x`` counts."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """A dense layer, y = x Wᵀ + b with W (outputs, inputs).

    Attributes:
        transposed: Whether the graph passes the weight as (inputs, outputs).
        alpha: Factor of the weight, as ``addmm`` has it.
        beta: Factor of the bias, as ``addmm`` has it.
    """

    transposed: bool = False
    alpha: float = 1
    beta: float = 1
    dim: int = -1

    def parameters(
        self, weight: Any, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return W (outputs, inputs) and b, with factors and the batch norm folded in."""
        weight = weight.mT if self.transposed else weight
        weight = weight if self.alpha == 1 else weight * self.alpha
        bias = bias if bias is None or self.beta == 1 else bias * self.beta
        return super().parameters(weight, bias, norm)

    def made(self, of: Callable[..., Tensor], *weights: Tensor) -> Made:
        """Return of(*weights), computed some rows at a time."""
        return Made(of, weights)

    def apply(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b."""
        if isinstance(weight, Made):
            return self.shifted(torch.cat([F.linear(x, rows) for rows in weight], -1), bias)
        return F.linear(x, weight, bias)

    def adjoint(self, s: Tensor, x: Tensor, weight: Any) -> Tensor:
        """Return s W."""
        if not isinstance(weight, Made):
            return torch.matmul(s, weight)
        total = torch.zeros_like(x)
        for part, rows in zip(s.split(weight.rows, -1), weight, strict=True):
            total += part @ rows
        return total

    def products(self, x: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        """Return sᵀ x: (outputs, inputs)."""
        return self.outputs(s).mT @ self.outputs(x)


@dataclass(frozen=True, kw_only=True)
class Convolution(Layer):
    """A convolution or transposed convolution of any number of spatial dimensions.

    Attributes:
        geometry: Its arguments besides weight and bias.
    """

    geometry: Geometry

    def apply(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return A(x; W) + b."""
        return self.geometry.forward(x, weight, bias)

    def adjoint(self, s: Tensor, x: Tensor, weight: Any) -> Tensor:
        """Return the convolution's gradient with respect to x at ``s``."""
        return self.geometry.gradient(s, x, weight, of=0)

    def products(self, x: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution's gradient with respect to W at ``s``."""
        return self.geometry.gradient(s, x, weight, of=1)

    def by_neuron(self, weights: Tensor) -> Tensor:
        """Return a tensor shaped like W as (neurons, weights of each neuron)."""
        if self.geometry.transposed:  # (in, out / groups, *kernel) → (out, in / groups, *kernel)
            groups = weights.unflatten(0, (self.geometry.groups, -1))
            weights = groups.transpose(1, 2).flatten(0, 1)
        return weights.flatten(1)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return one value for each neuron, shaped to broadcast with W."""
        if not self.geometry.transposed:
            return super().spread(values, weight)
        groups = self.geometry.groups
        rows = values.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        return rows.reshape(len(weight), -1, *(1,) * (weight.ndim - 2))


@dataclass(frozen=True, kw_only=True)
class Scale(Layer):
    """A batch norm of its own, y = w ⊙ x + b with one weight w for each channel."""

    def apply(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return w ⊙ x + b."""
        return self.shifted(x * self.channelwise(weight, x), bias)

    def adjoint(self, s: Tensor, x: Tensor, weight: Any) -> Tensor:
        """Return w ⊙ s."""
        return s * self.channelwise(weight, s)


#: (layer, whether it is a first layer after the inputs, whether a last one before the output) →
#: name of its rule.
Choose = Callable[[Layer, bool, bool], str]

#: Name of a convolution → its number of spatial dimensions.
_CONVOLUTIONS = {f"conv{form}{d}d": d for form in ("", "_transpose") for d in (1, 2, 3)}
_BATCH_NORM = "_native_batch_norm_legit_no_training"


def replace_layers(
    graph: fx.Graph, batch: str, starts: Sequence[fx.Node], choose: Choose, *, fold: bool = True
) -> None:
    """Rewrite a marked copy of a graph, so that every operation with weights is a :class:`Layer`.

    Args:
        graph: See :class:`captum_mipin.propagation.draft.Draft`.
        batch: The symbol of the batch size.
        starts: The nodes where the way back ends; no batch norm is folded across them.
        choose: Returns the name of a layer's rule.
        fold: Whether to fold batch norms into the layer before, and to make the others a
            :class:`Scale`. If False, batch norms are not changed.
    """
    layers: dict[Any, Layer] = {}
    node: Any
    for node in list(graph.nodes):
        weighted = _weighted(node)
        if weighted is not None:
            mark(node, original=original(node))
            layers[node], node.args = weighted
            node.kwargs = {}
    norms = [node for node in graph.nodes if operation(node) == _BATCH_NORM] if fold else []
    for node in norms:
        if value_of(node.args[0]).ndim > 1:
            value, layer = _replace_norm(graph, node, starts, layers)
            layers[value] = layer
    weighted_nodes = {node for node, layer in layers.items() if not isinstance(layer, Scale)}
    inputs = [n for n in graph.nodes if n.op == "placeholder" and _is_per_example(n, batch)]
    outputs = [n for n in graph.nodes if n.op == "output"]
    first = _nearest(inputs, weighted_nodes, lambda n: list(n.users))
    last = _nearest(outputs, weighted_nodes, lambda n: n.all_input_nodes)
    for node, layer in layers.items():
        node.target = replace(layer, rule=choose(layer, node in first, node in last))


def _weighted(node: Any) -> tuple[Layer, tuple[Any, ...]] | None:
    """Return the layer that an operation is and its new arguments, or None if it has no weights."""
    name = operation(node)
    if node.op != "call_function":
        return None
    if name in ("linear", "mm", "addmm"):
        x = 1 if name == "addmm" else 0
        weight = argument(node, x + 1, "weight")
        if value_of(weight).ndim != 2:
            return None
        bias = {"linear": argument(node, 2, "bias"), "mm": None, "addmm": node.args[0]}[name]
        alpha, beta = (node.kwargs.get(factor, 1) for factor in ("alpha", "beta"))
        dense = Dense(
            key=marks(node).key, name="linear", transposed=name != "linear", alpha=alpha, beta=beta
        )
        return dense, (node.args[x], weight, bias, None)
    if name not in _CONVOLUTIONS or value_of(node.args[0]).ndim != _CONVOLUTIONS[name] + 2:
        return None
    parsed = ConvolutionArguments.of(node.args[1:], node.kwargs, transposed="transpose" in name)
    convolution = Convolution(key=marks(node).key, name=name, geometry=parsed.geometry)
    return convolution, (node.args[0], parsed.weight, parsed.bias, None)


def _replace_norm(
    graph: fx.Graph, node: Any, starts: Sequence[fx.Node], layers: dict[Any, Layer]
) -> tuple[Any, Layer]:
    """Fold a batch norm into the layer before it, or make it a scale.

    Returns:
        The node of the batch norm's value, which takes its place, and the layer that it becomes.
    """
    x, scale, shift, mean, variance, _, eps = node.args
    norm = scale, shift, mean, variance, eps
    (value,) = (user for user in node.users if user.args[1] == 0)
    before = layers.get(x)
    layer: Layer
    if (
        before is None
        or x in starts
        or x.args[3] is not None  # it has a batch norm already
        or len(x.users) > 1  # another node needs the value without the batch norm
        or (isinstance(before, Dense) and value_of(x).ndim != 2)  # dimension 1 is not its outputs
    ):
        layer, args = Scale(key=marks(node).key, name=_BATCH_NORM), (x, None, None, norm)
        mark(value, key=layer.key, original=node.target)
    else:
        layer, args = layers.pop(x), (*x.args[:3], norm)
        set_module_stack(value, module_stack(x))
        mark(value, key=layer.key, original=marks(x).original)
    value.target, value.args = layer, args
    for user in [user for user in node.users if user is not value]:
        if not user.users:
            graph.erase_node(user)
    graph.erase_node(node)
    if before is layer:
        graph.erase_node(x)
    return value, layer


def _nearest(
    nodes: list[Any], goals: Collection[Any], neighbours: Callable[[Any], list[Any]]
) -> set[Any]:
    """Return the goals that are reached from ``nodes`` with no other goal in between."""
    reached, seen = set[Any](), set[Any](nodes)
    while nodes:
        for node in neighbours(nodes.pop()):
            if node in goals:
                reached.add(node)
            elif node not in seen and isinstance(value_of(node), (Tensor, tuple, list)):  # no sizes
                seen.add(node)
                nodes.append(node)
    return reached


def _is_per_example(node: Any, batch: str) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.ndim > 0 and str(value.shape[0]) == batch
