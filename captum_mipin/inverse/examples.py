"""The stored examples that neighbours are chosen from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from captum_mipin.errors import InputError, InverseFileError, MIPINError
from captum_mipin.graph.validate import finite

Metric = Literal["cosine", "euclidean"]


@dataclass
class Examples:
    """The stored activations of the data.

    Attributes:
        sources: Tensors (examples, ...), the features where backward passes stop.
        outputs: Tensors (examples, ...), the outputs of each learned step, by the step's key.
        features: Tensors (examples, ...) by which examples are compared; empty to compare them by
            ``sources``.
    """

    sources: list[Tensor]
    outputs: dict[str, list[Tensor]]
    features: list[Tensor]
    _statistics: dict[Metric, tuple[list[Tensor], Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.sources[0])

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of :meth:`layout`."""
        outputs = (output for outputs in self.outputs.values() for output in outputs)
        return [*self.sources, *self.features, *outputs]

    @property
    def example_bytes(self) -> int:
        """Number of bytes per example."""
        return sum(t[:1].nbytes for t in self.tensors)

    @property
    def layout(self) -> dict[str, Any]:
        """The number of tensors of each kind, as JSON data for a file."""
        return {
            "sources": len(self.sources),
            "features": len(self.features),
            "outputs": [(key, len(outputs)) for key, outputs in self.outputs.items()],
        }

    @classmethod
    def of(cls, layout: Mapping[str, Any], tensors: Sequence[Tensor]) -> "Examples":
        """Return the examples of a layout, from tensors in the order of :attr:`tensors`."""
        remaining = iter(tensors)

        def some(count: int) -> list[Tensor]:
            return [next(remaining) for _ in range(count)]

        sources, features = some(layout["sources"]), some(layout["features"])
        return cls(sources, {key: some(count) for key, count in layout["outputs"]}, features)

    @classmethod
    def load(cls, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Examples":
        """Return the examples that a file contains.

        Raises:
            InverseFileError: The number, shape or dtype of the tensors does not fit the layout.
        """
        count = layout["sources"] + layout["features"] + sum(n for _, n in layout["outputs"])
        if len(tensors) != count:
            raise InverseFileError(
                f"the file has {len(tensors)} tensors, expected {count}: save it again"
            )
        kept = cls.of(layout, [tensors[str(number)] for number in range(count)])
        for t in kept.tensors:
            if t.shape[:1] != (len(kept),) or not t.is_floating_point() or not finite(t):
                raise InverseFileError(
                    f"the file has a tensor of shape {tuple(t.shape)}, {t.dtype}, expected finite "
                    f"floating-point numbers of {len(kept)} examples: save it again"
                )
        return kept

    def map(self, change: Callable[..., Tensor], *others: "Examples") -> "Examples":
        """Return examples whose tensors are ``change(tensor, *the same tensor of others)``."""
        counterparts = zip(self.tensors, *(other.tensors for other in others), strict=True)
        return Examples.of(self.layout, [change(*tensors) for tensors in counterparts])

    def nearest(self, queries: Sequence[Tensor], count: int, metric: Metric) -> Tensor:
        """Return the stored examples that are most similar to each query.

        Args:
            queries: The tensors to compare, each (queries, features), in the order of the stored
                ``features``, or of ``sources`` if there are no ``features``.
            count: Number of examples per query.
            metric: "cosine" for the largest cosine, "euclidean" for the smallest distance.

        Returns:
            Integer tensor (queries, count), indices of examples.

        Raises:
            InputError: Squares of the features overflow.
        """
        features = self._compared
        if count == len(self):
            return torch.arange(count, device=features[0].device).expand(len(queries[0]), -1)
        if metric not in self._statistics:
            self._statistics[metric] = _statistics(features, metric)
        means, squares = self._statistics[metric]
        pairs = zip(queries, means, features, strict=True)
        # q·x for the cosine; for the euclidean distance (q − m)·x with the mean m of the examples:
        # without m, differences of large numbers would lose digits
        products = torch.stack([(q.to(x) - mean) @ x.mT for q, mean, x in pairs]).sum(0)
        if metric == "euclidean":
            # |q − x|² is smallest where 2 (q − m)·x − |x − m|² is largest, up to a constant of q
            scores = 2 * products - squares
        else:
            # cos(q, x) = q·x / (|q| |x|), 0 for x = 0; |q| does not change the order
            scores = products * squares.rsqrt().nan_to_num(posinf=0.0)
        return scores.topk(count, 1).indices

    @property
    def _compared(self) -> list[Tensor]:
        """The compared tensors (examples, features), with at least float32, to hold sums."""
        flat = [x.flatten(1) for x in self.features or self.sources]
        return [x.float() if x.element_size() < 4 else x for x in flat]


def _statistics(features: Sequence[Tensor], metric: Metric) -> tuple[list[Tensor], Tensor]:
    """Return the means m of the features (zeros for the cosine), and |x − m|² per example."""
    means = [x.mean(0) if metric == "euclidean" else torch.zeros_like(x[0]) for x in features]
    squares = [
        # 256 examples at a time: float64 copies of all of them would take too much memory
        torch.cat([(part - mean).double().square().sum(1) for part in x.split(256)])
        for x, mean in zip(features, means, strict=True)
    ]
    sums = torch.stack(squares).sum(0).to(features[0].dtype)
    if not finite(sums):
        raise InputError(
            f"the features that neighbours are compared by are too large for {sums.dtype}: "
            "their squares overflow, expected finite ones. Scale the features down"
        )
    return means, sums


@contextmanager
def belonging() -> Iterator[None]:
    """Raise InverseFileError for errors that stored examples of another model cause."""
    try:
        yield
    except (MIPINError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        raise InverseFileError(
            "the stored examples were computed with another model, expected this one: fit a new "
            f"NeighbourInverse. {type(error).__name__}: {error}"
        ) from error
