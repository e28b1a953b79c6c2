"""Whether a further argument that is as long as the batch has one row for each example.

It may also be shared by all examples: the matrix of a graph, a table of classes. If a model mixes
the examples with one row for each of them, and does not with all rows for each of them, its graph
decides. Rows that lie along another dimension than the examples where both meet, as in ``x @ a.T``,
and tables in which entries are looked up, are shared. Rows that are gone before, as in
``x * a.sum()``, may be those of the examples: then the examples are taken to be mixed.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.dimensions import indices
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument, is_size, operation, place

#: Function: node → dimensions of its value along which the rows of a further argument lie.
Rows = Callable[[fx.Node], Collection[int]]

#: Operation that looks up entries of a table → positions of its table and of its indices among the
#: arguments, and position and default of the dimension.
_LOOKUPS: dict[str, tuple[int, int, int, int]] = {
    "embedding": (0, 1, 9, 0),
    "index_select": (0, 2, 1, 0),
    "gather": (0, 2, 1, 0),
    "take_along_dim": (0, 1, 2, 0),
}

#: The way out for an argument whose meaning is not known.
SHARED = "if all examples share this argument, pass a batch of another size than its length"


class LostRowsError(UnsupportedOperationError):
    """All examples would use what is computed from the rows of several examples."""


def symbolic(node: fx.Node) -> list[int]:
    """Return the dimensions of a traced value that depend on the size of the batch."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return []
    return [dim for dim, size in enumerate(value.shape) if not isinstance(size, int)]


def loses_rows(
    graph: fx.Graph, examples: Collection[str], further: Collection[str], rows: Rows = symbolic
) -> fx.Node | None:
    """Return the first operation on examples that shows that an argument may have a row for each.

    Args:
        graph: The graph of a model.
        examples: Names of the placeholders of the inputs.
        further: Names of the placeholders of further arguments as long as the batch.
        rows: The dimensions of a value along which the rows of a further argument lie; by default,
            those that depend on the size of the batch. Else no such dimension is that of examples.

    Returns:
        The first use of a further argument whose rows never lie apart from the examples; None if
        the rows of all arguments do, so that these are shared.
    """
    depends, origins = set[fx.Node](), dict[fx.Node, frozenset[str]]()
    first, apart = dict[str, fx.Node](), set[str]()  # argument → first use together with examples
    for node in graph.nodes:
        sources = [n for n in node.all_input_nodes if not _is_filled(node)]
        beside = [n for n in sources if n in origins]
        if node.op == "placeholder":
            if node.name in examples:
                depends.add(node)
            elif node.name in further:
                origins[node] = frozenset([node.name])
        elif node.op != "call_function":
            continue
        elif not depends.isdisjoint(sources):
            depends.add(node)
            for source in beside:
                for name in origins[source]:
                    first.setdefault(name, node)
                if rows(source) and (rows is not symbolic or _lies_apart(node, source)):
                    apart |= origins[source]
        elif beside:
            origins[node] = frozenset().union(*(origins[n] for n in beside))
        table, index = _lookup(node, rows)
        if table in origins and (index in depends or origins.get(index, set()) - origins[table]):
            apart |= origins[table]
    return next((node for name, node in first.items() if name not in apart), None)


def check_rows(
    graph: fx.Graph,
    examples: Collection[str],
    values: Mapping[str, Any],
    longer: Mapping[str, Tensor],
) -> None:
    """Raise LostRowsError if arguments that a graph shares may have one row for each example.

    Args:
        graph: A graph in which all examples share the further arguments.
        examples: Names of the placeholders of the inputs.
        values: Name of each other placeholder → its value.
        longer: Name of the placeholder of an argument as long as the batch → it, with a row more.
    """
    whole, more = (_beside(graph, each) for each in (values, {**values, **longer}))

    def rows(node: fx.Node) -> list[int]:
        before, after = (known.get(node) for known in (whole, more))
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            # the graph takes no other number of rows: it is one of the model's own sizes
            return [] if isinstance(before, (int, float)) and type(before) is type(after) else [0]
        sizes = zip(before.shape, after.shape, strict=True)
        return [dim for dim, (a, b) in enumerate(sizes) if a != b]

    if (node := loses_rows(graph, examples, longer, rows)) is not None:
        raise LostRowsError(
            f"all examples use what is computed from all rows of a further argument, by "
            f"{node.target} in {place(node).path or 'the model itself'}; expected one row for each "
            "example, since the argument is as long as the batch: compute along its other "
            f"dimensions, or {SHARED}"
        )


def _beside(graph: fx.Graph, given: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """Return the values of a graph that can be computed without its inputs.

    Args:
        graph: The graph.
        given: Name of a placeholder → its value, for all placeholders but the inputs.
    """
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in given:
            values[node] = given[node.name]
        elif node.op == "call_function" and values.keys() >= set(node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad(), suppress(Exception):  # it may take no such number of rows
                values[node] = node.target(*args, **kwargs)
    return values


def _is_filled(node: fx.Node) -> bool:
    """Return True if a value depends on the shapes of the arguments of its operation alone."""
    name = operation(node)
    filled = name.startswith("new_") or name.endswith("_like")
    return filled or (is_size(node) and name.startswith("sym_"))


def _lies_apart(node: fx.Node, source: fx.Node) -> bool:
    """Return True if rows lie along another dimension than the examples in an operation on both."""
    dims, batch, value = symbolic(source), symbolic(node), value_of(node)
    if len(dims) > 1 or len(batch) != 1:
        return True
    # broadcasting counts the dimensions from the last one on
    return bool(value_of(source).ndim - dims[0] != value.ndim - batch[0])


def _lookup(node: fx.Node, rows: Rows) -> tuple[Any, Any]:
    """Return the table and the indices of an operation that looks up rows; else (None, None)."""
    name = operation(node)
    if name in _LOOKUPS:
        at, chosen, along, default = _LOOKUPS[name]
        table, index = node.args[at], node.args[chosen]
        dim: Any = argument(node, along, "dim", default)
        found = {dim % max(len(value_of(table).shape), 1): index}  # type: ignore[arg-type]
    else:
        table, found = node.args[0] if node.args else None, dict(enumerate(indices(node)))
    if not isinstance(table, fx.Node):
        return None, None
    return next(((table, found[dim]) for dim in rows(table) if found.get(dim)), (None, None))
