"""From a model to its graph of operations.

``torch.export`` records what the model computes as a functional graph in which every spelling of an operation looks
the same. The export runs on a structural copy of the model that shares its parameters, so the model itself is never
touched.
"""

import copy
import linecache
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from threading import Condition
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, default_decompositions, export
from torch.export.graph_signature import InputKind
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError, InputError, TrainingModeError
from captum_mipin.graph.marks import inherit, module_stack, value_of
from captum_mipin.graph.nodes import place

Inputs = tuple[Tensor, ...]
Extras = tuple[Any, ...]
#: Which of a model's outputs: an index, a key or a field's name, or several, one inside the other; None for its only one.
Output = int | str | tuple[int | str, ...] | None

#: Batch size the example is captured with. Any; sizes 0 and 1 would be taken for constants.
_EXAMPLE_BATCH = 3

#: The batch sizes a model has to take: beyond, torch itself chooses other kernels, for normalisation on GPUs.
_LARGEST_BATCH = 65535

#: What torch warns of when it copies recurrent layers, whose weights are attributes as well.
_RECURRENT = r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ (was|were) assigned during export"

#: Attributes that every module has.
_OWN = frozenset(vars(nn.Module()))


class _Turns:
    """Lets explanations overlap each other, and an export nothing.

    ``torch.export`` cannot run in two threads at once, and while it runs it switches oneDNN off for the whole process, so
    that convolutions in other threads would round otherwise.
    """

    def __init__(self) -> None:
        self._changed, self._explaining = Condition(), 0

    @contextmanager
    def explaining(self) -> Iterator[None]:
        with self._changed:
            self._explaining += 1
        try:
            yield
        finally:
            with self._changed:
                self._explaining -= 1
                self._changed.notify_all()

    @contextmanager
    def exporting(self) -> Iterator[None]:
        with self._changed:  # held throughout, so that nothing else begins
            self._changed.wait_for(lambda: self._explaining == 0)
            yield


TURNS = _Turns()


