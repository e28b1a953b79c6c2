"""Passes over the data of a fit: forward passes of batches, stored as far as memory allows."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from captum_mipin.errors import FitError
from captum_mipin.graph.alone import check_length
from captum_mipin.graph.signature import Signature, pick, shapes
from captum_mipin.graph.validate import finite
from captum_mipin.inverse.data import Values, check_independent
from captum_mipin.inverse.request import FitRequest
from captum_mipin.inverse.trace import Trace
from captum_mipin.propagation.runtime import Inverses, Run, Seen
from captum_mipin.regression.lag_gram import CHUNK
from captum_mipin.rules import Options
from captum_mipin.rules.linear import Dense
from captum_mipin.types import Extras, Inputs, Target

#: Number of copies of a batch's values at a step that its moments take, as measured, and at a
#: dense layer, which has neither patches nor Fourier transforms.
COPIES, DENSE_COPIES = 4, 2


class Passes:
    """The forward passes of the batches of a fit, with the values at the learned steps.

    If memory allows, all values are stored in the first pass, and no other pass is needed. If not,
    later passes run the batches again. Each stores values for the step that is being fitted and for
    as many of the next steps as fit into memory.

    Args:
        request: The request for the fit.

    Attributes:
        rows: Number of examples of this process; None before the first pass.
        most: Number of examples of the process that has the most.
    """

    def __init__(self, request: FitRequest) -> None:
        self._request, self._batches = request, request.batches
        self._learned = request.surrogate.learned
        name = request.settings.autocast
        self._autocast: torch.dtype | None = getattr(torch, name) if name else None
        self.rows: int | None = None
        self.most = 0
        self._kept: list[Trace] = []
        self._kept_steps: Sequence[str] = self._learned
        self._sizes: Mapping[str, float] = {}  # bytes per example of the values stored for a step
        self._widest = 0.0  # bytes per example of the signals of one class
        self._all_kept = False
        self._largest = 1  # number of examples of the largest batch

    # ------------------------------------------------------------------------------- first pass

    def first(self) -> Iterator[Trace]:
        """Yield the forward pass of every batch, and store it if memory allows.

        Raises:
            FitError: The kinds of further arguments differ between batches, an output contains NaN
                or Inf, or the model mixes the examples of a batch.
        """
        request, rows = self._request, 0
        signature: Signature | None = None
        for index, (inputs, extras) in enumerate(self._batches):
            captured = request.surrogate.captured
            found = Signature.of(inputs, extras, captured.shared)
            signature = signature or found
            if found != signature:
                if captured.shared and len(found.leaves) == len(signature.leaves):
                    # after a first batch of one example
                    check_length(captured, inputs, extras, {})
                raise FitError(
                    f"batch {index} has inputs and further arguments {shapes(found)}, expected "
                    f"{shapes(signature)} as in the first batch: pass the same kinds in all batches"
                )
            if index == 0:
                self._prove(inputs, extras)
            values = self._below(inputs, extras)
            if request.activations is not None:
                values = request.activations.add(values)
            trace = self._trace(values, self._kept_steps)
            output = trace.output.detach()
            rows, self._largest = rows + len(output), max(self._largest, len(output))
            if not finite(output):
                raise FitError(
                    f"batch {index}: the model's output contains NaN or Inf, expected finite "
                    "numbers: scale the inputs as in training, or use a wider dtype"
                )
            if index == 0:
                self._measure(trace, inputs, extras)
            if rows * (sum(self._sizes.values()) + self._widest) <= request.memory:
                self._kept.append(trace)
            else:
                self.discard()
            yield trace
        self.rows = rows
        if request.activations is not None:
            self._all_kept = bool(self._kept_steps)
            self._batches = ()  # later fits use the stored activations instead of the data

    def _prove(self, inputs: Inputs, extras: Extras) -> None:
        """Raise RuleError if a rule's result differs from its operation's, for two examples."""
        few = torch.arange(min(2, len(inputs[0])), device=inputs[0].device)
        values = self._below(*pick(inputs, extras, few, self._request.surrogate.captured.shared))
        self._trace(values, self._learned, proving=True)

    def _measure(self, trace: Trace, inputs: Inputs, extras: Extras) -> None:
        """Check on the first batch that examples are independent, and measure bytes per example."""

        def run(inputs: Inputs, extras: Extras) -> Sequence[Tensor]:
            # without autocast, whose rounding of an example depends on the rest of the batch
            values = self._below(inputs, extras, exact=True)
            return (self._trace(values, exact=True).output,)

        output = trace.output.detach()
        outputs = (output,) if self._autocast is None else run(inputs, extras)
        check_independent(outputs, inputs, extras, self._request.surrogate.captured.shared, run)
        self._sizes = {key: size / len(output) for key, size in trace.sizes.items()}
        self._widest = trace.widest / len(output)

    def agree(self) -> int:
        """Make all processes store the same steps, and return the number of all examples."""
        processes = self._request.processes
        counts, kept = zip(*processes.gather((self.rows or 0, bool(self._kept_steps))), strict=True)
        if not all(kept):
            self.discard()
        sizes = processes.first((self._sizes, self._widest) if self.rows else None)
        self._sizes, self._widest = sizes or ({}, 0.0)
        self.most = max(counts)
        return sum(counts)

    def ahead(self, targets: int) -> int:
        """Return the bytes of all batches' values and signals that are still to be stored."""
        rows, signals = self.rows or self._largest, targets * self._widest
        if self._kept_steps:
            held = 0.0 if self.rows is None else rows * sum(self._sizes.values())
            every = rows * (sum(self._sizes.values()) + signals)
            return round(max(min(every, max(self._request.memory, held)) - held, 0))
        most = 0.0
        for at in range(len(self._learned)):
            below = self._learned[at:]
            kept = below[: self._affordable(below, targets)]
            most = max(
                most, rows * (sum(self._sizes[key] for key in kept) + signals) if kept else 0
            )
        return round(most)

    def working(self, key: str, seen: Seen, examples: int) -> int:
        """Return the bytes that the values of one batch at a step take, with all copies of them.

        Args:
            key: The step.
            seen: Its values for some examples.
            examples: Number of these examples.
        """
        size, rows = max(1, seen.x.numel() // examples), self._largest
        if self.rows and self.keeps(key) and seen.inverter.joins:  # small batches are joined
            rows = max(rows, min(self.rows, CHUNK // 4 // size))
        values = sum(t.nbytes for t in (seen.x, *seen.outputs)) * rows // examples
        # signals, the same centred, in another order or dtype, and their Fourier transforms
        copies = DENSE_COPIES if isinstance(seen.inverter, Dense) else COPIES
        return copies * values * (2 if self._request.settings.double else 1)

    def example(self, keys: Sequence[str] = ()) -> Trace:
        """Return the forward pass of one example, for a process without data."""
        return self._trace(self._below(*self._request.example), keys)

    # ----------------------------------------------------------------------------- later passes

    def traces(
        self, key: str, targets: Sequence[Target], inverses: Mapping[Target, Inverses]
    ) -> Iterator[Trace]:
        """Yield the forward pass of every batch, from memory or run again.

        Args:
            key: The step that is being fitted.
            targets: All targets of the fit.
            inverses: For each target, the inverses of the steps between ``key`` and the output.
        """
        if self.keeps(key):
            yield from self._kept
            return
        self.discard()
        below = self._learned[self._learned.index(key) :]
        count, rows, kept = self._affordable(below, len(targets)), 0, []
        above = self._learned[: len(self._learned) - len(below)]
        for values in self._values():
            trace = self._trace(values, (*above, *below[: max(1, count)]))
            if count:
                for target in targets:
                    trace.signals(key, target, inverses.get(target, {}))
                self.forget(trace, targets)
                kept.append(trace)
            yield trace
            rows += len(trace.output)
        if rows != self.rows:
            raise FitError(
                f"the data had {self.rows} examples in the first pass and {rows} in a later one, "
                "expected the same number: pass data that yields all examples in every pass"
            )
        self._kept, self._kept_steps = kept, below[:count]

    def keeps(self, key: str) -> bool:
        """Return True if the values of a step are stored for every batch."""
        return key in self._kept_steps

    def groups(self, targets: Sequence[Target]) -> list[list[Target]]:
        """Return the targets in groups that are fitted together, step by step.

        If the values of all batches are stored, memory limits the size of a group.
        """
        count = len(targets)
        if self._kept_steps:
            free = self._request.memory - self.most * sum(self._sizes.values())
            room = max(1, int(free // max(self.most * self._widest, 1)))
            if self._request.settings.sharing and room < count:
                # targets that share inverses cannot be split into groups
                self.discard()
            else:
                count = min(count, room)
        return [list(targets[i : i + count]) for i in range(0, len(targets), count)]

    def forget(self, trace: Trace, targets: Sequence[Target]) -> None:
        """Drop values that no target needs any more, unless classes may be fitted later."""
        if self._request.activations is None:
            trace.forget(targets)

    def drop(self, targets: Sequence[Target]) -> None:
        """Drop the signals of targets that are fitted."""
        for trace in self._kept:
            trace.drop(targets)

    def discard(self) -> None:
        """Drop the stored values of all batches."""
        self._kept, self._kept_steps = [], ()

    def resume(self) -> None:
        """Prepare a fit from the first step on; store all batches' values if memory allows."""
        if not self._all_kept:
            self.discard()
        elif not self._kept:
            self._kept = [self._trace(values, self._learned) for values in self._values()]
            self._kept_steps = self._learned

    def _affordable(self, keys: Sequence[str], targets: int) -> int:
        """Return the number of first steps in ``keys`` whose values fit into memory together."""
        signals = targets * self._widest
        totals = list(accumulate((self._sizes[key] for key in keys), initial=signals))[1:]
        return sum(self.most * total <= self._request.memory for total in totals)

    def _values(self) -> Iterator[Values]:
        """Yield the values at the start of the inverted part, from the store or computed again."""
        if self._request.activations is not None:
            yield from self._request.activations
        else:
            yield from (self._below(inputs, extras) for inputs, extras in self._batches)

    def _below(self, inputs: Inputs, extras: Extras, exact: bool = False) -> Values:
        """Return the values at the start of the inverted part, from a run of the part before it."""
        values = self._request.surrogate.captured.values(self._request.model, inputs, extras)
        return self._request.surrogate.below(values, None if exact else self._autocast)

    def _trace(
        self, values: Values, keys: Sequence[str] = (), proving: bool = False, exact: bool = False
    ) -> Trace:
        """Run the inverted part of the model, and record the steps ``keys``.

        Args:
            values: The values at the start of the inverted part.
            keys: The keys of the steps, in order from the output to the input.
            proving: True to check that the results of rules agree with those of their operations.
            exact: True to compute in the model's dtype even if autocast is set.
        """
        request = self._request
        options = Options(shares=request.settings.shares, packed=request.activations is not None)
        autocast = None if exact else self._autocast
        run = Run(
            request.surrogate.steps, options, fitting=keys, proving=proving, autocast=autocast
        )
        weights = request.surrogate.captured.weights(request.model)
        return Trace(run, request.surrogate.above(run, values, weights))
