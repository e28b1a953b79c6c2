"""Operations with weights in one form, y = A(x; W) + b, for rules that need x and W separately.

Every dense layer, convolution and transposed convolution is replaced by a :class:`Layer`. A batch
norm that directly follows such a layer is folded into its weights, because the two are one linear
map. Any other batch norm becomes a :class:`Scale`. Only the graph is rewritten, and the model is
not changed: weights are read and folded in each call.
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
from captum_mipin.rules.base import varies
from captum_mipin.rules.geometry import ConvolutionArguments

#: Scale γ, shift β, mean μ, variance σ² and ε of a batch norm.
Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]

#: Number of entries of dense weights that :class:`Made` computes at a time.
_ENTRIES = 1 << 19


@dataclass(frozen=True)
class Made:
    """Dense weights that are an elementwise function of others, such as their positive parts.

    All of these weights at once may take more memory than the rest of the method. Therefore they
    are computed a few rows at a time, each time they are used.

    Attributes:
        of: The elementwise function.
        weights: The arguments of the function, each (outputs, inputs).
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
    """An operation whose outputs are neurons, each with its own weights.

    Attributes:
        key: Name of the operation in fits and errors: module path and operation.
        dim: The dimension of the output that holds the neurons; all other dimensions are rows.
        last: True if no further neurons follow between this operation and the model's output.
    """

    key: str
    dim: int = 1
    last: bool = False

    def products(self, x: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        """Return Σ x_i s_j over samples and positions for each weight w_ij, shaped like W."""
        raise NotImplementedError

    def channelwise(self, values: Tensor, like: Tensor) -> Tensor:
        """Return ``values``, one per neuron, with a shape that broadcasts with ``like``."""
        shape = [1] * like.ndim
        shape[self.dim] = -1
        return values.view(shape)

    def shifted(self, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``value`` + b, or ``value`` if b is None."""
        return value if bias is None else value + self.channelwise(bias, value)

    def outputs(self, value: Tensor) -> Tensor:
        """Return ``value`` in the shape (rows, neurons), with one row per sample and position."""
        return value.movedim(self.dim, 0).flatten(1).mT

    def by_neuron(self, weights: Tensor) -> Tensor:
        """Return a tensor shaped like W in the shape (neurons, weights per neuron)."""
        return weights.reshape(len(weights), -1)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return ``values``, one per neuron, with a shape that broadcasts with W."""
        return values.view(-1, *(1,) * (weight.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class Layer(Neurons):
    """A linear map with weights, y = A(x; W) + b.

    In the graph, the arguments of the operation are x, weight, bias and the batch norm to fold.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return y for the arguments x, weight, bias and batch norm, in the dtype of x."""
        return self.exact(*arguments).to(arguments[0].dtype)

    def exact(self, x: Tensor, *parameters: Any) -> Tensor:
        """Return y in the dtype of the weights, which is wider if the model uses autocast."""
        weight, bias = self.parameters(*parameters)
        return self.apply(x.to(weight.dtype), weight, bias)

    def parameters(
        self, weight: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return W and b, with the batch norm folded in."""
        if norm is None:
            assert weight is not None  # for mypy: an operation without a batch norm has a weight
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
        """Return Σ_j w_ij s_j for each element i of x; of ``x``, only the shape is used."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """A dense layer, y = x Wᵀ + b with W (outputs, inputs).

    Attributes:
        transposed: Whether the weight in the graph has the shape (inputs, outputs).
        alpha: Factor of the weight, an argument of ``addmm``.
        beta: Factor of the bias, an argument of ``addmm``.
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
        """Return of(*weights), whose rows are computed at each use."""
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
        """Return sᵀ x, a tensor (outputs, inputs)."""
        return self.outputs(s).mT @ self.outputs(x)


@dataclass(frozen=True, kw_only=True)
class Convolution(Layer):
    """A convolution or transposed convolution of any number of spatial dimensions.

    Attributes:
        geometry: The arguments of the convolution other than weight and bias: stride, padding, ...
    """

    geometry: Geometry

    def apply(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return A(x; W) + b."""
        return self.geometry.forward(x, weight, bias)

    def adjoint(self, s: Tensor, x: Tensor, weight: Any) -> Tensor:
        """Return the gradient with respect to x, for the convolution's output gradient ``s``."""
        return self.geometry.gradient(s, x, weight, of=0)

    def products(self, x: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to W, for the convolution's output gradient ``s``."""
        return self.geometry.gradient(s, x, weight, of=1)

    def by_neuron(self, weights: Tensor) -> Tensor:
        """Return a tensor shaped like W in the shape (neurons, weights per neuron)."""
        if self.geometry.transposed:  # (in, out / groups, *kernel) → (out, in / groups, *kernel)
            groups = weights.unflatten(0, (self.geometry.groups, -1))
            weights = groups.transpose(1, 2).flatten(0, 1)
        return weights.flatten(1)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return ``values``, one per neuron, with a shape that broadcasts with W."""
        if not self.geometry.transposed:
            return super().spread(values, weight)
        groups = self.geometry.groups
        rows = values.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        return rows.reshape(len(weight), -1, *(1,) * (weight.ndim - 2))


@dataclass(frozen=True, kw_only=True)
class Scale(Layer):
    """A batch norm that is not folded, y = w ⊙ x + b, with one weight w per channel."""

    def apply(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return w ⊙ x + b."""
        return self.shifted(x * self.channelwise(weight, x), bias)

    def adjoint(self, s: Tensor, x: Tensor, weight: Any) -> Tensor:
        """Return w ⊙ s."""
        return s * self.channelwise(weight, s)


#: Function that returns the name of a layer's rule. Its arguments are the layer, whether no other
#: layer comes before it, and whether no other layer comes after it.
Choose = Callable[[Layer, bool, bool], str]

#: Name of a convolution → its number of spatial dimensions.
_CONVOLUTIONS = {f"conv{form}{d}d": d for form in ("", "_transpose") for d in (1, 2, 3)}
_BATCH_NORM = "_native_batch_norm_legit_no_training"


def replace_layers(
    graph: fx.Graph, starts: Sequence[fx.Node], choose: Choose, *, fold: bool = True
) -> None:
    """Rewrite a marked copy of a graph, so that every operation with weights is a :class:`Layer`.

    Args:
        graph: The copy, with the marks of :class:`captum_mipin.propagation.draft.Draft`.
        starts: The nodes of the explained tensors. A batch norm is not folded into one of them.
        choose: Function that returns the name of a layer's rule.
        fold: True to fold each batch norm into the layer before it, or else to replace it by a
            :class:`Scale`. False to leave batch norms as they are.
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
    inputs = [n for n in graph.nodes if n.op == "placeholder" and varies(n)]
    outputs = [n for n in graph.nodes if n.op == "output"]
    first = _nearest(inputs, weighted_nodes, lambda n: [user for user in n.users if varies(user)])
    last = _nearest(outputs, weighted_nodes, lambda n: n.all_input_nodes)
    for node, layer in layers.items():
        node.target = replace(layer, rule=choose(layer, node in first, node in last))


def _weighted(node: Any) -> tuple[Layer, tuple[Any, ...]] | None:
    """Return the layer and arguments that replace an operation; None without weights."""
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
    """Fold a batch norm into the layer before it, or replace it by a scale.

    Returns:
        The node of the batch norm's value, and the layer that this node computes now.
    """
    x, scale, shift, mean, variance, _, eps = node.args
    norm = scale, shift, mean, variance, eps
    (value,) = (user for user in node.users if user.args[1] == 0)
    before = layers.get(x)
    layer: Layer
    if (
        before is None
        or x in starts
        or x.args[3] is not None  # a batch norm is folded into this layer already
        or len(x.users) > 1  # another node needs the value without the batch norm
        or (isinstance(before, Dense) and value_of(x).ndim != 2)  # dim 1 does not hold the neurons
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
    """Return the first goals on all paths from ``nodes`` through tensors that are no masks.

    Args:
        nodes: The nodes at which the paths start.
        goals: The nodes at which the paths end.
        neighbours: Function that returns the next nodes of a node: its users, or its inputs.
    """
    reached, seen = set[Any](), set[Any](nodes)
    while nodes:
        for node in neighbours(nodes.pop()):
            if node in goals:
                reached.add(node)
            elif node not in seen and _is_value(value_of(node)):
                seen.add(node)
                nodes.append(node)
    return reached


def _is_value(value: Any) -> bool:
    """Return True for tensors other than booleans."""
    tensor = isinstance(value, Tensor) and value.dtype != torch.bool
    return tensor or isinstance(value, (tuple, list))