@dataclass(frozen=True)
class Signature:
    """What a captured graph holds for: shapes without the batch, dtypes, and the values of all other arguments."""

    leaves: tuple[tuple[str, ...], ...]
    structure: str

    @classmethod
    def of(cls, inputs: Inputs, extras: Extras, shared: bool = False) -> "Signature":
        """The signature of a call; ``shared`` as for :func:`capture`."""
        leaves, structure = pytree.tree_flatten(extras)
        free = _per_example(inputs, extras, shared)
        described = tuple(
            _describe(leaf, each) for leaf, each in zip((*inputs, *leaves), free, strict=True)
        )
        return cls(described, str(structure) if extras else "")

    def kinds(self) -> tuple[str, ...]:
        """Which tensors are per example and which are shared."""
        return tuple(leaf[-1] for leaf in self.leaves if leaf[0] == "tensor")

    def to_json(self) -> list[Any]:
        """As lists and strings."""
        return [[list(leaf) for leaf in self.leaves], self.structure]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Signature":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: It is none.
        """
        if not all(leaf and all(isinstance(part, str) for part in leaf) for leaf in value[0]):
            raise ValueError(f"{value[0]!r} does not describe inputs")
        return cls(tuple(tuple(leaf) for leaf in value[0]), value[1])


@dataclass(frozen=True)
class CapturedGraph:
    """The operations of a model, as a functional graph.

    Attributes:
        graph: Nodes in order of execution; placeholders first.
        constants: Placeholder name → where its tensor is found: a parameter's or buffer's path, or the tensor.
        inputs: Names of the placeholders of the explained inputs.
        arguments: Names of the placeholders of all inputs and extra arguments, in order; None where the graph has none.
        output: Node of the model's output.
        batch: The symbol of the batch size.
        shared: See :func:`capture`.
    """

    graph: fx.Graph
    constants: dict[str, str | Tensor]
    inputs: tuple[str, ...]
    arguments: tuple[str | None, ...]
    output: fx.Node
    batch: str
    shared: bool

    def values(self, model: nn.Module, inputs: Inputs, extras: Extras) -> dict[str, Any]:
        """The value of every placeholder, parameters and buffers as they are in ``model`` now."""
        values = self.weights(model)
        leaves = pytree.tree_leaves((inputs, extras))
        values.update(
            (name, leaf)
            for name, leaf in zip(self.arguments, leaves, strict=True)
            if name is not None
        )
        return values

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The value of every placeholder that is a parameter, a buffer or a constant, as it is in ``model`` now."""
        modules = dict(tree(model))
        values: dict[str, Any] = {}
        source: Any
        for name, source in self.constants.items():
            if isinstance(source, str):
                path, _, attribute = source.rpartition(".")
                source = modules[path]._parameters.get(attribute)  # a third of getattr's time
                source = getattr(modules[path], attribute) if source is None else source
            values[name] = source.detach() if source.requires_grad else source
        return values


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself behind ``nn.DataParallel``, ``DistributedDataParallel`` and ``torch.compile``; any other as it is.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> unwrapped(nn.DataParallel(torch.compile(model))) is unwrapped(model) is model
        True
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def select(value: Any, output: Output) -> Tensor:
    """The tensor among a model's outputs that ``output`` leads to.

    Raises:
        CaptureError: It leads to none, or the model returns several and ``output`` is None.

    Examples:
        >>> select({"logits": torch.ones(1), "states": [torch.zeros(1)]}, ("states", 0))
        tensor([0.])
    """
    done: tuple[int | str, ...] = ()
    for key in () if output is None else output if isinstance(output, tuple) else (output,):
        entries = _entries(value)
        if key not in entries:
            what = f"its output {_shown(done)!r}" if done else "what the model returns"
            kind = "Tensor" if isinstance(value, Tensor) else type(value).__name__
            known = (
                f"expected one of {_listed(entries, done)}"
                if entries
                else f"expected output={_shown(done)!r}"
            )
            raise CaptureError(f"output={output!r} does not fit: {what} is a {kind}, {known}")
        value, done = entries[key], (*done, key)
    if isinstance(value, Tensor):
        return value
    what = f"has for output={_shown(done)!r}" if done else "returns"
    entries = _entries(value)
    choose = f"Choose one by output=, out of {_listed(entries, done)}. " if entries else ""
    raise CaptureError(
        f"the model {what} a {type(value).__name__}, expected one tensor. {choose}"
        "Wrap it in a module that returns the logits alone, if none of its outputs is."
    )


