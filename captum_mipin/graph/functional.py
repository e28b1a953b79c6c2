"""Rewrite an exported graph so that no operation writes to memory, without a second trace.

``torch.export`` records operations as the model calls them: in place, with dropout switched off,
with recurrent layers as one operation. ``ExportedProgram.run_decompositions`` makes such a graph
functional by tracing it again, which takes two to five times as long as the export. Here the same
is done node by node:

- an operation in place becomes its functional form, and later users take the new value;
- where it writes through slices of a tensor, the new value is scattered back into that tensor;
- dropout that is switched off is left out; batch norm becomes the one of evaluation mode;
- einsum, recurrent layers and composite views are each replaced by their own parts.

What cannot be rewritten this way for certain is left to ``run_decompositions``.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from captum_mipin.graph.marks import inherit, set_value, value_of
from captum_mipin.graph.nodes import operation

aten = torch.ops.aten

#: How a changed slice goes back into the tensor it was taken from.
_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}

#: Composite operations whose result never shares memory with an argument.
_FRESH = frozenset(
    {"batch_norm", "gelu", "group_norm", "instance_norm", "layer_norm", "linear", "matmul",
     "rms_norm", "scaled_dot_product_attention", "selu", "silu", "softmax"}
    | {f"{kind}{dims}d" for dims in (1, 2, 3) for kind in
       ("conv", "conv_transpose", "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")}
)  # fmt: skip

#: Composite operations with a rule of their own: they stay whole.
_WHOLE = _FRESH | {"chunk", "contiguous", "flatten", "reshape", "unflatten"}

#: Composite operations that only a second trace takes apart as the rules expect.
_TRACED = frozenset(
    {"alpha_dropout", "feature_alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d",
     "cartesian_prod", "conj_physical"}
)  # fmt: skip

_DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)


class NotRewritableError(Exception):
    """The graph cannot be made functional node by node."""


def functional(graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]]) -> fx.Graph:
    """Return a copy of an exported graph in which no operation writes to memory.

    Args:
        graph: The graph of a program by ``torch.export.export``; it stays as it is.
        decompositions: Operations to take apart, each with a function that computes it.

    Raises:
        NotRewritableError: An operation may write to memory that others read, and which ones read
            it cannot be told from the graph; or an operation is random, or has graphs inside.
    """
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, copies)
    result.output(output)
    for node in result.nodes:
        if node.op not in ("placeholder", "call_function", "output") or isinstance(
            node.target, torch._ops.HigherOrderOperator
        ):
            raise NotRewritableError(f"{node} has a graph inside")
        if operation(node).removesuffix("_") in _TRACED:
            raise NotRewritableError(f"{node} is taken apart by a second trace")
    known: dict[str, fx.Graph] = {}
    for node in list(result.nodes):
        if node.target in decompositions:
            _take_apart(result, node, decompositions, known)
    _remove_writes(result)
    for node in list(result.nodes):
        if node.target in _DROPOUTS:
            _remove_dropout(result, node)
        elif node.target is aten.batch_norm.default:
            _evaluate_batch_norm(result, node)
        elif _is_composite_view(node) or operation(node) == "unsafe_chunk":
            _take_apart(result, node, {}, known)
    result.eliminate_dead_code()
    result = _renamed(result)
    pairs = zip(
        graph.find_nodes(op="placeholder"), result.find_nodes(op="placeholder"), strict=True
    )
    for before, after in pairs:  # a graph would call an input named "input" otherwise
        after.name = before.name
    return result


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_composite_view(node: fx.Node) -> bool:
    """Return True for a composite operation whose result may be a view, such as ``swapaxes``."""
    target = node.target
    return (
        isinstance(target, OpOverload)
        and operation(node) not in _WHOLE
        and any(value.alias_info is not None for value in target._schema.returns)
        and target._can_decompose()
    )


def _shares_memory_with(node: fx.Node) -> list[fx.Node]:
    """Return the arguments with which the result of a node may share memory."""
    target = node.target
    if target is operator.getitem or _writes(node):
        return [node.all_input_nodes[0]]
    if not isinstance(target, OpOverload) or operation(node) in _FRESH:
        return []
    if target in _DROPOUTS or target._can_decompose():  # a composite may return an argument
        return [n for n in node.all_input_nodes if isinstance(value_of(n), (Tensor, list, tuple))]
    pairs = zip(target._schema.arguments, node.args, strict=False)
    return [n for argument, n in pairs if argument.alias_info and isinstance(n, fx.Node)]


def _families(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return for each node all nodes whose values may share memory with its own."""
    families = {node: [node] for node in graph.nodes}
    for node in graph.nodes:
        for other in _shares_memory_with(node) if node.op == "call_function" else ():
            if families[other] is not families[node]:
                families[other].extend(families[node])
                for member in families[node]:
                    families[member] = families[other]
    return families


