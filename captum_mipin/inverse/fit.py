"""Algorithm 1: one regression per learned step and target, in order from output to input."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import prod
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_mipin.errors import FitError
from captum_mipin.inverse.information import SharedInformation
from captum_mipin.inverse.memory import Plan, check_memory
from captum_mipin.inverse.passes import Passes
from captum_mipin.inverse.request import FitRequest, Fitted
from captum_mipin.inverse.sgd import Descent, descend
from captum_mipin.inverse.tables import Table
from captum_mipin.inverse.trace import Trace
from captum_mipin.regression.dual import Rows, RowSolution
from captum_mipin.regression.lag_gram import CHUNK
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution, solve
from captum_mipin.report import LayerFit
from captum_mipin.rules import Inverse, Inverter
from captum_mipin.rules.linear import Convolution, Dense
from captum_mipin.rules.pooled import PooledDense
from captum_mipin.targets import target_label
from captum_mipin.types import Inputs, Target

logger = logging.getLogger(__name__)

#: For each target, the inverse of one step and the report of its regression.
_Solved = dict[Target, tuple[Inverse, LayerFit]]


class _Batch(NamedTuple):
    """One batch of a regression: inverter, features, and the function target → signals."""

    inverter: Inverter
    x: Tensor
    signals: Callable[[Target], tuple[Tensor, ...]]


class Fit:
    """One fit, which solves the regressions step after step on the data of :class:`Passes`."""

    def __init__(self, request: FitRequest) -> None:
        self._request, self._targets = request, list(request.targets)
        self._passes = Passes(request)
        self._information = SharedInformation(request.surrogate, self._targets)
        self._rows: dict[str, Rows] = {}  # features of steps solved by the dual, for later classes

    def run(self, fitted: Fitted, done: Callable[[Fitted], None] = lambda fitted: None) -> Fitted:
        """Fit all classes and steps that are not in ``fitted``, and return ``fitted``.

        Args:
            fitted: The results so far; new results are added to this object.
            done: Function that is called with ``fitted`` after each regression.

        Raises:
            FitError: There are fewer than two examples, the output of a class is constant, or
                values are NaN or Inf.
        """
        if self._passes.rows is None:
            self.scan()
        request, passes = self._request, self._passes
        # algorithm 1: S_L = Y_c; for l = L … 1: fit g_l, then S_{l-1} = g_l(S_l) ⊙ 1[X_{l-1} ≠ 0]
        learned, groups = request.surrogate.learned, passes.groups(self._targets)
        progress = request.progress and request.processes.rank == 0 and request.activations is None
        with tqdm(unit="row", disable=not progress, unit_scale=True) as bar:
            for index, group in enumerate(groups):
                for number, key in enumerate(learned):
                    missing = [target for target in group if not fitted.has(target, key)]
                    while missing:
                        ahead = len(learned) * (len(groups) - index) - number
                        bar.total = bar.n + ahead * (passes.rows or 0)
                        solved = self._solve(key, missing, fitted, bar)
                        missing = missing[len(solved) :]
                        for target, (inverse, layer) in solved.items():
                            fitted.inverses.setdefault(target, {})[key] = inverse
                            fitted.layers.append(layer)
                        done(fitted)
                passes.drop(group)
        if request.activations is None:
            fitted.information = self._information.bits()
        return fitted

    def later(self, target: Target) -> Fitted:
        """Return the fit of one more class, from the stored activations of the data."""
        self._targets = [target]
        try:
            self._passes.resume()
            return self.run(Fitted())
        except BaseException:
            self.restart()
            raise

    def information(self, target: Target) -> Inputs:
        """Return the bits of each feature for one class, from the stored activations."""
        self._passes.resume()
        information = SharedInformation(self._request.surrogate, [target])
        for trace in self._passes.traces(self._request.surrogate.learned[0], [target], {}):
            information.add(trace)
        return information.bits()[target]

    def restart(self) -> None:
        """Drop all values that can be computed again from the stored activations."""
        self._passes.discard()
        self._rows.clear()

    def scan(self) -> list[float]:
        """Make the first pass over the data.

        Returns:
            The number of examples, then the minimum and the maximum of each target's output. A
            resumed fit identifies its data by these numbers.

        Raises:
            FitError: There are fewer than two examples, the output of a class is constant, or
                values are NaN or Inf.
        """
        processes = self._request.processes
        bounds: Tensor | None = None  # maximum of the output, and of the negative output
        with processes.fail_together():
            for trace in self._passes.first():
                if bounds is None:  # large convolutions: do not run all the data first
                    self._check_memory(trace)
                output = trace.output.detach()
                both = torch.stack([output.amax(0), -output.amin(0)])
                bounds = both if bounds is None else torch.maximum(bounds, both)
                if self._request.activations is None:
                    self._information.add(trace)
        rows = self._passes.agree()
        if rows < 2:
            raise FitError(f"the data has {rows} example, expected at least two: pass more data")
        with processes.fail_together():
            self._check_memory(self._passes.example(self._request.surrogate.learned))
        known = processes.gather(None if bounds is None else bounds.cpu())
        extremes = torch.stack([part for part in known if part is not None]).amax(0)
        high, low = extremes[0], -extremes[1]
        for target in self._targets:
            if high[target] == low[target]:
                raise FitError(
                    f"the output for target {target_label(target)} is {low[target]:g} for each of "
                    f"the {rows} examples, expected different values, which a regression needs: "
                    "pass other data, or leave this target out"
                )
        if processes.count > 1:
            with processes.fail_together():
                if self._information.empty:  # this process has no data
                    self._information.add(self._passes.example(), counted=False)
            self._information.pool(processes)
        ranges = [float(bound[target]) for target in self._targets for bound in (low, high)]
        return [float(rows), *ranges]

    def _batches(self, key: str, fitted: Fitted, bar: "tqdm[Any]") -> Iterator[_Batch]:
        """Yield for each batch the features X_{l-1} and signals S_l of a step l (algorithm 1)."""
        for trace in self._passes.traces(key, self._targets, fitted.inverses):
            seen = trace.seen(key)

            def signals(target: Target, trace: Any = trace) -> tuple[Tensor, ...]:
                above = trace.signals(key, target, fitted.inverses.get(target, {}))
                return tuple(above)

            yield _Batch(seen.inverter, seen.x.detach(), signals)
            self._passes.forget(trace, self._targets)
            bar.update(len(trace.output))

    def _solve(
        self, key: str, targets: Sequence[Target], fitted: Fitted, bar: "tqdm[Any]"
    ) -> _Solved:
        """Return the inverses of one step for as many of the first targets as memory allows."""
        request, batches = self._request, self._batches(key, fitted, bar)
        shared = self._shared(key)
        with request.processes.fail_together():
            first = next(batches, None)
            if first is None:  # this process has no data
                seen = self._passes.example([key]).seen(key)
                inverter, x = seen.inverter, seen.x.detach()
            else:
                inverter, x, _ = first
            plan = self._plan(key, inverter, x)
        batches = batches if first is None else chain([first], batches)
        targets = targets if shared else targets[: plan.classes(request.memory)]
        names = shorten(", ".join(str(target_label(t)) for t in targets), 30, placeholder=" ...")
        bar.set_description(f"{key} · class {names}")
        if plan.solver == "sgd":
            return self._descend(key, targets, fitted, batches, bar)
        if isinstance(inverter, (Dense, Convolution)) and plan.solver == "rows":
            return self._solve_by_rows(key, inverter, targets, batches)
        groups = [targets] if shared else [[target] for target in targets]
        with request.processes.fail_together():
            moments = self._moments(key, groups, batches)
        if request.processes.count > 1:
            for index in range(len(groups)):
                moments[index] = self._pooled(moments.get(index), inverter, x)
        with request.processes.fail_together():
            return self._solve_moments(key, inverter, groups, moments, x)

    def _solve_moments(
        self, key: str, inverter: Inverter, groups: Any, moments: dict[int, Moments], x: Tensor
    ) -> _Solved:
        """Return the inverses of one step from the moments of each group of targets.

        This empties ``moments``. The inverses have the dtype and the device of ``x``.
        """
        solved: _Solved = {}
        settings = self._request.settings
        for index, group in enumerate(groups):
            part = moments.pop(index)
            # eq. 6: W = cov(X, S) (cov(S, S) + λI)^-1, b = E[X] − W E[S]
            parts = inverter.parts if self._drawn(inverter, x) is None else ()
            solution = solve(part, settings.ridge, settings.ridge_scale, inverter.tied, parts)
            inverse = inverter.inverse(solution, x)
            for target in group:
                solved[target] = inverse, _layer_fit(key, target, inverter, part.count, solution)
        return solved

    def _moments(
        self, key: str, groups: Sequence[Sequence[Target]], batches: Iterable[_Batch]
    ) -> dict[int, Moments]:
        """Return the moments of this process's data for each group of targets."""
        moments: dict[int, Moments] = {}
        pairs = [(number, target) for number, group in enumerate(groups) for target in group]
        for index, (inverter, x, signals) in enumerate(self._merged(key, batches)):
            positions = self._positions(key, index, inverter, x)
            x = x.double() if self._request.settings.double else x
            for number, target in pairs:
                s = tuple(part.to(x.dtype) for part in signals(target))
                if positions is None:
                    part = inverter.moments(x, s)
                else:
                    assert isinstance(inverter, Convolution)  # for mypy: no others have positions
                    part = inverter.moments(x, s, positions)
                total = moments.setdefault(number, part)
                if total is not part:
                    total.add(part)
                if not total.finite():
                    raise _not_finite(index, key, target)
        return moments

    def _merged(self, key: str, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield the batches; join small stored ones, because few large products are faster."""
        waiting: list[_Batch] = []
        join = self._request.surrogate.steps[key].layout.join
        for batch in batches:
            elements = sum(x.numel() for _, x, _ in (*waiting, batch))
            small = self._passes.keeps(key) and batch.inverter.joins and elements <= CHUNK // 4
            if waiting and not small:
                yield _merge(waiting, join)
                waiting = []
            waiting.append(batch)
        if waiting:
            yield _merge(waiting, join)

    def _positions(self, key: str, index: int, inverter: Inverter, x: Tensor) -> Tensor | None:
        """Return the positions of ``x`` that a convolution is fitted on; None for all."""
        count, chosen = prod(x.shape[2:]), self._drawn(inverter, x)
        if chosen is None:
            return None
        step, rank = self._request.surrogate.learned.index(key), self._request.processes.rank
        digest = hashlib.sha256(f"{self._request.settings.seed} {step} {index} {rank}".encode())
        seed = int.from_bytes(digest.digest()[:8], "big", signed=True)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order[:chosen].sort().values.to(x.device)

    def _drawn(self, inverter: Inverter, x: Tensor) -> int | None:
        """Return the number of positions of ``x`` that a convolution is fitted on; None for all."""
        chosen, count = self._request.settings.positions, prod(x.shape[2:])
        if chosen is None or not isinstance(inverter, Convolution) or inverter.tied > 1:
            return None
        chosen = chosen if isinstance(chosen, int) else max(1, round(chosen * count))
        return chosen if chosen < count else None

    def _pooled(self, moments: Moments | None, inverter: Inverter, x: Tensor) -> Moments:
        """Return the moments of all processes' data; ``moments`` is None in one without data."""
        moments = moments or Moments.zeros(*inverter.size, x.device, parts=inverter.blocks)
        # Moments can be added only if the live signals and the parts of all processes are equal.
        kept = moments.live and moments.live[0].tolist(), len(moments.parts)
        if any(other != kept for other in self._request.processes.gather(kept)):
            moments = moments.whole()
        return moments.pooled(self._request.processes.sum)

    def _shared(self, key: str) -> bool:
        """Return True if all classes share the inverse of a step."""
        return self._request.settings.sharing and key != self._request.surrogate.learned[0]

    def _plan(self, key: str, inverter: Inverter, x: Tensor) -> Plan:
        """Return the plan of a step; ``x`` has the features of a batch."""
        alone = self._request.processes.count == 1 and not self._shared(key)
        rows = self._regressed_rows(key, inverter, x) if alone else None
        settings = self._request.settings
        whole = settings.ridge == 0 or self._drawn(inverter, x) is not None
        sgd, width = settings.solver == "sgd", x.element_size()
        return Plan.of(inverter, rows, sgd, whole=whole, width=width)

    def _regressed_rows(self, key: str, inverter: Inverter, x: Tensor) -> int:
        """Return the number of rows of a step's regression; ``x`` has the features of a batch."""
        layout = self._request.surrogate.steps[key].layout
        groups, features, *_ = inverter.size
        examples = max(1, x.shape[layout.dim] // (layout.outer * layout.inner))
        drawn = self._drawn(inverter, x)
        rows = x.numel() // (groups * features) if drawn is None else len(x) * drawn
        return rows * (self._passes.rows or examples) // examples

    def _check_memory(self, trace: Trace) -> None:
        """Raise FitError if memory is short, judged by a pass that recorded all learned steps."""
        request, plans = self._request, {}
        for key in request.surrogate.learned:
            seen = trace.seen(key)
            # Of the logits of a dense layer, the regression of a class uses only one.
            dense = isinstance(seen.inverter, (Dense, PooledDense))
            if not (dense and seen.outputs[0].shape == trace.output.shape):
                batch = self._passes.working(key, seen, len(trace.output))
                plans[key] = self._plan(key, seen.inverter, seen.x)._replace(batch=batch)
        classes = 1 if request.activations is not None else len(self._targets)
        kept = self._passes.ahead(classes)
        check_memory(plans, classes, request.memory, trace.output.device, kept)

    def _solve_by_rows(
        self,
        key: str,
        inverter: Dense | Convolution,
        targets: Sequence[Target],
        batches: Iterable[_Batch],
    ) -> _Solved:
        """Return the inverses of a step with fewer rows than signals, by the dual."""
        table = Table(inverter, self._rows.get(key))
        for index, (_, x, signals) in enumerate(self._merged(key, batches)):
            places = self._positions(key, index, inverter, x)
            for target in targets:
                if not table.add(x, target, signals(target), places):
                    raise _not_finite(index, key, target)
        solved: _Solved = {}
        settings = self._request.settings
        for target in targets:
            inverse, solution, silent = table.solve(target, settings.ridge, settings.ridge_scale)
            layer = _layer_fit(key, target, inverter, table.count, solution, silent=silent)
            solved[target] = inverse, layer
        if self._request.activations is not None and table.rows is not None:
            self._rows[key] = table.rows
        return solved

    def _descend(
        self,
        key: str,
        targets: Sequence[Target],
        fitted: Fitted,
        batches: Iterable[_Batch],
        bar: "tqdm[Any]",
    ) -> _Solved:
        """Return the inverses of a convolution, fitted by the paper's SGD on equation 7."""
        settings = self._request.settings
        later = (self._batches(key, fitted, bar) for _ in range(settings.epochs - 1))
        states = descend(key, targets, chain([batches], later), settings.learning_rate)
        return {
            target: (state.inverse, _layer_fit(key, target, state.inverter, state.rows, state))
            for target, state in states.items()
        }


def _layer_fit(
    key: str,
    target: Target,
    inverter: Inverter,
    rows: int,
    solution: Solution | RowSolution | Descent,
    *,
    silent: int = 0,
) -> LayerFit:
    """Return the report of one regression, which left out ``silent`` signals that are always 0."""
    label, (groups, features, signals, own) = target_label(target), inverter.size
    explained = solution.explained_variance
    logger.debug("%s, target %s: explained variance %.3f", key, label, explained)
    solver = "sgd" if isinstance(solution, Descent) else "exact"
    dead, size = solution.dead + silent, (groups * features, signals + own)
    return LayerFit(label, key, rows, *size, explained, dead, solution.condition, solver)


def _merge(batches: Sequence[_Batch], join: Callable[[list[Tensor]], Tensor]) -> _Batch:
    """Return several batches joined to one."""
    if len(batches) == 1:
        return batches[0]

    def signals(target: Target) -> tuple[Tensor, ...]:
        parts = zip(*(batch.signals(target) for batch in batches), strict=True)
        return tuple(join(list(part)) for part in parts)

    return _Batch(batches[0].inverter, join([batch.x for batch in batches]), signals)


def _not_finite(index: int, key: str, target: Target) -> FitError:
    return FitError(
        f"batch {index}: NaN or Inf in the features or the signal of {key}, target "
        f"{target_label(target)}: scale the inputs as in training, or use a wider dtype"
    )
