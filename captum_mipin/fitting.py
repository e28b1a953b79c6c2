"""Algorithm 1: from the output down, one regression a layer and target."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)  # fmt: skip
from tqdm.auto import tqdm

from captum_mipin.capture import CapturedGraph, Extras, Inputs, Signature, check_inputs, finite, pick, plain
from captum_mipin.convolution import CHUNK
from captum_mipin.errors import FitError, InputError
from captum_mipin.processes import Processes
from captum_mipin.propagation import Inverses, Run, Surrogate, Target
from captum_mipin.regression import Moments, RidgeScale, Rows, gaussian_information, solve, solve_rows
from captum_mipin.report import LayerFit
from captum_mipin.rules import Inverse, Inverter, Options
from captum_mipin.rules.linear import Convolution, Dense
from captum_mipin.targets import shown
from captum_mipin.trace import Trace

logger = logging.getLogger(__name__)

Unpack = Callable[[Any], tuple[Any, Any]]
#: What is regressed on what: the inverter, its features, and target → the signals.
_Regressed = tuple[Inverter, Tensor, Callable[[Target], tuple[Tensor, ...]]]
Solver = Literal["exact", "sgd"]


@dataclass(frozen=True)
class Settings:
    """How the regressions are solved.

    Attributes:
        ridge: λ of equation 6.
        ridge_scale: What λ is measured in, see :func:`captum_mipin.regression.solve`.
        shares: Average pooling by recorded shares, or evenly.
        solver: "exact", or the paper's "sgd" for convolutions.
        epochs: Of the SGD solver.
        learning_rate: Of the SGD solver; None for 1/L, L the largest curvature on the first batch.
        double: Whether products of moments are taken in float64 instead of the model's dtype.
        sharing: Whether all targets have one inverse below the first step.
        joint: Whether what comes back to a tensor from several branches is learned together, or summed up.
    """

    ridge: float = 1e-3
    ridge_scale: RidgeScale = "relative"
    shares: bool = True
    solver: Solver = "exact"
    epochs: int = 20
    learning_rate: float | None = None
    joint: bool = True
    double: bool = False
    sharing: bool = False


@dataclass
class Fitted:
    """Inverses by target and step key, how their fits went, and what the features tell of each target's output, in bits."""

    inverses: dict[Target, dict[str, Inverse]] = field(default_factory=dict)
    layers: list[LayerFit] = field(default_factory=list)
    information: dict[Target, Inputs] = field(default_factory=dict)

    def has(self, target: Target, key: str) -> bool:
        """Whether a step is fitted for a target."""
        return key in self.inverses.get(target, {})


