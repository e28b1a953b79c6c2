"""Rewrite an exported graph so that no operation writes to memory, without a second trace.

``torch.export`` records operations as the model calls them: some work in place, dropout is present
but switched off, and a recurrent layer is a single operation.
``ExportedProgram.run_decompositions`` makes such a graph functional by tracing it again, which
takes two to five times as long as the export. This module does the same node by node:

- An operation in place is replaced by its functional form, and later users take the new value.
- If the operation writes to a slice of a tensor, the new value is scattered into that tensor.
- Dropout is removed; batch norm is replaced by the operation for evaluation mode.
- Einsum, recurrent layers and composite views are replaced by the operations they consist of.

If it is not certain that a graph can be rewritten in this way, ``NotRewritableError`` is raised,
and the caller uses ``run_decompositions``.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from captum_mipin.graph.marks import inherit, set_value, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.graph.recurrence import traced

aten = torch.ops.aten

#: Operation that takes a slice → operation that returns the whole tensor with that slice changed.
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

#: Composite operations that have a rule of their own, so they are not replaced by their parts.
_WHOLE = _FRESH | {"chunk", "contiguous", "flatten", "reshape", "unflatten"}

#: Composite operations whose parts have rules only after a second trace by torch.
_TRACED = frozenset(
    {"alpha_dropout", "feature_alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d",
     "cartesian_prod", "conj_physical"}
)  # fmt: skip

_DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)


class NotRewritableError(Exception):
    """The graph cannot be made functional node by node.

    This error never reaches users: :mod:`captum_mipin.graph.capture` catches it and lets torch
    trace the program again.
    """


def functional(graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]]) -> fx.Graph:
    """Return a copy of an exported graph in which no operation writes to memory.

    Args:
        graph: The graph of a program from ``torch.export.export``; it is not changed.
        decompositions: Composite operation → function that computes it from simpler operations. All
            operations in this mapping are replaced by their parts.

    Raises:
        NotRewritableError: The graph does not show which operations read the memory that another
            operation writes to; or an operation is random, or has a graph as its argument.
    """
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, copies)
    result.output(output)
    for node in result.nodes:
        if node.op not in ("placeholder", "call_function", "output") or isinstance(
            node.target, torch._ops.HigherOrderOperator
        ):
            raise NotRewritableError(f"{node} has a graph as its argument: trace again")
        if operation(node).removesuffix("_") in _TRACED:
            raise NotRewritableError(f"{node} is replaced by its parts only if torch traces again")
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
        elif node.target in decompositions:  # such as addcmul, from addcmul_
            _take_apart(result, node, decompositions, known)
    result.eliminate_dead_code()
    result = _renamed(result)
    pairs = [g.find_nodes(op="placeholder") for g in (graph, result)]
    # fx.Graph renames some placeholders, such as "input"
    for before, after in zip(*pairs, strict=True):
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
    """Return the argument nodes with which the result of a node may share memory."""
    target = node.target
    if target is operator.getitem or _writes(node):
        return [node.all_input_nodes[0]]
    if not isinstance(target, OpOverload) or operation(node) in _FRESH:
        return []
    if target in _DROPOUTS or target._can_decompose():  # these may return an argument itself
        return [n for n in node.all_input_nodes if isinstance(value_of(n), (Tensor, list, tuple))]
    pairs = zip(target._schema.arguments, node.args, strict=False)
    return [n for argument, n in pairs if argument.alias_info and isinstance(n, fx.Node)]


def _families(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return node → all nodes whose values may share memory with that node's value."""
    families = {node: [node] for node in graph.nodes}
    for node in graph.nodes:
        for other in _shares_memory_with(node) if node.op == "call_function" else ():
            if families[other] is not families[node]:
                families[other].extend(families[node])
                for member in families[node]:
                    families[member] = families[other]
    return families


def _remove_writes(graph: fx.Graph) -> None:
    """Replace every operation that works in place by its functional form."""
    writing = [node for node in graph.nodes if _writes(node) and node.target not in _DROPOUTS]
    if not writing:
        return
    families = _families(graph)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in writing:
        _remove_write(graph, node, families[node], order)


def _remove_write(
    graph: fx.Graph, node: fx.Node, family: list[fx.Node], order: dict[fx.Node, int]
) -> None:
    """Replace one operation that works in place by its functional form.

    Args:
        graph: The graph, which is changed.
        node: The operation; it writes to its first argument x.
        family: The nodes whose values may share memory with x; new nodes are added to it.
        order: Node → its position in the graph; new nodes are added to it.

    Raises:
        NotRewritableError: The graph does not show all operations that read the written memory.
    """
    x = node.all_input_nodes[0]
    # If x is a slice: x, the tensor it is a slice of, and so on; base is the whole tensor.
    views = list(_views(x))
    base = views[-1].all_input_nodes[0] if views else x

    def later(n: fx.Node) -> list[fx.Node]:
        return [user for user in n.users if order[user] > order[node]]

    if any(member.op == "placeholder" for member in family):
        raise NotRewritableError(f"{node} writes to an input, parameter or buffer: trace again")
    if node.args[0] is not x or any(later(view) for view in views[1:]):
        raise NotRewritableError(f"{node} writes to memory that other views share: trace again")
    members = {n for n in family if order[n] < order[node]} - {x, base, *views}
    if any(later(member) for member in members):
        raise NotRewritableError(f"{node} writes to memory that is read later: trace again")
    node.target = _functional_form(node)
    value, position = node, order[node]
    for view in views:  # for x = slice(base), the new base is slice_scatter(base, new x)
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
        family.append(value)  # the list that all of the family share
        for user in later(base):
            user.replace_input_with(base, value)


