"""One batch of a fit, run forward once; the signals of each class then come down step by step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from captum_mipin.propagation.runtime import Inverses, Run, Seen, seed
from captum_mipin.types import Target

#: For each step still to come, from the input up, the signals at its outputs; None for no signal.
_Pending = dict[str, list[Tensor | None]]


class Trace:
    """The recordings of a batch, and the signals of each class on their way down (algorithm 1).

    Args:
        run: A finished forward pass that recorded the learned steps, from the output down.
        output: The model's output.

    Attributes:
        output: The model's output.
        sources: The features at which the signals arrive in the end.
        sizes: For each learned step, about the bytes kept for the way back through it and on to
            the next one.
        widest: About the bytes of one class's signals between two steps, at most.
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
            key: The step; each call for a class has to ask for the same step or a lower one.
            target: The class.
            inverses: The inverses of this class for all steps above.
        """
        pending = self._pending.get(target)
        if pending is None:
            pending = {step: [None] * len(seen.outputs) for step, seen in self._seen.items()}
            # S_L = Y_c
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
        """Drop the recordings of steps that the signals of all ``targets`` have passed."""
        if all(target in self._pending for target in targets):
            needed = {key for pending in self._pending.values() for key in pending}
            self._seen = {key: seen for key, seen in self._seen.items() if key in needed}

    def drop(self, targets: Iterable[Target]) -> None:
        """Drop the signals of ``targets``, which are fitted."""
        for target in targets:
            self._pending.pop(target, None)

    def _send(self, x: Tensor, signal: Tensor, pending: _Pending) -> None:
        """Send the signal at ``x`` back to the outputs of the steps below, and add it there."""
        places = [(waiting, i) for waiting in pending.values() for i in range(len(waiting))]
        leaves = [output for key in pending for output in self._seen[key].outputs]
        signals = torch.autograd.grad(x, leaves, signal, retain_graph=True, allow_unused=True)
        for (waiting, i), s in zip(places, signals, strict=True):
            before = waiting[i]
            if s is not None:
                waiting[i] = s if before is None else before + s


def _with_zeros(signals: list[Tensor | None], seen: Seen) -> tuple[Tensor, ...]:
    """Return the signals at a step's outputs, zeros where none has come."""
    return tuple(
        torch.zeros_like(y) if s is None else s for s, y in zip(signals, seen.outputs, strict=True)
    )
