"""Batches of which one can be replaced, or raise an error."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class Batches:
    """Batches of 16 that can be gone through again; ``odd`` may replace one, or raise.

    A fit takes the first batch (pass 0), then all of them for the outputs (pass 1), and again for
    each layer.
    """

    def __init__(
        self, x: Tensor, odd: Callable[[int, int, Tensor], Any] = lambda number, index, batch: batch
    ) -> None:
        self.batches, self.odd, self.passes = x.split(16), odd, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        number = self.passes - 1
        for index, batch in enumerate(self.batches):
            yield self.odd(number, index, batch)


def batch_at(
    number: int, index: int, odd: Callable[[Tensor], Any]
) -> Callable[[int, int, Tensor], Any]:
    """Return a function that replaces one batch of one pass, by ``odd`` of it."""
    return lambda n, i, batch: odd(batch) if (n, i) == (number, index) else batch


def interrupt(batch: Tensor) -> Any:
    raise KeyboardInterrupt
