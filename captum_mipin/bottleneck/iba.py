"""IBA: how many bits of a layer's features a prediction needs, and where they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from captum.attr import Attribution
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.bottleneck.gaussian import (
    Bottleneck,
    CrossEntropy,
    Noise,
    Optimised,
    optimise,
    whole,
)
from captum_mipin.bottleneck.parts import Parts
from captum_mipin.errors import (
    FitError,
    InputError,
    ModelChangedError,
    NotFittedError,
)
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import TURNS, CapturedGraph, capture
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.signature import Signature, pick, plain
from captum_mipin.graph.subgraph import Part, tensor_name
from captum_mipin.graph.validate import (
    as_extras,
    as_inputs,
    check_finite,
    check_inputs,
    check_model,
    device_of,
    finite,
    generator_kept,
    like,
)
from captum_mipin.inverse.data import Batches, Unpack, check_independent
from captum_mipin.regression.statistics import Statistics
from captum_mipin.storage.saved import Saved
from captum_mipin.storage.watch import Watch
from captum_mipin.targets import per_example
from captum_mipin.types import Extras, Inputs, Output, Target

#: Masked values that a CPU takes at a time, and that other devices do.
_CPU_VALUES, _VALUES = 1 << 21, 1 << 26

#: Named settings: as published, and a faster one whose agreement with it docs/bottlenecks.md tells.
IBA_SETTINGS = {"published": Bottleneck(), "fast": Bottleneck(copies=2)}


@dataclass(frozen=True)
class EstimateReport:
    """What the data says of a layer's features.

    Attributes:
        values: Of which each element's mean and standard deviation are; one an example, more with ``across``.
        features: Elements.
        floored: Elements whose standard deviation is below the floor, which stands in for it; constant ones among them.
        inactive: Elements that are hardly ever other than 0. They are left out: told nothing, 0 in the masked features.

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
            f"{self.features} features of {self.values} values each: {self.floored} with a standard deviation below the "
            f"floor, {self.inactive} inactive"
        )


@dataclass
class _State:
    """All that an estimate leaves behind.

    Attributes:
        structures: What the model computed, for each kind of inputs in the data.
    """

    statistics: Statistics
    structures: dict[Signature, str]
    watch: Watch


