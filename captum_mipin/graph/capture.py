"""From a model to its graph of operations.

``torch.export`` records the operations of a model. They become a functional graph, in which an
operation has one form, however the model's code calls it (as a method, in place, or as a function).
The export runs on a copy of the model that shares its parameters, so the model itself is never
changed.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError
from captum_mipin.graph.alone import check_alone, check_one, check_shared
from captum_mipin.graph.diagnosis import failure
from captum_mipin.graph.exporting import (
    FixedBatchError,
    check_registered,
    check_sizes,
    export_graph,
    free_batch,
)
from captum_mipin.graph.lifting import NotLiftableError, lifted
from captum_mipin.graph.literals import settle_literals
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.modes import uncollected
from captum_mipin.graph.modules import is_quantised, tree
from captum_mipin.graph.nodes import operation
from captum_mipin.graph.programs import settle_program
from captum_mipin.graph.rows import LostRowsError
from captum_mipin.graph.sharing import share
from captum_mipin.graph.signature import per_example
from captum_mipin.graph.trials import EXAMPLES, Trial, close, examples_like, joined
from captum_mipin.graph.validate import check_exportable, check_inputs, check_model
from captum_mipin.types import Extras, Inputs, Output

_LOGGER = logging.getLogger(__name__)

#: Arguments of a call: inputs, further arguments, and whether examples share these.
_Call = tuple[Inputs, Extras, bool]


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
        single: Whether the model takes no free batch size. Then the graph was made from the graph
            for one example, see :mod:`captum_mipin.graph.lifting`.
        writes: Whether the model writes to its attributes or to other objects while it runs.
        switches: Whether the model switches gradients on or off; else ``detached`` of
            :func:`capture` changes nothing.
    """

    graph: fx.Graph
    constants: dict[str, str | Tensor]
    inputs: tuple[str, ...]
    arguments: tuple[str | None, ...]
    output: fx.Node
    batch: str
    shared: bool
    places: dict[tuple[str, bool], tuple[str, ...]] = field(default_factory=dict)
    single: bool = False
    writes: bool = False
    switches: bool = False

    def run(self, values: Mapping[str, Any]) -> Tensor:
        """Return the output for the values of all placeholders, see :meth:`values`."""
        module = fx.GraphModule(nn.Module(), self.graph)
        arguments = [values.get(n.name) for n in self.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            (output,) = module.forward(*arguments)
        result: Tensor = output
        return result

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
            source = source.dequantize() if is_quantised(source) else source
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
    mixes: Callable[[CapturedGraph], bool] | None = None,
    counts: Callable[[CapturedGraph], bool] | None = None,
) -> CapturedGraph:
    """Capture ``model`` as a graph for inputs of these shapes and any batch size.

    The graph is kept as long as the model. The next call for such inputs returns it again, unless
    the model has changed in more than its weights; see :mod:`captum_mipin.graph.sharing`.

    Args:
        model: Module in evaluation mode.
        inputs: Example inputs (batch, ...). Only their shapes, dtypes and devices matter.
        extras: Further arguments of ``forward``.
        shared: See :func:`captum_mipin.graph.signature.per_example`.
        output: Which output, see :func:`captum_mipin.graph.signature.select`.
        explained: See :func:`captum_mipin.graph.validate.check_inputs`.
        detached: Detach the inputs of those parts that the model runs under ``torch.no_grad()``.
            If False, the graph does not show where gradients were switched off.
        mixes: Function that tells of a graph if its examples seem to depend on each other. If calls
            of the model show that they do not, the model is captured for one example.
        counts: Function that tells of a graph if it uses the number of examples as a value. Then it
            is returned in place of one that was made for one example, where the number is 1.

    Raises:
        CaptureError: ``torch.export`` cannot follow the model, or its output is not one tensor.
        InputError: The inputs are not dense tensors of a floating dtype with one common length.
        TrainingModeError: A module is in training mode and computes something else in it.

    Examples:
        >>> graph = capture(nn.Sequential(nn.Linear(4, 2)).eval(), (torch.ones(1, 4),))
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ['aten.linear.default']
    """
    check_inputs(inputs, explained)
    # a batch of any other size may get the graph, also one whose size is that of an argument
    shared = shared or not any(per_example(inputs, extras, shared)[len(inputs) :])
    check_model(model)
    call, options = (inputs, extras, shared), {"output": output, "detached": detached}
    make = partial(_capture_as_told, model, call, options, mixes, counts)
    graph: CapturedGraph = share(model, call, output, detached, make)
    return graph


