"""Classes that are fitted when they are first explained, and forgotten when there is no room for all."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NoReturn

from torch import Tensor

from captum_mipin.errors import NotFittedError
from captum_mipin.graph.capture import TURNS
from captum_mipin.inverse.fit import Fit
from captum_mipin.inverse.request import Fitted
from captum_mipin.rules import Inverse
from captum_mipin.types import Inputs, Target


class Lazy:
    """The classes of a fit that keeps what it has seen of its data: each is fitted when it is asked for.

    Calls from several threads take turns, so that no class is fitted twice; those that ask for what is there do not wait.

    Args:
        fit: Has looked at its data and kept it.
        room: Bytes that fitted classes may take. The least recently asked for give way; those of one call stay together.
        weights: What changes whenever the model's weights may lie elsewhere than when it looked.
    """

    def __init__(self, fit: Fit, room: int, weights: list[Any]) -> None:
        self._fit, self._room = fit, room
        self._ready: OrderedDict[Target, Fitted] = OrderedDict()
        self._made_of = weights
        self._turn, self._access = Lock(), Lock()

    @property
    def ready(self) -> list[Fitted]:
        """What is fitted now, the least recently asked for first."""
        with self._access:
            return list(self._ready.values())

    def get(
        self, targets: Sequence[Target], weights: Callable[[], list[Any]]
    ) -> dict[Target, dict[str, Inverse]]:
        """The inverses of classes, fitted where they are not there.

        Args:
            targets: The classes.
            weights: Makes sure that the model's weights are those that the data was looked at with, and says what changes
                whenever they may lie elsewhere.
        """
        found: dict[Target, Fitted] = {}
        for target in targets:
            known = self._known(target)
            if known is None:
                with self._turn:
                    known = self._known(target) or self._fitted(target, weights())
            found[target] = known
        with self._access:
            while len(self._ready) > len(found) and _bytes(self._ready) > self._room:
                self._ready.popitem(last=False)
        return {target: fitted.inverses[target] for target, fitted in found.items()}

    def information(self, target: Target, weights: list[Any]) -> Inputs:
        """Bits that each feature shares with the output of a class."""
        with self._turn, TURNS.explaining():
            self._renew(weights)
            return self._fit.information(target)

    def _known(self, target: Target) -> Fitted | None:
        with self._access:
            if target in self._ready:
                self._ready.move_to_end(target)
            return self._ready.get(target)

    def _fitted(self, target: Target, weights: list[Any]) -> Fitted:
        with TURNS.explaining():
            self._renew(weights)
            fitted = self._fit.later(target)
        with self._access:
            self._ready[target] = fitted
        return fitted

    def _renew(self, weights: list[Any]) -> None:
        """Run forward anew where weights have moved, or were changed and changed back."""
        if self._made_of != weights:
            self._fit.restart()
        self._made_of = weights

    def __reduce__(self) -> NoReturn:
        raise NotFittedError(
            "classes that are fitted when they are explained cannot be copied or pickled: fit those that are needed without "
            "lazy=True"
        )


def _bytes(ready: OrderedDict[Target, Fitted]) -> int:
    """Memory of fitted classes; what they share counts once."""
    tensors = {
        id(part): part.nbytes
        for fitted in ready.values()
        for inverses in fitted.inverses.values()
        for inverse in inverses.values()
        for part in vars(inverse).values()
        if isinstance(part, Tensor)
    }
    return sum(tensors.values())