def _entries(value: Any) -> dict[Any, Any]:
    """What a container holds, by index, key or field; of a named tuple by either."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        names = {name: getattr(value, name) for name in getattr(value, "_fields", ())}
        return {
            **names,
            **dict(enumerate(value)),
            **{i - len(value): v for i, v in enumerate(value)},
        }
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return {}


def _listed(entries: Mapping[Any, Any], done: tuple[int | str, ...]) -> str:
    names = [key for key in entries if not isinstance(key, int)] or [
        key for key in entries if key >= 0
    ]
    return ", ".join(repr(_shown((*done, name))) for name in names)


def _shown(path: tuple[int | str, ...]) -> Output:
    return path[0] if len(path) == 1 else path or None


def check_model(model: object) -> nn.Module:
    """``model`` as a module in evaluation mode.

    Raises:
        CaptureError: ``model`` is not a module.
        TrainingModeError: It, or one of its modules, is in training mode.
    """
    if isinstance(model, ExportedProgram) or (
        isinstance(model, fx.GraphModule) and "eval" in vars(model)
    ):  # its module()
        raise CaptureError(
            "the model is an exported program, whose module() has no evaluation mode and no layers: take "
            "torch.export.unflatten(program).eval(), of a program that was exported in evaluation mode and with a dynamic batch"
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is a {type(model).__name__}, expected a torch.nn.Module: its layers have to be known. "
            "Wrap a function in a small nn.Module that holds the network and calls it in forward()."
        )
    if any(module.training for module in model.modules()):
        training = [
            path or "(the model itself)"
            for path, module in model.named_modules()
            if module.training
        ]
        raise TrainingModeError(
            f"the model is in training mode ({len(training)} modules, the first is {training[0]!r}): dropout and batch "
            "statistics would make its explanation random. Call model.eval() first."
        )
    return model


def check_inputs(inputs: Inputs, explained: bool = True) -> None:
    """Refuse what cannot carry a signal: nothing, integers, empty batches, unequal batches.

    Args:
        inputs: Tensors (batch, ...).
        explained: Whether they are themselves explained. Where only a layer behind them is, they may be integers.

    Raises:
        InputError: Always with what was found and what was expected.
    """
    if not inputs:
        raise InputError("no input tensor was given")
    for index, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"input {index} is a {type(x).__name__}, expected a torch.Tensor")
        if x.is_meta:
            raise InputError(f"input {index} is on the meta device: it has no values")
        if x.is_complex() or (explained and not x.is_floating_point()):
            raise InputError(
                f"input {index} has dtype {x.dtype}, expected a floating dtype: integers carry no signal. "
                "Convert it, or stop at a layer behind it, such as its embedding: InverseNetwork(model, layer=...). What only "
                "steers, such as a mask, goes into additional_forward_args, which fit takes by unpack=."
            )
        if x.is_nested:
            raise InputError(
                f"input {index} is a nested tensor, expected one shape for all examples: pad them, or give one by one"
            )
        if x.layout != torch.strided:
            raise InputError(
                f"input {index} has layout {x.layout}, expected a dense tensor: call to_dense() first"
            )
        if x.ndim == 0 or x.numel() == 0:
            raise InputError(f"input {index} is empty: its shape is {tuple(x.shape)}")
        if len(x) != len(inputs[0]):
            raise InputError(f"input {index} has {len(x)} examples, input 0 has {len(inputs[0])}")


def check_finite(inputs: Inputs) -> None:
    """Refuse what is to be explained if it holds NaN or Inf.

    Raises:
        InputError: It does.
    """
    for index, x in enumerate(inputs):
        if not finite(x):
            raise InputError(f"input {index} contains NaN or Inf")


def capture(
    model: nn.Module,
    inputs: Inputs,
    extras: Extras = (),
    shared: bool = False,
    *,
    output: Output = None,
    explained: bool = True,
    detached: bool = False,
) -> CapturedGraph:
    """Capture ``model`` as a graph for inputs of these shapes, with any batch size.

    Args:
        model: Module in evaluation mode.
        inputs: Example inputs, first dimension the batch; only shapes, dtypes and devices count.
        extras: Further arguments of ``forward``. Tensors whose first dimension equals the batch are per-example,
        shared: unless this says that none is.
        output: Which output, where the model returns several, see :func:`select`.
        explained: See :func:`check_inputs`.
        detached: Detach what the model computes under ``torch.no_grad()``, of which the graph keeps no other trace.

    Raises:
        CaptureError: ``torch.export`` cannot follow the model, or its output is not one tensor.
        InputError, TrainingModeError: See :func:`check_inputs`, :func:`check_model`.

    Examples:
        >>> graph = capture(nn.Sequential(nn.Linear(4, 2)).eval(), (torch.ones(1, 4),))
        >>> [str(place(node)) for node in graph.graph.nodes if node.op == "call_function"]
        ['0/linear']
    """
    check_model(model)
    _check_plain(model)
    check_inputs(inputs, explained)
    return trace(model, inputs, extras, shared, output=output, detached=detached)


def trace(
    model: nn.Module,
    inputs: Inputs,
    extras: Extras,
    shared: bool,
    *,
    output: Output,
    detached: bool,
) -> CapturedGraph:
    """Do the work of :func:`capture` once model and inputs are checked.

    Every graph of this package is made by a call of ``captum_mipin.graph.capture.trace``: replace
    that one name to share graphs, as the tests do.
    """
    leaves, structure = pytree.tree_flatten(plain((*inputs, *extras)))
    shapes = ShapesCollection()
    for index, free in enumerate(_per_example(inputs, extras, shared)):
        if free:
            leaves[index] = leaves[index][:1].repeat(
                _EXAMPLE_BATCH, *(1,) * (leaves[index].ndim - 1)
            )
            shapes[leaves[index]] = {0: Dim.DYNAMIC}
    arguments = pytree.tree_unflatten(leaves, structure)
    try:
        twin = copy.deepcopy(
            model, {id(tensor): tensor for _, tensor in named_tensors(model)} | traced(model)
        )
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied ({type(error).__name__}: {error}). Its parameters are shared with the copy, "
            "everything else must allow copy.deepcopy."
        ) from error
    twin.register_forward_hook(
        lambda module, arguments, value: select(value, output)
    )  # the last, and not on the model
    try:
        with (
            TURNS.exporting(),
            warnings.catch_warnings(),
            torch.autocast(inputs[0].device.type, enabled=False),
        ):
            warnings.filterwarnings(
                "error", message=".* assigned during export"
            )  # by a model that keeps state
            warnings.filterwarnings("ignore", message=_RECURRENT)
            program = export(twin, arguments, dynamic_shapes=shapes, strict=False)
            if detached:
                _detach(program.graph)
            program = program.run_decompositions(dict(_decompositions()))
    except CaptureError:
        raise
    except Exception as error:
        given = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in inputs)
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__} for inputs {given}{_where(error, twin)}:\n{error}\n"
            "Control flow must not depend on the data, the batch size must be free (x.shape[0] keeps it so, len(x) "
            "does not), and inputs must have the shape, dtype and device that the model takes."
        ) from error
    for symbol, bounds in program.range_constraints.items():
        if bounds.lower > 2 or bounds.upper < _LARGEST_BATCH:
            raise CaptureError(
                f"the model computes otherwise for batches outside {bounds} ({symbol}): the batch size must be free"
            )
    _check_registered(program, twin)
    return _from_program(program, len(inputs), shared)


def _check_plain(model: nn.Module) -> None:
    """Refuse modules whose computation, or whose weights, cannot be seen."""
    for path, module in model.named_modules():
        name = f"module {path!r}" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name} is compiled by TorchScript, and torch.export cannot follow it: take what it was made from"
            )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
                raise CaptureError(
                    f"{name} computes its weight anew each time in a hook, {type(hook).__name__}, which torch.export cannot "
                    "follow: make it a weight by remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils, "
                    "or use torch.nn.utils.parametrizations"
                )


def _detach(graph: fx.Graph) -> None:
    """Detach what goes into the parts of a graph that run under ``torch.no_grad()``."""
    for node in list(graph.nodes):
        if (
            node.target is torch.ops.higher_order.wrap_with_set_grad_enabled
            and node.args[0] is False
        ):
            given = [n for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]
            with graph.inserting_before(node):
                cuts = {n: graph.call_function(torch.ops.aten.detach.default, (n,)) for n in given}
            for n, cut in cuts.items():
                inherit(cut, n)
                node.replace_input_with(n, cut)


def _check_registered(program: ExportedProgram, model: nn.Module) -> None:
    """Refuse weights of modules that are kept in plain containers: neither torch nor anything here knows when they change."""
    used = {
        tensor.data_ptr()
        for tensor in program.constants.values()
        if isinstance(tensor, Tensor) and tensor.numel()
    }
    used -= {tensor.data_ptr() for _, tensor in named_tensors(model)}
    known = set(model.modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for leaf in () if name in _OWN else pytree.tree_leaves(value):
                if (
                    isinstance(leaf, nn.Module)
                    and leaf not in known
                    and used & {t.data_ptr() for _, t in named_tensors(leaf)}
                ):
                    where = f"{path}.{name}".lstrip(".")
                    raise CaptureError(
                        f"the model computes with a {type(leaf).__name__} in {where!r} that is not registered, so that a "
                        "change of its weights would go unnoticed: keep it in an nn.ModuleList or nn.ModuleDict"
                    )


def _where(error: Exception, model: nn.Module) -> str:
    """The module and the line at which a model failed."""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [
        (f, line)
        for f, line in traceback.walk_tb(error.__traceback__)
        if id(f.f_locals.get("self")) in paths
    ]
    if not frames:
        return ""
    frame, number = frames[-1]
    module = frame.f_locals["self"]
    path = paths[id(module)]
    name = f"module {path!r} ({type(module).__name__})" if path else "the model itself"
    line = linecache.getline(frame.f_code.co_filename, number).strip()
    return f", at {line!r} in {name}" if line else f", in {name}"


@cache
def _decompositions() -> Mapping[Any, Any]:
    """The few operations to be taken apart into simpler ones: recurrent layers into their steps."""
    recurrent = [
        f"{kind}{cell}"
        for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for cell in ("", "_cell")
    ]
    apart = ("einsum", *recurrent)
    return MappingProxyType(
        {op: how for op, how in default_decompositions().items() if str(op).split(".")[1] in apart}
    )


def first_example(inputs: Inputs, extras: Extras, shared: bool) -> tuple[Inputs, Extras]:
    """Zeros like the first example's inputs, and its extra arguments."""
    first, extras = pick(inputs, extras, torch.tensor([0], device=inputs[0].device), shared)
    return tuple(torch.zeros_like(x) for x in first), extras


