"""Statistics of a layer's features over data: estimate them, save them and load them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from captum.attr import Attribution
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin._captum import NoFuture
from captum_mipin.bottleneck.gaussian import Bottleneck, Noise
from captum_mipin.bottleneck.samples import Parts
from captum_mipin.calls import explained
from captum_mipin.errors import FitError, InputError, NotFittedError
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layers import tensor_name
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.modules import layer_or_tensor
from captum_mipin.graph.signature import Signature
from captum_mipin.graph.validate import as_model, check_model, device_of, finite, generator_kept
from captum_mipin.inverse.data import Batches, Unpack, check_independent
from captum_mipin.options import check_choice, check_number, type_of
from captum_mipin.propagation.final import require_logits
from captum_mipin.propagation.independent import Differentiated, capture_apart, check_graph
from captum_mipin.regression.statistics import Statistics
from captum_mipin.storage.saved import Saved
from captum_mipin.storage.watch import Watch
from captum_mipin.types import Extras, Inputs, Output

Settings = TypeVar("Settings")
_Self = TypeVar("_Self", bound="LayerFeatures[Any]")

#: Names of the options that a file stores under "options".
_OPTIONS = ("channels", "input_channels", "classes", "across", "min_std", "active")


@dataclass(frozen=True)
class EstimateReport:
    """Counts of a layer's features: all, with a small standard deviation, and inactive.

    Attributes:
        values: Number of values from which each mean and standard deviation is computed: one per
            example, or more with ``across``.
        features: Number of features that have a mean of their own.
        floored: Number of features whose standard deviation is below ``min_std``; ``min_std``
            replaces it.
        inactive: Number of features that are 0 in almost all examples. Masked tensors contain 0
            for them, and their information is 0 bits.

    Examples:
        >>> print(EstimateReport(1000, 512, 3, 2))
        512 features of 1000 values each: 3 with a standard deviation below the floor, 2 inactive
    """

    values: int
    features: int
    floored: int
    inactive: int

    def __str__(self) -> str:
        return (
            f"{self.features} features of {self.values} values each: {self.floored} with a "
            f"standard deviation below the floor, {self.inactive} inactive"
        )


@dataclass
class _State:
    """The result of an estimate.

    Attributes:
        statistics: Mean and standard deviation of each feature.
        structures: Signature of inputs in the data → text that describes the model's operations.
        watch: Detects changes of the model's weights.
    """

    statistics: Statistics
    structures: dict[Signature, str]
    watch: Watch


class LayerFeatures(Differentiated, Saved, NoFuture, Attribution, Generic[Settings]):
    """A layer and the statistics of its features; :class:`IBA` describes the arguments."""

    #: Name → settings; the first entry is the default.
    _named: ClassVar[Mapping[str, Any]]

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        settings: Settings | str | None = None,
        *,
        output: Output = None,
        channels: int = 1,
        input_channels: int | None = None,
        classes: int = 1,
        across: Sequence[int] = (),
        min_std: float = 0.01,
        active: float = 0.01,
    ) -> None:
        check_number("min_std", min_std, above=True)
        check_number("active", active)
        if active >= 1:
            raise InputError(f"active={active!r} must be at least 0 and below 1: change it")
        if 0 in (channels, input_channels, classes, *across):
            raise InputError(
                f"channels={channels}, input_channels={input_channels}, classes={classes} and "
                f"across={tuple(across)} contain 0, which is the batch dimension: pass other "
                "dimensions"
            )
        self.model = as_model(model)
        Attribution.__init__(self, model)
        self.layer = layer_or_tensor(layer, self.model)
        self.settings: Settings = self._resolved(settings)
        self.output, self.channels, self.classes = output, channels, classes
        self.across, self.min_std, self.active = tuple(across), min_std, active
        self.input_channels = 1 if input_channels is None and channels == 1 else input_channels
        self._graphs = Graphs[Parts]()
        self._state: _State | None = None

    @classmethod
    def _resolved(cls, settings: Any) -> Any:
        """Return the settings for a name, or the default for None; return settings unchanged."""
        default = next(iter(cls._named))
        if settings is None or isinstance(settings, str):
            check_choice("settings", settings or default, tuple(cls._named))
            return cls._named[settings or default]
        expected = type(cls._named[default])
        if not isinstance(settings, expected):
            raise InputError(
                f"settings is {type_of(settings)}, expected {expected.__name__}(...) or one of the "
                f"names {', '.join(map(repr, cls._named))}: pass one of these"
            )
        return settings

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return cls.__name__

    # ----------------------------------------------------------------------------- estimate

    @explained
    def estimate(
        self: _Self,
        data: Any,
        *,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> _Self:
        """Compute the mean and standard deviation of each feature over data, in float64.

        The data is read once. If an error is raised, earlier statistics stay. The publications use
        1,000 to 10,000 images of the training set.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader``
                of (images, labels), or any iterable of batches, as for :meth:`InverseNetwork.fit`.
            unpack: Function batch → (inputs, additional_forward_args), for batches of any other
                form.
            batch_size: Number of examples per batch, for data that is not in batches already.
            progress: True to show a progress bar.

        Returns:
            self

        Raises:
            FitError: The data is empty, has only one example or contains NaN or Inf, or the shape
                of the features differs between batches.
            CaptureError: The model cannot be captured, or has no such layer.
        """
        device = device_of(check_model(self.model))
        check_number("batch_size", batch_size, 1, whole=True)
        statistics: Statistics | None = None
        structures: dict[Signature, str] = {}
        bar = tqdm(unit="row", disable=not progress, desc="features")
        with generator_kept(), plain_modes(device), torch.no_grad(), bar:
            watch = Watch(self.model)
            batches = Batches(data, batch_size, unpack, device, explained=False)
            for index, (inputs, extras) in enumerate(batches):
                parts = self._parts(inputs, extras)
                self._check_graph(parts)
                shared = parts.captured.shared
                structures[Signature.of(inputs, extras, shared)] = parts.structure
                run = partial(self._outputs, parts)
                if index == 0:
                    check_independent(run(inputs, extras), inputs, extras, shared, run)
                (features,) = run(inputs, extras, above=False)
                statistics = self._added(statistics, features, index)
                bar.update(len(features))
        assert statistics is not None  # for mypy: Batches refuses data without any batch
        _ = statistics.std  # raises FitError if there is only one example
        self._state = _State(statistics, structures, watch)
        return self

    def _outputs(
        self, parts: Parts, inputs: Inputs, extras: Extras, above: bool = True
    ) -> list[Tensor]:
        """Return [features of a batch], or [features, model's output] if ``above`` is True."""
        part = parts(self._name(parts))
        features, others = part.below(parts.captured.values(self.model, inputs, extras))
        return [features, part.above(features, others)] if above else [features]

    def _added(self, before: Statistics | None, features: Tensor, index: int) -> Statistics:
        """Add one more batch to the statistics of earlier batches, and return the sum.

        Args:
            before: The statistics of the batches before; None for the first batch.
            features: (batch, ...) features of one more batch.
            index: Number of this batch, for errors.
        """
        if not finite(features):
            raise FitError(
                f"batch {index}: the layer's features contain NaN or Inf, expected finite values: "
                "remove the examples that cause it"
            )
        dims = range(1 - features.ndim, features.ndim)
        if not {*self.across, self.channels}.issubset(dims):
            raise InputError(
                f"the layer's output has shape {tuple(features.shape)}, so channels="
                f"{self.channels} and across={self.across} are not all dimensions of it: pass "
                f"numbers from 1 to {features.ndim - 1}, or negative ones"
            )
        chunk = Statistics.of(features, [dim % features.ndim for dim in self.across])
        if before is None:
            return chunk
        if before.mean.shape != chunk.mean.shape:
            raise FitError(
                f"batch {index}: the features have shape {tuple(features.shape[1:])}, but in "
                f"earlier batches they had shape {tuple(before.mean.shape)}: pass data of one "
                "size, or share statistics between positions with across="
            )
        return before.merged(chunk)

    @property
    def report(self) -> EstimateReport:
        """Return the number of features, and how many are nearly constant or inactive."""
        statistics, noise = self._estimated().statistics, self.noise
        low = statistics.std < self.min_std
        inactive = int((~noise.active).sum())
        return EstimateReport(statistics.count, low.numel(), int(low.sum()), inactive)

    @property
    def noise(self) -> Noise:
        """Return the noise that replaces masked features."""
        statistics = self._estimated().statistics
        active = statistics.nonzero > self.active * statistics.count
        return Noise(statistics.mean, statistics.std.clamp(min=self.min_std), active)

    def _estimated(self) -> _State:
        if self._state is None:
            raise NotFittedError(
                f"this {type(self).__name__} has no statistics yet: call estimate(data) first"
            )
        return self._state

    @property
    @abstractmethod
    def _layer_settings(self) -> Bottleneck:
        """Return the settings of the bottleneck at the layer."""

    # ----------------------------------------------------------------------------- the graph

    def _parts(self, inputs: Inputs, extras: Extras) -> Parts:
        """Return the graph for the shapes and dtypes of ``inputs``.

        It is captured if the cache has none.
        """
        known = next(iter(self._state.structures)) if self._state else None

        def make(inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
            return capture_apart(
                self.model, inputs, extras, shared, output=self.output, explained=False
            )

        def find() -> Signature:
            return self._graphs.find(inputs, extras, make, prepare=require_logits, fitted=known)

        def build(graph: CapturedGraph, _: Any) -> Parts:
            check_graph(graph, self.model, (inputs, extras), self.output)
            return Parts(graph)

        return self._graphs.build(lambda graph: graph.inputs, None, find, build)[1]

    def _check_graph(self, parts: Parts) -> None:
        """Raise CaptureError if a tensor that :meth:`attribute` needs is not in the graph."""

    def _name(self, parts: Parts) -> str:
        """Return the name of the layer's output in the graph."""
        return tensor_name(parts.captured, self.model, self.layer)

    # ----------------------------------------------------------------------------- files

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._estimated()
        statistics = state.statistics
        tensors = {name: getattr(statistics, name) for name in ("mean", "squares", "nonzero")}
        structures = [[signature.to_json(), made] for signature, made in state.structures.items()]
        content = {
            "method": type(self).__name__,
            "fingerprint": state.watch.fingerprint,
            "layer": self._where(self.layer),
            "settings": asdict(self._layer_settings),
            "output": self.output,
            "options": {name: getattr(self, name) for name in _OPTIONS},
            "count": statistics.count,
            "structures": structures,
        }
        return tensors, content

    @classmethod
    def _unpack(
        cls: type[_Self], tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> _Self:
        layer, own = cls._find(content["layer"], model), cls._own_arguments(content, model)
        method = cls(model, layer, output=content["output"], **content["options"], **own)
        moments = (tensors[name] for name in ("mean", "squares", "nonzero"))
        structures = {Signature.from_json(kind): made for kind, made in content["structures"]}
        watch = Watch(model, content["fingerprint"])
        method._state = _State(Statistics(content["count"], *moments), structures, watch)
        return method

    @classmethod
    def _own_arguments(cls, content: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Return the arguments from a file that only this class has, such as ``settings``."""
        return {"settings": Bottleneck(**content["settings"])}

    def _where(self, layer: nn.Module | str | None) -> dict[str, str] | None:
        """Return a layer's entry in a file: its module path, or the name of a tensor."""
        if layer is None:
            return None
        if isinstance(layer, str):
            return {"tensor": layer}
        paths = (path for path, module in self.model.named_modules() if module is layer)
        return {"module": next(paths)}

    @staticmethod
    def _find(where: dict[str, str], model: nn.Module) -> nn.Module | str:
        """Return the layer for its entry in a file, which :meth:`_where` made."""
        return where["tensor"] if "tensor" in where else model.get_submodule(where["module"])