def _capture_as_told(
    model: nn.Module,
    call: _Call,
    options: dict[str, Any],
    mixes: Callable[[CapturedGraph], bool] | None,
    counts: Callable[[CapturedGraph], bool] | None,
) -> CapturedGraph:
    """Return the graph of a model, or another one of it, as two functions tell of it."""
    check_exportable(model)
    graph = trace(model, *call, **options)
    if mixes is not None and not graph.single and mixes(graph):
        with suppress(CaptureError):  # it does mix them: the operation is refused by its name
            return trace(model, *call, **options, single=True)
    elif counts is not None and graph.single and any(map(_makes, graph.graph.nodes)):
        with suppress(CaptureError):
            free = trace(model, *call, **options, lengths=True)
            return free if counts(free) else graph
    return graph


def _makes(node: fx.Node) -> bool:
    """Return True for an operation that makes a tensor, as ``ones``, which may have a length."""
    named = operation(node).startswith("new_") or operation(node).endswith("_like")
    return named or (node.op == "call_function" and not node.all_input_nodes)


@uncollected()
def trace(
    model: nn.Module,
    inputs: Inputs,
    extras: Extras,
    shared: bool,
    *,
    output: Output,
    detached: bool,
    single: bool = False,
    lengths: bool = False,
) -> CapturedGraph:
    """Export a checked model for checked inputs; see :func:`capture` for the arguments.

    With ``single``, the graph is made from that for one example. With ``lengths``, ``len(x)`` is
    free in it; a model without ``len`` is refused.

    All graphs of this package are made by calls of ``captum_mipin.graph.capture.trace``. Replace
    this one name to share graphs between models, as the tests do.
    """
    trial, call = Trial(model, output), (inputs, extras, shared)
    if lengths and not trial.counts_lengths:
        raise CaptureError("the model's code does not call len")
    example = examples_like(*call)[0]
    trial.check_iterators()  # a call would advance those that nothing can stand for
    trial.dequantise(example)
    trial.run_alone(example)
    trial.check_iterators()
    trial.check_data()
    writes = trial.writes or trial.alone is None  # torch.export writes as well
    try:
        if single:
            refusal = FixedBatchError("the examples of a batch seem to depend on each other")
            graph = _capture_one(trial, call, detached, refusal)
        elif lengths:
            with trial.free_lengths():
                graph = _capture_any(trial, call, detached)
        else:
            graph = _capture(trial, call, detached)
        check_shared(trial, call, graph)
    except CaptureError as refusal:
        if single or lengths or isinstance(refusal, LostRowsError):
            raise
        graph = _capture_without_hooks(trial, call, detached, refusal)
    finally:
        for hook in trial.hooks:
            hook.put_back()
    return replace(graph, writes=writes)


def _capture(trial: Trial, call: _Call, detached: bool) -> CapturedGraph:
    """Return the graph of a model for any batch size, made from that for one if need be."""
    try:
        return _capture_any(trial, call, detached)
    except CaptureError as error:
        trial.check_repeats(examples_like(*call)[0])
        if not isinstance(error, FixedBatchError):
            raise
        if trial.is_recurrent and trial.counts_lengths:
            with trial.free_lengths(), suppress(CaptureError):
                graph = _capture_any(trial, call, detached)
                if trial.runs_recurrent(graph.graph):
                    return graph
        return _capture_one(trial, call, detached, error)


def _capture_without_hooks(
    trial: Trial, call: _Call, detached: bool, refusal: CaptureError
) -> CapturedGraph:
    """Return the graph of a model without the hooks that only observe.

    Raises:
        CaptureError: ``refusal``; or the hooks that are its cause, which may change the output.
    """
    if not trial.hooks:
        raise refusal
    others = trial.leave_out_observers(examples_like(*call)[0])
    with suppress(CaptureError):
        return _capture(trial, call, detached)
    if not others:  # all hooks only look: they are not the cause
        raise refusal from refusal.__cause__
    for hook in trial.hooks:
        hook.leave_out()
    trial.alone = None  # the result with the hooks
    try:
        _capture(trial, call, detached)
    except CaptureError:
        raise refusal from refusal.__cause__
    raise CaptureError(
        f"{refusal}\nThe cause is "
        + ", or ".join(f"{name}, which {does}" for name, does in others.items())
        + ". Expected hooks that only look, which are left out, or that compute with torch alone: "
        "remove it for the explanation (handle.remove())"
    ) from refusal.__cause__