def pick(inputs: Inputs, extras: Extras, index: Tensor, shared: bool) -> tuple[Inputs, Extras]:
    """The examples ``index`` of a batch; extra arguments that are not per example stay."""
    leaves, structure = pytree.tree_flatten((inputs, extras))
    free = _per_example(inputs, extras, shared)
    picked = [leaf[index] if each else leaf for leaf, each in zip(leaves, free, strict=True)]
    chosen: tuple[Inputs, Extras] = pytree.tree_unflatten(picked, structure)
    return chosen


def plain(arguments: Any) -> Any:
    """The same arguments, their tensors without gradients and fit for recording."""
    return pytree.tree_map(
        lambda leaf: (
            (leaf.clone() if leaf.is_inference() else leaf.detach())
            if isinstance(leaf, Tensor)
            else leaf
        ),
        arguments,
    )


def finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither NaN nor Inf; a finite sum says so at once."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def memory(tensor: Tensor) -> Any:
    """A tensor's values as bytes."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (
        (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format))
        .view(torch.uint8)
        .numpy()
        .data
    )


def tree(model: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules(remove_duplicate=False)`` goes through, in less time."""
    found = [(path, model)]
    for name, part in model._modules.items():
        if part is not None:
            found += tree(part, f"{path}.{name}" if path else name)
    return found


