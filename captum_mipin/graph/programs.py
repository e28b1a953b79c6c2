"""From a program of ``torch.export`` to the parts of a captured graph."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from captum_mipin.errors import CaptureError
from captum_mipin.graph.marks import mark, value_of
from captum_mipin.graph.nodes import ancestors, operation, settle_sizes

#: The constants, the names of the arguments' placeholders, and the output's node; see
#: :class:`captum_mipin.graph.capture.CapturedGraph`.
_Parts = tuple[dict[str, str | Tensor], tuple[str | None, ...], fx.Node]


def settle_program(program: ExportedProgram, graph: fx.Graph) -> _Parts:
    """Bring the graph of a program into its final form, and return the parts of the program.

    Raises:
        CaptureError: The output depends on tensors that the model writes to while it runs, or the
            model takes an argument that is not a tensor, such as a custom object.
    """
    outputs: Any = graph.output_node().args[0]
    specs = program.graph_signature.output_specs
    kinds = [spec.kind for spec in specs][-len(outputs) :]
    result: fx.Node = outputs[kinds.index(OutputKind.USER_OUTPUT)]
    _drop_writes(program, graph, result)
    nodes = {node.name: node for node in graph.nodes}
    constants: dict[str, str | Tensor] = {}
    arguments: list[str | None] = []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            constants |= {name: str(spec.target)} if name in nodes else {}
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
        settle_sizes(node)
        # The export used contiguous tensors. Of tensors with other strides, view() would fail.
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            mark(node, original=node.target)
            node.target = torch.ops.aten.reshape.default
        elif operation(node) == "squeeze":
            _keep_batch(node)
    return constants, tuple(arguments), result


def _drop_writes(program: ExportedProgram, graph: fx.Graph, result: fx.Node) -> None:
    """Remove the writes to parameters and buffers, such as counters, that ``result`` ignores.

    Raises:
        CaptureError: ``result`` depends on what the model writes to.
    """
    signature = program.graph_signature
    written = {
        *signature.buffers_to_mutate.values(),
        *getattr(signature, "parameters_to_mutate", {}).values(),
    }
    names = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target in written}
    used = {names[node.name] for node in ancestors([result]) if node.name in names}
    used |= set(signature.user_inputs_to_mutate.values())
    if used:
        raise CaptureError(
            f"the model writes to {', '.join(map(repr, sorted(used)))} while it runs, so that an "
            "explanation would depend on earlier calls; expected a forward that changes no input, "
            "parameter or buffer that it computes with: compute with a copy (clone) instead"
        )
    if names:
        graph.output_node().args = ((result,),)
        graph.eliminate_dead_code()
        for node in graph.find_nodes(op="placeholder"):
            if node.name in names:
                graph.erase_node(node)


def _keep_batch(node: fx.Node) -> None:
    """Let ``squeeze`` keep the dimension of the batch, also of a batch of one example."""
    source, *dims = node.args
    shape: Any = value_of(node.all_input_nodes[0]).shape
    given: Any = dims[0] if dims else range(len(shape))
    given = [given] if isinstance(given, int) else given
    ones = [dim % len(shape) for dim in given if isinstance(shape[dim], int) and shape[dim] == 1]
    mark(node, original=node.target)
    node.target, node.args = torch.ops.aten.squeeze.dims, (source, ones)
