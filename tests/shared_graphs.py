"""One capture for all networks that are spelled alike, and a watch that no graph is written to.

``torch.export`` takes most of a test's time. A graph holds no values of weights, so that two
networks with the same modules, options and shapes have the same graph: it is captured once.
"""

from collections.abc import Hashable
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload

from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.signature import Signature

#: Attributes that every module has.
_OWN = frozenset(vars(nn.Module()))
#: Attributes of recurrent layers that hold their parameters once more.
_AGAIN = frozenset({"_flat_weights", "_flat_weight_refs"})
_PLAIN = (type(None), bool, int, float, str, torch.dtype, type)
#: What a function that is written in C belongs to, unless it is a method of some object.
_PLACES = (type(None), ModuleType, type)


class Shared(NamedTuple):
    """A captured graph and how it was written when it was captured."""

    graph: CapturedGraph
    written: str


class SharedGraphs:
    """Stands for ``captum_mipin.graph.capture.trace``; captures each spelling of a network once.

    Args:
        trace: The function that captures.
    """

    def __init__(self, trace: Any) -> None:
        self.trace = trace
        self._shared: dict[Hashable, Shared] = {}
        self._used: set[Hashable] = set()

    def __call__(
        self, model: nn.Module, inputs: Any, extras: Any, shared: bool, **options: Any
    ) -> CapturedGraph:
        """Return the graph of ``model``, captured now or earlier; arguments as for ``trace``."""
        alike = spelling(model)
        if alike is None:
            return self.trace(model, inputs, extras, shared, **options)
        key: tuple[Hashable, ...] = (
            alike,
            Signature.of(inputs, extras, shared),
            repr(options),
            (torch.is_grad_enabled(), torch.get_default_dtype()),
        )
        if key not in self._shared:
            graph = self.trace(model, inputs, extras, shared, **options)
            self._shared[key] = Shared(graph, written(graph.graph))
            if not graph.switches:  # then it is the same with detached=True and False
                options["detached"] = not options["detached"]
                self._shared[(*key[:2], repr(options), key[3])] = self._shared[key]
        self._used.add(key)
        return self._shared[key].graph

    def check_unwritten(self) -> None:
        """Check the graphs used since the last call.

        Raises:
            AssertionError: A graph was written to.
        """
        used, self._used = self._used, set()
        changed = [key for key in used if _is_changed(self._shared[key])]
        assert not changed, f"captured graphs were written to: {changed}"


def _is_changed(entry: Shared) -> bool:
    return written(entry.graph.graph) != entry.written


def written(graph: fx.Graph) -> str:
    """Return all that may not change in a graph: its operations, and the marks of each node."""
    return "\n".join(f"{node.format_node()} {sorted(node.meta)}" for node in graph.nodes)


def spelling(model: nn.Module) -> Hashable | None:
    """Return what decides the graph of a model, but for its inputs; None where that cannot be told.

    It is told from the types of all modules, their own attributes, and shapes, strides, dtypes and
    identities of parameters and buffers. It cannot be told where a module has a hook, or holds a
    tensor or another object that is neither plain nor a function of plain things.
    """
    numbers: dict[int, int] = {}  # a tensor or module that comes again is told by its number

    def number(value: object) -> int:
        return numbers.setdefault(id(value), len(numbers))

    parts: list[Hashable] = []
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            if module._forward_hooks or module._forward_pre_hooks:
                return None
            parts.append((path, number(module), type(module), module.training))
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                kind = () if tensor is None else _kind(tensor)
                parts.append((name, number(tensor), kind))
            own = vars(module).keys() - _OWN - _AGAIN
            parts.append(tuple((name, _told(vars(module)[name])) for name in sorted(own)))
    except TypeError:
        return None
    return tuple(parts)


def _kind(tensor: torch.Tensor) -> Hashable:
    shape = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return *shape, type(tensor), tensor.requires_grad


def _told(value: Any) -> Hashable:
    """Return what stands for an attribute: equal where two models compute the same with it.

    Raises:
        TypeError: That cannot be told.
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return dict, tuple((_told(key), _told(entry)) for key, entry in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_told, value))
    if isinstance(value, partial):
        return partial, _told(value.func), _told(value.args), _told(value.keywords)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        told = _told(cells), _told(value.__defaults__), _told(value.__kwdefaults__)
        return value.__code__, told
    if isinstance(value, OpOverload) or (
        isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, _PLACES)
    ):
        return value
    raise TypeError(f"a {type(value).__name__} may be anything")