class Batches:
    """Any kind of data as batches of inputs and extra arguments that can be gone through more than once.

    Args:
        data: Tensor, tuple of tensors (the inputs of the model), ``Dataset``, ``DataLoader`` or iterable of batches.
            A batch is a tensor, or a tuple or list whose first element is the input (or a tuple of inputs).
        batch_size: For data that is not batched yet.
        unpack: Batch → (inputs, additional_forward_args), where a batch is anything else.
        device: Where the model is.
        explained: See :func:`captum_mipin.capture.check_inputs`.
        shard: (this process, all processes): every so many batches belong to this one, of a ``DataLoader`` every so many
            examples; with a ``DistributedSampler`` it is taken as it is. There may be none.

    Raises:
        FitError: The data is of no known kind, empty, or a batch does not fit those before it.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        unpack: Unpack | None,
        device: torch.device,
        explained: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if isinstance(data, Tensor) or (isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data)):
            tensors = data if isinstance(data, tuple) else (data,)
            try:
                check_inputs(tensors, explained)
            except InputError as error:
                raise FitError(f"the data cannot be fitted on: {error}") from error
            rows = range(0, len(tensors[0]), batch_size)
            data = [(tuple(t[i : i + batch_size] for t in tensors), None) for i in rows]
            unpack = _as_it_is
        elif isinstance(data, Dataset):
            data = DataLoader(data, batch_size=batch_size, generator=torch.Generator())
        elif isinstance(data, Iterator):
            data = list(data)  # each layer takes a pass of its own
        if not isinstance(data, Iterable) or isinstance(data, (str, dict)):
            raise FitError(
                f"cannot fit on a {type(data).__name__}: expected a tensor, a tuple of tensors, a Dataset, a DataLoader "
                "or an iterable of batches"
            )
        self._several = shard[1] > 1
        if isinstance(data, DataLoader) and self._several and not isinstance(data.dataset, IterableDataset):
            data = data if isinstance(data.sampler, DistributedSampler) else _part_of(data, *shard)
            shard = (0, 1)
        self._data, self._unpack, self._device, self._explained = data, unpack or _unpack, device, explained
        self._shard = shard
        self._like: Inputs | None = None

    def __iter__(self) -> Iterator[tuple[Inputs, Extras]]:
        found = False
        for index, batch in enumerate(islice(self._data, self._shard[0], None, self._shard[1])):
            inputs, extras = self._unpack(batch)
            inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            extras = () if extras is None else extras if isinstance(extras, tuple) else (extras,)
            self._check(inputs, index)
            extras = tuple(e.to(self._device) if isinstance(e, Tensor) else e for e in extras)
            yield plain((tuple(x.to(self._device) for x in inputs), extras))
            found = True
        if not found and not self._several:
            raise FitError("the data yields no batch: nothing to fit on (an iterator that is used up?)")

    def _check(self, inputs: Inputs, index: int) -> None:
        try:
            check_inputs(inputs, self._explained)
        except InputError as error:
            raise FitError(f"batch {index}: {error}") from error
        self._like = self._like or inputs
        found, expected = ([(tuple(x.shape[1:]), x.dtype) for x in xs] for xs in (inputs, self._like))
        if found != expected:
            raise FitError(f"batch {index} has inputs of shape and dtype {found}, the first batch had {expected}")
        for number, x in enumerate(inputs):
            if not finite(x):
                raise FitError(f"batch {index}: input {number} contains NaN or Inf")


def _part_of(loader: "DataLoader[Any]", rank: int, count: int) -> "DataLoader[Any]":
    """The examples of a loader that belong to one of several processes."""
    if loader.batch_size is None or not isinstance(loader.sampler, (SequentialSampler, RandomSampler)):
        raise FitError(
            f"the DataLoader draws by a {type(loader.batch_sampler or loader.sampler).__name__}, of which each process would "
            "draw for itself: give it a torch.utils.data.DistributedSampler"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]  # these samplers know it
    return DataLoader(
        Subset(loader.dataset, range(rank, size, count)), batch_size=loader.batch_size, num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, generator=torch.Generator(),
    )  # fmt: skip


def _as_it_is(batch: Any) -> Any:
    return batch


def _unpack(batch: Any) -> tuple[Any, Any]:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(first, Tensor) or (isinstance(first, (tuple, list)) and all(isinstance(x, Tensor) for x in first)):
        return first, None
    raise FitError(
        f"a batch is a {type(batch).__name__}, expected a tensor or a tuple whose first element is the input; pass "
        "unpack=lambda batch: (inputs, additional_forward_args)"
    )


class Fit:
    """One fit: the data, the surrogate and the targets it goes through.

    Args:
        model: The model, whose parameters are used as they are.
        captured, surrogate: Its graph, and the surrogate whose backward pass is the method.
        batches: The data.
        targets: Classes to fit.
        settings: How the regressions are solved.
        memory: Bytes for what is kept of the data between layers, and as many for moments. What does not fit is computed again.
        progress: Show a progress bar.
        processes: Those that fit together, each with its batches.
        example: A batch of one, by which a process without data knows shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: CapturedGraph,
        surrogate: Surrogate,
        batches: Batches,
        targets: Sequence[Target],
        settings: Settings,
        memory: int,
        progress: bool,
        processes: Processes,
        example: tuple[Inputs, Extras],
    ) -> None:
        self._model, self._captured, self._surrogate, self._batches = model, captured, surrogate, batches
        self._targets, self._settings, self._memory, self._progress = list(targets), settings, memory, progress
        self._processes, self._example = processes, example
        self._rows: int | None = None  # of this process
        self._most = 0  # of any process
        self._kept: list[Trace] = []
        self._covered: Sequence[str] = surrogate.learned  # the steps that what is kept serves
        self._sizes: Mapping[str, float] = {}  # of what is kept for each step, bytes an example
        self._widest = 0.0  # of the signals of one class, bytes an example
        self._signature: Signature | None = None
        self._shared: list[Moments] = []  # of the features where the passes end and the targets' outputs
        self._features: list[Tensor] = []  # an example of these

    def run(self, fitted: Fitted, done: Callable[[Fitted], None] = lambda fitted: None) -> Fitted:
        """Fit what ``fitted`` lacks; ``done`` is called after each regression solved.

        Raises:
            FitError: Fewer than two examples, a class whose output is constant, values that are not finite.
        """
        if self._rows is None:
            self.look()
        learned, groups = self._surrogate.learned, self._groups()
        with tqdm(unit="row", disable=not self._progress or self._processes.rank > 0, unit_scale=True) as bar:
            for index, group in enumerate(groups):
                for number, key in enumerate(learned):
                    left = [target for target in group if not fitted.has(target, key)]
                    while left:
                        passes = len(learned) * (len(groups) - index) - number
                        bar.total = bar.n + passes * (self._rows or 0)
                        solved = self._solve(key, left, fitted, bar)
                        left = left[len(solved) :]
                        for target, (inverse, layer) in solved.items():
                            fitted.inverses.setdefault(target, {})[key] = inverse
                            fitted.layers.append(layer)
                        done(fitted)
                for trace in self._kept:
                    trace.drop(group)
        fitted.information = self._information()
        return fitted

    def _information(self) -> dict[Target, Inputs]:
        """Bits that each feature shares with each target's output, as jointly Gaussian variables."""
        maps = [gaussian_information(shared).float() for shared in self._shared]
        like = list(zip(maps, self._surrogate.layouts, self._features, strict=True))
        return {
            target: tuple(layout.restored(bits[0, :, index].reshape(x.shape)).clone() for bits, layout, x in like)
            for index, target in enumerate(self._targets)
        }

    def _groups(self) -> list[list[Target]]:
        """The targets whose signals come down together: as many as there is memory for, where all else is kept."""
        rows, count = self._most, len(self._targets)
        if self._covered:
            free = self._memory - rows * sum(self._sizes.values())
            room = max(1, int(free // max(rows * self._widest, 1)))
            if self._settings.sharing and room < count:  # these have to come down together
                self._kept, self._covered = [], ()
            else:
                count = min(count, room)
        return [self._targets[i : i + count] for i in range(0, len(self._targets), count)]

    def _segment(self, key: str) -> Sequence[str]:
        """The steps from ``key`` down for which what a pass over the data sees can be kept."""
        keys = self._surrogate.learned
        keys, rows = keys[keys.index(key) :], self._most
        total = list(accumulate((self._sizes[k] for k in keys), initial=len(self._targets) * self._widest))
        return keys[: sum(rows * size <= self._memory for size in total[1:])]

    def look(self) -> list[float]:
        """Go through the data once: rows, and the range of each target's output, by which a resumed fit knows its data.

        Raises:
            FitError: Fewer than two examples, a target whose output is constant, values that are not finite.
        """
        with self._processes.step():
            low, high = self._look()
        mine = self._rows or 0, tuple(bound if bound is None else bound.cpu() for bound in (low, high)), bool(self._covered)
        counts, bounds, fits = zip(*self._processes.gathered(mine), strict=True)
        if not all(fits):
            self._kept, self._covered = [], ()
        self._sizes, self._widest = self._processes.first((self._sizes, self._widest) if self._rows else None) or ({}, 0.0)
        rows, self._most = sum(counts), max(counts)
        if rows < 2:
            raise FitError(f"the data has {rows} example, expected at least two: a regression needs variance")
        low = torch.stack([low for low, _ in bounds if low is not None]).amin(0)
        high = torch.stack([high for _, high in bounds if high is not None]).amax(0)
        for target in self._targets:
            if high[target] == low[target]:
                raise FitError(
                    f"the output for target {shown(target)} is {low[target]:g} for each of the {rows} examples: nothing can be "
                    "regressed on a constant. Fit it on data it responds to, or leave it out."
                )
        if self._processes.count > 1:
            with self._processes.step():
                if not self._features:  # this process has no data
                    self._share(self._trace(*self._example))
                    self._shared = [Moments.zeros(1, m.zs.shape[2], m.zs.shape[3], device=m.ss.device) for m in self._shared]
            self._shared = [moments.pooled(self._processes.total) for moments in self._shared]
        ranges = [float(bound[target]) for target in self._targets for bound in (low, high)]
        return [float(rows), *ranges]

    def _look(self) -> tuple[Tensor | None, Tensor | None]:
        """The same in this process; what is seen is kept as long as it fits."""
        low = high = None
        rows = 0
        for index, (inputs, extras) in enumerate(self._batches):
            signature = Signature.of(inputs, extras, self._captured.shared)
            self._signature = self._signature or signature
            if signature != self._signature:
                raise FitError(
                    f"batch {index} has further arguments {signature.leaves}, the first had {self._signature.leaves}"
                )
            trace = self._trace(inputs, extras, self._covered, proving=index == 0)
            output = trace.output.detach()
            rows += len(output)
            if not finite(output):
                raise FitError(f"batch {index}: the model's output contains NaN or Inf")
            if index == 0:
                check_apart((output,), inputs, extras, self._captured.shared, lambda *fewer: (self._trace(*fewer).output,))
                self._sizes = {key: size / len(output) for key, size in trace.sizes.items()}
                self._widest = trace.widest / len(output)
            self._keep(trace, rows)
            self._share(trace)
            low = output.amin(0) if low is None else torch.minimum(low, output.amin(0))
            high = output.amax(0) if high is None else torch.maximum(high, output.amax(0))
        self._rows = rows
        return low, high

    def _share(self, trace: Trace) -> None:
        """What the features where the passes end have in common with the targets' outputs."""
        whole: tuple[Any, ...] = (slice(None),)
        outputs = torch.stack([trace.output.detach()[whole + target] for target in self._targets], 1).unsqueeze(0)
        sources = [layout.first(x.detach()) for layout, x in zip(self._surrogate.layouts, trace.sources, strict=True)]
        if not self._features:
            self._features = [x[:1].clone() for x in sources]
            self._shared = [Moments.zeros(1, x[0].numel(), len(self._targets), device=x.device) for x in sources]
        for moments, x in zip(self._shared, sources, strict=True):
            moments.update(x.reshape(1, len(x), -1), outputs.to(x.dtype))

    def _trace(self, inputs: Inputs, extras: Extras, keys: Sequence[str] = (), proving: bool = False) -> Trace:
        """A batch run forward, for a fit of the steps ``keys``."""
        run = Run(self._surrogate.steps, Options(shares=self._settings.shares), fitting=keys, proving=proving)
        return Trace(run, self._surrogate(run, self._captured.values(self._model, inputs, extras)))

    def _keep(self, trace: Trace, rows: int) -> None:
        """Keep what the first pass over the data sees, as long as it fits, with the signals of a class at least."""
        self._kept.append(trace)
        if rows * (sum(self._sizes.values()) + self._widest) > self._memory:
            self._kept, self._covered = [], ()

    def _traces(self, key: str, inverses: Mapping[Target, Inverses]) -> Iterator[Trace]:
        """Every batch, as far down as ``key``: as it was kept, or run forward once more."""
        if key in self._covered:
            yield from self._kept
            return
        self._kept, self._covered = [], ()
        segment, keys, rows, kept = self._segment(key), self._surrogate.learned, 0, []
        for inputs, extras in self._batches:
            trace = self._trace(inputs, extras, keys[: keys.index(key) + max(1, len(segment))])
            if segment:
                for target in self._targets:
                    trace.signals(key, target, inverses.get(target, {}))
                trace.forget(self._targets)
                kept.append(trace)
            yield trace
            rows += len(trace.output)
        if rows != self._rows:
            raise FitError(f"the data had {self._rows} examples in the first pass and {rows} in a later one")
        self._kept, self._covered = kept, segment

    def _signals(self, key: str, fitted: Fitted, bar: "tqdm[Any]") -> Iterator[_Regressed]:
        """For each batch: the inverter of ``key``, its features, and target → the source signals above it (algorithm 1)."""
        for trace in self._traces(key, fitted.inverses):
            seen = trace.seen(key)

            def signals(target: Target, trace: Trace = trace) -> tuple[Tensor, ...]:
                return trace.signals(key, target, fitted.inverses.get(target, {}))

            yield seen.inverter, seen.x.detach(), signals
            trace.forget(self._targets)
            bar.update(len(trace.output))

    def _joined(self, key: str, batches: Iterable[_Regressed]) -> Iterator[_Regressed]:
        """Small batches put together where that can be done: what moments cost a batch, they cost less often."""
        waiting: list[_Regressed] = []
        join = self._surrogate.steps[key].layout.join
        for batch in batches:
            joins = key in self._covered and batch[0].joins
            if waiting and not (joins and sum(x.numel() for _, x, _ in (*waiting, batch)) <= CHUNK // 4):
                yield _joined(waiting, join)
                waiting = []
            waiting.append(batch)
        if waiting:
            yield _joined(waiting, join)

    def _solve(
        self, key: str, targets: Sequence[Target], fitted: Fitted, bar: "tqdm[Any]"
    ) -> dict[Target, tuple[Inverse, LayerFit]]:
        """The inverses of one step for the first of ``targets``, as many as memory allows."""
        passes = self._signals(key, fitted, bar)
        with self._processes.step():
            first = next(passes, None)
            if first is None:  # this process has no data
                seen = self._trace(*self._example, [key]).seen(key)
                inverter, x = seen.inverter, seen.x.detach()
            else:
                inverter, x, _ = first
            rows = self._regressed_rows(key, inverter, x)
            alone = self._processes.count == 1
            shared = self._settings.sharing and key != self._surrogate.learned[0]
            by_rows = alone and not shared and isinstance(inverter, Dense) and not inverter.own and rows < inverter.size[2]
            needed = 8 * rows * inverter.size[2] if by_rows else Moments.bytes_needed(*inverter.size)
            if needed > (there_is := _memory_of(x.device)):
                raise FitError(
                    f"the moments of {key} take {needed / 2**30:,.0f} GiB, this machine has {there_is / 2**30:,.0f}: there are "
                    f"{inverter.size[2]:,} signals in one regression. Start above it, with InverseNetwork(model, layer=...)"
                )
        batches = passes if first is None else chain([first], passes)
        targets = targets if shared else targets[: max(1, self._memory // needed)]
        names = ", ".join(str(shown(target)) for target in targets)
        bar.set_description(f"{key} · class {names if len(names) < 30 else names[:27] + '...'}")
        if self._settings.solver == "sgd" and isinstance(inverter, Convolution) and inverter.plain:
            return self._descend(key, targets, fitted, batches, bar)
        if by_rows:
            assert isinstance(inverter, Dense)  # for mypy: as above
            return self._solve_by_rows(key, inverter, targets, batches)
        pooled = [targets] if shared else [[target] for target in targets]
        with self._processes.step():
            moments = self._moments(key, pooled, batches)
        if not alone:
            moments = {group[0]: self._together(moments.pop(group[0], None), inverter, x) for group in pooled}
        result: dict[Target, tuple[Inverse, LayerFit]] = {}
        groups, features, signals, own = inverter.size
        with self._processes.step():
            for group in pooled:
                part = moments.pop(group[0])
                solution = solve(part, self._settings.ridge, self._settings.ridge_scale)
                logger.debug("%s, target %s: explained variance %.3f", key, shown(group[0]), solution.explained_variance)
                inverse = inverter.inverse(solution, x)
                for target in group:
                    layer = LayerFit(
                        shown(target), key, part.count, groups * features, signals + own,
                        solution.explained_variance, solution.dead, solution.condition, "exact",
                    )  # fmt: skip
                    result[target] = inverse, layer
        return result

    def _moments(self, key: str, pooled: Sequence[Sequence[Target]], batches: Iterator[_Regressed]) -> dict[Target, Moments]:
        """The moments of this process's data, for each group of targets under the first of it."""
        moments: dict[Target, Moments] = {}
        for index, (inverter, x, signals) in enumerate(self._joined(key, batches)):
            for first, target in ((group[0], target) for group in pooled for target in group):
                s = signals(target)
                if self._settings.double:
                    x, s = x.double(), tuple(part.double() for part in s)
                found = inverter.moments(x, s)
                moments.setdefault(first, found)
                if moments[first] is not found:
                    moments[first].add(found)
                if not moments[first].finite():
                    raise FitError(f"batch {index}: NaN or Inf in the features or the signal of {key}, target {shown(target)}")
        return moments

    def _together(self, mine: Moments | None, inverter: Inverter, x: Tensor) -> Moments:
        """The moments of all processes' data."""
        live = [found for found in self._processes.gathered(mine and (mine.live[0].tolist() if mine.live else "all")) if found]
        if live.count(live[0]) < len(live):
            mine, live = mine and mine.whole(), ["all"]
        if mine is None:
            groups, features, signals, own = inverter.size
            mine = Moments.zeros(groups, features, signals if live[0] == "all" else len(live[0]), own, x.device)
            mine.live = None if live[0] == "all" else (torch.tensor(live[0], device=x.device), signals)
        return mine.pooled(self._processes.total)

    def _regressed_rows(self, key: str, inverter: Inverter, x: Tensor) -> int:
        """Rows of a step's regression over all data, from the features ``x`` of a batch."""
        layout, (groups, features, *_) = self._surrogate.steps[key].layout, inverter.size
        examples = x.shape[layout.dim] // (layout.outer * layout.inner)
        return x.numel() // (groups * features) * (self._rows or 0) // max(examples, 1)

    def _solve_by_rows(
        self, key: str, inverter: Dense, targets: Sequence[Target], batches: Iterable[_Regressed]
    ) -> dict[Target, tuple[Inverse, LayerFit]]:
        """The inverses of a dense layer from fewer rows than signals."""
        xs: list[Tensor] = []
        parts: dict[Target, list[Tensor]] = {target: [] for target in targets}
        for index, (_, x, signals) in enumerate(batches):
            xs.append(x.reshape(-1, inverter.features))
            for target in targets:
                s = torch.cat(signals(target), -1)
                parts[target].append(s.reshape(-1, s.shape[-1]))
                if not (finite(s) and finite(x)):
                    raise FitError(f"batch {index}: NaN or Inf in the features or the signal of {key}, target {shown(target)}")
        rows, result = Rows(torch.cat(xs)), {}
        for target in targets:
            s = torch.cat(parts.pop(target))
            live = s.any(0).nonzero().squeeze(1)
            solution = solve_rows(rows, s[:, live], self._settings.ridge, self._settings.ridge_scale)
            layer = LayerFit(
                shown(target), key, len(s), inverter.features, s.shape[1], solution.explained_variance,
                solution.dead + s.shape[1] - len(live), solution.condition, "exact",
            )  # fmt: skip
            result[target] = inverter.inverse_of_rows(solution, live, rows), layer
        return result

    def _descend(
        self, key: str, targets: Sequence[Target], fitted: Fitted, first_pass: Iterator[Any], bar: "tqdm[Any]"
    ) -> dict[Target, tuple[Inverse, LayerFit]]:
        """The paper's way for convolutions: gradient descent on equation 7, momentum 0.9, batch by batch."""
        states: dict[Target, _Descent] = {}
        for epoch in range(self._settings.epochs):
            for inverter, x, signals in first_pass if epoch == 0 else self._signals(key, fitted, bar):
                for target in targets:
                    (s,) = signals(target)
                    if target not in states:
                        assert isinstance(inverter, Convolution)  # for mypy: as in the caller
                        states[target] = _Descent(inverter, x, s, self._settings.learning_rate)
                    states[target].step(epoch, x, s)
        result = {}
        for target, state in states.items():
            groups, features, signals_each, _ = state.inverter.size
            layer = LayerFit(
                shown(target), key, state.rows, groups * features, signals_each, state.explained_variance(), 0, None, "sgd"
            )
            if not torch.isfinite(state.weight).all():
                raise FitError(f"SGD diverged at {key}, target {shown(target)}: lower learning_rate={state.rate:g}")
            result[target] = Inverse(state.weight.flatten(), state.bias), layer
        return result


def check_apart(
    found: Sequence[Tensor], inputs: Inputs, extras: Extras, shared: bool, again: Callable[[Inputs, Extras], Sequence[Tensor]]
) -> None:
    """Whether examples give the same in other company and order: the last line of defence behind the rules.

    Args:
        found: What a batch gave, each (batch, ...).
        inputs, extras: The batch.
        shared: Whether a further tensor as long as the batch is shared.
        again: (inputs, extras) → the same for other examples.

    Raises:
        FitError: They do not.
    """
    rows = len(inputs[0])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    later = (order[: rows // 2] if rows > 1 else torch.tensor([0, 0])).to(inputs[0].device)  # one, beside itself
    for before, after in zip(found, again(*pick(inputs, extras, later, shared)), strict=True):
        scale = float(before.abs().max()) * torch.finfo(before.dtype).eps ** 0.5
        if after.shape != before[later].shape or float((after - before[later]).abs().max()) > scale:
            raise FitError(
                "the model's output for an example changes with the other examples of its batch, or at random, and so would "
                "its explanation: remove what reads or mixes the batch, or what is random"
            )


def _memory_of(device: torch.device) -> int:
    """The bytes of memory that there are where tensors of a device are."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize


def _joined(batches: Sequence[_Regressed], join: Callable[[list[Tensor]], Tensor]) -> _Regressed:
    """Several batches as one."""
    inverters, xs, signals = zip(*batches, strict=True)
    if len(xs) == 1:
        return batches[0]

    def joined(target: Target) -> tuple[Tensor, ...]:
        return tuple(join(list(parts)) for parts in zip(*(of(target) for of in signals), strict=True))

    return inverters[0], join(list(xs)), joined


class _Descent:
    """Gradient descent with momentum on ½ mean ‖X − g(S)‖² over the kernel and bias of one convolution's inverse."""

    def __init__(self, inverter: Convolution, x: Tensor, s: Tensor, rate: float | None) -> None:
        self.inverter, (self._geometry,) = inverter, inverter.geometries
        self.weight = x.new_zeros(self._geometry.weight_shape)
        self.bias = x.new_zeros(x.shape[1])
        self._velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rate = rate or 1 / self._curvature(x, s)
        self._epoch, self._residual, self._variance, self.rows = -1, 0.0, 0.0, 0

    def _curvature(self, x: Tensor, s: Tensor) -> float:
        """Largest eigenvalue of the Gram matrix of patches and the constant 1."""
        moments = self.inverter.moments(x, (s,))
        mean = moments.mean_s
        gram = moments.ss / moments.count + mean.unsqueeze(2) * mean.unsqueeze(1)
        return float(torch.linalg.matrix_norm(gram, 2).max()) + 1

    def step(self, epoch: int, x: Tensor, s: Tensor) -> None:
        if epoch != self._epoch:
            self._epoch, self._residual, self._variance, self.rows = epoch, 0.0, 0.0, 0
        error = self.inverter.apply(Inverse(self.weight.flatten(), self.bias), (s,), True) - x
        over = (0, *range(2, x.ndim))
        rows = x.numel() // x.shape[1]
        self.rows += rows
        self._residual += float(error.square().sum())
        self._variance += float((x - x.mean(over, keepdim=True)).square().sum())
        gradients = self._geometry.gradient(s, error, self.weight, of=1) / rows, error.sum(over) / rows
        for value, velocity, gradient in zip((self.weight, self.bias), self._velocity, gradients, strict=True):
            velocity.mul_(0.9).add_(gradient)
            value.sub_(self.rate * velocity)

    def explained_variance(self) -> float:
        """Over the last epoch, each batch before its own step."""
        return 1 - self._residual / self._variance if self._variance else 1.0
