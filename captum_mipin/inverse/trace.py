"""One batch of a fit, run forward once: each class's signal then comes down with the fit, step by step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from captum_mipin.propagation.runtime import Inverses, Run, Seen, seed
from captum_mipin.types import Target

#: For each step not passed yet, from the bottom up, the signals at its outputs; None where nothing has come.
_Waiting = dict[str, list[Tensor | None]]


class Trace:
    """What a batch leaves behind on its way up, and how far each class's signal has come down (algorithm 1).

    Args:
        run: The pass that has been made, with the steps of interest from the output down.
        output: The model's.

    Attributes:
        output: The model's.
        sources: Features where the way back ends.
        sizes: About the bytes of what is kept for the way back through each step, and on to the steps below.
        widest: About the bytes of the signals of one class that are kept between two steps.
    """

    def __init__(self, run: Run, output: Tensor) -> None:
        self.output, self.sizes = output, run.sizes
        self.sources = tuple(x for _, x in sorted(run.sources.items()))
        self._seen = {key: run.seen[key] for key in reversed(tuple(run.fitting or ()))}
        self.widest = max(
            (sum(s.nbytes for s in (seen.x, *seen.outputs)) for seen in self._seen.values()),
            default=0,
        )
        self._waiting: dict[Target, _Waiting] = {}

    def seen(self, key: str) -> Seen:
        """A step's inverter, input and outputs."""
        return self._seen[key]

    def signals(self, key: str, target: Target, inverses: Inverses) -> tuple[Tensor, ...]:
        """S at the outputs of a step, once all steps above it have their inverses; the next step goes on from here.

        Args:
            key: The step.
            target: The class.
            inverses: Its inverses of the steps above.
        """
        waiting = self._waiting.get(target)
        if waiting is None:
            waiting = {below: [None] * len(seen.outputs) for below, seen in self._seen.items()}
            self._send(self.output, seed(self.output, [target] * len(self.output)), waiting)
        while next(reversed(waiting)) != key:
            above, signals = waiting.popitem()
            seen = self._seen[above]
            if seen.x.requires_grad:
                found = _filled(signals, seen)
                self._send(
                    seen.x, seen.inverter.apply(inverses[above].to(found[0]), found, True), waiting
                )
        self._waiting[target] = waiting
        return _filled(waiting[key], self._seen[key])

    def forget(self, targets: Iterable[Target]) -> None:
        """Let go of the steps that the signals of all targets have passed."""
        if all(target in self._waiting for target in targets):
            needed = {key for waiting in self._waiting.values() for key in waiting}
            self._seen = {key: seen for key, seen in self._seen.items() if key in needed}

    def drop(self, targets: Iterable[Target]) -> None:
        """Let go of the signals of targets that are done."""
        for target in targets:
            self._waiting.pop(target, None)

    def _send(self, x: Tensor, signal: Tensor, waiting: _Waiting) -> None:
        """Send the signal at ``x`` back to the outputs of the steps below."""
        leaves = [
            (key, index, leaf)
            for key in waiting
            for index, leaf in enumerate(self._seen[key].outputs)
        ]
        found = torch.autograd.grad(
            x, [leaf for *_, leaf in leaves], signal, retain_graph=True, allow_unused=True
        )
        for (key, index, _), s in zip(leaves, found, strict=True):
            before = waiting[key][index]
            if s is not None:
                waiting[key][index] = s if before is None else before + s


def _filled(signals: list[Tensor | None], seen: Seen) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(y) if s is None else s for s, y in zip(signals, seen.outputs, strict=True)
    )