class IBA(Saved, NoFuture, Attribution):
    """Information-bottleneck attribution: the bits of a layer's features that a prediction needs (Schulz et al.).

    Noise with the mean and standard deviation of the features is put in their place, as much of it as the prediction
    bears: for each sample, cross entropy + β · mean information is minimised over a mask. What the masked features still
    tell of the real ones is counted in bits: an upper bound of their mutual information. Nothing of the model is touched.

    Args:
        model: A module in evaluation mode that returns logits, bare or behind ``nn.DataParallel`` or ``torch.compile``.
        layer: A module of the model with one output tensor, or the name of any tensor of the captured graph. The method is
            published for convolutional layers of medium depth: conv4_1 of VGG16, layer2 of ResNet50.
        settings: "published", "fast", or a :class:`~captum_mipin.Bottleneck`.
        output: Which of several outputs, as for :class:`~captum_mipin.InverseNetwork`.
        channels: The dimension of the layer's output that holds the channels; all others but the first are positions. 1 for
            images (batch, channels, height, width), -1 for sequences (batch, tokens, features).
        input_channels: That of the input, where it has one. By default 1 if ``channels`` is; else it has to be said.
        classes: The dimension of the model's output that holds the classes.
        across: Dimensions of the layer's output across which elements share mean and standard deviation, such as the
            tokens of a sequence; their sizes may then differ between calls.
        min_std: Floor of the standard deviations.
        active: Elements that are not zero in more than this share of the data take part.

    Raises:
        InputError: An option out of its range.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> x = torch.randn(50, 1, 8, 8)
        >>> iba = IBA(model, model[1]).estimate(x, progress=False)
        >>> bits, total = iba.attribute(x[:2], target=[0, 2], return_information=True)
        >>> bits.shape, torch.allclose(bits.sum((1, 2, 3)), total)
        (torch.Size([2, 1, 8, 8]), True)
    """

    _kind = "IBA"

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        settings: Bottleneck | Literal["published", "fast"] = "published",
        *,
        output: Output = None,
        channels: int = 1,
        input_channels: int | None = None,
        classes: int = 1,
        across: Sequence[int] = (),
        min_std: float = 0.01,
        active: float = 0.01,
    ) -> None:
        if isinstance(settings, str):
            if settings not in IBA_SETTINGS:
                raise InputError(
                    f"settings={settings!r} is not one of {', '.join(map(repr, IBA_SETTINGS))}"
                )
            settings = IBA_SETTINGS[settings]
        if not isinstance(settings, Bottleneck):
            raise InputError(
                f"settings are a {type(settings).__name__}, expected a Bottleneck or a name"
            )
        if not 0 < min_std < float("inf"):
            raise InputError(f"min_std={min_std!r} must be above 0")
        if not 0 <= active < 1:
            raise InputError(f"active={active!r} must be at least 0 and below 1")
        if 0 in (channels, input_channels, classes, *across):
            raise InputError(
                "channels, input_channels, classes and across name dimensions other than the first, the batch"
            )
        Attribution.__init__(self, model)
        self.model = unwrapped(model)
        self.layer = layer if isinstance(layer, str) else unwrapped(layer)
        self.settings = settings
        self.output, self.channels, self.classes, self.across = (
            output,
            channels,
            classes,
            tuple(across),
        )
        self.input_channels = 1 if input_channels is None and channels == 1 else input_channels
        self.min_std, self.active = min_std, active
        self._graphs = Graphs[Parts]()
        self._state: _State | None = None

    # ------------------------------------------------------------------------------------------------- estimate

    def estimate(
        self,
        data: Any,
        *,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> "IBA":
        """Gather mean and standard deviation of each feature over data, in one pass, in float64.

        If it fails, everything is as it was before. The publications take 1,000 to 10,000 images of the training set.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader`` of (images, labels),
                or any iterable of batches, as for :meth:`InverseNetwork.fit`.
            unpack: Batch → (inputs, additional_forward_args), where a batch is anything else.
            batch_size: For data that does not come in batches.
            progress: Show a progress bar.

        Returns:
            self

        Raises:
            FitError: The data cannot be used: empty, not finite, changing shape, one example only.
            CaptureError: The model cannot be captured, or has no such layer.
        """
        return self.gather(data, unpack, batch_size, progress)

    def gather(
        self,
        data: Any,
        unpack: Unpack | None,
        batch_size: int,
        progress: bool,
        look: Callable[[Parts], Any] = lambda parts: None,
    ) -> "IBA":
        """:meth:`estimate`, where ``look`` sees the graph of each batch first."""
        model = check_model(self.model)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} must be at least 1")
        gathered: Statistics | None = None
        structures: dict[Signature, str] = {}
        with (
            generator_kept(),
            calm(device_of(model)),
            torch.no_grad(),
            tqdm(unit="row", disable=not progress) as bar,
        ):
            bar.set_description("features")
            watch = Watch(model)
            for index, (inputs, extras) in enumerate(
                Batches(data, batch_size, unpack, device_of(model), explained=False)
            ):
                parts = self._parts(inputs, extras)
                look(parts)
                structures[Signature.of(inputs, extras, parts.captured.shared)] = parts.structure
                part = self.part(parts)
                features, others = part.below(parts.captured.values(model, inputs, extras))
                if not finite(features):
                    raise FitError(f"batch {index}: the features contain NaN or Inf")
                if index == 0:
                    both = features, part.above(features, others)
                    check_independent(
                        both,
                        inputs,
                        extras,
                        parts.captured.shared,
                        partial(self._once, parts, part),
                    )
                chunk = Statistics.of(features, self._across(features))
                if gathered is not None and gathered.mean.shape != chunk.mean.shape:
                    raise FitError(
                        f"batch {index} has features of shape {tuple(features.shape[1:])}, those before had "
                        f"{tuple(gathered.mean.shape)}: give data of one size, or share statistics with across="
                    )
                gathered = chunk if gathered is None else gathered.merged(chunk)
                bar.update(len(features))
            assert gathered is not None  # for mypy: Batches refuses data without any batch
            _ = gathered.std  # that of one example is refused
        self._state = _State(gathered, structures, watch)
        return self

    @property
    def report(self) -> EstimateReport:
        """How many features there are, and how many of them are constant or inactive."""
        statistics = self._estimated().statistics
        low, active = statistics.std < self.min_std, self._active(statistics)
        return EstimateReport(statistics.count, low.numel(), int(low.sum()), int((~active).sum()))

    @property
    def noise(self) -> Noise:
        """What stands in for masked features."""
        statistics = self._estimated().statistics
        return Noise(
            statistics.mean, statistics.std.clamp(min=self.min_std), self._active(statistics)
        )

    def _active(self, statistics: Statistics) -> Tensor:
        return statistics.nonzero > self.active * statistics.count

    def _across(self, features: Tensor) -> list[int]:
        if not all(-features.ndim < dim < features.ndim for dim in (*self.across, self.channels)):
            raise InputError(
                f"the layer's output has shape {tuple(features.shape)}: channels={self.channels} and across={self.across} do "
                "not name dimensions of it"
            )
        return [dim % features.ndim for dim in self.across]

    def _once(
        self, parts: Parts, part: Part, inputs: Inputs, extras: Extras
    ) -> tuple[Tensor, Tensor]:
        """The features and the output of a batch."""
        features, others = part.below(parts.captured.values(self.model, inputs, extras))
        return features, part.above(features, others)

    # ------------------------------------------------------------------------------------------------- attribute

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        at: Literal["input", "layer"] = "input",
        per_position: bool = False,
        generator: torch.Generator | None = None,
        internal_batch_size: int | None = None,
        return_information: bool = False,
        progress: bool = False,
    ) -> Any:
        """The bits of the layer's features that the target's cross entropy needs, position by position.

        Samples are optimised together, and each as if it were alone: all meet the same noise.

        Args:
            inputs: Tensor (batch, ...) or tuple of such.
            target: The class, as any Captum method takes it; may differ between examples. None for a model with one
                logit, where the sign of the logit is explained.
            additional_forward_args: Further arguments of the model.
            at: "input": bits of each position, summed over channels, interpolated to the positions of the input. Each
                channel of the input has an equal share, so that the map has the input's shape and sums to the total. For one
                input tensor with positions like the layer's. "layer": bits of each feature, shaped like the layer's output.
            per_position: Without channels: (batch, height, width), (batch, tokens).
            generator: Of the noise; one number is drawn from it. By default the noise is the same at each call.
            internal_batch_size: Samples optimised together; by default so many that memory stays bounded, and on a CPU small
                enough to be fast. Results do not go with it.
            return_information: Return also the total bits of each sample.
            progress: Show a progress bar.

        Returns:
            Bits, shaped as ``at`` and ``per_position`` say; with ``return_information`` a pair of them and (batch,).

        Raises:
            NotFittedError: Nothing was estimated yet.
            InputError: Not a tensor or tuple, empty, NaN; no map at the input; features of another shape than those estimated
                on; a loss that overflows.
            TargetError: Not a target of this model. Also an AssertionError; out of range also an IndexError.
            CaptureError: The model cannot run on inputs of this shape, dtype or device; it has no such layer.
            ModelChangedError: The model's weights changed since the estimate, or what it computes for inputs of a shape that
                was estimated on.
        """
        if at not in ("input", "layer"):
            raise InputError(f"at={at!r} is not one of 'input', 'layer'")
        tensors, extras = as_inputs(inputs), as_extras(additional_forward_args)
        with calm(device_of(self.model)):
            case = self.case(tensors, target, extras, internal_batch_size)
            if at == "input":  # where there is no such map, say so before all the work
                features = torch.empty(
                    len(tensors[0]), *case.shape(self.name(case.parts)), device="meta"
                )
                at_input(features, tensors, self.channels, self.input_channels)
            bits = self._optimised(case, generator, internal_batch_size, progress).information
        total = bits.flatten(1).sum(1)
        if at == "layer":
            maps = bits.sum(self.channels) if per_position else bits
            return (maps, total) if return_information else maps
        grid = at_input(bits, tensors, self.channels, self.input_channels)
        maps = spread(grid, tensors[0], self.input_channels or -1, per_position)
        return (like(inputs, (maps,)), total) if return_information else like(inputs, (maps,))

    def explain(
        self,
        inputs: Tensor | Inputs,
        target: Any,
        extras: Any = (),
        *,
        generator: torch.Generator | None = None,
        internal_batch_size: int | None = None,
        progress: bool = False,
    ) -> Optimised:
        """The optimised bottlenecks: bits of each feature, masks, and the losses of each step.

        Args:
            inputs, target, generator, internal_batch_size, progress: As for :meth:`attribute`.
            extras: Its ``additional_forward_args``.

        Raises:
            As :meth:`attribute`.
        """
        with calm(device_of(self.model)):
            case = self.case(as_inputs(inputs), target, as_extras(extras), internal_batch_size)
            return self._optimised(case, generator, internal_batch_size, progress)

    def _optimised(
        self, case: "Case", generator: torch.Generator | None, size: int | None, progress: bool
    ) -> Optimised:
        groups = case.groups(self.name(case.parts), self.settings.copies, size)
        with tqdm(
            total=len(case.targets) * self.settings.steps, unit="step", disable=not progress
        ) as bar:
            bar.set_description("feature bottleneck")
            chosen = seed(generator)
            return joined([self.restrict(group, chosen, bar) for group in groups])

    def case(self, inputs: Inputs, target: Any, extras: Extras, size: int | None) -> "Case":
        """The samples to explain, all of them."""
        state = self._estimated()
        check_inputs(inputs, explained=False)
        if size is not None and not (whole(size) and size >= 1):
            raise InputError(f"internal_batch_size={size!r} must be a whole number of at least 1")
        check_finite(inputs)
        check_model(self.model)
        if state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the features were estimated: call estimate again"
            )
        inputs, extras = plain((inputs, extras))
        parts = self._parts(inputs, extras)
        if (
            state.structures.get(
                Signature.of(inputs, extras, parts.captured.shared), parts.structure
            )
            != parts.structure
        ):
            raise ModelChangedError(
                "the model computes something else than when its features were estimated: estimate again"
            )
        dims = value_of(parts.captured.output).shape[1:]
        targets = per_example(target, torch.empty(len(inputs[0]), *dims, device="meta"))
        return Case(parts, inputs, extras, targets, 0)

    def restrict(self, case: "Case", chosen: int, bar: "tqdm[Any] | None" = None) -> Optimised:
        """The bottlenecks of one group."""
        x, above, entropy = self.bottleneck(case, self.part(case.parts), self.settings.copies)
        noise = self.noise
        shape = (
            torch.broadcast_shapes(x.shape[1:], noise.mean.shape) if self._fits(x, noise) else None
        )
        if shape != x.shape[1:]:
            raise InputError(
                f"the layer's output has shape {tuple(x.shape[1:])} for these inputs, the statistics are of "
                f"{tuple(noise.mean.shape)}: resize the inputs, or share statistics between positions with across="
            )
        with TURNS.explaining():
            return optimise(
                x, noise, lambda z: entropy(above(z)), self.settings, positions=positions(x, self.channels), seed=chosen,
                first=case.first, bar=bar,
            )  # fmt: skip

    def _fits(self, x: Tensor, noise: Noise) -> bool:
        return x.ndim - 1 == noise.mean.ndim and all(
            n in (1, m) for n, m in zip(noise.mean.shape, x.shape[1:], strict=True)
        )

    def bottleneck(
        self, case: "Case", part: Part, copies: int
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], CrossEntropy]:
        """A tensor, what the model makes of masked copies of it, and the cross entropy of that."""
        with torch.no_grad():
            x, others = part.below(case.values(self.model))
            logits = part.above(x, others)
            others = self.beside(case, part, copies, others)
        if not finite(logits):
            raise InputError(
                "the model's output overflows for these inputs: it contains NaN or Inf"
            )
        entropy = CrossEntropy(logits, case.targets, self.classes)
        return x, lambda z: part.above(z.flatten(0, 1), others), entropy

    def beside(self, case: "Case", part: Part, copies: int, others: Sequence[Any]) -> Sequence[Any]:
        """What goes round a tensor, for copies of it."""
        if not part.bypassed:
            return others
        index = torch.arange(len(case.targets), device=case.inputs[0].device).repeat(copies)
        with torch.no_grad():
            return part.below(case.pick(index).values(self.model))[1]

    def _parts(self, inputs: Inputs, extras: Extras) -> Parts:
        """The graph for inputs of this kind."""

        def find() -> Signature:
            known = next(iter(self._state.structures)) if self._state else None
            return self._graphs.find(inputs, extras, self._capture, fitted=known)

        return self._graphs.build(self.model, None, None, find, lambda graph, start: Parts(graph))[
            1
        ]

    def _capture(self, inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
        return capture(self.model, inputs, extras, shared, output=self.output, explained=False)

    def part(self, parts: Parts) -> Part:
        """The model from the layer on."""
        return parts(self.name(parts))

    def name(self, parts: Parts) -> str:
        """The layer's tensor."""
        return tensor_name(parts.captured, self.model, self.layer)

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return "IBA"

    # ------------------------------------------------------------------------------------------------- files

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._estimated()
        statistics = state.statistics
        tensors = {
            "mean": statistics.mean,
            "squares": statistics.squares,
            "nonzero": statistics.nonzero,
        }
        content = {
            "method": "IBA",
            "fingerprint": state.watch.fingerprint,
            "layer": self.where(self.layer),
            "settings": asdict(self.settings),
            "output": self.output,
            "options": {
                "channels": self.channels,
                "input_channels": self.input_channels,
                "classes": self.classes,
                "across": self.across,
                "min_std": self.min_std,
                "active": self.active,
            },
            "count": statistics.count,
            "structures": [
                [signature.to_json(), found] for signature, found in state.structures.items()
            ],
        }
        return tensors, content

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "IBA":
        layer, settings = cls.found(content["layer"], model), Bottleneck(**content["settings"])
        iba = cls(model, layer, settings, output=content["output"], **content["options"])
        moments = (tensors[key] for key in ("mean", "squares", "nonzero"))
        structures = {
            Signature.from_json(signature): found for signature, found in content["structures"]
        }
        watch = Watch(model, content["fingerprint"])
        iba._state = _State(Statistics(content["count"], *moments), structures, watch)
        return iba

    def where(self, layer: nn.Module | str) -> dict[str, str]:
        """A layer, as files name it."""
        if isinstance(layer, str):
            return {"tensor": layer}
        return {
            "module": next(path for path, module in self.model.named_modules() if module is layer)
        }

    @staticmethod
    def found(where: dict[str, str], model: nn.Module) -> nn.Module | str:
        """The inverse of :meth:`where`."""
        return where["tensor"] if "tensor" in where else model.get_submodule(where["module"])

    def _estimated(self) -> _State:
        if self._state is None:
            raise NotFittedError(
                f"this {type(self).__name__} has no statistics yet: call estimate(data) first"
            )
        return self._state


@dataclass(frozen=True)
class Case:
    """Samples that are optimised together.

    Attributes:
        parts: The model's graph for them.
        inputs, extras: What the model takes.
        targets: One class a sample.
        first: The number of the first of them.
    """

    parts: Parts
    inputs: Inputs
    extras: Extras
    targets: list[Target]
    first: int

    @property
    def rows(self) -> slice:
        """Which of all samples these are."""
        return slice(self.first, self.first + len(self.targets))

    def shape(self, name: str) -> list[int]:
        """That of a tensor of the graph, without the batch."""
        (value,) = (value_of(node) for node in self.parts.captured.graph.nodes if node.name == name)
        return list(map(int, value.shape[1:]))

    def groups(self, name: str, copies: int, size: int | None) -> list["Case"]:
        """The samples in groups to be optimised together.

        Args:
            name: The tensor that is masked.
            copies: How many masked copies of each sample there are.
            size: Samples in a group; by default so many that memory is bounded, and on a CPU few enough to be fast.
        """
        index = torch.arange(len(self.targets), device=self.inputs[0].device)
        if size is None:
            most = _CPU_VALUES if index.device.type == "cpu" else _VALUES
            size = max(1, most // (copies * prod(self.shape(name))))
        return [self.pick(some) for some in index.split(size)] if len(index) > size else [self]

    def values(self, model: nn.Module) -> dict[str, Any]:
        """The value of every placeholder of the graph."""
        return self.parts.captured.values(model, self.inputs, self.extras)

    def pick(self, index: Tensor) -> "Case":
        """Some of the samples, or the same ones repeatedly."""
        inputs, extras = pick(self.inputs, self.extras, index, self.parts.captured.shared)
        targets = [self.targets[i] for i in index.tolist()]
        return Case(self.parts, inputs, extras, targets, self.first + int(index[0]))


def positions(x: Tensor, channels: int) -> list[int]:
    """The dimensions of a tensor other than batch and channels."""
    return [dim for dim in range(1, x.ndim) if dim != channels % x.ndim]


def at_input(bits: Tensor, inputs: Inputs, channels: int, input_channels: int | None) -> Tensor:
    """Bits of features (batch, ...) as bits of the input's positions, with the same total.

    Interpolated linearly and scaled. The published scale is h·w of the layer over that of the input, which keeps the total
    where one size divides the other; this one keeps it always.

    Raises:
        InputError: The positions of the layer are not like those of the input.
    """
    x = inputs[0]
    grid = bits.sum(channels)
    count = grid.ndim - 1
    if len(inputs) != 1 or not 1 <= count <= 3 or x.ndim - count not in (1, 2):
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in inputs)
        raise InputError(
            f"the layer's output of shape {tuple(bits.shape[1:])}, channels along dimension {channels}, has no positions like "
            f"those of inputs of shape {shapes}: ask with at='layer', or say where the channels are with channels="
        )
    bare = x.ndim - count == 1
    if not bare and input_channels is None:
        raise InputError(
            f"which dimension of inputs of shape {tuple(x.shape)} holds their channels? Say it with input_channels="
        )
    shape = (
        list(x.shape[1:]) if bare else [x.shape[dim] for dim in positions(x, input_channels or -1)]
    )
    if shape == list(grid.shape[1:]):
        return grid
    mode = ("linear", "bilinear", "trilinear")[count - 1]
    fine = F.interpolate(grid.unsqueeze(1), size=shape, mode=mode, align_corners=False).squeeze(1)
    total, now = grid.flatten(1).sum(1), fine.flatten(1).sum(1)
    scale = torch.where(now > 0, total / now.clamp(min=torch.finfo(now.dtype).tiny), 0)
    return fine * scale.view(-1, *(1,) * count)


def spread(maps: Tensor, x: Tensor, channels: int, per_position: bool) -> Tensor:
    """A map of positions in the shape of an input, whose channels share it evenly."""
    kind = x.dtype if x.is_floating_point() else maps.dtype
    if per_position or x.ndim == maps.ndim:
        return maps.to(kind).contiguous()
    shares = maps.unsqueeze(channels % x.ndim) / x.shape[channels]
    return shares.expand(x.shape).to(kind).contiguous()


def joined(groups: Sequence[Optimised]) -> Optimised:
    """Several groups of samples as one."""
    if len(groups) == 1:
        return groups[0]
    return Optimised(
        torch.cat([group.information for group in groups]),
        torch.cat([group.alpha for group in groups]),
        torch.cat([group.losses for group in groups], 1),
        torch.cat([group.cross_entropy for group in groups], 1),
    )


def seed(generator: torch.Generator | None) -> int:
    """A seed for the noise, drawn from a generator."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


@contextmanager
def calm(device: torch.device) -> Iterator[None]:
    """Gradients can be taken, and nothing is cast, whatever the modes around."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield
