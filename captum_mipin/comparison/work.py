"""The work of a comparison: groups of images, and for each group all methods and metrics.

Groups make what is done usable at any time: after an interruption, or when a budget of time is
used up, all methods have been measured on the same images.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from captum_mipin.comparison.methods import place_of
from captum_mipin.comparison.rows import Row
from captum_mipin.comparison.scores import Metric, by_image, selected, uses_maps
from captum_mipin.errors import InputError, MIPINError, NotFittedError
from captum_mipin.metrics import Result
from captum_mipin.metrics.case import Case, attribution_of
from captum_mipin.metrics.replacement import Ends
from captum_mipin.metrics.result import joined

#: Number of input elements in a group of images; a group has 4 to 32 images, with a budget 1 to 32.
_ELEMENTS, _LEAST = 1 << 17, 4


@dataclass
class Line:
    """What is known about one method or control while the work goes on.

    Attributes:
        name: Label of the method.
        method: The method, or the exception raised when it was made.
        control: True for a control.
        maps: Index of an image -> its map.
        missing: Reason -> indices of the images without a map.
        results: Name of a metric -> pairs (indices of images, result for these images).
        errors: Name of a metric -> text of its error.
        seconds: Time to compute the maps, in seconds.
        reached: Number of images for which the maps were asked; in the first group, metrics come
            later.
    """

    name: str
    method: Any
    control: bool
    maps: dict[int, Tensor] = field(default_factory=dict)
    missing: dict[str, list[int]] = field(default_factory=dict)
    results: dict[str, list[tuple[list[int], Result]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reached: int = 0

    def row(self, targets: Sequence[Any]) -> Row:
        """Return the row for the first images, whose targets are ``targets``."""
        count = len(targets)
        missing = {why: tuple(i for i in at if i < count) for why, at in self.missing.items()}
        missing = {why: at for why, at in missing.items() if at}
        known = [index for index in range(count) if index in self.maps]
        if not known:
            return Row(self.name, self.control, None, errors={"": next(iter(missing), "")})
        # images without a map get NaN
        blank = torch.full_like(self.maps[known[0]], torch.nan, dtype=self._dtype(known, count))
        maps = torch.stack([self.maps.get(index, blank) for index in range(count)])
        results = {}
        for title, pieces in self.results.items():
            inside = [piece for piece in pieces if max(piece[0]) < count]
            if inside:
                scored = {index for piece in inside for index in piece[0]}
                left = [index for index in range(count) if index not in scored]
                results[title] = self._named(joined(inside, targets, {"no map": left}))
        row = Row(self.name, self.control, maps, results, self.errors, self.seconds)
        return replace(row, missing=missing, place=place_of(self.method, self.name))

    def _dtype(self, known: Sequence[int], count: int) -> torch.dtype:
        """Return the dtype of the maps; NaN needs a floating-point one."""
        dtype = self.maps[known[0]].dtype
        return dtype if len(known) == count or dtype.is_floating_point else torch.float64

    def _named(self, result: Result) -> Result:
        return replace(result, settings={**result.settings, "method": self.name})


@dataclass(frozen=True)
class Work:
    """What is compared.

    Attributes:
        case: Case with the images and targets, without a method.
        lines: One line per method and control.
        metrics: Name -> metric.
        arguments: Keyword arguments; each metric gets those that it has as parameters.
        seed: Seed of the generator that each metric gets.
        ends: Address of a model and indices of images -> scores of these images that all methods
            share, with no and with all pixels replaced.
    """

    case: Case
    lines: Sequence[Line]
    metrics: Mapping[str, Metric]
    arguments: Mapping[str, Any]
    seed: int
    ends: defaultdict[Any, Ends] = field(default_factory=lambda: defaultdict(Ends))

    @property
    def units(self) -> int:
        """Number of units of progress: a metric, or a method without metrics, on one image."""
        return len(self.lines) * len(self.case.examples) * max(1, len(self.metrics))

    def groups(self, budget: float | None, bar: Any) -> Iterator[int]:
        """Do the work in steps, and yield the number of finished images after each step.

        In the first group, a step is the maps of a line or a metric of it; after it, a step is a
        group. Metrics that need all images at once come last, line by line.

        Args:
            budget: Seconds after which no more images are begun, or None.
            bar: Progress bar of `units`.
        """
        begun, longest, done = perf_counter(), 0.0, 0
        ends = [*range(0, len(self.case.examples), self._size(budget)), len(self.case.examples)]
        whole = {name: metric for name, metric in self.metrics.items() if not by_image(metric)}
        parts = {name: metric for name, metric in self.metrics.items() if name not in whole}
        for start, end in pairwise(ends):
            now = perf_counter()
            if budget is not None and start and now - begun + longest > budget:
                break
            group = list(range(start, end))
            for line in self.lines:
                bar.set_postfix_str(line.name)
                self._explain(line, group)
                line.reached = end
                bar.update(0 if self.metrics else len(group))
                if start == 0:
                    yield end
                for title, metric in parts.items():
                    bar.set_postfix_str(f"{line.name}, {title}")
                    self._score(line, title, metric, group)
                    bar.update(len(group))
                    if start == 0:
                        yield end
            longest, done = max(longest, perf_counter() - now), end
            if start:
                yield end
        for line in self.lines if whole else ():
            for title, metric in whole.items():
                bar.set_postfix_str(f"{line.name}, {title}")
                self._score(line, title, metric, range(done))
                bar.update(done)
            yield done

    def left(self, done: int) -> list[str]:
        """Return what is missing for the first ``done`` images: lines, and metrics of lines."""
        names = []
        for line in self.lines:
            known = {*line.results, *line.errors} if line.maps else self.metrics
            scores = [f"{title} of {line.name}" for title in self.metrics if title not in known]
            names += [line.name] if line.reached < done else scores
        return names

    def _size(self, budget: float | None) -> int:
        """Return the number of images in a group."""
        x = self.case.examples.x
        size = max(_LEAST if budget is None else 1, _ELEMENTS // max(1, prod(x.shape[1:])))
        return min(size, self.case.examples_per_call)

    def _explain(self, line: Line, group: Sequence[int]) -> None:
        """Add the maps of a group of images to a line, or the reason why there are none."""
        start = perf_counter()
        try:
            if isinstance(line.method, Exception):
                raise line.method
            line.maps |= zip(group, self._maps(line.method, group), strict=True)
        except NotFittedError as error:
            if len(group) == 1 or isinstance(line.method, Exception):
                line.missing.setdefault(said(error), []).extend(group)
            else:  # one class of the group was not fitted: the other images have maps
                for index in group:
                    self._explain(line, [index])
        except Exception as error:  # of any type: other methods must still be computed
            line.missing.setdefault(said(error), []).extend(group)
            if not line.maps:  # not only this group: the method is not tried again
                line.method = error
        line.seconds += perf_counter() - start

    def _maps(self, method: Any, group: Sequence[int]) -> Tensor:
        """Return the maps (images, ...) of a group of images. Raise InputError for several maps."""
        examples = self.case.examples.select(torch.tensor(group))
        maps = replace(self.case, method=_part(method, group), examples=examples).maps
        if len(maps) != 1:
            raise InputError(
                f"the method gave {len(maps)} tensors of maps, expected one: pass a method that "
                "returns one tensor"
            )
        return maps[0]

    def _score(self, line: Line, title: str, metric: Metric, group: Sequence[int]) -> None:
        """Add the result of a metric for a group of images to a line, or the metric's error."""
        known = [index for index in group if index in line.maps]
        try:
            if known:
                result = self._result(line, metric, known, group[0])
                line.results.setdefault(title, []).append((known, result))
        except Exception as error:  # of any type: other metrics must still be computed
            line.errors.setdefault(title, said(error))

    def _result(self, line: Line, metric: Metric, group: list[int], start: int) -> Result:
        """Return the result of a metric for a group of images that have maps.

        Args:
            line: The line of the method.
            metric: The metric.
            group: Indices of the images.
            start: Index of the first image of the group, also if this image has no map.
        """
        examples = self.case.examples.select(torch.tensor(group))
        # metrics that use only maps get the maps of the line, so that none are computed twice
        source = _part(line.method, group)
        if uses_maps(metric):
            source = torch.stack([line.maps[index] for index in group])
        # a new generator for each call, so that all methods get the same random numbers
        generator = torch.Generator().manual_seed(self.seed + start)
        arguments = {**self.arguments, "generator": generator}
        arguments["additional_forward_args"] = examples.extras or None
        boxes = arguments.get("boxes")
        if boxes is not None:
            is_tensor = isinstance(boxes, Tensor)
            arguments["boxes"] = boxes[group] if is_tensor else [boxes[index] for index in group]
        attribution = attribution_of(line.method)
        if attribution is not None:  # each method is measured on the network that it explains
            arguments["model"] = attribution.forward_func
        if by_image(metric):  # not if it has a model of its own
            arguments["ends"] = self.ends[id(arguments.get("model")), tuple(group)]
        return metric(source, examples.x, examples.target, **selected(metric, arguments))


def _part(method: Any, group: Sequence[int]) -> Any:
    """Return a method for a group of images. If the method is maps, return those of the group."""
    if isinstance(method, Tensor):
        return method[list(group)]
    if isinstance(method, tuple):
        return tuple(maps[list(group)] for maps in method)
    return method


def said(error: Exception) -> str:
    """Return the first line of an error; errors of other packages with their type."""
    prefix = "" if isinstance(error, MIPINError) else f"{type(error).__name__}: "
    return f"{prefix}{error}".splitlines()[0]
