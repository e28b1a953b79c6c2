"""Neighbourhood fits: each example is explained by an inverse of its own, fitted on those of the data that are most like it.

Section 4.2 of the paper calls this the intuitive way to make an inverse local, and drops it since each example would need a
training of its own. In closed form it does not: where the passes back end, and at the outputs of operations with weights, the
values of all examples are kept, so that the network between is not run again, and a regression on k rows is small.
"""

import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from captum_mipin.errors import (
    CaptureError,
    FitError,
    InputError,
    InverseFileError,
    MIPINError,
    ModelChangedError,
    NotFittedError,
)  # fmt: skip
from captum_mipin.graph.capture import TURNS, CapturedGraph
from captum_mipin.graph.layout import first_dimension
from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.nodes import is_size, place
from captum_mipin.graph.signature import Signature, first_example, pick
from captum_mipin.graph.subgraph import evaluate, extract, module_output, run_part
from captum_mipin.graph.validate import check_model, device_of, finite, generator_kept
from captum_mipin.inverse.data import Batches, Unpack, check_independent
from captum_mipin.inverse.network import Explanation, InverseNetwork
from captum_mipin.inverse.request import Fitted, Settings
from captum_mipin.inverse.state import State, head_of
from captum_mipin.inverse.trace import Trace
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.propagation.runtime import Inverses, Run, Seen, Step, source
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.dual import Rows, solve_rows
from captum_mipin.regression.ridge import RidgeScale, solve
from captum_mipin.rules import Fork, Inverse, Options
from captum_mipin.rules.linear import Dense
from captum_mipin.storage.watch import Watch
from captum_mipin.targets import per_example, target_indices, target_label
from captum_mipin.types import Extras, Inputs, Output, Target

#: Bytes that the inverses of examples explained at once may take, unless it is one example alone.
_TOGETHER = 1 << 29

Metric = Literal["cosine", "euclidean"]


