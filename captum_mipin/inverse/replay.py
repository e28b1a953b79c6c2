"""Algorithm 1 on a few stored examples of the data, without a new run of the network.

For all examples, two kinds of values are stored: the features where backward passes stop, and the
outputs of operations with weights. Other operations run again on the chosen examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.errors import CaptureError, FitError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import batch_dimension, shape_text
from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.nodes import ancestors, is_size, place
from captum_mipin.graph.subgraph import evaluate, extract, run_part
from captum_mipin.graph.turns import TURNS
from captum_mipin.inverse.examples import Examples
from captum_mipin.inverse.request import Settings
from captum_mipin.inverse.trace import Trace
from captum_mipin.propagation.runtime import Run, Seen, Step, source
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.dual import Rows, solve_rows
from captum_mipin.regression.ridge import solve
from captum_mipin.rules import Fork, Inverse, Options
from captum_mipin.rules.linear import Dense
from captum_mipin.targets import target_label
from captum_mipin.types import Target


class Replay:
    """The part of a surrogate that a fit on stored examples runs.

    Operations with weights are not run, because their outputs are stored.

    Args:
        surrogate: The surrogate of the model.
        feature: Name of the node whose tensor examples are compared by; None for the inputs.

    Raises:
        CaptureError: A fit needs values of the examples that are not stored, or the compared tensor
            has integer values or no batch dimension.
    """

    def __init__(self, surrogate: Surrogate, feature: str | None) -> None:
        captured = surrogate.captured
        _check_feature(captured, feature)
        self._inputs, self._batch = captured.inputs, captured.batch
        # A reference to the surrogate would keep it in the WeakKeyDictionary of replays forever.
        self._steps, self._layouts = surrogate.steps, surrogate.layouts
        placeholders = captured.graph.find_nodes(op="placeholder")
        self._arguments = [node.name for node in placeholders]
        features = [node for node in captured.graph.nodes if node.name == feature]
        self._feature = extract(captured.graph, placeholders, features) if features else None
        self._at = [batch_dimension(value_of(node), self._batch) or 0 for node in features]

        graph = surrogate.graph
        run, (result,) = next(iter(graph.nodes)), graph.output_node().all_input_nodes
        ends = sorted(graph.find_nodes(op="call_function", target=source), key=_index)
        # x of each source(run, index, x): other nodes may use x directly, for example to record it
        tensors = [node.args[2] for node in ends]
        known = {run, *ends, *tensors, *filter(is_size, graph.nodes)}
        needed = ancestors([result], known)
        sizes = [node for node in graph.nodes if node in needed and is_size(node)]
        placeholders = graph.find_nodes(op="placeholder")
        constants = [node for node in placeholders if node in needed - known]
        for node in constants:
            if marks(node).origin not in captured.constants:
                raise _other_way(node, needed)
        self._constants = [marks(node).origin for node in constants]
        self._sizes = [value_of(node).node.expr for node in sizes]
        self._module = extract(graph, [run, *constants, *sizes, *ends, *tensors], [result])

    def features(self, values: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors (batch, features) that the examples of a batch are compared by.

        Args:
            values: Values of the placeholders of the model's graph, by name.
        """
        if self._feature is None:
            return [values[name].flatten(1) for name in self._inputs]
        arguments = [values[name] for name in self._arguments]
        with TURNS.explaining():
            (x,) = run_part(self._feature, arguments, map(values.get, self._inputs))
        return [x.detach().movedim(self._at[0], 0).flatten(1)]

    def inverses(
        self,
        examples: Examples,
        target: Target,
        values: Mapping[str, Any],
        keys: Sequence[str],
        settings: Settings,
    ) -> dict[str, Inverse]:
        """Return the inverses of a class, fitted on some examples (algorithm 1).

        Args:
            examples: The chosen stored examples, on the device of the model.
            target: The class.
            values: Values of the placeholders of the model's graph, by name; only those of
                parameters are used.
            keys: Keys of the learned steps, in order from the output to the input.
            settings: The settings of the regressions.

        Raises:
            FitError: The output for the class is the same for all examples.
        """
        outputs = examples.outputs.items()
        known = {key: _known(self._steps[key], tensors) for key, tensors in outputs}
        layouts = zip(self._layouts, examples.sources, strict=True)
        sources = [layout.restored(x) for layout, x in layouts]
        sizes = [evaluate(size, self._batch, len(examples)) for size in self._sizes]
        constants = [values[name] for name in self._constants]
        run = Run({**self._steps, **known}, Options(shares=settings.shares), fitting=keys)
        with TURNS.explaining(), torch.enable_grad():
            (output,) = self._module.forward(run, *constants, *sizes, *sources, *sources)
            _check_varies(output.detach(), target)
            trace = Trace(run, output)
            inverses: dict[str, Inverse] = {}
            for key in keys:
                signals = trace.signals(key, target, inverses)
                inverses[key] = _solve(trace.seen(key), signals, settings, last=key == keys[-1])
                trace.forget([target])
        return inverses


