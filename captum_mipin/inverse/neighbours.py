"""Neighbourhood fits: the inverse for an example is fitted on the data most similar to it.

Section 4.2 of the paper calls this the intuitive way to make an inverse local, but rejects it
because each example would need its own training. Here regressions are solved in closed form: on k
neighbours they are small, and :mod:`captum_mipin.inverse.replay` avoids running the network again.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin.calls import explained, unknown_argument
from captum_mipin.errors import (
    FitError,
    InputError,
    NotFittedError,
)
from captum_mipin.graph.layers import module_output
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.modules import module_of
from captum_mipin.graph.signature import Signature, shapes
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.validate import check_model, device_of, finite, generator_kept
from captum_mipin.inverse.base import Groups, ModelInverse
from captum_mipin.inverse.data import Batches, Unpack, check_independent
from captum_mipin.inverse.examples import Examples, Metric, belonging
from captum_mipin.inverse.explain import Explanation, Request
from captum_mipin.inverse.replay import Replay
from captum_mipin.inverse.state import Origin
from captum_mipin.options import check_choice, check_number
from captum_mipin.propagation.runtime import Inverses, Run
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.rules import Options
from captum_mipin.storage.watch import Watch
from captum_mipin.targets import per_example, target_indices
from captum_mipin.types import Extras, Inputs, Target

#: Maximum bytes of the inverses of examples explained at once; a single example may take more.
_TOGETHER = 1 << 29
#: Options of :meth:`InverseNetwork.fit` that a neighbourhood fit cannot have.
_ONLY_THERE = ("checkpoint", "distributed", "lazy", "keep", "cache")


@dataclass(frozen=True)
class NeighbourState:
    """The result of :meth:`NeighbourInverse.fit`.

    Attributes:
        origin: The model and the kind of inputs of the fit.
        targets: The classes that can be explained.
        kept: The stored activations of the data.
    """

    origin: Origin
    targets: list[Target]
    kept: Examples


class NeighbourInverse(ModelInverse[NeighbourState]):
    """MIP-IN by neighbourhood fits: one inverse per example, fitted on the most similar data.

    Use it like an :class:`InverseNetwork` in ``MIPINAttribution`` and ``LayerMIPINAttribution``.
    :meth:`fit` only stores activations of the data; each explanation fits its inverses from them.
    The part of the model after ``layer`` should be small, such as dense layers. If all data are
    neighbours, the result equals that of :class:`InverseNetwork`. An example that is part of the
    data is one of its own neighbours.

    Args:
        model: The model, as for :class:`InverseNetwork`.
        neighbours: Number of examples that each inverse is fitted on, at least 2. Also an
            attribute, which may be changed at any time.
        metric: "cosine" to choose the neighbours of largest cosine, "euclidean" for those of
            smallest distance. The choice among equally similar ones is not defined. Also an
            attribute, which may be changed at any time.
        feature: The module, or its name, whose outputs are compared, or "input" to compare the
            inputs. None for ``layer``, or for the inputs if ``layer`` is None.
        options: ``layer``, ``output``, ``ridge``, ``ridge_scale``, ``pooling``, ``forks`` and
            ``precision``, as for :class:`InverseNetwork`.

    Raises:
        InputError: An option has a value that is not allowed.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> x = torch.randn(200, 6)
        >>> inverse = NeighbourInverse(model, neighbours=30).fit(x, progress=False)
        >>> inverse.source_signal(x[:5], target=[0, 1, 2, 0, 1]).shape
        torch.Size([5, 6])
    """

    _kind = "a neighbourhood inverse"

    def __init__(
        self,
        model: nn.Module,
        *,
        neighbours: int = 60,
        metric: Metric = "cosine",
        feature: nn.Module | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        _check_search(neighbours, metric)
        self.neighbours, self.metric = operator.index(neighbours), metric
        self.feature: nn.Module | str | None = feature
        if feature is not None and feature != "input":
            self.feature = module_of(feature, self.model)
        self._replays = WeakKeyDictionary[Surrogate, Replay]()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_replays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._replays = WeakKeyDictionary()

    def to(self, device: torch.device | str) -> "NeighbourInverse":
        """Move the stored examples to a device and return self.

        Without this, each call copies the neighbours to the device of the model.
        """
        state = self._fitted()
        self._state = replace(state, kept=state.kept.map(lambda t: t.to(device)))
        return self

    @explained
    def fit(
        self,
        data: Any,
        targets: Any = None,
        *,
        memory: int = 4 << 30,
        progress: bool = True,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        **unsupported: Any,
    ) -> "NeighbourInverse":
        """Run the model on the data once and store activations; earlier data is dropped.

        Args:
            data, unpack, batch_size: As for :meth:`InverseNetwork.fit`.
            targets: One class or several that may be explained, in the form of Captum's
                ``target``; None for all outputs.
            memory: Maximum bytes of the stored activations.
            progress: True to show a progress bar.
            unsupported: Other options of :meth:`InverseNetwork.fit`, which raise InputError.

        Raises:
            FitError: The data is empty, has fewer examples than ``neighbours``, contains NaN or
                Inf, changes its shape, or needs more than ``memory``.
            CaptureError: The model cannot be captured, uses an operation without a rule, or uses
                inputs in operations after ``layer`` that bypass ``layer``.
            InputError: An option is not supported.
            TargetError, ModelChangedError, RuleError: As for :meth:`InverseNetwork.fit`.
        """
        for name in unsupported:
            if name not in _ONLY_THERE:
                names = ["data", "targets", "memory", "progress", "unpack", "batch_size"]
                raise unknown_argument("NeighbourInverse.fit", name, names)
        if unsupported:
            raise InputError(
                f"a neighbourhood fit has no option {', '.join(unsupported)}: it makes one pass "
                "over the data in one process, and stores activations in memory. Leave this option "
                "out"
            )
        check_number("batch_size", batch_size, 1, whole=True)
        model = check_model(self.model)
        if self._state is not None:
            self._check_weights(self._state)
        with generator_kept(), plain_modes(device_of(model)):
            batches = Batches(
                data, batch_size, unpack, device_of(model), explained=self.layer is None
            )
            call = next(iter(batches))
            surrogate = self._surrogate(*call, self.layer)
            self._replay(surrogate)  # raises CaptureError now if an operation bypasses the layer
            origin = Origin.of(surrogate.captured, *call, Watch(model))
            chosen = target_indices(targets, origin.dims)
            bar = tqdm(batches, unit="batch", disable=not progress)
            kept = self._keep(bar, surrogate, origin.signature, memory)
        origin = replace(origin, scale=batches.scale.moments())
        self._state = NeighbourState(origin, chosen, kept)
        return self

    def _keep(
        self, batches: "tqdm[Any]", surrogate: Surrogate, signature: Signature, memory: int
    ) -> Examples:
        """Return the stored activations of the data, from one pass over the batches."""
        parts: list[Examples] = []
        rows, shared = 0, surrogate.captured.shared

        def run(inputs: Inputs, extras: Extras, proving: bool = False) -> tuple[Tensor, Examples]:
            return self._run(surrogate, (inputs, extras), proving)

        for index, (inputs, extras) in enumerate(batches):
            actual = Signature.of(inputs, extras, shared)
            if actual != signature:
                raise FitError(
                    f"batch {index} has further arguments {shapes(actual)}, expected "
                    f"{shapes(signature)} as in the first batch: pass the same kinds in all batches"
                )
            output, part = run(inputs, extras, proving=index == 0)
            if not all(finite(t) for t in (output, *part.tensors)):
                raise FitError(
                    f"batch {index}: the model's output or activations contain NaN or Inf, "
                    "expected finite numbers: scale the inputs as in training"
                )
            if index == 0:
                check_independent((output,), inputs, extras, shared, lambda *call: run(*call)[:1])
            parts.append(part)
            rows += len(part)
            if (needed := rows * part.example_bytes) > memory:
                raise FitError(
                    f"the stored activations of {rows} examples take {needed / 2**30:.2g} GiB, "
                    f"more than memory={memory}: choose a layer= closer to the output, pass fewer "
                    "examples, or raise memory="
                )
        if rows < self.neighbours:
            raise FitError(
                f"the data has {rows} examples, fewer than neighbours={self.neighbours}: pass more "
                "data, or lower neighbours="
            )
        return parts[0].map(lambda *batches: torch.cat(batches), *parts[1:])

    def _run(
        self, surrogate: Surrogate, call: tuple[Inputs, Extras], proving: bool
    ) -> tuple[Tensor, Examples]:
        """Return the model's output for a batch, and the activations to store.

        Args:
            surrogate: The surrogate of the model.
            call: Inputs and further arguments.
            proving: True to check that the results of rules agree with those of their operations.
        """
        steps, values = surrogate.steps, surrogate.captured.values(self.model, *call)
        options = Options(shares=self.settings.shares)
        run = Run(steps, options, fitting=surrogate.learned, proving=proving)
        with TURNS.explaining():
            output = surrogate(run, values).detach()
        features = []
        if self.feature is not None:
            features = self._replay(surrogate).features(values)
        layouts = enumerate(surrogate.layouts)
        sources = [layout.first(run.sources[index]) for index, layout in layouts]
        outputs = {
            key: [steps[key].layout.first(y.detach()) for y in run.seen[key].outputs]
            for key in surrogate.learned
        }
        return output, Examples(sources, outputs, features)

    def class_attribution(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Raise NotFittedError: inverses belong to single examples, so a class has no map."""
        raise NotFittedError(
            "a NeighbourInverse has one inverse per example, and none for a whole class: fit an "
            "InverseNetwork, whose inverse is the same for all examples of a class"
        )

    information = class_attribution

    def _back(self, state: NeighbourState, request: Request) -> Explanation:
        """Run the passes of a request, for as many examples at once as ``_TOGETHER`` allows."""
        kept = state.kept
        _check_search(self.neighbours, self.metric)
        if self.neighbours > len(kept):
            raise InputError(
                f"neighbours={self.neighbours} are more than the {len(kept)} examples of the fit: "
                "lower neighbours=, or fit on more data"
            )
        count = len(request.inputs[0])
        most = max(1, _TOGETHER // (self.neighbours * kept.example_bytes))
        if count <= most:
            return super()._back(state, request)
        targets = per_example(request.target, torch.empty(count, *state.origin.dims, device="meta"))
        request = replace(request, target=targets)
        shared = "per example" not in state.origin.signature.kinds()[len(request.inputs) :]
        groups = torch.arange(count, device=request.inputs[0].device).split(most)
        return Explanation.join(
            [super(NeighbourInverse, self)._back(state, request.pick(g, shared)) for g in groups]
        )

    def _inverses(
        self, state: NeighbourState, request: Request, surrogate: Surrogate, features: Inputs
    ) -> tuple[Mapping[Target, Inverses], Groups]:
        """Return one inverse per example, with the key (index of the example,), not a class."""
        kept, origin, call = state.kept, state.origin, (request.inputs, request.extras)
        self._check_reaches(surrogate, kept.outputs, request.layer)
        captured = surrogate.captured
        signature = Signature.of(*call, captured.shared)
        if signature != origin.signature:
            raise InputError(
                f"the inputs are {shapes(signature)}, expected {shapes(origin.signature)} as in "
                "the data that the inverse was fitted on: resize or convert the inputs"
            )
        fitted = self._surrogate(*call, self.layer)
        values, replay = captured.values(self.model, *call), self._replay(fitted)
        if surrogate is fitted and self.feature is None:
            queries = [x.detach().flatten(1) for x in features]
        else:
            queries = replay.features(values)
        with belonging():
            queries = [x.to(kept.sources[0].device) for x in queries]
            nearest = kept.nearest(queries, self.neighbours, self.metric)
            device = features[0].device
            pairs = enumerate(zip(nearest, request.target, strict=True))
            inverses: dict[Target, Inverses] = {
                (number,): replay.inverses(
                    kept.map(lambda t, rows=rows: t[rows].to(device)),
                    target,
                    values,
                    surrogate.learned,
                    self.settings,
                )
                for number, (rows, target) in pairs
            }
        return inverses, [(number, slice(number[0], number[0] + 1)) for number in inverses]

    def _replay(self, surrogate: Surrogate) -> Replay:
        """Return the :class:`Replay` of a surrogate, which the first call builds."""
        if surrogate not in self._replays:
            module = self.layer if self.feature is None else self.feature
            feature = None
            if isinstance(module, nn.Module):
                feature = module_output(surrogate.captured, self.model, module)
            self._replays[surrogate] = Replay(surrogate, feature)
        return self._replays[surrogate]

    @classmethod
    def _accepts(cls, content: dict[str, Any]) -> bool:
        return "neighbours" in content

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._fitted()
        path = self._path(self.feature) if isinstance(self.feature, nn.Module) else self.feature
        search = {
            "count": self.neighbours,
            "metric": self.metric,
            "feature": path,
            "module": isinstance(self.feature, nn.Module),
            **state.kept.layout,
        }
        content = {**self._head(state.origin), "targets": state.targets, "neighbours": search}
        return {str(number): t for number, t in enumerate(state.kept.tensors)}, content

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "NeighbourInverse":
        search = content["neighbours"]
        feature = search["feature"]
        inverse = cls._rebuild(
            content,
            model,
            neighbours=search["count"],
            metric=search["metric"],
            feature=model.get_submodule(feature) if search["module"] else feature,
        )
        targets = [tuple(target) for target in content["targets"]]
        kept = Examples.load(search, tensors)
        inverse._state = NeighbourState(Origin.from_content(content, model), targets, kept)
        return inverse


def _check_search(neighbours: Any, metric: Any) -> None:
    """Raise InputError unless the number of neighbours and the metric are valid."""
    # a regression needs variance, so at least two examples
    check_number("neighbours", neighbours, 2, whole=True)
    check_choice("metric", metric, ("cosine", "euclidean"))