def glance(model: nn.Module) -> list[Any]:
    """What a captured graph has taken in of a model besides its parameters and buffers.

    Modules and their types, hooks, and attributes that are numbers, strings, containers or tensors. Where it differs, the
    model is captured again.
    """
    seen: list[Any] = []
    for path, module in tree(model):
        seen.append((path, type(module), id(module)))
        if module._forward_hooks or module._forward_pre_hooks:
            seen.extend(
                id(hook)
                for hooks in (module._forward_hooks, module._forward_pre_hooks)
                for hook in hooks.values()
            )
        attributes = vars(module)
        for name in attributes.keys() - _OWN:
            value = attributes[name]
            if isinstance(value, (int, str)):
                seen.append((name, value))
            elif isinstance(value, (float, tuple, list, dict, set)):
                seen.append((name, text := repr(value)))
                if "tensor(" in text:  # which shows only a part of large ones
                    seen.extend(
                        (id(t), t._version)
                        for t in pytree.tree_leaves(value)
                        if isinstance(t, Tensor)
                    )
            elif isinstance(value, Tensor):
                seen.append((name, id(value), value._version))
    return seen


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A model's parameters, buffers and tensors that are plain attributes of its modules."""
    attributes = [
        (f"{path}.{name}", value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    return [*model.named_parameters(), *model.named_buffers(), *attributes]


def traced(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` is to leave as it is, as its memo: what torch has traced of exported programs cannot be copied."""
    kept = (value for module in model.modules() for value in vars(module).values())
    graphs = [
        value if isinstance(value, fx.Graph) else value.graph
        for value in kept
        if isinstance(value, fx.Graph | fx.GraphModule)
    ]
    return {
        id(value): value
        for graph in graphs
        for node in graph.nodes
        if (value := value_of(node)) is not None
    }


def module_output(captured: CapturedGraph, model: nn.Module, layer: nn.Module) -> str:
    """Name of the node that is the output of ``layer``.

    Raises:
        CaptureError: ``layer`` is no part of the model, or it has not exactly one output in the graph.
    """
    paths = {
        path for path, module in model.named_modules(remove_duplicate=False) if module is layer
    }
    if not paths:
        raise CaptureError(
            f"layer {type(layer).__name__} is not a module of this {type(model).__name__}"
        )
    if layer is model:
        return str(captured.output.name)
    name = min(paths)
    inside = {node for node in captured.graph.nodes if paths & set(place(node).stack)}
    calls = {
        key for node in inside for key, (path, _) in module_stack(node).items() if path in paths
    }
    leaving = [
        node
        for node in captured.graph.nodes
        if node in inside
        and isinstance(value_of(node), Tensor)
        and any(user not in inside for user in node.users)
    ]
    if len(leaving) == 1 and len(calls) == 1:
        return str(leaving[0].name)
    if not inside:
        reason = "leaves no operation in the graph: it is not called, or does nothing at inference. Name the module before it"
    else:
        reason = f"is called {len(calls)} times and has {len(leaving)} outputs in the graph, expected one of each"
    raise CaptureError(f"layer {name!r} ({type(layer).__name__}) {reason}")


def _from_program(program: ExportedProgram, count: int, shared: bool) -> CapturedGraph:
    signature = program.graph_signature
    mutated = {
        **signature.buffers_to_mutate,
        **getattr(signature, "parameters_to_mutate", {}),
        **signature.user_inputs_to_mutate,
    }
    if mutated:
        raise CaptureError(
            f"the model writes to {', '.join(map(repr, sorted(mutated.values())))} while it runs; each example's "
            "explanation would depend on the calls before it."
        )
    constants: dict[str, str | Tensor] = {}
    arguments: list[str | None] = []
    placeholders = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            constants[name] = str(spec.target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = program.constants[str(spec.target)]
        elif spec.kind is InputKind.USER_INPUT:
            arguments.append(name if name in placeholders else None)
        else:
            raise CaptureError(
                f"the model takes an argument of kind {spec.kind.name}, which has no signal to explain"
            )
    graph = program.graph
    ((result,),) = next(node for node in graph.nodes if node.op == "output").args
    inputs = tuple(str(name) for name in arguments[:count])
    nodes = {node.name: node for node in graph.nodes}
    batch = str(value_of(nodes[inputs[0]]).shape[0])
    return CapturedGraph(graph, constants, inputs, tuple(arguments), result, batch, shared)


def _describe(leaf: Any, free: bool) -> tuple[str, ...]:
    if isinstance(leaf, Tensor):
        shape = leaf.shape[1:] if free else leaf.shape
        return (
            "tensor",
            str(tuple(shape)),
            str(leaf.dtype),
            str(leaf.device),
            "per example" if free else "shared",
        )
    return ("value", type(leaf).__name__, repr(leaf))


def _per_example(inputs: Inputs, extras: Extras, shared: bool) -> list[bool]:
    """Which leaves of a call hold one row an example."""
    leaves = pytree.tree_leaves(extras)
    rows = len(inputs[0])
    return [True] * len(inputs) + [
        not shared and isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows
        for leaf in leaves
    ]
