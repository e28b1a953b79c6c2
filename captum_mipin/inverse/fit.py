"""Algorithm 1: from the output down, one regression a layer and target."""

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin.errors import FitError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.signature import Signature
from captum_mipin.graph.validate import finite
from captum_mipin.inverse.data import Activations, Values, check_independent
from captum_mipin.inverse.distributed import Processes
from captum_mipin.inverse.sgd import Descent
from captum_mipin.inverse.trace import Trace
from captum_mipin.propagation.runtime import Inverses, Run
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.dual import Rows, solve_rows
from captum_mipin.regression.lag_gram import CHUNK
from captum_mipin.regression.moments import Moments, gaussian_information
from captum_mipin.regression.ridge import RidgeScale, solve
from captum_mipin.report import LayerFit
from captum_mipin.rules import Inverse, Inverter, Options
from captum_mipin.rules.linear import Convolution, Dense
from captum_mipin.targets import target_label
from captum_mipin.types import Extras, Inputs, Target

logger = logging.getLogger(__name__)

#: What is regressed on what: the inverter, its features, and target → the signals.
_Regressed = tuple[Inverter, Tensor, Callable[[Target], tuple[Tensor, ...]]]
Solver = Literal["exact", "sgd"]


@dataclass(frozen=True)
class Settings:
    """How the regressions are solved.

    Attributes:
        ridge: λ of equation 6.
        ridge_scale: What λ is measured in, see :func:`captum_mipin.regression.ridge.solve`.
        shares: Average pooling by recorded shares, or evenly.
        solver: "exact", or the paper's "sgd" for convolutions.
        epochs: Of the SGD solver.
        learning_rate: Of the SGD solver; None for 1/L, L the largest curvature on the first batch.
        double: Whether products of moments are taken in float64 instead of the model's dtype.
        sharing: Whether all targets have one inverse below the first step.
        joint: Whether what comes back to a tensor from several branches is learned together, or summed up.
        positions: How many positions of each batch's maps convolutions are fitted on, or which share of them; None for all.
        seed: What draws them.
        autocast: Name of the dtype that forward passes compute products with weights in; None for the model's.
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
    autocast: str | None = None
    positions: float | None = None
    seed: int = 0


@dataclass
class Fitted:
    """Inverses by target and step key, how their fits went, and what the features tell of each target's output, in bits."""

    inverses: dict[Target, dict[str, Inverse]] = field(default_factory=dict)
    layers: list[LayerFit] = field(default_factory=list)
    information: dict[Target, Inputs] = field(default_factory=dict)

    def has(self, target: Target, key: str) -> bool:
        """Whether a step is fitted for a target."""
        return key in self.inverses.get(target, {})


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
        kept: Where the fit keeps what it starts from, if classes are to be fitted later, by :meth:`later`.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: CapturedGraph,
        surrogate: Surrogate,
        batches: Iterable[tuple[Inputs, Extras]],
        targets: Sequence[Target],
        settings: Settings,
        memory: int,
        progress: bool,
        processes: Processes,
        example: tuple[Inputs, Extras],
        kept: Activations | None = None,
    ) -> None:
        self._model, self._captured, self._surrogate, self._batches = (
            model,
            captured,
            surrogate,
            batches,
        )
        self._targets, self._settings, self._memory, self._progress = (
            list(targets),
            settings,
            memory,
            progress,
        )
        self._processes, self._example, self._store = processes, example, kept
        self._autocast: torch.dtype | None = (
            getattr(torch, settings.autocast) if settings.autocast else None
        )
        self._rows: int | None = None  # of this process
        self._most = 0  # of any process
        self._kept: list[Trace] = []
        self._covered: Sequence[str] = surrogate.learned  # the steps that what is kept serves
        self._sizes: Mapping[str, float] = {}  # of what is kept for each step, bytes an example
        self._widest = 0.0  # of the signals of one class, bytes an example
        self._signature: Signature | None = None
        self._shared: list[
            Moments
        ] = []  # of the features where the passes end and the targets' outputs
        self._features: list[Tensor] = []  # an example of these
        self._whole = False  # whether all that classes fitted later need can be kept
        self._centred: dict[
            str, Rows
        ] = {}  # of the steps solved row by row, for classes fitted later

    def run(self, fitted: Fitted, done: Callable[[Fitted], None] = lambda fitted: None) -> Fitted:
        """Fit what ``fitted`` lacks; ``done`` is called after each regression solved.

        Raises:
            FitError: Fewer than two examples, a class whose output is constant, values that are not finite.
        """
        if self._rows is None:
            self.look()
        learned, groups = self._surrogate.learned, self._groups()
        with tqdm(
            unit="row", disable=not self._progress or self._processes.rank > 0, unit_scale=True
        ) as bar:
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
        if self._store is None:
            fitted.information = self._information()
        return fitted

    def later(self, target: Target) -> Fitted:
        """Fit one more class, from what was kept."""
        self._targets = [target]
        try:
            self._resume()
            return self.run(Fitted())
        except BaseException:
            self.restart()
            raise

    def information(self, target: Target) -> Inputs:
        """Bits that each feature shares with the output of a class, from what was kept."""
        self._targets, self._shared, self._features = [target], [], []
        self._resume()
        for trace in self._traces(self._surrogate.learned[0], {}):
            self._share(trace)
        found = self._information()[target]
        self._shared, self._features = [], []
        return found

    def restart(self) -> None:
        """Let go of all but what cannot be computed again."""
        self._kept, self._covered = [], ()
        self._centred.clear()

    def _resume(self) -> None:
        """Begin as the first class did; what there is memory to keep is run forward anew after a restart."""
        if not self._whole:
            self._kept, self._covered = [], ()
        elif not self._kept:
            self._kept = [self._trace(values, self._surrogate.learned) for values in self._values()]
            self._covered = self._surrogate.learned

    def _information(self) -> dict[Target, Inputs]:
        """Bits that each feature shares with each target's output, as jointly Gaussian variables."""
        maps = [gaussian_information(shared).float() for shared in self._shared]
        like = list(zip(maps, self._surrogate.layouts, self._features, strict=True))
        return {
            target: tuple(
                layout.restored(bits[0, :, index].reshape(x.shape)).clone()
                for bits, layout, x in like
            )
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
        total = list(
            accumulate((self._sizes[k] for k in keys), initial=len(self._targets) * self._widest)
        )
        return keys[: sum(rows * size <= self._memory for size in total[1:])]

    def look(self) -> list[float]:
        """Go through the data once: rows, and the range of each target's output, by which a resumed fit knows its data.

        Raises:
            FitError: Fewer than two examples, a target whose output is constant, values that are not finite.
        """
        with self._processes.fail_together():
            low, high = self._look()
        mine = (
            self._rows or 0,
            tuple(bound if bound is None else bound.cpu() for bound in (low, high)),
            bool(self._covered),
        )
        counts, bounds, fits = zip(*self._processes.gather(mine), strict=True)
        if not all(fits):
            self._kept, self._covered = [], ()
        self._sizes, self._widest = self._processes.first(
            (self._sizes, self._widest) if self._rows else None
        ) or ({}, 0.0)
        rows, self._most = sum(counts), max(counts)
        if rows < 2:
            raise FitError(
                f"the data has {rows} example, expected at least two: a regression needs variance"
            )
        low = torch.stack([low for low, _ in bounds if low is not None]).amin(0)
        high = torch.stack([high for _, high in bounds if high is not None]).amax(0)
        for target in self._targets:
            if high[target] == low[target]:
                raise FitError(
                    f"the output for target {target_label(target)} is {low[target]:g} for each of the {rows} examples: nothing can be "
                    "regressed on a constant. Fit it on data it responds to, or leave it out."
                )
        if self._processes.count > 1:
            with self._processes.fail_together():
                if not self._features:  # this process has no data
                    self._share(self._trace(self._below(*self._example)))
                    self._shared = [
                        Moments.zeros(1, m.zs.shape[2], m.zs.shape[3], device=m.ss.device)
                        for m in self._shared
                    ]
            self._shared = [moments.pooled(self._processes.sum) for moments in self._shared]
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
            values = self._below(inputs, extras)
            if self._store is not None:
                values = self._store.add(values)
            trace = self._trace(values, self._covered, proving=index == 0)
            output = trace.output.detach()
            rows += len(output)
            if not finite(output):
                raise FitError(f"batch {index}: the model's output contains NaN or Inf")
            if index == 0:
                exact = (output,) if self._autocast is None else self._again(inputs, extras)
                check_independent(exact, inputs, extras, self._captured.shared, self._again)
                self._sizes = {key: size / len(output) for key, size in trace.sizes.items()}
                self._widest = trace.widest / len(output)
            self._keep(trace, rows)
            if self._store is None:
                self._share(trace)
            low = output.amin(0) if low is None else torch.minimum(low, output.amin(0))
            high = output.amax(0) if high is None else torch.maximum(high, output.amax(0))
        self._rows = rows
        if self._store is not None:
            self._whole = bool(self._covered)
            self._batches, self._progress = (
                (),
                False,
            )  # what comes later needs neither data nor patience
        return low, high

    def _again(self, inputs: Inputs, extras: Extras) -> Sequence[Tensor]:
        """The output of some examples; autocast would round it otherwise in other batches."""
        return (self._trace(self._below(inputs, extras, exact=True), exact=True).output,)

    def _share(self, trace: Trace) -> None:
        """What the features where the passes end have in common with the targets' outputs."""
        whole: tuple[Any, ...] = (slice(None),)
        outputs = torch.stack(
            [trace.output.detach()[whole + target] for target in self._targets], 1
        ).unsqueeze(0)
        sources = [
            layout.first(x.detach())
            for layout, x in zip(self._surrogate.layouts, trace.sources, strict=True)
        ]
        if not self._features:
            self._features = [x[:1].clone() for x in sources]
            self._shared = [
                Moments.zeros(1, x[0].numel(), len(self._targets), device=x.device) for x in sources
            ]
        for moments, x in zip(self._shared, sources, strict=True):
            moments.update(x.reshape(1, len(x), -1), outputs.to(x.dtype))

    def _below(self, inputs: Inputs, extras: Extras, exact: bool = False) -> Values:
        """What lies below the part that is inverted, run forward."""
        values = self._captured.values(self._model, inputs, extras)
        return self._surrogate.below(values, None if exact else self._autocast)

    def _values(self) -> Iterator[Values]:
        """What the part that is inverted starts from, batch by batch: as it was kept, or run forward once more."""
        if self._store is None:
            yield from (self._below(inputs, extras) for inputs, extras in self._batches)
        else:
            yield from self._store

    def _trace(
        self, values: Values, keys: Sequence[str] = (), proving: bool = False, exact: bool = False
    ) -> Trace:
        """A batch run forward, for a fit of the steps ``keys``; ``exact`` without autocast."""
        options = Options(shares=self._settings.shares, packed=self._store is not None)
        autocast = None if exact else self._autocast
        run = Run(self._surrogate.steps, options, fitting=keys, proving=proving, autocast=autocast)
        return Trace(run, self._surrogate.above(run, values, self._captured.weights(self._model)))

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
        for values in self._values():
            trace = self._trace(values, keys[: keys.index(key) + max(1, len(segment))])
            if segment:
                for target in self._targets:
                    trace.signals(key, target, inverses.get(target, {}))
                self._forget(trace)
                kept.append(trace)
            yield trace
            rows += len(trace.output)
        if rows != self._rows:
            raise FitError(
                f"the data had {self._rows} examples in the first pass and {rows} in a later one"
            )
        self._kept, self._covered = kept, segment

    def _signals(self, key: str, fitted: Fitted, bar: "tqdm[Any]") -> Iterator[_Regressed]:
        """For each batch: the inverter of ``key``, its features, and target → the source signals above it (algorithm 1)."""
        for trace in self._traces(key, fitted.inverses):
            seen = trace.seen(key)

            def signals(target: Target, trace: Trace = trace) -> tuple[Tensor, ...]:
                return trace.signals(key, target, fitted.inverses.get(target, {}))

            yield seen.inverter, seen.x.detach(), signals
            self._forget(trace)
            bar.update(len(trace.output))

    def _forget(self, trace: Trace) -> None:
        """Let go of what no target needs any more, unless others come later."""
        if self._store is None:
            trace.forget(self._targets)

    def _joined(self, key: str, batches: Iterable[_Regressed]) -> Iterator[_Regressed]:
        """Small batches put together where that can be done: what moments cost a batch, they cost less often."""
        waiting: list[_Regressed] = []
        join = self._surrogate.steps[key].layout.join
        for batch in batches:
            joins = key in self._covered and batch[0].joins
            if waiting and not (
                joins and sum(x.numel() for _, x, _ in (*waiting, batch)) <= CHUNK // 4
            ):
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
        with self._processes.fail_together():
            first = next(passes, None)
            if first is None:  # this process has no data
                seen = self._trace(self._below(*self._example), [key]).seen(key)
                inverter, x = seen.inverter, seen.x.detach()
            else:
                inverter, x, _ = first
            rows = self._regressed_rows(key, inverter, x)
            alone = self._processes.count == 1
            shared = self._settings.sharing and key != self._surrogate.learned[0]
            by_rows = (
                alone
                and not shared
                and isinstance(inverter, Dense)
                and not inverter.own
                and rows < inverter.size[2]
            )
            needed = (
                8 * rows * inverter.size[2] if by_rows else Moments.bytes_needed(*inverter.size)
            )
            if needed > (there_is := _memory_of(x.device)):
                raise FitError(
                    f"the moments of {key} take {needed / 2**30:,.0f} GiB, this machine has {there_is / 2**30:,.0f}: there are "
                    f"{inverter.size[2]:,} signals in one regression. Start above it, with InverseNetwork(model, layer=...)"
                )
        batches = passes if first is None else chain([first], passes)
        targets = targets if shared else targets[: max(1, self._memory // needed)]
        names = ", ".join(str(target_label(target)) for target in targets)
        bar.set_description(f"{key} · class {names if len(names) < 30 else names[:27] + '...'}")
        if self._settings.solver == "sgd" and isinstance(inverter, Convolution) and inverter.plain:
            return self._descend(key, targets, fitted, batches, bar)
        if by_rows:
            assert isinstance(inverter, Dense)  # for mypy: as above
            return self._solve_by_rows(key, inverter, targets, batches)
        pooled = [targets] if shared else [[target] for target in targets]
        with self._processes.fail_together():
            moments = self._moments(key, pooled, batches)
        if not alone:
            moments = {
                group[0]: self._together(moments.pop(group[0], None), inverter, x)
                for group in pooled
            }
        result: dict[Target, tuple[Inverse, LayerFit]] = {}
        groups, features, signals, own = inverter.size
        with self._processes.fail_together():
            for group in pooled:
                part = moments.pop(group[0])
                solution = solve(
                    part, self._settings.ridge, self._settings.ridge_scale, inverter.tied
                )
                logger.debug(
                    "%s, target %s: explained variance %.3f",
                    key,
                    target_label(group[0]),
                    solution.explained_variance,
                )
                inverse = inverter.inverse(solution, x)
                for target in group:
                    layer = LayerFit(
                        target_label(target), key, part.count, groups * features, signals + own,
                        solution.explained_variance, solution.dead, solution.condition, "exact",
                    )  # fmt: skip
                    result[target] = inverse, layer
        return result

    def _moments(
        self, key: str, pooled: Sequence[Sequence[Target]], batches: Iterator[_Regressed]
    ) -> dict[Target, Moments]:
        """The moments of this process's data, for each group of targets under the first of it."""
        moments: dict[Target, Moments] = {}
        for index, (inverter, x, signals) in enumerate(self._joined(key, batches)):
            places = self._places(key, index, inverter, x)
            for first, target in ((group[0], target) for group in pooled for target in group):
                s = signals(target)
                if self._settings.double:
                    x, s = x.double(), tuple(part.double() for part in s)
                if places is None:
                    found = inverter.moments(x, s)
                else:
                    assert isinstance(inverter, Convolution)  # for mypy: only these have positions
                    found = inverter.moments_at(x, s, places)
                moments.setdefault(first, found)
                if moments[first] is not found:
                    moments[first].add(found)
                if not moments[first].finite():
                    raise FitError(
                        f"batch {index}: NaN or Inf in the features or the signal of {key}, target {target_label(target)}"
                    )
        return moments

    def _places(self, key: str, index: int, inverter: Inverter, x: Tensor) -> Tensor | None:
        """The positions of x that a convolution is fitted on in a batch, drawn anew for each; None for all."""
        wanted, count = self._settings.positions, prod(x.shape[2:])
        if wanted is None or not isinstance(inverter, Convolution) or inverter.tied > 1:
            return None
        chosen = wanted if isinstance(wanted, int) else max(1, round(wanted * count))
        if chosen >= count:
            return None
        words = f"{self._settings.seed} {self._surrogate.learned.index(key)} {index} {self._processes.rank}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big", signed=True)
        return (
            torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:chosen]
            .sort()
            .values.to(x.device)
        )

    def _together(self, mine: Moments | None, inverter: Inverter, x: Tensor) -> Moments:
        """The moments of all processes' data."""
        live = [
            found
            for found in self._processes.gather(
                mine and (mine.live[0].tolist() if mine.live else "all")
            )
            if found
        ]
        if live.count(live[0]) < len(live):
            mine, live = mine and mine.whole(), ["all"]
        if mine is None:
            groups, features, signals, own = inverter.size
            mine = Moments.zeros(
                groups, features, signals if live[0] == "all" else len(live[0]), own, x.device
            )
            mine.live = (
                None if live[0] == "all" else (torch.tensor(live[0], device=x.device), signals)
            )
        return mine.pooled(self._processes.sum)

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
                    raise FitError(
                        f"batch {index}: NaN or Inf in the features or the signal of {key}, target {target_label(target)}"
                    )
        rows, result = self._centred.get(key) or Rows(torch.cat(xs)), {}
        if self._store is not None:
            self._centred[key] = rows
        for target in targets:
            s = torch.cat(parts.pop(target))
            live = s.any(0).nonzero().squeeze(1)
            solution = solve_rows(
                rows, s[:, live], self._settings.ridge, self._settings.ridge_scale
            )
            layer = LayerFit(
                target_label(target), key, len(s), inverter.features, s.shape[1], solution.explained_variance,
                solution.dead + s.shape[1] - len(live), solution.condition, "exact",
            )  # fmt: skip
            result[target] = inverter.inverse_of_rows(solution, live, rows), layer
        return result

    def _descend(
        self,
        key: str,
        targets: Sequence[Target],
        fitted: Fitted,
        first_pass: Iterator[Any],
        bar: "tqdm[Any]",
    ) -> dict[Target, tuple[Inverse, LayerFit]]:
        """The paper's way for convolutions: gradient descent on equation 7, momentum 0.9, batch by batch."""
        states: dict[Target, Descent] = {}
        for epoch in range(self._settings.epochs):
            for inverter, x, signals in (
                first_pass if epoch == 0 else self._signals(key, fitted, bar)
            ):
                for target in targets:
                    (s,) = signals(target)
                    if target not in states:
                        assert isinstance(inverter, Convolution)  # for mypy: as in the caller
                        states[target] = Descent(inverter, x, s, self._settings.learning_rate)
                    states[target].step(epoch, x, s)
        result = {}
        for target, state in states.items():
            groups, features, signals_each, _ = state.inverter.size
            rows = state.rows // state.inverter.tied
            layer = LayerFit(
                target_label(target),
                key,
                rows,
                groups * features,
                signals_each,
                state.explained_variance(),
                0,
                None,
                "sgd",
            )
            if not torch.isfinite(state.inverse.weight).all():
                raise FitError(
                    f"SGD diverged at {key}, target {target_label(target)}: lower learning_rate={state.rate:g}"
                )
            result[target] = state.inverse, layer
        return result


def _memory_of(device: torch.device) -> int:
    """The bytes of memory that there are where tensors of a device are."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if hasattr(os, "sysconf")
        else sys.maxsize
    )


def _joined(batches: Sequence[_Regressed], join: Callable[[list[Tensor]], Tensor]) -> _Regressed:
    """Several batches as one."""
    inverters, xs, signals = zip(*batches, strict=True)
    if len(xs) == 1:
        return batches[0]

    def joined(target: Target) -> tuple[Tensor, ...]:
        return tuple(
            join(list(parts)) for parts in zip(*(of(target) for of in signals), strict=True)
        )

    return inverters[0], join(list(xs)), joined
