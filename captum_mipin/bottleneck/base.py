"""The base class of IBA and InputIBA, which explain samples with a bottleneck at a layer."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_mipin.bottleneck.features import LayerFeatures, Settings
from captum_mipin.bottleneck.gaussian import (
    Bottleneck,
    Noise,
    Optimised,
    joined,
    optimise,
)
from captum_mipin.bottleneck.maps import positions
from captum_mipin.bottleneck.samples import Samples
from captum_mipin.errors import InputError, ModelChangedError
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.signature import Signature, plain
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.validate import (
    as_extras,
    as_inputs,
    check_finite,
    check_inputs,
    check_model,
    device_of,
)
from captum_mipin.options import check_generator, check_number
from captum_mipin.targets import per_example
from captum_mipin.types import Inputs

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """The options of one optimisation.

    Attributes:
        seed: Seed of all random numbers.
        size: Number of samples that are optimised together. None: chosen from their size.
        progress: True to show progress bars.
    """

    seed: int
    size: int | None
    progress: bool

    @classmethod
    def of(cls, generator: torch.Generator | None, size: int | None, progress: bool) -> "Run":
        """Return the options; the seed is drawn from ``generator``, or is 0 if that is None."""
        check_generator(generator)
        if generator is None:
            return cls(0, size, progress)
        draw = torch.randint(2**62, (1,), generator=generator, device=generator.device)
        return cls(int(draw), size, progress)

    def bar(self, name: str, total: int) -> "tqdm[Any]":
        """Return the progress bar of one stage."""
        return tqdm(total=total, unit="step", disable=not self.progress, desc=name)


@dataclass(frozen=True)
class Place:
    """A tensor of the graph that is masked, and the settings of its mask.

    Attributes:
        name: Name of the tensor in the graph.
        noise: The noise that replaces masked elements.
        settings: The settings of the mask's optimisation.
        channels: The dimension of the tensor that holds the channels.
    """

    name: str
    noise: Noise
    settings: Bottleneck
    channels: int


class LayerBottleneck(LayerFeatures[Settings], Generic[Settings, Result]):
    """Base class of methods with a bottleneck at a layer; :class:`IBA` describes the arguments."""

    def explain(
        self,
        inputs: Tensor | Inputs,
        target: Any,
        extras: Any = (),
        *,
        generator: torch.Generator | None = None,
        internal_batch_size: int | None = None,
        progress: bool = False,
    ) -> Result:
        """Return the optimised bottlenecks: the bits of each element, the masks and the losses.

        Args:
            inputs: Tensor (batch, ...) or tuple of such tensors, the model's inputs.
            target: The output to explain, in any form that Captum takes.
            extras: Further arguments of the model: one object, or a tuple of several.
            generator: Generator that the seed of the noise is drawn from. None: the seed is 0.
            internal_batch_size: Number of samples that are optimised together. None: chosen from
                their size.
            progress: True to show progress bars.

        Raises:
            InputError, TargetError, NotFittedError, ModelChangedError, CaptureError: In the same
                cases as :meth:`attribute`.
        """
        with plain_modes(device_of(self.model)):
            samples = self._samples(inputs, target, extras, internal_batch_size)
            return self._explain(samples, Run.of(generator, internal_batch_size, progress))

    @abstractmethod
    def _explain(self, samples: Samples, run: Run) -> Result:
        """Return the optimised bottlenecks of these samples."""

    def _samples(self, inputs: Any, target: Any, extras: Any, size: int | None) -> Samples:
        """Return the samples to explain, after checks of inputs, target, ``size`` and model."""
        state, inputs, extras = self._estimated(), as_inputs(inputs), as_extras(extras)
        check_inputs(inputs, explained=False)
        if size is not None:
            check_number("internal_batch_size", size, 1, whole=True)
        check_finite(inputs)
        check_model(self.model)
        if state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the features were estimated: call "
                "estimate(data) again"
            )
        inputs, extras = plain((inputs, extras))
        parts = self._parts(inputs, extras)
        signature = Signature.of(inputs, extras, parts.captured.shared)
        if state.structures.get(signature, parts.structure) != parts.structure:
            raise ModelChangedError(
                "the operations that the model runs have changed since the features were "
                "estimated: call estimate(data) again"
            )
        dims = value_of(parts.captured.output).shape[1:]
        targets = per_example(target, torch.empty(len(inputs[0]), *dims, device="meta"))
        return Samples(self.model, parts, inputs, extras, targets)

    def _at_layer(self, samples: Samples, run: Run) -> Optimised:
        """Return the optimised bottlenecks at the layer."""
        name, noise = self._name(samples.parts), self.noise
        shape, known = samples.shape(name), noise.mean.shape
        if len(shape) != len(known) or any(
            n not in (1, m) for n, m in zip(known, shape, strict=True)
        ):
            raise InputError(
                f"for these inputs the layer's output has shape {shape}, but its statistics have "
                f"shape {tuple(known)}: resize the inputs, or share statistics between positions "
                "with across="
            )
        place = Place(name, noise, self._layer_settings, self.channels)
        return self._optimised("feature bottleneck", samples, place, run)

    def _optimised(
        self, title: str, samples: Samples, place: Place, run: Run, prior: Tensor | None = None
    ) -> Optimised:
        """Return the optimised bottlenecks at a tensor; groups of samples are optimised in turn.

        Args:
            title: Title of the progress bar.
            samples: The samples.
            place: The tensor that is masked.
            run: The options of the optimisation.
            prior: (batch, ...) mask of the information that is not counted; None to count all.
        """
        settings, found = place.settings, []
        with run.bar(title, len(samples.targets) * settings.steps) as bar, TURNS.explaining():
            for group in samples.groups(place.name, settings.copies, run.size):
                x, entropy = group.objective(place.name, settings.copies, self.classes)
                known = 0.0 if prior is None else prior[group.rows]
                over = positions(x, place.channels)
                found.append(
                    optimise(
                        x, place.noise, entropy, settings, positions=over, prior=known,
                        seed=run.seed, first=group.first, bar=bar,
                    )
                )  # fmt: skip
        return joined(found)
