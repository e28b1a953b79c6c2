"""A graph for batches, made from the graph for a batch of one example.

Some models use the batch size as a number: by ``len(x)``, in a loop over the examples, in chunks or
by ``torch.vmap``. ``torch.export`` can record them only for a fixed batch size. Their graph for one
example is rewritten here, operation by operation, so that it computes each example of a batch as if
it were alone. A value with the shape S in the graph for one example becomes one of two:

- (batch, \\*S[1:]) if S begins with 1: this dimension becomes the batch;
- (batch, \\*S) otherwise, such as for an example that a loop has taken out of the batch.
"""

import operator
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

from captum_mipin.graph.dimensions import RESHAPES, dimensions, indices, item, with_batch
from captum_mipin.graph.marks import inherit, set_value, value_of
from captum_mipin.graph.nodes import ancestors, operation, place
from captum_mipin.graph.quiet import quiet

aten = torch.ops.aten

#: A batch size that no tensor of a model has by chance.
_UNLIKELY = 7919

#: Operations whose result depends on the dtype and device of their argument alone.
_NEW = frozenset({"new_zeros", "new_ones", "new_full", "new_empty"})

#: Operations with several results, whose third argument is the dimension.
_PARTS = frozenset({"split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk"})

#: Operations that take tensors of a fixed number of dimensions.
_FOLDED = ("conv", "pool", "batch_norm", "group_norm", "instance_norm", "bmm", "baddbmm")

#: Operation over all elements → the same operation over some dimensions.
_TOTALS: dict[Any, Any] = {
    aten.sum.default: aten.sum.dim_IntList,
    aten.mean.default: aten.mean.dim,
}


class NotLiftableError(Exception):
    """An operation cannot be computed for several examples at once."""


def lifted(graph: fx.Graph, batched: Sequence[str]) -> fx.Graph:
    """Return a graph for batches of any size, from a graph for a batch of one example.

    Args:
        graph: A functional graph without symbolic sizes; it is not changed.
        batched: Names of the placeholders whose first dimension is the batch. The first of them
            is one of the inputs.

    Raises:
        NotLiftableError: The graph contains an operation that cannot be rewritten.
    """
    with quiet():  # some of the calls that are tried fail
        return _Lift(graph, batched).graph