def _remove_writes(graph: fx.Graph) -> None:
    """Put the functional form in the place of every operation in place."""
    writing = [node for node in graph.nodes if _writes(node) and node.target not in _DROPOUTS]
    if not writing:
        return
    families = _families(graph)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in writing:
        _remove_write(graph, node, families[node], order)


def _remove_write(
    graph: fx.Graph, node: fx.Node, family: Sequence[fx.Node], order: dict[fx.Node, int]
) -> None:
    """Put the functional form in the place of one operation in place.

    Args:
        graph: The graph.
        node: The operation; its first argument x is what it writes to.
        family: The nodes whose values may share memory with x.
        order: Positions of the nodes; nodes that a rewrite adds get one.
    """
    x = node.all_input_nodes[0]
    views = list(_views(x))  # x, what x is a slice of, ... up to a tensor with memory of its own
    base = views[-1].all_input_nodes[0] if views else x

    def later(n: fx.Node) -> list[fx.Node]:
        return [user for user in n.users if order[user] > order[node]]

    if any(member.op == "placeholder" for member in family):
        raise NotRewritableError(f"{node} writes to an input, a parameter or a buffer")
    if node.args[0] is not x or any(later(view) for view in views[1:]):
        raise NotRewritableError(f"{node} writes to what other views show")
    members = {n for n in family if order[n] < order[node]} - {x, base, *views}
    if any(later(member) for member in members):
        raise NotRewritableError(f"{node} writes to what others read later")
    node.target = _functional_form(node)
    value, position = node, order[node]
    for view in views:  # x = slice(base): base becomes slice_scatter(base, new x)
        source = view.all_input_nodes[0]
        with graph.inserting_after(value):
            scattered = graph.call_function(
                _SCATTERS[view.target], (source, value, *view.args[1:]), dict(view.kwargs)
            )
        inherit(scattered, source)
        order[scattered] = position
        value = scattered
    for user in later(x):
        user.replace_input_with(x, node)
    if views:
        family.append(value)  # type: ignore[attr-defined]  # the shared list of the family
        for user in later(base):
            user.replace_input_with(base, value)


def _views(x: fx.Node) -> Iterator[fx.Node]:
    """Go from a slice to what it is a slice of, as far as there are slices."""
    while x.op == "call_function" and x.target in _SCATTERS:
        yield x
        x = x.all_input_nodes[0]


def _functional_form(node: fx.Node) -> Any:
    """Return the operation that computes what ``node`` writes.

    Raises:
        NotRewritableError: There is none, or it gives another shape or dtype.
    """
    assert isinstance(node.target, OpOverload)  # for mypy: it writes
    name, overload = node.target.__name__.split(".")
    form: Any = getattr(getattr(aten, name.removesuffix("_"), None), overload, None)
    if not name.endswith("_") or node.target.namespace != "aten" or form is None:
        raise NotRewritableError(f"{node.target} has no functional form")
    # A composite has parts that have rules; a form of other arguments is another function.
    if form._can_decompose() or _arguments(form) != _arguments(node.target):
        raise NotRewritableError(f"{node.target} has no functional form of its own")
    x = value_of(node)
    values = [value_of(n) for n in node.all_input_nodes]
    if x.is_floating_point() and all(
        getattr(value, "dtype", x.dtype) == x.dtype for value in values
    ):
        return form  # of one floating dtype, both forms give the same shape and dtype
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with x.fake_mode:
        y = form(*args, **kwargs)
    if (y.dtype, str(y.shape)) != (x.dtype, str(x.shape)):
        raise NotRewritableError(f"{node.target} casts or broadcasts what it writes")
    return form


def _arguments(target: OpOverload) -> list[tuple[str, str]]:
    """Return names and types of the arguments of an operation."""
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _remove_dropout(graph: fx.Graph, node: fx.Node) -> None:
    """Leave out dropout that is switched off."""
    arguments: Any = node.args
    x, _, train = arguments
    if train:
        raise NotRewritableError("dropout is switched on")
    node.replace_all_uses_with(x)
    graph.erase_node(node)