@dataclass
class Examples:
    """What is kept of the data, the examples along the first dimension throughout.

    Attributes:
        sources: The features where the passes back end.
        outputs: Key of a learned step → its operation's outputs.
        features: What neighbours are looked for by; where there are none, the sources.
    """

    sources: list[Tensor]
    outputs: dict[str, list[Tensor]]
    features: list[Tensor]
    _sums: dict[Metric, tuple[list[Tensor], Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.sources[0])

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [
            *self.sources,
            *self.features,
            *(output for outputs in self.outputs.values() for output in outputs),
        ]

    @property
    def bytes_each(self) -> int:
        """Memory of one example."""
        return sum(t[:1].nbytes for t in self.tensors)

    def mapped(self, change: Callable[..., Tensor], *others: "Examples") -> "Examples":
        """Each tensor changed, together with those in its place in others of the same kind."""
        found = iter(
            [
                change(*tensors)
                for tensors in zip(self.tensors, *(other.tensors for other in others), strict=True)
            ]
        )
        sources, features = (
            [next(found) for _ in self.sources],
            [next(found) for _ in self.features],
        )
        return Examples(
            sources,
            {key: [next(found) for _ in outputs] for key, outputs in self.outputs.items()},
            features,
        )

    def nearest(self, examples: Sequence[Tensor], count: int, metric: Metric) -> Tensor:
        """The ``count`` most similar for each of some examples, by their features: (examples, count).

        What is most similar has the largest q·x / |x|, or the largest 2 (q − m)·x − |x − m|², where m is the mean.
        """
        features = [x.flatten(1) for x in self.features or self.sources]
        features = [
            x.float() if x.element_size() < 4 else x for x in features
        ]  # half precision cannot hold sums
        if count == len(self):
            return torch.arange(count, device=features[0].device).expand(len(examples[0]), -1)
        if metric not in self._sums:
            means = [
                x.mean(0) if metric == "euclidean" else torch.zeros_like(x[0]) for x in features
            ]
            squared = [
                torch.cat([(part - mean).double().square().sum(1) for part in x.split(256)])
                for x, mean in zip(features, means, strict=True)
            ]
            sums = torch.stack(squared).sum(0).to(features[0].dtype)
            if not finite(sums):
                raise InputError(
                    f"the features that neighbours are looked for by are too large for {sums.dtype}: scale them down"
                )
            self._sums[metric] = means, sums
        means, squares = self._sums[metric]
        pairs = zip(examples, means, features, strict=True)
        products = torch.stack([(q.to(x) - mean) @ x.mT for q, mean, x in pairs]).sum(0)
        scores = (
            2 * products - squares
            if metric == "euclidean"
            else products * squares.rsqrt().nan_to_num(posinf=0.0)
        )
        return scores.topk(count, 1).indices


class Replay:
    """The surrogate of a fit from what is kept on: operations with weights are not run, their outputs are given.

    Args:
        captured, surrogate: The graph and the surrogate.
        feature: The tensor that neighbours are looked for by; None for the inputs.

    Raises:
        CaptureError: Something else of the examples is needed than what is kept; the feature is of no use.
    """

    def __init__(self, captured: CapturedGraph, surrogate: Surrogate, feature: str | None) -> None:
        self._inputs = captured.inputs
        placeholders = captured.graph.find_nodes(op="placeholder")
        self._order = [node.name for node in placeholders]
        features = [node for node in captured.graph.nodes if node.name == feature]
        self._part = extract(captured.graph, placeholders, features) if feature else None
        for node in captured.graph.nodes:
            value = value_of(node)
            if node.name in ([feature] if feature else captured.inputs) and (
                not value.is_floating_point() or not first_dimension(value, captured.batch)
            ):
                raise CaptureError(
                    f"neighbours cannot be looked for by {place(node)}, of dtype {value.dtype} and shape "
                    f"{tuple(map(str, value.shape))}: expected floating numbers, the batch first. Name another feature="
                )
        self._steps, self._learned, self._layouts = (
            surrogate.steps,
            surrogate.learned,
            surrogate.layouts,
        )
        self._symbol = captured.batch
        (result,) = next(node for node in surrogate.graph.nodes if node.op == "output").args
        needed, stack = set[fx.Node](), [result]
        sources = {node.args[2]: node for node in surrogate.graph.nodes if node.target is source}
        while stack:
            node = stack.pop()
            node = sources.get(
                node, node
            )  # where the passes end, what goes round as a recording is known too
            if isinstance(node, fx.Node) and node not in needed:
                needed.add(node)
                stack.extend([] if node.target is source or is_size(node) else node.all_input_nodes)
        graph = fx.Graph()
        copied = {node: graph.placeholder("run") for node in list(surrogate.graph.nodes)[:1]}
        (run,) = copied.values()
        self._sizes: list[Any] = []
        self._constants: list[str] = []
        for node in needed:
            if node.op == "placeholder" and node not in copied:
                if marks(node).origin not in captured.constants:
                    raise _refused(node, needed)
                self._constants.append(marks(node).origin)
                copied[node] = graph.placeholder(node.name)
        for node in needed:
            if is_size(node):
                self._sizes.append(value_of(node).node.expr)
                copied[node] = graph.placeholder(node.name)
        inputs = [graph.placeholder(f"source_{index}") for index in range(surrogate.starts)]
        for node in surrogate.graph.nodes:
            if node.target is source:
                copied[node] = copied[node.args[2]] = graph.call_function(
                    source, (run, node.args[1], inputs[node.args[1]])
                )
            elif node in needed and node not in copied:
                copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(copied[result])
        self._module = fx.GraphModule(nn.Module(), graph)

    def features(self, values: Mapping[str, Any]) -> list[Tensor]:
        """What neighbours of a batch's examples are looked for by, for these values of the graph's placeholders."""
        if self._part is None:
            return [values[name].flatten(1) for name in self._inputs]
        shown = map(values.get, self._inputs)
        with TURNS.explaining():
            (x,) = run_part(self._part, [values[name] for name in self._order], shown)
        return [x.detach().flatten(1)]

    def inverses(
        self,
        kept: Examples,
        rows: Tensor,
        target: Target,
        values: Mapping[str, Any],
        keys: Sequence[str],
        settings: Settings,
    ) -> dict[str, Inverse]:
        """Algorithm 1 on some of the examples.

        Args:
            kept: What there is of all examples.
            rows: Which examples.
            target: The class.
            values: The model's parameters.
            keys: The learned steps that are wanted, from the output down.
            settings: How regressions are solved.

        Raises:
            FitError: All of them have the same output.
        """
        device = values[self._inputs[0]].device
        given = {
            key: _given(self._steps[key], [output[rows].to(device) for output in kept.outputs[key]])
            for key in self._learned
        }
        layouts = zip(self._layouts, kept.sources, strict=True)
        sources = [layout.restored(x[rows].to(device)) for layout, x in layouts]
        run = Run({**self._steps, **given}, Options(shares=settings.shares), fitting=keys)
        sizes = [evaluate(size, self._symbol, len(rows)) for size in self._sizes]
        constants = [values[name] for name in self._constants]
        with TURNS.explaining(), torch.enable_grad():
            trace = Trace(run, self._module.forward(run, *constants, *sizes, *sources))
            index: tuple[Any, ...] = (slice(None), *target)
            output = trace.output.detach()[index]
            if bool((output == output[0]).all()):
                raise FitError(
                    f"the output for target {target_label(target)} is {float(output[0]):g} for each of the {len(rows)} neighbours of "
                    "an example: nothing can be regressed on a constant. Take more neighbours."
                )
            found: dict[str, Inverse] = {}
            for key in keys:
                signals = trace.signals(key, target, found)
                found[key] = _solved(trace.seen(key), signals, settings, last=key == keys[-1])
                trace.forget([target])
        return found


def _refused(node: fx.Node, needed: set[fx.Node]) -> CaptureError:
    user = next(user for user in node.users if user in needed and not is_size(user))
    return CaptureError(
        f"neighbours cannot be fitted on here: {place(user)} takes {place(node).path} by another way than through the layer "
        "where the inverse stops. Stop at one that everything goes through, by layer=, or fit an InverseNetwork"
    )


def _given(step: Step, outputs: list[Tensor]) -> Step:
    """A step whose operation is not run: its outputs are known."""
    found = [step.layout.restored(output) for output in outputs]
    value = found[0] if len(found) == 1 and not isinstance(step.operation, Fork) else tuple(found)
    return replace(step, operation=lambda *arguments, **named: value)


def _solved(seen: Seen, signals: tuple[Tensor, ...], settings: Settings, last: bool) -> Inverse:
    """The inverse of one step, by whichever way takes less time.

    The ``last`` is applied to the explained example alone, and so is best kept in factors.
    """
    x, inverter = seen.x.detach(), seen.inverter
    wide = torch.float64 if settings.double else torch.promote_types(x.dtype, torch.float32)
    if isinstance(inverter, Dense) and not inverter.own:
        s = torch.cat(signals, -1)
        s = s.reshape(-1, s.shape[-1]).to(wide)
        live = s.any(0).nonzero().squeeze(1)
        n, ds = len(s), len(live)
        if n * (ds + n / 3) < ds * (ds + inverter.features):
            rows = Rows(x.reshape(-1, inverter.features).to(wide))
            solution = solve_rows(
                rows, s[:, live], settings.ridge, settings.ridge_scale, measure=False
            )
            if not last:
                return inverter.inverse_of_rows(solution, live, rows).to(x)
            return Inverse(
                solution.coefficients.to(x), solution.bias.to(x), live, rows=rows.x.to(x)
            )
    moments = inverter.moments(x.to(wide), tuple(s.to(wide) for s in signals))
    return inverter.inverse(solve(moments, settings.ridge, settings.ridge_scale, inverter.tied), x)


@dataclass
class _NeighbourState(State):
    """All that a fit leaves behind, and what it keeps of the data."""

    kept: Examples


@contextmanager
def _belonging() -> Iterator[None]:
    """What is kept may come from a file, which may hold anything: it is told if it does not go with the model.

    Raises:
        InverseFileError: It does not.
    """
    try:
        yield
    except (MIPINError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        raise InverseFileError(
            f"what is kept of the data does not belong to this model: {error}"
        ) from error


def _check_search(neighbours: Any, metric: Any) -> None:
    if isinstance(neighbours, bool) or not hasattr(neighbours, "__index__") or neighbours < 2:
        raise InputError(
            f"neighbours={neighbours!r} must be an integer of at least 2: a regression needs variance"
        )
    if metric not in ("cosine", "euclidean"):
        raise InputError(f"metric={metric!r} is not one of 'cosine', 'euclidean'")


class NeighbourInverse(InverseNetwork):
    """MIP-IN by neighbourhood fits: an inverse for each example, fitted on the examples most like it (section 4.2).

    To be used in place of an :class:`InverseNetwork`, by ``MIPINAttribution`` and ``LayerMIPINAttribution`` as well. Nothing is
    learned beforehand: :meth:`fit` keeps what is needed of the data, and each class is explained without having been fitted.
    What is above the start layer should be small, such as dense layers. With as many neighbours as there is data, all is as
    :class:`InverseNetwork` has it. An example that is in the data is a neighbour of its own.

    Args:
        model: As for :class:`InverseNetwork`.
        layer: Stop at the output of this module instead of the input, as for :class:`InverseNetwork`.
        neighbours: Number of examples that each inverse is fitted on, at least 2. Also an attribute, to be changed at any time.
        metric: Neighbours are those of the largest "cosine", or of the smallest "euclidean" distance. Of those at the same
            distance, but for rounding, any may be taken. Also an attribute.
        feature: What is compared: by default the output of ``layer``, or without one the input; another module's output; or the
            "input".
        output, ridge, ridge_scale, pooling, forks, precision: As for :class:`InverseNetwork`.

    Raises:
        InputError: An option out of its range.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> x = torch.randn(200, 6)
        >>> inverse = NeighbourInverse(model, neighbours=30).fit(x, progress=False)
        >>> inverse.source_signal(x[:5], target=[0, 1, 2, 0, 1]).shape
        torch.Size([5, 6])
    """

    _kind = "a neighbourhood inverse"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: nn.Module | None = None,
        neighbours: int = 60,
        metric: Metric = "cosine",
        feature: nn.Module | Literal["input"] | None = None,
        output: Output = None,
        ridge: float = 1e-3,
        ridge_scale: RidgeScale = "relative",
        pooling: Literal["shares", "even"] = "shares",
        forks: Literal["joint", "sum"] = "joint",
        precision: Literal["model", "double"] = "model",
    ) -> None:
        super().__init__(
            model, layer=layer, output=output, ridge=ridge, ridge_scale=ridge_scale, pooling=pooling, forks=forks,
            precision=precision,
        )  # fmt: skip
        _check_search(neighbours, metric)
        if not (feature is None or feature == "input" or isinstance(feature, nn.Module)):
            raise InputError(f"feature={feature!r} is neither a module of the model nor 'input'")
        self.neighbours, self.metric = operator.index(neighbours), metric
        self.feature = unwrapped(feature) if isinstance(feature, nn.Module) else feature
        self._state: _NeighbourState | None = None
        self._replays = WeakKeyDictionary[Surrogate, Replay]()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_replays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._replays = WeakKeyDictionary()

    def to(self, device: torch.device | str) -> "NeighbourInverse":
        """Move what is kept to a device; returns self. Otherwise each call moves what it needs."""
        state = self._fitted()
        self._state = replace(state, kept=state.kept.mapped(lambda t: t.to(device)))
        return self

    # ------------------------------------------------------------------------------------------------- fit

    def fit(
        self,
        data: Any,
        targets: Any = None,
        *,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        memory: int = 4 << 30,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        distributed: bool = False,
        lazy: bool = False,
        keep: str | os.PathLike[str] | None = None,
        cache: int = 1 << 30,
    ) -> "NeighbourInverse":
        """Run the data through the model once and keep what later fits need of it; what was kept before is let go.

        Args:
            data, unpack, batch_size: As for :meth:`InverseNetwork.fit`.
            targets: The classes that may be explained, as Captum's ``target``; None for all.
            memory: Bytes that may be taken by what is kept.
            progress: Show a progress bar.
            checkpoint: Not here: there is one pass over the data, and nothing to take up.
            distributed: Not here: neighbours are looked for in one process.
            lazy, keep, cache: Not here: all is fitted when it is explained, from what is kept in memory.

        Returns:
            self

        Raises:
            FitError: The data cannot be used: empty, fewer examples than neighbours, not finite, changing shape; or what is to
                be kept takes more than ``memory``.
            CaptureError: The model cannot be captured, uses an operation without a rule, or takes something around the layer.
            InputError: ``checkpoint``, ``distributed``, ``lazy`` or ``keep`` is given.
            TargetError, ModelChangedError, RuleError: As for :meth:`InverseNetwork.fit`.
        """
        if checkpoint is not None or distributed:
            raise InputError(
                "a neighbourhood fit is one pass over the data in one process: leave checkpoint, distributed out"
            )
        if lazy or keep is not None:
            raise InputError(
                "a neighbourhood fit always keeps its data in memory and fits what is explained: leave lazy, keep out"
            )
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} must be at least 1")
        model = check_model(self.model)
        if self._state is not None:
            self._check_unchanged(self._state)
        with (
            generator_kept(),
            torch.inference_mode(False),
            torch.autocast(device_of(model).type, enabled=False),
        ):
            batches = Batches(
                data, batch_size, unpack, device_of(model), explained=self.layer is None
            )
            inputs, extras = next(iter(batches))
            graph, surrogate = self._surrogate(inputs, extras, self.layer)
            self._replay(graph, surrogate)
            dims = tuple(int(n) for n in value_of(graph.output).shape[1:])
            fitted = Fitted({target: {} for target in target_indices(targets, dims)})
            kept = self._keep(batches, graph, surrogate, memory, progress)
            signature, example = (
                Signature.of(inputs, extras, graph.shared),
                first_example(inputs, extras, graph.shared),
            )
            made_of = structure(graph, surrogate.rules)
        self._state = _NeighbourState(
            fitted, dims, signature, made_of, *example, Watch(model), kept
        )
        return self

    def _keep(
        self,
        batches: Batches,
        graph: CapturedGraph,
        surrogate: Surrogate,
        memory: int,
        progress: bool,
    ) -> Examples:
        """One pass over the data."""
        parts: list[Examples] = []
        signature: Signature | None = None
        rows = 0
        for index, (inputs, extras) in enumerate(tqdm(batches, unit="batch", disable=not progress)):
            found = Signature.of(inputs, extras, graph.shared)
            signature = signature or found
            if found != signature:
                raise FitError(
                    f"batch {index} has further arguments {found.leaves}, the first had {signature.leaves}"
                )
            output, part = self._seen(graph, surrogate, inputs, extras, proving=index == 0)
            if not all(finite(t) for t in (output, *part.tensors)):
                raise FitError(
                    f"batch {index}: the model's output, or what is kept of it, contains NaN or Inf"
                )
            if index == 0:
                again = partial(self._seen, graph, surrogate)
                check_independent(
                    (output,),
                    inputs,
                    extras,
                    graph.shared,
                    lambda *fewer, again=again: again(*fewer)[:1],
                )
            parts.append(part)
            rows += len(part)
            if (needed := rows * part.bytes_each) > memory:
                raise FitError(
                    f"what is kept of {rows} examples takes {needed / 2**30:.2g} GiB, more than memory={memory}: start "
                    "further up, with layer=, give fewer examples, or allow more memory"
                )
        if rows < self.neighbours:
            raise FitError(f"the data has {rows} examples, fewer than neighbours={self.neighbours}")
        return parts[0].mapped(lambda *batches: torch.cat(batches), *parts[1:])

    def _seen(
        self,
        graph: CapturedGraph,
        surrogate: Surrogate,
        inputs: Inputs,
        extras: Extras,
        proving: bool = False,
    ) -> tuple[Tensor, Examples]:
        """The model's output for a batch, and what is kept of it."""
        steps, values = surrogate.steps, graph.values(self.model, inputs, extras)
        run = Run(
            steps, Options(shares=self.settings.shares), fitting=surrogate.learned, proving=proving
        )
        with TURNS.explaining():
            output = surrogate(run, values).detach()
        features = (
            self._replay(graph, surrogate).features(values) if self.feature is not None else []
        )
        sources = [
            layout.first(run.sources[index]) for index, layout in enumerate(surrogate.layouts)
        ]
        outputs = {
            key: [steps[key].layout.first(y.detach()) for y in run.seen[key].outputs]
            for key in surrogate.learned
        }
        return output, Examples(sources, outputs, features)

    # ------------------------------------------------------------------------------------------------- explain

    def class_attribution(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """A class has no inverse of its own here, and so no map.

        Raises:
            NotFittedError: Always.
        """
        raise NotFittedError(
            "each example has an inverse of its own, a class has none: fit an InverseNetwork, the same for all examples"
        )

    def information(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """A class has no inverse of its own here, and so no map.

        Raises:
            NotFittedError: Always.
        """
        return self.class_attribution(target, additional_forward_args)

    def _back(
        self,
        state: State,
        inputs: Inputs,
        target: Any,
        extras: Extras,
        biases: Sequence[bool],
        options: Options,
        mask: bool,
        layer: nn.Module | None,
        unit: bool = False,
    ) -> Explanation:
        assert isinstance(state, _NeighbourState)  # for mypy: fit and load make no other
        kept = state.kept
        _check_search(self.neighbours, self.metric)
        if self.neighbours > len(kept):
            raise InputError(
                f"neighbours={self.neighbours} are more than the {len(kept)} examples that were fitted on"
            )
        count, most = len(inputs[0]), max(1, _TOGETHER // (self.neighbours * kept.bytes_each))
        if count <= most:
            return super()._back(state, inputs, target, extras, biases, options, mask, layer, unit)
        targets = per_example(target, torch.empty(count, *state.dims, device="meta"))
        shared = "per example" not in state.signature.kinds()[len(inputs) :]
        found = []
        for rows in torch.arange(count, device=inputs[0].device).split(most):
            some, others = pick(inputs, extras, rows, shared)
            chosen = [targets[row] for row in rows.tolist()]
            found.append(
                super()._back(state, some, chosen, others, biases, options, mask, layer, unit)
            )
        features = tuple(
            torch.cat(parts) for parts in zip(*(part.features for part in found), strict=True)
        )
        signals = tuple(
            tuple(torch.cat(parts) for parts in zip(*passes, strict=True))
            for passes in zip(*(part.signals for part in found), strict=True)
        )
        return Explanation(features, signals, torch.cat([part.output for part in found]))

    def _fitted(self) -> _NeighbourState:
        state = super()._fitted()
        assert isinstance(state, _NeighbourState)  # for mypy: as above
        return state

    def _check_steps(self, state: State, surrogate: Surrogate, targets: Sequence[Target]) -> None:
        for target in targets:
            if target not in state.fitted.inverses:
                raise self._unknown(target)

    def _check_unchanged(self, state: State) -> None:
        if state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the data was kept, but neighbours are fitted on with the new ones: "
                "fit a new NeighbourInverse, whatever changed= says"
            )

    def _inverses(
        self,
        state: State,
        graph: CapturedGraph,
        surrogate: Surrogate,
        inputs: Inputs,
        extras: Extras,
        targets: Sequence[Target],
        sources: Sequence[Tensor],
        layer: nn.Module | None,
    ) -> tuple[Mapping[Target, Inverses], Sequence[tuple[Target, slice]]]:
        """The inverse of each example, under its number."""
        assert isinstance(state, _NeighbourState)  # for mypy: as above
        kept = state.kept
        missing = [key for key in surrogate.learned if key not in kept.outputs]
        if missing:
            raise self._beyond(missing, layer)
        if Signature.of(inputs, extras, graph.shared) != state.signature:
            raise InputError(
                f"neighbours are looked for among other inputs than these.\n{self._way_out(state)}"
            )
        if self.changed != "refuse":
            self._check_unchanged(state)
        fitted_graph, fitted = self._surrogate(inputs, extras, self.layer)
        values, replay = (
            graph.values(self.model, inputs, extras),
            self._replay(fitted_graph, fitted),
        )
        own = surrogate is fitted and self.feature is None
        features = [x.detach().flatten(1) for x in sources] if own else replay.features(values)
        with _belonging():
            nearest = kept.nearest(
                [x.to(kept.sources[0].device) for x in features], self.neighbours, self.metric
            )
            inverses: dict[Target, Inverses] = {
                (number,): replay.inverses(
                    kept, rows, target, values, surrogate.learned, self.settings
                )
                for number, (rows, target) in enumerate(zip(nearest, targets, strict=True))
            }
        return inverses, [((number,), slice(number, number + 1)) for number in range(len(targets))]

    def _replay(self, graph: CapturedGraph, surrogate: Surrogate) -> Replay:
        """The replay that belongs to a surrogate, built once."""
        if surrogate not in self._replays:
            module = self.layer if self.feature is None else self.feature
            feature = (
                module_output(graph, self.model, module) if isinstance(module, nn.Module) else None
            )
            self._replays[surrogate] = Replay(graph, surrogate, feature)
        return self._replays[surrogate]

    # ------------------------------------------------------------------------------------------------- files

    @classmethod
    def _accepts(cls, content: dict[str, Any]) -> bool:
        return "neighbours" in content

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._fitted()
        feature = self.feature if isinstance(self.feature, str | None) else self._path(self.feature)
        content = {
            **self._head(state),
            "targets": list(state.fitted.inverses),
            "neighbours": {
                "count": self.neighbours,
                "metric": self.metric,
                "feature": feature,
                "module": isinstance(self.feature, nn.Module),
                "sources": len(state.kept.sources),
                "features": len(state.kept.features),
                "outputs": [(key, len(outputs)) for key, outputs in state.kept.outputs.items()],
            },
        }
        return {str(number): t for number, t in enumerate(state.kept.tensors)}, content

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "NeighbourInverse":
        how = content["neighbours"]
        settings = Settings(**content["settings"])
        inverse = cls(
            model,
            layer=None if content["layer"] is None else model.get_submodule(content["layer"]),
            neighbours=how["count"],
            metric=how["metric"],
            feature=model.get_submodule(how["feature"]) if how["module"] else how["feature"],
            output=content["output"],
            ridge=settings.ridge,
            ridge_scale=settings.ridge_scale,
            pooling="shares" if settings.shares else "even",
            forks="joint" if settings.joint else "sum",
            precision="double" if settings.double else "model",
        )
        wanted = how["sources"] + how["features"] + sum(count for _, count in how["outputs"])
        if len(tensors) != wanted:
            raise InverseFileError(f"the file has {len(tensors)} tensors, expected {wanted}")
        found = iter([tensors[str(number)] for number in range(len(tensors))])
        sources, features = (
            [next(found) for _ in range(how[kind])] for kind in ("sources", "features")
        )
        outputs = {key: [next(found) for _ in range(count)] for key, count in how["outputs"]}
        kept = Examples(sources, outputs, features)
        if not all(
            t.ndim > 0 and len(t) == len(kept) and t.is_floating_point() and finite(t)
            for t in kept.tensors
        ):
            raise InverseFileError(
                "the file holds other tensors than finite numbers of as many examples each"
            )
        inverse._state = _NeighbourState(
            Fitted({tuple(target): {} for target in content["targets"]}),
            *head_of(content, model),
            kept,
        )
        return inverse
