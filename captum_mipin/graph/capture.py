"""From a model to its graph of operations.

``torch.export`` records the operations of a model. They become a functional graph, in which an
operation has one form, however the model's code calls it (as a method, in place, or as a function).
The export runs on a copy of the model that shares its parameters, so the model itself is never
changed.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, default_decompositions, export
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError
from captum_mipin.graph.diagnosis import failure, quiet
from captum_mipin.graph.functional import NotRewritableError, functional
from captum_mipin.graph.kept import Kept
from captum_mipin.graph.marks import inherit, mark, value_of
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.modules import OWN, named_tensors, tree
from captum_mipin.graph.signature import per_example, plain, select
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.twin import twin_of
from captum_mipin.graph.validate import check_exportable, check_inputs, check_model
from captum_mipin.training import settle
from captum_mipin.types import Extras, Inputs, Output

#: Batch size of the example for the capture. torch.export treats sizes 0 and 1 as constants.
_EXAMPLE_BATCH = 3

#: A model must accept all batch sizes up to this one. For larger batches torch itself uses other
#: kernels of normalisation on GPUs.
_LARGEST_BATCH = 65535

#: Pattern of a harmless warning about recurrent layers, whose weights are plain attributes as well.
_RECURRENT = (
    r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ (was|were) assigned during "
    "export"
)


@dataclass(frozen=True)
class CapturedGraph:
    """The operations of a model, as a functional graph.

    Attributes:
        graph: Nodes in order of execution; placeholders first.
        constants: Name of a placeholder → the path of its parameter or buffer as a string, or the
            tensor itself if the model has not registered it.
        inputs: Names of the placeholders of the inputs.
        arguments: Names of the placeholders of all inputs and extra arguments, in order; None for
            an argument without a placeholder.
        output: Node of the model's output.
        batch: The symbol of the batch size.
        shared: See :func:`captum_mipin.graph.signature.per_example`.
        places: The nodes at the places of modules that were looked up before, see
            :func:`captum_mipin.graph.layers.tensors_at`.
    """

    graph: fx.Graph
    constants: dict[str, str | Tensor]
    inputs: tuple[str, ...]
    arguments: tuple[str | None, ...]
    output: fx.Node
    batch: str
    shared: bool
    places: dict[tuple[str, bool], tuple[str, ...]] = field(default_factory=dict)

    def values(self, model: nn.Module, inputs: Inputs, extras: Extras) -> dict[str, Any]:
        """Return the values of all placeholders for a call, by name of the placeholder."""
        leaves = zip(self.arguments, pytree.tree_leaves((inputs, extras)), strict=True)
        given = {name: leaf for name, leaf in leaves if name is not None}
        return self.weights(model) | given

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """Return the current parameters, buffers and constants of ``model``, by placeholder."""
        modules = dict(tree(model))
        values: dict[str, Any] = {}
        source: Any
        for name, source in self.constants.items():
            if isinstance(source, str):
                path, _, attribute = source.rpartition(".")
                # looking into _parameters first takes a third of the time of getattr
                source = modules[path]._parameters.get(attribute)
                source = getattr(modules[path], attribute) if source is None else source
            values[name] = source.detach() if source.requires_grad else source
        return values


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
    """Capture ``model`` as a graph for inputs of these shapes and any batch size.

    Args:
        model: Module in evaluation mode.
        inputs: Example inputs (batch, ...). Only their shapes, dtypes and devices matter.
        extras: Further arguments of ``forward``.
        shared: See :func:`captum_mipin.graph.signature.per_example`.
        output: Which output, see :func:`captum_mipin.graph.signature.select`.
        explained: See :func:`captum_mipin.graph.validate.check_inputs`.
        detached: Detach the inputs of those parts that the model runs under ``torch.no_grad()``.
            If False, the graph does not show where gradients were switched off.

    Raises:
        CaptureError: ``torch.export`` cannot follow the model, or its output is not one tensor.
        InputError: The inputs are not dense tensors of a floating dtype with one common length.
        TrainingModeError: A module is in training mode and computes something else in it.

    Examples:
        >>> graph = capture(nn.Sequential(nn.Linear(4, 2)).eval(), (torch.ones(1, 4),))
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ['aten.linear.default']
    """
    check_model(model)
    check_exportable(model)
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
    """Export a checked model for checked inputs; see :func:`capture` for the arguments.

    All graphs of this package are made by calls of ``captum_mipin.graph.capture.trace``. Replace
    this one name to share graphs between models, as the tests do.
    """
    twin = twin_of(model)
    settle(twin)
    kept, arguments = Kept(twin), _examples(inputs, extras, shared)
    written: list[str] = []

    def finish(module: nn.Module, arguments: Any, value: Any) -> Tensor:
        # before torch compares the attributes of the model with those before the call
        written.extend(kept.restore())
        return select(value, output)

    handle = twin.register_forward_hook(finish)
    try:
        program, graph = _export(twin, *arguments, detached)
    except CaptureError:
        raise
    except Exception as error:
        handle.remove()
        raise failure(error, twin, inputs, extras, shared) from error
    finally:
        kept.restore()
        handle.remove()
    if written:
        _check_forgets(twin, kept, arguments[0], written)
    for symbol, bounds in program.range_constraints.items():
        if bounds.lower > 2 or bounds.upper < _LARGEST_BATCH:
            raise CaptureError(
                f"the model accepts only sizes {bounds} of {symbol}, or computes differently for "
                f"other sizes; expected all from 2 to {_LARGEST_BATCH}: the batch size must be "
                "free, so remove conditions on x.shape[0]"
            )
    _check_registered(program, twin)
    return _from_program(program, graph, len(inputs), shared)


def _examples(inputs: Inputs, extras: Extras, shared: bool) -> tuple[Any, ShapesCollection]:
    """Return the arguments for the export, and the dimensions whose size is not fixed."""
    leaves, structure = pytree.tree_flatten(plain((*inputs, *extras)))
    shapes = ShapesCollection()
    for index, own in enumerate(per_example(inputs, extras, shared)):
        if own:
            ones = (1,) * (leaves[index].ndim - 1)
            leaves[index] = leaves[index][:1].repeat(_EXAMPLE_BATCH, *ones)
            shapes[leaves[index]] = {0: Dim.DYNAMIC}
    return pytree.tree_unflatten(leaves, structure), shapes


def _check_forgets(twin: nn.Module, kept: Kept, arguments: Any, written: list[str]) -> None:
    """Raise CaptureError if a call of the model changes the results of later calls.

    Args:
        twin: The copy of the model.
        kept: The places that calls of the copy write to.
        arguments: The arguments of a call.
        written: Names of the attributes and variables that a call writes tensors to.
    """
    device = pytree.tree_leaves(arguments)[0].device
    devices = [device] if device.type == "cuda" else []
    others = pytree.tree_map_only(Tensor, _other, arguments)

    def run(arguments: Any) -> list[Any]:
        torch.manual_seed(0)
        return pytree.tree_leaves(twin(*arguments))

    try:
        with plain_modes(device), torch.no_grad(), torch.random.fork_rng(devices):
            expected = run(arguments)
            kept.restore()
            run(others)
            results = run(arguments)
        same = all(
            torch.equal(x, y) if isinstance(x, Tensor) else x is y
            for x, y in zip(expected, results, strict=True)
        )
    except Exception:  # of any type: the second call fails, the first one did not
        same = False
    finally:
        kept.restore()
    if not same:
        raise CaptureError(
            f"the model writes a tensor to {', '.join(map(repr, dict.fromkeys(written)))} while it "
            "runs, and its next call reads that tensor, so that an explanation would depend on "
            "earlier calls; expected a forward whose result depends on its arguments alone: pass "
            "the tensor as an argument, or clear it at the beginning of forward"
        )


def _other(x: Tensor) -> Tensor:
    """Return another tensor of the same shape that a model that takes ``x`` takes as well."""
    return x / 2 + 0.25 if x.is_floating_point() else x.flip(-1) if x.ndim else x


def _export(
    model: nn.Module, arguments: Any, shapes: ShapesCollection, detached: bool
) -> tuple[ExportedProgram, fx.Graph]:
    """Return a model's program, and its graph without operations that write to memory."""
    device = pytree.tree_leaves(arguments)[0].device.type
    with (
        TURNS.exporting(), warnings.catch_warnings(), quiet(),
        torch.autocast(device, enabled=False),
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=_RECURRENT)
        program = export(model, arguments, dynamic_shapes=shapes, strict=False)
        if detached:
            _detach(program.graph)
        try:
            return program, functional(program.graph, _decompositions())
        except NotRewritableError:  # then torch traces the program again, which takes longer
            # Without example inputs torch does not check guards: torch 2.9 fails at that check for
            # a model whose forward takes *inputs.
            program.example_inputs = None
            program = program.run_decompositions(dict(_decompositions()))
            return program, program.graph