def _evaluate_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Put the batch norm of evaluation mode in the place of the one for both modes."""
    arguments = node.args if len(node.args) == 9 and not node.kwargs else (None,) * 9
    x, weight, bias, mean, variance, training, momentum, eps, _ = arguments
    if training is not False or mean is None or variance is None:
        raise NotRewritableError("batch norm uses the statistics of the batch")
    with graph.inserting_before(node):
        norm = graph.call_function(
            aten._native_batch_norm_legit_no_training.default,
            (x, weight, bias, mean, variance, momentum, eps),
        )
        first = graph.call_function(operator.getitem, (norm, 0))
    inherit(first, node)
    inherit(norm, node)
    empty = value_of(node).new_empty(0)
    set_value(norm, (value_of(node), empty, empty))
    node.replace_all_uses_with(first)
    graph.erase_node(node)


@contextmanager
def _no_onednn() -> Iterator[None]:
    """Switch oneDNN off, as ``torch.export`` does while it traces."""
    backend: Any = torch.backends.mkldnn
    enabled, backend.enabled = backend.enabled, False
    try:
        yield
    finally:
        backend.enabled = enabled


def _take_apart(
    graph: fx.Graph,
    node: fx.Node,
    decompositions: Mapping[Any, Callable[..., Any]],
    known: dict[str, fx.Graph],
) -> None:
    """Put the operations that a composite one consists of in its place.

    Args:
        graph: The graph.
        node: The composite operation.
        decompositions: As for :func:`functional`.
        known: The parts of operations seen before, by target, arguments and shapes.
    """
    numbers = {n: f"%{index} {value_of(n)!r}" for index, n in enumerate(node.all_input_nodes)}
    key = f"{node.target} {fx.map_arg((node.args, node.kwargs), numbers.__getitem__)}"
    if key not in known:
        known[key] = _parts(node, decompositions)
    parts = known[key]
    copies = dict(zip(parts.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        for part in parts.nodes:
            if part.op == "call_function":
                copies[part] = graph.node_copy(part, copies.__getitem__)
                inherit(copies[part], node)
                set_value(copies[part], value_of(part))
            elif part.op == "get_attr":
                raise NotRewritableError(f"{node.target} makes constants")
    results: Any = parts.output_node().args[0]
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(copies[results])
    for user in list(node.users):  # each takes one of several results
        position: Any = user.args[1]
        user.replace_all_uses_with(copies[results[position]])
        graph.erase_node(user)
    graph.erase_node(node)


def _parts(node: fx.Node, decompositions: Mapping[Any, Callable[..., Any]]) -> fx.Graph:
    """Return the operations that a composite one consists of, as a graph of its inputs."""
    inputs, table = node.all_input_nodes, dict(decompositions)
    run: Any = table.get(node.target, node.target)

    def compute(*values: Any) -> Any:
        known = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return run(*args, **kwargs)

    values = [value_of(n) for n in inputs]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    # pre_dispatch keeps other composites, such as linear in an LSTM, in one piece
    whole = node.target in table
    trace = make_fx(compute, table, pre_dispatch=whole, _allow_non_fake_inputs=True)
    try:
        # without oneDNN, which has recurrent layers of its own that cannot be taken apart
        with mode, enable_python_dispatcher(), _no_onednn():
            return trace(*values).graph
    except Exception as error:
        raise NotRewritableError(f"{node.target} cannot be traced by itself") from error


def _renamed(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph whose nodes are named after their operations.

    Parts of a result are numbered as a second trace does, which names all parts of all results,
    used or not: files and reports of fits hold such names.
    """
    result, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    first: dict[fx.Node, int] = {}  # operation with several results -> number of its first part
    parts = 0
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        name = operation(node) if node.op == "call_function" else ""
        if isinstance(value_of(node), (tuple, list)):
            first[node], parts = parts, parts + len(value_of(node))
        elif node.target is operator.getitem and node.args[0] in first:
            number = first[node.args[0]] + node.args[1]
            name = f"getitem_{number}" if number else "getitem"
        copies[node] = result.create_node(node.op, node.target, args, kwargs, name or node.name)
        inherit(copies[node], node)
    result.lint()
    return result
