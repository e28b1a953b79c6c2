"""One batch of a fit: its forward pass, and the signals of each class, step by step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from captum_mipin.propagation.runtime import Inverses, Run, Seen, seed
from captum_mipin.types import Target

#: The signals at the outputs of each step whose inverse was not applied yet; None for no signal.
#: Steps are in order from the input to the output.
_Pending = dict[str, list[Tensor | None]]


class Trace:
    """The recorded forward pass of a batch, and the signals of each class (algorithm 1).

    The signals of a class move from the output to the input, one step at a time.

    Args:
        run: A finished forward pass that recorded the learned steps, from the output to the input.
        output: The model's output for the batch.

    Attributes:
        output: The model's output for the batch.
        sources: The features where the backward pass stops: the inputs, or the output of a layer.
        sizes: For each learned step, the approximate bytes that are stored for the backward pass
            from this step to the next one.
        widest: Approximate bytes of one class's signals at the step where they are largest.
    """

    def __init__(self, run: Run, output: Tensor) -> None:
        self.output, self.sizes = output, run.sizes
        self.sources = tuple(x for _, x in sorted(run.sources.items()))
        self._seen = {key: run.seen[key] for key in reversed(tuple(run.fitting or ()))}
        self.widest = max(
            (sum(s.nbytes for s in (seen.x, *seen.outputs)) for seen in self._seen.values()),
            default=0,
        )
        self._pending: dict[Target, _Pending] = {}

    def seen(self, key: str) -> Seen:
        """Return the inverter, the input and the outputs of a step."""
        return self._seen[key]

    def signals(self, key: str, target: Target, inverses: Inverses) -> tuple[Tensor, ...]:
        """Return the source signals at the outputs of a step.

        Args:
            key: The key of the step. For each class, later calls must use the same step or one
                closer to the input.
            target: The class.
            inverses: The inverses of this class for all steps between ``key`` and the output.
        """
        pending = self._pending.get(target)
        if pending is None:
            pending = {step: [None] * len(seen.outputs) for step, seen in self._seen.items()}
            # algorithm 1: S_L = Y_c
            self._send(self.output, seed(self.output, [target] * len(self.output)), pending)
        while (above := next(reversed(pending))) != key:
            seen = self._seen[above]
            s = _with_zeros(pending.pop(above), seen)
            if seen.x.requires_grad:
                # eq. 5: S_l = g_{l+1}(S_{l+1})
                inverse = inverses[above].to(s[0])
                self._send(seen.x, seen.inverter.apply(inverse, s, True), pending)
        self._pending[target] = pending
        return _with_zeros(pending[key], self._seen[key])

    def forget(self, targets: Iterable[Target]) -> None:
        """Drop the recordings of steps whose inverses were applied for all ``targets``."""
        if all(target in self._pending for target in targets):
            needed = {key for pending in self._pending.values() for key in pending}
            self._seen = {key: seen for key, seen in self._seen.items() if key in needed}

    def drop(self, targets: Iterable[Target]) -> None:
        """Drop the signals of ``targets``, whose fit is complete."""
        for target in targets:
            self._pending.pop(target, None)

    def _send(self, x: Tensor, signal: Tensor, pending: _Pending) -> None:
        """Send the signal at ``x`` back to outputs of earlier steps, and add it to ``pending``."""
        places = [(waiting, i) for waiting in pending.values() for i in range(len(waiting))]
        leaves = [output for key in pending for output in self._seen[key].outputs]
        signals = torch.autograd.grad(x, leaves, signal, retain_graph=True, allow_unused=True)
        for (waiting, i), s in zip(places, signals, strict=True):
            before = waiting[i]
            if s is not None:
                waiting[i] = s if before is None else before + s


def _with_zeros(signals: list[Tensor | None], seen: Seen) -> tuple[Tensor, ...]:
    """Return the signals at a step's outputs, with zeros in place of None."""
    return tuple(
        torch.zeros_like(y) if s is None else s for s, y in zip(signals, seen.outputs, strict=True)
    )