def _detach(graph: fx.Graph) -> None:
    """Detach the inputs of those parts of a graph that run under ``torch.no_grad()``."""
    for node in list(graph.nodes):
        without = node.target is torch.ops.higher_order.wrap_with_set_grad_enabled
        if not without or node.args[0] is not False:
            continue
        for source in node.all_input_nodes:
            if isinstance(value_of(source), Tensor):
                with graph.inserting_before(node):
                    cut = graph.call_function(torch.ops.aten.detach.default, (source,))
                inherit(cut, source)
                node.replace_input_with(source, cut)


def _check_registered(program: ExportedProgram, model: nn.Module) -> None:
    """Raise CaptureError if the model uses weights of a module that it has not registered.

    A module in a plain list or dictionary is not registered. Changes of its weights would not be
    noticed, and a fitted inverse would be used with weights that it does not belong to.
    """
    constants = [tensor for tensor in program.constants.values() if isinstance(tensor, Tensor)]
    used = {tensor.data_ptr() for tensor in constants if tensor.numel()}
    used -= {tensor.data_ptr() for _, tensor in named_tensors(model)}
    known = set(model.modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for leaf in () if name in OWN else pytree.tree_leaves(value):
                hidden = isinstance(leaf, nn.Module) and leaf not in known
                if hidden and used & {t.data_ptr() for _, t in named_tensors(leaf)}:
                    where = f"{path}.{name}".lstrip(".")
                    raise CaptureError(
                        f"the model computes with a {type(leaf).__name__} in {where!r} that is not "
                        "registered, so that a change of its weights would not be noticed; "
                        "expected a registered module: put it into an nn.ModuleList or "
                        "nn.ModuleDict"
                    )


@cache
def _decompositions() -> Mapping[Any, Any]:
    """Return the composite operations to replace by their parts, such as einsum and LSTM.

    Returns:
        Operation → function that computes it from simpler operations.
    """
    kinds = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    apart = {
        "einsum",
        "addcmul",
        "addcdiv",
        "lerp",
        "take_along_dim",
        *kinds,
        *(f"{kind}_cell" for kind in kinds),
    }
    table = default_decompositions().items()
    return MappingProxyType({op: how for op, how in table if str(op).split(".")[1] in apart})


def _from_program(
    program: ExportedProgram, graph: fx.Graph, count: int, shared: bool
) -> CapturedGraph:
    """Return the graph of a program whose first ``count`` arguments are the inputs.

    Raises:
        CaptureError: The model writes to its tensors while it runs, or it takes an argument that is
            not a tensor, such as a custom object.
    """
    signature = program.graph_signature
    written = {
        **signature.buffers_to_mutate,
        **getattr(signature, "parameters_to_mutate", {}),
        **signature.user_inputs_to_mutate,
    }
    if written:
        raise CaptureError(
            f"the model writes to {', '.join(map(repr, sorted(written.values())))} while it runs, "
            "so that an explanation would depend on earlier calls; expected a forward that changes "
            "no input, parameter or buffer: compute with a copy (clone) instead"
        )
    nodes = {node.name: node for node in graph.nodes}
    constants: dict[str, str | Tensor] = {}
    arguments: list[str | None] = []
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            constants[name] = str(spec.target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = program.constants[str(spec.target)]
        elif spec.kind is InputKind.USER_INPUT:
            arguments.append(name if name in nodes else None)
        else:
            raise CaptureError(
                f"the exported model takes an argument of kind {spec.kind.name}, expected tensors, "
                "parameters and buffers alone: wrap the model in a module that creates this "
                "argument itself"
            )
    for node in graph.nodes:
        # The export used contiguous tensors. Of tensors with other strides, view() would fail.
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            mark(node, original=node.target)
            node.target = torch.ops.aten.reshape.default
    ((result,),) = next(node for node in graph.nodes if node.op == "output").args
    inputs = tuple(str(name) for name in arguments[:count])
    batch = str(value_of(nodes[inputs[0]]).shape[0])
    return CapturedGraph(graph, constants, inputs, tuple(arguments), result, batch, shared)