def _check_feature(captured: CapturedGraph, feature: str | None) -> None:
    """Raise CaptureError unless compared tensors are floating and have one batch dimension."""
    names = captured.inputs if feature is None else (feature,)
    for node in captured.graph.nodes:
        value = value_of(node)
        if node.name in names and not (
            value.is_floating_point() and batch_dimension(value, captured.batch) is not None
        ):
            raise CaptureError(
                f"neighbours cannot be compared by {place(node)}, of dtype {value.dtype} and shape "
                f"{shape_text(value, captured.batch)}, expected floating-point numbers with the "
                "batch as one dimension: pass another feature="
            )


def _index(node: fx.Node) -> int:
    """Return the index of the feature that a node marks as the end of the backward pass."""
    index: Any = node.args[1]
    return int(index)


def _other_way(node: fx.Node, needed: set[fx.Node]) -> CaptureError:
    """Return the error for a path from ``node`` to the output.

    The path does not pass through the layer where the inverse stops.
    """
    user = next(user for user in node.users if user in needed and not is_size(user))
    return CaptureError(
        f"{place(user)} takes {place(node).path} on a path that bypasses the layer where the "
        "inverse stops, but a NeighbourInverse stores only the output of this layer. Choose a "
        "layer= that no path bypasses, or fit an InverseNetwork"
    )


def _known(step: Step, outputs: Sequence[Tensor]) -> Step:
    """Return a copy of a step that returns stored outputs, and does not run its operation."""
    tensors = tuple(step.layout.restored(output) for output in outputs)
    several = len(tensors) > 1 or isinstance(step.operation, Fork)
    value = tensors if several else tensors[0]
    return replace(step, operation=lambda *arguments, **named: value)


def _check_varies(output: Tensor, target: Target) -> None:
    """Raise FitError if the output of a class is the same for all examples."""
    index: tuple[Any, ...] = (slice(None), *target)
    values = output[index]
    if bool((values == values[0]).all()):
        raise FitError(
            f"the output for target {target_label(target)} is {float(values[0]):g} for each of the "
            f"{len(values)} neighbours of an example, expected different values, which a "
            "regression needs: raise neighbours="
        )


def _solve(seen: Seen, signals: tuple[Tensor, ...], settings: Settings, last: bool) -> Inverse:
    """Return the inverse of one step, solved by the dual or the primal, whichever is faster.

    Args:
        seen: The recorded inverter, input and outputs of the step.
        signals: Source signals at the outputs of the step.
        settings: The settings of the regression.
        last: True for the last step, whose inverse is applied to one example only.
    """
    x, inverter = seen.x.detach(), seen.inverter
    # at least float32: half precision has too few digits for sums
    dtype = torch.float64 if settings.double else torch.promote_types(x.dtype, torch.float32)
    if isinstance(inverter, Dense) and not inverter.own:
        s = torch.cat(signals, -1)
        s = s.reshape(-1, s.shape[-1]).to(dtype)
        live = s.any(0).nonzero().squeeze(1)
        n, columns = len(s), len(live)
        # operations for n rows: n² (columns + n / 3) by the dual,
        # n columns (columns + features) by the primal
        if n * (columns + n / 3) < columns * (columns + inverter.features):
            rows = Rows(x.reshape(-1, inverter.features).to(dtype))
            solution = solve_rows(
                rows, s[:, live], settings.ridge, settings.ridge_scale, measure=False
            )
            if last:  # for one example, two small products cost less than forming the weight
                weight, bias = solution.coefficients.to(x), solution.bias.to(x)
                return Inverse(weight, bias, live, rows=rows.x.to(x))
            return inverter.inverse_of_rows(solution, live, rows).to(x)
    moments = inverter.moments(x.to(dtype), tuple(s.to(dtype) for s in signals))
    return inverter.inverse(solve(moments, settings.ridge, settings.ridge_scale, inverter.tied), x)