def _capture_any(trial: Trial, call: _Call, detached: bool) -> CapturedGraph:
    """Return the graph of a model for any batch size."""
    arguments, shapes = free_batch(*call)

    def equal_lengths(module: nn.Module, arguments: Any) -> None:
        # else gather(1, labels) would have a batch of its own, the length of the labels
        leaves, own = pytree.tree_leaves(arguments), per_example(*call)
        first, *others = [x for x, each in zip(leaves, own, strict=True) if each]
        for x in others:
            torch._check(x.shape[0] == first.shape[0])

    handle = trial.twin.register_forward_pre_hook(equal_lengths)
    try:
        with trial.exporting():
            program, graph, switches = export_graph(trial.twin, arguments, shapes, detached)
    except CaptureError:
        raise
    except Exception as error:
        if trial.alone is not None:  # else the error of the model itself is the reason
            trial.check_weights()
        with trial.isolated():
            raise FixedBatchError(str(failure(error, trial.twin, *call))) from error
    finally:
        handle.remove()
        trial.restore()
    if any(getattr(node.target, "__name__", "") == "_add_batch_dim" for node in graph.nodes):
        raise FixedBatchError("the model contains torch.vmap, whose operations have no rules")
    if trial.written:
        trial.check_forgets(arguments)
    check_sizes(program)
    check_registered(program, trial.twin)
    captured = _from_program(program, graph, len(call[0]), call[2], switches)
    check_one(trial, call, lambda *one: captured.run(captured.values(trial.twin, *one)))
    check_alone(trial, call, captured)
    return captured


def _capture_one(
    trial: Trial, call: _Call, detached: bool, refusal: FixedBatchError
) -> CapturedGraph:
    """Return a graph for any batch size, made from the graph for one example.

    Raises:
        CaptureError: ``refusal``, if there is no such graph either; or the model mixes the examples
            of a batch.
    """
    examples, count = examples_like(*call), len(call[0])
    try:
        with trial.exporting():
            program, graph, switches = export_graph(trial.twin, examples[0], None, detached)
        one = _from_program(program, graph, count, call[2], switches)
        one.constants.update(settle_literals(one.graph, one.constants))
        named = zip(one.arguments, per_example(*call), strict=True)
        graph = lifted(one.graph, [name for name, own in named if own and name is not None])
        captured = _for_batches(one, graph)
        results = [trial.run(example) for example in examples]
        # squeeze() takes the dimension of the batch from the result for one example
        squeezed = results[0].ndim < value_of(captured.output).ndim
        results = [y[None] if squeezed else y for y in results]
        batch = joined(examples, EXAMPLES)
        found = captured.run(captured.values(trial.twin, batch[:count], batch[count:]))
        checked = close(found, joined(results, EXAMPLES))
    except NotLiftableError as error:
        reason = f"The model was captured for one example, but not for several: {error}"
        raise CaptureError(f"{refusal}\n{reason}.") from refusal.__cause__
    except Exception as error:  # of any type: the reason of the first way is the clearer one
        raise CaptureError(str(refusal)) from (refusal.__cause__ or error)
    finally:
        trial.restore()
    if trial.written:
        trial.check_forgets(examples[0])
    further = squeezed or any(per_example(*call)[count:])
    sizes = {EXAMPLES, 2, 4, 8, *refusal.sizes}  # a model may look if its size is even
    if any(trial.mixes(examples, results, size, further) for size in sizes):
        raise CaptureError(
            "the model's results for an example depend on the other examples of its batch or on "
            "their number, or are random; expected those for the example alone. Make the model "
            f"independent of the batch.\n{refusal}"
        ) from refusal.__cause__
    if not checked:
        raise CaptureError(str(refusal)) from refusal.__cause__
    check_registered(program, trial.twin)
    _LOGGER.info(
        "%s takes no free batch size: it was captured for one example. Each example of a batch is "
        "computed as if it were alone.",
        type(trial.twin).__name__,
    )
    return captured


def _for_batches(one: CapturedGraph, graph: fx.Graph) -> CapturedGraph:
    """Return the graph for batches that was made from the graph for one example."""
    first = next(node for node in graph.nodes if node.name == one.inputs[0])
    return replace(
        one,
        graph=graph,
        output=graph.output_node().all_input_nodes[0],
        batch=str(value_of(first).shape[0]),
        single=True,
    )


def _from_program(
    program: ExportedProgram, graph: fx.Graph, count: int, shared: bool, switches: bool
) -> CapturedGraph:
    """Return the graph of a program whose first ``count`` arguments are the inputs."""
    constants, arguments, result = settle_program(program, graph)
    inputs = tuple(str(name) for name in arguments[:count])
    first = next(node for node in graph.nodes if node.name == inputs[0])
    batch, call = str(value_of(first).shape[0]), (inputs, arguments)
    return CapturedGraph(graph, constants, *call, result, batch, shared, switches=switches)
