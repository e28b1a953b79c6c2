"""The public function :func:`check`: a table of the operations of a model and their support."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from captum_mipin.calls import explained
from captum_mipin.errors import InputError
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layers import tensors_at
from captum_mipin.graph.modules import module_of
from captum_mipin.graph.validate import as_extras, as_inputs, as_model, check_inputs
from captum_mipin.options import type_of
from captum_mipin.propagation.final import below_final, result_row
from captum_mipin.propagation.independent import capture_apart
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.propagation.treatments import treatments
from captum_mipin.report import CheckReport, CheckRow
from captum_mipin.rules import Rule, table
from captum_mipin.types import Extras, Inputs, Output


@explained
def check(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    additional_forward_args: Any = None,
    *,
    layer: nn.Module | str | None = None,
    output: Output = None,
    method: Any = None,
) -> CheckReport:
    """Return a table that shows for each operation whether a signal can be sent back through it.

    Args:
        model: A module in evaluation mode.
        example_inputs: Tensor (batch, ...) or tuple of such tensors. Only their shapes, dtypes and
            devices matter.
        additional_forward_args: Further arguments of the model.
        layer: A module of the model, or its name. If it is given, only the operations between its
            output and the model's output are checked.
        output: Index, key or field name of the model's output, see
            :class:`~captum_mipin.InverseNetwork`.
        method: A method of this package: its class, or an object such as ``LRP(model, ...)`` with
            its options; by default MIP-IN. For methods with rules of their own a further column
            names the operations at which relevance is not conserved, or which the definition does
            not cover. For others, such as IBA and SmoothGrad, the table names what they refuse.

    Returns:
        A table with one row per operation: its status ("supported", "passes" or "refused") and a
        note on its treatment.

    Raises:
        CaptureError: The model as a whole cannot be captured.
        InputError: ``method`` is no table of rules, such as LeGrad.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Softmax(1), nn.Linear(2, 2)).eval()
        >>> print(check(model, torch.ones(1, 4)))  # doctest: +ELLIPSIS
        module  operation            status     what happens to the signal
        0       aten.linear.default  supported  learned dense inverse
        1       aten.softmax.int     refused    no rule covers it; ...
        2       aten.linear.default  supported  learned dense inverse
    """
    model, inputs = as_model(model), as_inputs(example_inputs)
    extras = as_extras(additional_forward_args)
    check_inputs(inputs, explained=layer is None)
    graphs = Graphs[None]()

    def graph_of(inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
        return capture_apart(model, inputs, extras, shared, output=output, explained=layer is None)

    graph = graphs.get(graphs.find(inputs, extras, graph_of))
    assert graph is not None  # for mypy: find has captured the graph
    logits = getattr(method, "_logits", True)
    graph, final = below_final(graph) if logits else (graph, result_row(graph))
    module = None if layer is None else module_of(layer, model)
    start = tensors_at(graph, model, module, (inputs, extras))
    rows = _rows(method, model, graph, start)
    if final is not None:
        rows = [*rows, final] if logits else _with_final(rows, final)
    return CheckReport(tuple(rows), graph.single)


def _with_final(rows: list[CheckRow], final: CheckRow) -> list[CheckRow]:
    """Return the rows, with ``final`` in the place of the last row of this operation."""
    place = (final.path, final.operation)
    alike = [at for at, row in enumerate(rows) if (row.path, row.operation) == place]
    at = alike[-1] if alike else len(rows)
    return [*rows[:at], final, *rows[at + 1 :]]


def _rows(
    method: Any, model: nn.Module, graph: CapturedGraph, start: Sequence[str]
) -> list[CheckRow]:
    """Return one row per operation, by the rules of a method; None stands for MIP-IN."""
    if method is None or hasattr(method, "source_signal"):  # MIP-IN's inverses and attributions
        return survey(graph, table(), start)
    if not hasattr(method, "survey"):
        raise InputError(
            f"method is {type_of(method)}, which has no rules of operations to check; expected an "
            "object such as LRP(model) or a class such as Deconvnet, of captum_mipin.methods: pass "
            "one of these, or None for MIP-IN"
        )
    bare = getattr(method, "_bare", None) if isinstance(method, type) else None
    rows: list[CheckRow] = (bare(model) if bare else method).survey(graph, start)
    return rows


def survey(
    captured: CapturedGraph, rules: Mapping[str, Rule], start: Sequence[str] | None = None
) -> list[CheckRow]:
    """Return one row per operation between the explained node and the output, in their order.

    Args:
        captured: The model's graph.
        rules: Operation → rule.
        start: Names of the nodes whose values are explained; None for the inputs.
    """
    return treatments(draft(captured, rules, start, MARKING))
