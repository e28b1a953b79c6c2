"""Classes that are fitted when they are first explained, and dropped to save memory."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NoReturn

from torch import Tensor

from captum_mipin.errors import NotFittedError
from captum_mipin.graph.turns import TURNS
from captum_mipin.inverse.fit import Fit
from captum_mipin.inverse.request import Fitted
from captum_mipin.rules import Inverse
from captum_mipin.types import Inputs, Target


class Lazy:
    """The classes of a fit that has stored the activations of its data.

    Only one thread fits at a time, so that no class is fitted twice. Classes that are fitted
    already are returned without waiting.

    Args:
        fit: A fit that has finished its first pass over the data.
        memory: Bytes for fitted classes. If they need more, the least recently explained ones are
            dropped, but none of the current call.
        marks: Version marks of the model's weights during the first pass.
    """

    def __init__(self, fit: Fit, memory: int, marks: list[Any]) -> None:
        self._fit, self._memory, self._marks = fit, memory, marks
        self._ready: OrderedDict[Target, Fitted] = OrderedDict()
        self._fitting, self._access = Lock(), Lock()

    @property
    def ready(self) -> list[Fitted]:
        """The classes that are fitted now, the least recently explained first."""
        with self._access:
            return list(self._ready.values())

    def get(
        self, targets: Sequence[Target], marks: Callable[[], list[Any]]
    ) -> dict[Target, dict[str, Inverse]]:
        """Return the inverses of classes, after fitting the classes that are not fitted yet.

        Args:
            targets: The classes.
            marks: Function that checks that the weights are unchanged, and returns their version
                marks.
        """
        classes: dict[Target, Fitted] = {}
        for target in targets:
            fitted = self._known(target)
            if fitted is None:
                with self._fitting:  # while waiting here, another thread may have fitted the class
                    fitted = self._known(target) or self._fit_class(target, marks())
            classes[target] = fitted
        with self._access:
            while len(self._ready) > len(classes) and _bytes(self._ready) > self._memory:
                self._ready.popitem(last=False)
        return {target: fitted.inverses[target] for target, fitted in classes.items()}

    def information(self, target: Target, marks: list[Any]) -> Inputs:
        """Return the bits that each feature shares with the output of a class."""
        with self._fitting, TURNS.explaining():
            self._renew(marks)
            return self._fit.information(target)

    def _known(self, target: Target) -> Fitted | None:
        with self._access:
            if target in self._ready:
                self._ready.move_to_end(target)
            return self._ready.get(target)

    def _fit_class(self, target: Target, marks: list[Any]) -> Fitted:
        with TURNS.explaining():
            self._renew(marks)
            fitted = self._fit.later(target)
        with self._access:
            self._ready[target] = fitted
        return fitted

    def _renew(self, marks: list[Any]) -> None:
        """Drop computed values if the weights were moved, or changed and changed back."""
        if self._marks != marks:
            self._fit.restart()
        self._marks = marks

    def __reduce__(self) -> NoReturn:
        raise NotFittedError(
            "classes of fit(..., lazy=True) cannot be copied or pickled, because they are fitted "
            "only when they are explained: fit the classes that are needed without lazy=True"
        )


def _bytes(ready: OrderedDict[Target, Fitted]) -> int:
    """Return the number of bytes of fitted classes; tensors that they share count once."""
    tensors = {
        id(part): part.nbytes
        for fitted in ready.values()
        for inverses in fitted.inverses.values()
        for inverse in inverses.values()
        for part in vars(inverse).values()
        if isinstance(part, Tensor)
    }
    return sum(tensors.values())