def _views(x: fx.Node) -> Iterator[fx.Node]:
    """Yield a slice ``x``, then the slice from which ``x`` was taken, and so on."""
    while x.op == "call_function" and x.target in _SCATTERS:
        yield x
        x = x.all_input_nodes[0]


def _functional_form(node: fx.Node) -> Any:
    """Return the operation that computes the value that ``node`` writes, without writing it.

    Raises:
        NotRewritableError: There is no such operation, or its result has another shape or dtype.
    """
    assert isinstance(node.target, OpOverload)  # for mypy: see _writes
    name, overload = node.target.__name__.split(".")
    form: Any = getattr(getattr(aten, name.removesuffix("_"), None), overload, None)
    if not name.endswith("_") or node.target.namespace != "aten" or form is None:
        raise NotRewritableError(f"{node.target} has no functional form in ATen: trace again")
    # The parts of a composite have rules. Other arguments mean a different function.
    if form._can_decompose() or _arguments(form) != _arguments(node.target):
        raise NotRewritableError(f"{node.target} has no simple functional form: trace again")
    x = value_of(node)
    values = [value_of(n) for n in node.all_input_nodes]
    if x.is_floating_point() and all(
        getattr(value, "dtype", x.dtype) == x.dtype for value in values
    ):
        return form  # all values have one floating dtype: then shape and dtype are the same
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with x.fake_mode:
        y = form(*args, **kwargs)
    if (y.dtype, str(y.shape)) != (x.dtype, str(x.shape)):
        raise NotRewritableError(
            f"{node.target} writes a value of {y.dtype} and shape {tuple(y.shape)}, expected "
            f"{x.dtype} and {tuple(x.shape)}: trace again"
        )
    return form


def _arguments(target: OpOverload) -> list[tuple[str, str]]:
    """Return names and types of the arguments of an operation."""
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _remove_dropout(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a dropout that is switched off.

    Raises:
        NotRewritableError: The dropout is switched on.
    """
    arguments: Any = node.args
    x, _, train = arguments
    if train:
        raise NotRewritableError(f"{node} is switched on, expected evaluation mode: trace again")
    node.replace_all_uses_with(x)
    graph.erase_node(node)


def _evaluate_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a batch norm by the operation for evaluation mode.

    Raises:
        NotRewritableError: The batch norm uses the statistics of the batch.
    """
    arguments = node.args if len(node.args) == 9 and not node.kwargs else (None,) * 9
    x, weight, bias, mean, variance, training, momentum, eps, _ = arguments
    if training is not False or mean is None or variance is None:
        raise NotRewritableError(f"{node} uses statistics of the batch: trace again")
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
    """Switch oneDNN off during a block, as ``torch.export`` does while it traces."""
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
    """Replace a composite operation by the operations that it consists of.

    Args:
        graph: The graph, which is changed.
        node: The composite operation.
        decompositions: Operation → function, see :func:`functional`.
        known: Target, arguments and shapes of an operation → graph of its parts. Operations with
            the same entry are traced only once.

    Raises:
        NotRewritableError: The operation cannot be traced, or its parts contain constants.
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
                raise NotRewritableError(f"{node.target} creates constants: trace again")
    results: Any = parts.output_node().args[0]
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(copies[results])
    for user in list(node.users):  # if there are several results, each user takes one of them
        position: Any = user.args[1]
        user.replace_all_uses_with(copies[results[position]])
        graph.erase_node(user)
    graph.erase_node(node)


def _parts(node: fx.Node, decompositions: Mapping[Any, Callable[..., Any]]) -> fx.Graph:
    """Return a graph of the operations that a composite operation consists of.

    Its placeholders are the argument nodes of the operation.

    Raises:
        NotRewritableError: The operation cannot be traced by itself.
    """
    inputs, table = node.all_input_nodes, dict(decompositions)
    run: Any = table.get(node.target, node.target)

    def compute(*values: Any) -> Any:
        known = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return run(*args, **kwargs)

    # make_fx takes one tensor for one argument; results of equal operations may be one tensor
    values = tree_map_only(FakeTensor, Tensor.detach, [value_of(n) for n in inputs])
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    # pre_dispatch: other composites inside, such as linear in an LSTM, are not decomposed
    trace = make_fx(compute, table, pre_dispatch=node.target in table, _allow_non_fake_inputs=True)
    try:
        # oneDNN is off, for its recurrent layers are single operations without parts.
        with modes[0], enable_python_dispatcher(), _no_onednn():  # none inside torch.vmap
            return traced(node, values, trace)
    except Exception as error:
        raise NotRewritableError(f"{node.target} cannot be traced by itself: {error}") from error


def _renamed(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph whose nodes are named after their operations.

    Nodes that take one of several results ("getitem") are numbered as ``run_decompositions`` does
    it: it counts all results of all operations, including unused ones. Saved files and reports
    contain these names, so both ways of making a graph must give the same ones.
    """
    result, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    first: dict[fx.Node, int] = {}  # operation with several results → number of its first result
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