class _Lift:
    """The rewriting of a graph, in the order of its nodes.

    Attributes:
        graph: The new graph.
    """

    def __init__(self, graph: fx.Graph, batched: Sequence[str]) -> None:
        self.graph = fx.Graph()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        # node of the new graph → its value for a batch of _UNLIKELY examples, without numbers
        self._values: dict[fx.Node, Any] = {}
        # original node → its copy, and whether the copy has the batch as an additional dimension;
        # None if the copy does not depend on the batch
        self._copies: dict[fx.Node, fx.Node] = {}
        self._extra: dict[fx.Node, bool | None] = {}
        self._single = set[fx.Node]()  # nodes with a list of a single result, which is their copy
        self._size: fx.Node | None = None
        needed = ancestors([graph.output_node()])  # without checks of sizes
        for node in graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, node.name in batched)
                if batched[0] == node.name:
                    self._first = self._copies[node]
            elif node.op == "output":
                self._output(node)
            elif node in needed:
                known = isinstance(node.target, OpOverload) or node.target is operator.getitem
                (self._operation if known else self._vmapped)(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self._trace({self._copies[node] for node in self._copies if node.name in batched})

    def _trace(self, batched: Collection[fx.Node]) -> None:
        """Set the traced values of all nodes, for a symbolic batch size."""
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        batch = mode.from_tensor(torch.empty(_UNLIKELY), symbolic_context=context).shape[0]
        for node in self.graph.nodes:
            value = self._values.get(node)
            if node.op == "placeholder" and isinstance(value, Tensor):
                shape = (batch, *value.shape[1:]) if node in batched else value.shape
                with mode:
                    set_value(node, torch.empty(shape, dtype=value.dtype, device=value.device))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
                with mode, enable_python_dispatcher():
                    set_value(node, node.target(*args, **kwargs))
        if isinstance(batch, SymInt) and str(batch).isdigit():
            raise NotLiftableError("an operation takes only one batch size")

    def _placeholder(self, node: fx.Node, batched: bool) -> None:
        copy, value = self.graph.node_copy(node), value_of(node)
        copy.name = node.name
        if isinstance(value, Tensor):
            shape = (_UNLIKELY, *value.shape[1:]) if batched else value.shape
            with self._mode:
                value = torch.empty(shape, dtype=value.dtype, device=value.device)
        self._values[copy] = value
        self._copies[node], self._extra[node] = copy, False if batched else None

    def _output(self, node: fx.Node) -> None:
        (result,) = node.all_input_nodes
        if self._extra[result] is None:
            raise NotLiftableError("the result does not depend on the example")
        self.graph.output((self._copies[result],))

    def _vmapped(self, node: fx.Node) -> None:
        """Rewrite the nodes that ``torch.vmap`` adds, for a vmap over the batch."""
        name = getattr(node.target, "__name__", "")
        if name in ("_add_batch_dim", "_remove_batch_dim"):
            x: Any = node.args[0]
            entering = name == "_add_batch_dim"
            if self._extra[x] is not (not entering) or node.args[1 if entering else 3] != 0:
                raise NotLiftableError("torch.vmap over another dimension than the batch")
            self._copies[node], self._extra[node] = self._copies[x], entering
        elif node.users:
            raise NotLiftableError(f"operation {name}")

    def _operation(self, node: fx.Node) -> None:
        ways = self._as_it_is, self._reshaped, self._shifted
        if operation(node) in _NEW or all(self._extra[n] is None for n in node.all_input_nodes):
            copy = self.graph.node_copy(node, self._copies.__getitem__)
            self._values[copy] = self._run(copy.target, copy.args, copy.kwargs)
            self._copies[node], self._extra[node] = copy, None
        elif item(node) is not None:  # a number of each example; only a select may take it
            self._extra[node] = self._extra[node.all_input_nodes[0]]
        elif node.target is operator.getitem:
            self._part(node)
        elif not self._alias(node) and not any(
            self._try(node, *call)
            for make in ((self._indexed,) if indices(node) else ways)
            for call in make(node)
        ):
            self._fold(node)

    def _part(self, node: fx.Node) -> None:
        """Rewrite the choice of one of several results."""
        source, index = node.args
        assert isinstance(source, fx.Node)  # for mypy
        copy, extra = self._copies[source], self._extra[source]
        if source in self._single:
            self._copies[node], self._extra[node] = copy, extra
        else:
            self._accept(node, self._call(node, operator.getitem, copy, index), bool(extra))

    def _alias(self, node: fx.Node) -> bool:
        """Take the argument of an operation for its result, if the operation does nothing else.

        These are operations along a dimension of size 1 that becomes the batch: taking the only
        example out of the batch, and making a batch of one example again.

        Returns:
            Whether the operation is one of these.
        """
        name, (x, *others) = operation(node), node.args
        dim = node.kwargs.get("dim", 0)
        if len(others) > (name in _PARTS):
            dim = others[name in _PARTS]
        entries = x if isinstance(x, (list, tuple)) else [x]
        source: Any = entries[0]
        if len(entries) != 1 or not isinstance(source, fx.Node) or self._extra[source] is None:
            return False
        extra = self._extra[source]
        leaves = not extra and name in ("select", "unbind")
        enters = extra and name in ("unsqueeze", "stack")
        keeps = not extra and name in ("slice", "cat", *_PARTS)
        if dim != 0 or not (leaves or enters or keeps):
            return False
        if name in ("unbind", *_PARTS):
            if len(value_of(node)) != 1:
                return False
            self._single.add(node)
        elif value_of(node).numel() != value_of(source).numel():  # an empty slice
            return False
        self._copies[node], self._extra[node] = self._copies[source], leaves
        return True

    def _as_it_is(self, node: fx.Node) -> Iterator[Any]:
        """Yield calls of the same operation, on arguments that all begin with the batch."""
        if any(self._extra[n] for n in node.all_input_nodes) or 0 in dimensions(node):
            return
        value = value_of(node)
        ndim = value.ndim if isinstance(value, Tensor) else 0
        for aligned, spread in product((0, ndim), (False, True)):

            def leading(n: fx.Node, aligned: int = aligned, spread: bool = spread) -> fx.Node:
                return self._leading(n, spread, aligned)

            args: Any
            args, kwargs = fx.map_arg((node.args, node.kwargs), leading)
            if operation(node) == "expand":
                args = (args[0], [-1, *args[1][1:]])
            yield node.target, args, kwargs, False

    def _leading(self, node: fx.Node, spread: bool, aligned: int) -> fx.Node:
        """Return the copy of a node whose value begins with the batch, or is a constant.

        Args:
            node: A node of the original graph.
            spread: Make constants (1, ...) to (batch, ...).
            aligned: The least number of dimensions; further ones of size 1 follow the batch.
        """
        copy, value = self._copies[node], value_of(node)
        if not isinstance(value, Tensor):
            return copy
        if self._extra[node] is None:
            if not spread or value.shape[:1] != (1,):
                return copy
            return self._call(node, aten.expand.default, copy, [self._rows(), *value.shape[1:]])
        shape = [1] * (aligned - value.ndim) + list(value.shape[1:])
        return copy if len(shape) < value.ndim else self._reshape(node, copy, shape)

    def _reshape(self, node: fx.Node, copy: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Return ``copy`` in the shape (batch, \\*shape)."""
        return self._call(node, aten.reshape.default, copy, [-1, *shape])

    def _reshaped(self, node: fx.Node) -> Iterator[Any]:
        """Yield the reshape that is equal to an operation that keeps the order of elements."""
        if operation(node) in RESHAPES:
            shape, source = tuple(value_of(node).shape), self._copies[node.all_input_nodes[0]]
            extra = shape[:1] != (1,)
            yield aten.reshape.default, (source, [-1, *shape[not extra :]]), {}, extra

    def _shifted(self, node: fx.Node) -> Iterator[Any]:
        """Yield calls of the same operation, on arguments with the batch as a dimension more."""
        value, target = value_of(node), node.target
        ndim = value.ndim if isinstance(value, Tensor) else 0
        for aligned, spread in product((0, ndim), (False, True)):

            def added(n: fx.Node, aligned: int = aligned, spread: bool = spread) -> fx.Node:
                return self._added(n, spread, aligned)

            args, kwargs = fx.map_arg((node.args, node.kwargs), added)
            if target in _TOTALS:
                dims = list(range(1, 1 + value_of(node.all_input_nodes[0]).ndim))
                yield _TOTALS[target], (args[0], dims), kwargs, True
            else:
                yield target, *with_batch(node, args, kwargs), True

    def _indexed(self, node: fx.Node) -> Iterator[Any]:
        """Yield the call that takes elements from each example, or puts some into it.

        Of x with the shape (batch, \\*S), the indices i, j, ... of an example choose within S:
        x[arange(batch), i, j, ...]. If S begins with the only example, an index chooses that one.
        """
        source: Any = node.args[0]
        dims = [dim for dim, index in enumerate(indices(node)) if index is not None]
        chosen = [indices(node)[dim] for dim in dims]
        ndim = max(value_of(index).ndim for index in chosen)
        # the dimensions that are indexed come first
        order = [0, *(1 + dim for dim in dims)]
        order += [1 + dim for dim in range(value_of(source).ndim) if dim not in dims]
        x = self._call(node, aten.permute.default, self._added(source, True, 0), order)
        count = self._call(node, aten.arange.default, self._rows(), device=value_of(source).device)
        rows = self._reshape(node, count, [1] * ndim)
        within = [rows, *(self._added(index, False, ndim) for index in chosen)]
        if operation(node) == "index_put":
            values: Any
            values, *others = node.args[2:]
            values = self._added(values, False, ndim + value_of(source).ndim - len(dims))
            y = self._call(node, node.target, x, within, values, *others)
            if dims[0] == 0:  # else the values would have to be moved as well
                yield (
                    aten.permute.default,
                    (y, [order.index(dim) for dim in sorted(order)]),
                    {},
                    True,
                )
            return
        y = self._call(node, aten.index.Tensor, x, within)
        # neighbouring indices leave their result where they are, others move it to the front
        before = dims[0] if dims[-1] - dims[0] < len(dims) else 0
        first, behind = range(1, 1 + ndim), range(1 + ndim, self._values[y].ndim)
        yield aten.permute.default, (y, [0, *behind[:before], *first, *behind[before:]]), {}, True

    def _added(self, node: fx.Node, spread: bool, aligned: int) -> fx.Node:
        """Return the copy of a node, with its batch as a dimension of its own.

        Args:
            node: A node of the original graph.
            spread: Add the batch to constants as well.
            aligned: The least number of dimensions of the original value; further dimensions of
                size 1 are added in front.
        """
        copy, value, extra = self._copies[node], value_of(node), self._extra[node]
        if not isinstance(value, Tensor):
            return copy
        shape = [1] * (aligned - value.ndim) + list(value.shape)
        if extra is None and not spread:
            return copy
        if extra is None:
            return self._call(node, aten.expand.default, copy, [self._rows(), *shape])
        if extra and len(shape) == value.ndim:
            return copy
        return self._reshape(node, copy, shape)

    def _fold(self, node: fx.Node) -> None:
        """Rewrite an operation on (n, ...) as one on (batch · n, ...).

        Raises:
            NotLiftableError: The operation takes no such arguments.
        """
        value = value_of(node)

        def folded(n: fx.Node) -> fx.Node:
            x = value_of(n)
            if self._extra[n] is None:
                return self._copies[n]
            return self._reshape(n, self._copies[n], x.shape[1:])

        if any(part in operation(node) for part in _FOLDED) and isinstance(value, Tensor):
            args, kwargs = fx.map_arg((node.args, node.kwargs), folded)
            with suppress(Exception):  # of any type: the operation does not take such arguments
                y = self._call(node, node.target, *args, **kwargs)
                y = self._reshape(node, y, value.shape)
                if self._accept(node, y, True):
                    return
        raise NotLiftableError(f"operation {node.target} at {place(node)}")

    def _try(self, node: fx.Node, target: Any, args: Any, kwargs: Any, extra: bool) -> bool:
        """Add a call to the graph, if its result has the shapes that are expected."""
        try:
            y = self._call(node, target, *args, **kwargs)
        except Exception:  # of any type: the operation does not take such arguments
            return False
        return self._accept(node, y, extra)

    def _accept(self, node: fx.Node, y: fx.Node, extra: bool) -> bool:
        """Take ``y`` for the copy of a node, if its value has the shapes that are expected."""
        leaves = map(pytree.tree_leaves, (value_of(node), self._values[y]))
        used = {user.args[1] for user in node.users if user.target is operator.getitem}
        for index, (old, new) in enumerate(zip(*leaves, strict=True)):
            if used and index not in used:
                continue
            if not isinstance(old, Tensor) or (not extra and old.shape[:1] != (1,)):
                return False
            if tuple(new.shape) != (_UNLIKELY, *(old.shape if extra else old.shape[1:])):
                return False
        value = value_of(node)
        if extra and isinstance(value, Tensor) and value.shape[:1] == (1,):
            y, extra = self._reshape(node, y, value.shape[1:]), False
        self._copies[node], self._extra[node] = y, extra
        return True

    def _call(self, source: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an operation to the graph, with the metadata of ``source`` and its own value."""
        value = self._run(target, args, kwargs)
        name = source.name if target is source.target else target.__name__.split(".")[0]
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        inherit(node, source)
        self._values[node] = value
        return node

    def _rows(self) -> fx.Node:
        """Return the node of the batch size."""
        if self._size is None:
            with self.graph.inserting_after(self._first):
                self._size = self._call(self._first, aten.sym_size.int, self._first, 0)
        return self._size

    def _run(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.map_arg((args, kwargs), self._values.__getitem__)
        with self._mode, enable_python_dispatcher():
            return target(*args, **kwargs)
