"""InputIBA: the bits of the input itself that a prediction needs, with what a layer needs as prior knowledge."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from captum.attr import Attribution
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.bottleneck.gaussian import (
    Bottleneck,
    Noise,
    Optimised,
    mask,
    normal,
    optimise,
    settled,
    whole,
)
from captum_mipin.bottleneck.iba import (
    IBA,
    Case,
    EstimateReport,
    at_input,
    calm,
    joined,
    positions,
    seed,
)
from captum_mipin.bottleneck.parts import Parts
from captum_mipin.errors import CaptureError, InputError
from captum_mipin.graph.capture import TURNS
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.subgraph import tensor_name
from captum_mipin.graph.validate import as_extras, as_inputs, check_model, device_of, like
from captum_mipin.inverse.data import Unpack
from captum_mipin.storage.saved import Saved
from captum_mipin.types import Inputs, Output


@dataclass(frozen=True)
class Adversary:
    """How the prior is found: a mask of the input whose features a critic cannot tell from the bottleneck's.

    Attributes:
        samples, groups: Features behind the bottleneck, ``samples`` in all; each group has noise of its own mean,
            uniform in (−2, 2), and standard deviation, uniform in (0, 5).
        epochs, batch: Passes over them, and how many at a time.
        critic_rate, clip: Of the critic (RMSprop); its weights are clipped to ± ``clip``.
        critic_steps: One step of the generator after so many of the critic, the first at once in each epoch.
        mask_rate, mean_rate, std_rate: Of the generator: the mask, and the mean and standard deviation of the noise.
        noise: Whether these are one a "channel" or one a "position".
        bottleneck: What weighs the features: the "capacity" in nats, as in the released code, or the mask λ ("passed").
        width: Size of the critic, 1 as published.
        tolerance: Stop once the mean loss of three epochs is within this share of that of the three before; None for never.

    Raises:
        InputError: A value out of its range.
    """

    samples: int = 200
    groups: int = 10
    epochs: int = 20
    batch: int = 32
    critic_rate: float = 5e-5
    clip: float = 0.01
    critic_steps: int = 5
    mask_rate: float = 0.003
    mean_rate: float = 0.1
    std_rate: float = 0.05
    noise: Literal["channel", "position"] = "channel"
    bottleneck: Literal["capacity", "passed"] = "capacity"
    width: float = 1.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        above = ("critic_rate", "clip", "mask_rate", "mean_rate", "std_rate", "width", "tolerance")
        for name, least in (
            ("samples", 1),
            ("groups", 1),
            ("epochs", 0),
            ("batch", 2),
            ("critic_steps", 1),
        ):
            value = getattr(self, name)
            if not whole(value) or value < least:
                raise InputError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in above:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value!r} must be above 0")
        for name, known in (
            ("noise", ("channel", "position")),
            ("bottleneck", ("capacity", "passed")),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, known))}"
                )
        if self.samples % self.groups:
            raise InputError(f"samples={self.samples} must be a multiple of groups={self.groups}")
        if self.samples % self.batch == 1:
            raise InputError(
                f"samples={self.samples} leave a batch={self.batch} of one, over which the critic cannot normalise"
            )


@dataclass(frozen=True)
class ThreeStages:
    """The settings of InputIBA; the defaults are the published ones for images.

    Attributes:
        feature: The bottleneck at the layer.
        prior: The generative adversarial prior.
        input: The bottleneck at the input.
    """

    feature: Bottleneck = field(default_factory=lambda: Bottleneck(beta=20, sigma=0))
    prior: Adversary = field(default_factory=Adversary)
    input: Bottleneck = field(default_factory=lambda: Bottleneck(beta=20, steps=60))


#: Named settings: as released for VGG16 on ImageNet and for an LSTM on IMDB, and one for images with a short game.
INPUT_IBA_SETTINGS = {
    "images": ThreeStages(),
    "text": ThreeStages(
        Bottleneck(beta=15, sigma=0), Adversary(mask_rate=0.03, noise="position"),
        Bottleneck(beta=30, steps=30, learning_rate=0.5, sigma=0),
    ),
    "fast": ThreeStages(prior=Adversary(samples=32, groups=8, epochs=1, width=0.125)),
}  # fmt: skip


@dataclass(frozen=True)
class Stages:
    """What each stage found.

    Attributes:
        feature: The bottlenecks at the layer.
        prior: (batch, ...) the mask m of the input that the adversarial game ended with.
        critic, generator: (iterations, batch) their losses; NaN where none was taken.
        input: The bottlenecks at the input, their bits told beyond the prior.
    """

    feature: Optimised
    prior: Tensor
    critic: Tensor
    generator: Tensor
    input: Optimised


class InputIBA(Saved, NoFuture, Attribution):
    """Input information-bottleneck attribution (Zhang et al.), fine-grained at the input: images, embedded texts.

    Three stages for each sample: a bottleneck at a layer, as :class:`~captum_mipin.IBA`; a mask of the input whose features
    look like that bottleneck's to a critic; and a bottleneck at the input that starts from there: what it tells is counted
    beyond what that mask tells. Inputs are expected to be standardised: the noise is N(0, 1), as published. Nothing of the
    model is touched.

    Args:
        model, layer, output, channels, input_channels, classes, across, min_std, active: As for
            :class:`~captum_mipin.IBA`; the input is the output of ``input_layer``, where that is given.
        settings: "images", "text", "fast" (images), or a :class:`~captum_mipin.ThreeStages`.
        input_layer: A module, or the name of a tensor, whose output stands for the input: the embedding of tokens.

    Raises:
        InputError: An option out of its range.

    Source: Zhang et al., "Fine-Grained Neural Network Explanation by Identifying Input Features with Predictive
    Information", NeurIPS 2021, and the released code.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> x = torch.randn(50, 1, 8, 8)
        >>> settings = ThreeStages(prior=Adversary(epochs=1), input=Bottleneck(beta=20, steps=5))
        >>> iba = InputIBA(model, model[1], settings).estimate(x, progress=False)
        >>> iba.attribute(x[:2], target=[0, 2]).shape
        torch.Size([2, 1, 8, 8])
    """

    _kind = "InputIBA"

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        settings: ThreeStages | Literal["images", "text", "fast"] = "images",
        *,
        input_layer: nn.Module | str | None = None,
        output: Output = None,
        channels: int = 1,
        input_channels: int | None = None,
        classes: int = 1,
        across: Sequence[int] = (),
        min_std: float = 0.01,
        active: float = 0.01,
    ) -> None:
        if isinstance(settings, str):
            if settings not in INPUT_IBA_SETTINGS:
                raise InputError(
                    f"settings={settings!r} is not one of {', '.join(map(repr, INPUT_IBA_SETTINGS))}"
                )
            settings = INPUT_IBA_SETTINGS[settings]
        if not isinstance(settings, ThreeStages):
            raise InputError(
                f"settings are a {type(settings).__name__}, expected a ThreeStages or a name"
            )
        Attribution.__init__(self, model)
        #: The first stage.
        self.feature = IBA(
            model, layer, settings.feature, output=output, channels=channels, input_channels=input_channels,
            classes=classes, across=across, min_std=min_std, active=active,
        )  # fmt: skip
        if self.feature.input_channels is None:
            raise InputError(
                "which dimension of the input holds its channels? Say it with input_channels="
            )
        self.model, self.settings = self.feature.model, settings
        self.input_layer = (
            unwrapped(input_layer) if isinstance(input_layer, nn.Module) else input_layer
        )

    def estimate(
        self,
        data: Any,
        *,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> "InputIBA":
        """Gather mean and standard deviation of each feature, see :meth:`IBA.estimate`."""
        start = self.input_layer
        if isinstance(start, nn.Module) and all(
            module is not start for module in check_model(self.model).modules()
        ):
            raise CaptureError(
                f"input_layer {type(start).__name__} is not a module of this {type(self.model).__name__}"
            )

        def look(parts: Parts) -> None:
            if start is not None:
                tensor_name(parts.captured, self.model, start)

        self.feature.gather(data, unpack, batch_size, progress, look)
        return self

    @property
    def report(self) -> EstimateReport:
        """How many features there are, and how many of them are constant or inactive."""
        return self.feature.report

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        kind: Literal["mask", "information"] = "mask",
        per_position: bool = False,
        generator: torch.Generator | None = None,
        internal_batch_size: int | None = None,
        return_information: bool = False,
        progress: bool = False,
    ) -> Any:
        """What of the input the target's cross entropy needs.

        Args:
            inputs: Tensor (batch, ...) or a tuple of one; of several only with ``input_layer``.
            target, additional_forward_args, generator, internal_batch_size, progress: As for :meth:`IBA.attribute`.
            kind: "mask": sigmoid(α) of each element, whose mean over channels is the released map; "information": bits of
                each element beyond the prior.
            per_position: Without channels, the mean of masks or the sum of bits: (batch, height, width), (batch, tokens).
                Token ids, which have no channels, get one value a token in any case.
            return_information: Return also the total bits of each sample.

        Returns:
            Shaped like ``inputs``, or like the output of ``input_layer``; with ``return_information`` a pair of it and
            (batch,).

        Raises:
            As :meth:`IBA.attribute`.
        """
        if kind not in ("mask", "information"):
            raise InputError(f"kind={kind!r} is not one of 'mask', 'information'")
        tensors = as_inputs(inputs)
        found = self.explain(
            inputs, target, additional_forward_args, generator=generator, internal_batch_size=internal_batch_size,
            progress=progress,
        ).input  # fmt: skip
        total = found.information.flatten(1).sum(1)
        maps = found.alpha.sigmoid() if kind == "mask" else found.information
        x = tensors[0]
        if per_position or (x.ndim == maps.ndim - 1 and self.input_layer is not None):
            maps = maps.mean(self._channels) if kind == "mask" else maps.sum(self._channels)
        maps = maps.to(x.dtype if x.is_floating_point() else maps.dtype).contiguous()
        shaped = like(inputs, (maps,)) if len(tensors) == 1 else maps
        return (shaped, total) if return_information else shaped

    def explain(
        self,
        inputs: Tensor | Inputs,
        target: Any,
        extras: Any = (),
        *,
        generator: torch.Generator | None = None,
        internal_batch_size: int | None = None,
        progress: bool = False,
    ) -> Stages:
        """All three stages with their losses.

        Args:
            inputs, target, generator, internal_batch_size, progress: As for :meth:`attribute`.
            extras: Its ``additional_forward_args``.

        Raises:
            As :meth:`attribute`.
        """
        how, tensors = self.settings, as_inputs(inputs)

        def bar(name: str, steps: int) -> "tqdm[Any]":
            shown: tqdm[Any] = tqdm(
                total=len(tensors[0]) * steps, unit="step", disable=not progress, desc=name
            )
            return shown

        with calm(device_of(self.model)):
            case = self.feature.case(tensors, target, as_extras(extras), internal_batch_size)
            start, layer = self._input(case, len(tensors)), self.feature.name(case.parts)
            chosen = seed(generator)
            with bar("feature bottleneck", how.feature.steps) as shown:
                groups = case.groups(layer, how.feature.copies, internal_batch_size)
                feature = joined([self.feature.restrict(group, chosen, shown) for group in groups])
            with bar("adversarial prior", how.prior.epochs) as shown:
                games = [
                    self._prior(one, start, feature, chosen, shown)
                    for one in case.groups(start, how.prior.batch, 1)
                ]
            priors, critics, generators = zip(*games, strict=True)
            prior = torch.cat(priors)
            with bar("input bottleneck", how.input.steps) as shown:
                groups = case.groups(start, how.input.copies, internal_batch_size)
                found = joined(
                    [
                        self._restrict(group, start, prior[group.rows], chosen, shown)
                        for group in groups
                    ]
                )
        return Stages(feature, prior, torch.stack(critics, 1), torch.stack(generators, 1), found)

    @property
    def _channels(self) -> int:
        assert self.feature.input_channels is not None  # for mypy: __init__ refuses that
        return self.feature.input_channels

    def _input(self, case: Case, count: int) -> str:
        """The tensor that stands for the input."""
        if self.input_layer is not None:
            return tensor_name(case.parts.captured, self.model, self.input_layer)
        if count > 1 or not case.inputs[0].is_floating_point():
            what = f"{count} inputs" if count > 1 else f"inputs of dtype {case.inputs[0].dtype}"
            raise InputError(
                f"{what} cannot be masked with noise: pass input_layer=, such as the embedding of tokens"
            )
        return case.parts.captured.inputs[0]

    def _prior(
        self, case: Case, start: str, feature: Optimised, chosen: int, bar: "tqdm[Any]"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For one sample the mask that the adversarial game ends with, and the losses of critic and generator."""
        how, channels = self.settings.prior, self.feature.channels
        part = case.parts(start, self.feature.name(case.parts))
        with torch.no_grad():
            x, others = part.below(case.values(self.model))
            features = part.above(x, others)
        kind = torch.promote_types(x.dtype, torch.float32)
        told = feature.information[case.rows]
        if how.bottleneck == "capacity":
            weight = told * math.log(2)
        else:
            own = feature.alpha[case.rows]
            weight = mask(own, self.settings.feature.sigma, positions(own, channels))[0]
        beside: dict[int, Sequence[Any]] = {}

        def above(masked: Tensor) -> Tensor:
            rows = len(masked)
            if rows not in beside:
                beside[rows] = self.feature.beside(case, part, rows, others)
            return part.above(masked.to(x.dtype), beside[rows]).to(kind)

        initial = self._initial(told.to(kind), x)
        with TURNS.explaining():
            return adversarial_mask(
                x.to(kind), features.to(kind), weight.to(kind), initial, above, how, channels=channels,
                input_channels=self._channels, seed=chosen, first=case.first, bar=bar,
            )  # fmt: skip

    def _initial(self, told: Tensor, x: Tensor) -> Tensor:
        """The bits of the layer at the input's positions; zeros where it has no such."""
        if told.ndim != x.ndim or told.ndim < 3:
            return torch.zeros_like(x, dtype=told.dtype)
        grid = at_input(told, (x,), self.feature.channels, self._channels)
        return grid.unsqueeze(self._channels % x.ndim).expand(x.shape).contiguous()

    def _restrict(
        self, case: Case, start: str, prior: Tensor, chosen: int, bar: "tqdm[Any]"
    ) -> Optimised:
        """The bottlenecks at the input."""
        how = self.settings.input
        x, above, entropy = self.feature.bottleneck(case, case.parts(start), how.copies)
        one = torch.ones((), device=x.device)
        with TURNS.explaining():
            return optimise(
                x, Noise(torch.zeros_like(one), one, one), lambda z: entropy(above(z)), how,
                positions=positions(x, self._channels), prior=prior, seed=chosen, first=case.first, bar=bar,
            )  # fmt: skip

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return "InputIBA"

    # ------------------------------------------------------------------------------------------------- files

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, content = self.feature._pack()
        where = None if self.input_layer is None else self.feature.where(self.input_layer)
        stages = asdict(self.settings)
        return tensors, {**content, "method": "InputIBA", "stages": stages, "input_layer": where}

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "InputIBA":
        feature = IBA._unpack(tensors, content, model)
        stages, where = content["stages"], content["input_layer"]
        settings = ThreeStages(
            Bottleneck(**stages["feature"]),
            Adversary(**stages["prior"]),
            Bottleneck(**stages["input"]),
        )
        input_layer = None if where is None else IBA.found(where, model)
        iba = cls(model, feature.layer, settings, input_layer=input_layer)
        iba.feature = feature
        return iba


def adversarial_mask(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    initial: Tensor,
    above: Callable[[Tensor], Tensor],
    how: Adversary,
    *,
    channels: int = 1,
    input_channels: int = 1,
    seed: int = 0,
    first: int = 0,
    bar: "tqdm[Any] | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Wasserstein game with clipped weights between a mask of one input and a critic of features.

    Args:
        x: (1, ...) the input.
        features: (1, ...) its features.
        weight: What of each feature is real: real features are m f + (1 − m) · noise.
        initial: Of the mask's parameter, whose sigmoid is the mask.
        above: Masked inputs → features.
        how: How.
        channels, input_channels: The dimension of the features, and of the input, that holds the channels.
        seed: Of all that is random.
        first: Number of the sample, for errors.
        bar: Moved by each epoch.

    Returns:
        The mask (1, ...), and the losses of critic and generator (iterations,), NaN where none was taken.

    Raises:
        InputError: A loss is NaN or Inf; a critic of these features is not known.
    """
    draw = torch.Generator(x.device).manual_seed(seed)
    size = how.samples // how.groups
    levels = torch.rand(
        2, how.groups, *(1,) * features.ndim, generator=draw, device=x.device, dtype=torch.float32
    )
    noise = 5 * levels[1] * normal(draw, how.groups, size, *features.shape[1:]) + 4 * levels[0] - 2
    real = (weight * features + (1 - weight) * noise.to(x.dtype)).flatten(0, 1)
    critic = Critic(features, channels, how.width, draw)
    own = [
        dim
        for dim in range(1, x.ndim)
        if (dim == input_channels % x.ndim) == (how.noise == "channel")
    ]
    shape = [x.shape[dim] if dim in own else 1 for dim in range(x.ndim)]
    alpha, mean, std = initial.clone(), x.new_zeros(shape), x.new_ones(shape)
    for parameter in (alpha, mean, std):
        parameter.requires_grad_()
    rates = ((alpha, how.mask_rate), (mean, how.mean_rate), (std, how.std_rate))
    generator_step = torch.optim.RMSprop(
        [{"params": [parameter], "lr": rate} for parameter, rate in rates]
    )
    critic_step = torch.optim.RMSprop(critic.parameters(), lr=how.critic_rate)
    rows = -(-how.samples // how.batch)
    losses = torch.full((2, how.epochs * rows), math.nan, dtype=x.dtype, device=x.device)
    epochs: list[Tensor] = []

    def descend(
        optimiser: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        loss: Tensor,
        at: tuple[int, int],
    ) -> None:
        if not bool(torch.isfinite(loss)):
            raise InputError(
                f"the adversarial prior's loss of sample {first} is NaN or Inf at iteration {at[1]}: the model overflows when "
                "noise stands in for its input. Standardise the inputs, or leave this sample out"
            )
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        optimiser.step()
        losses[at] = loss.detach()

    for epoch in range(how.epochs):
        for index, some in enumerate(
            torch.randperm(how.samples, generator=draw, device=x.device).split(how.batch)
        ):
            at = epoch * rows + index
            z = normal(draw, len(some), *x.shape[1:]).to(x.dtype)

            def fake(z: Tensor = z) -> Tensor:
                passed = alpha.sigmoid()
                return above(passed * x + (1 - passed) * (std * z + mean))

            with torch.no_grad():
                masked = fake()
            loss = critic(masked).mean() - critic(real[some]).mean()
            descend(critic_step, list(critic.parameters()), loss, (0, at))
            with torch.no_grad():
                for parameter in critic.parameters():
                    parameter.clamp_(-how.clip, how.clip)
            if index % how.critic_steps == 0:
                descend(generator_step, [alpha, mean, std], -critic(fake()).mean(), (1, at))
        epochs.append(losses[0, epoch * rows : (epoch + 1) * rows].mean())
        if bar is not None:
            bar.update()
        if bool(settled(torch.stack(epochs).unsqueeze(1), how.tolerance)):
            break
    return alpha.detach().sigmoid(), losses[0], losses[1]


class Critic(nn.Module):
    """Scores features, as published: three convolutions and three dense layers for images, an LSTM for sequences.

    Args:
        features: (1, ...) such features.
        channels: The dimension that holds the channels.
        width: Factor of its hidden sizes.
        draw: What its initial weights are drawn from, uniformly as torch does.

    Raises:
        InputError: Features with other than one or two dimensions of positions, or maps below 4 x 4.
    """

    def __init__(
        self, features: Tensor, channels: int, width: float, draw: torch.Generator
    ) -> None:
        super().__init__()
        self._channels, self._maps = channels % features.ndim, features.ndim == 4
        count, shape = features.shape[self._channels], features.movedim(self._channels, 1).shape[2:]
        if len(shape) not in (1, 2) or (self._maps and min(shape) < 4):
            raise InputError(
                f"the layer's output has shape {tuple(features.shape[1:])}, but the prior is known for maps of at least 4 x 4 "
                "and for sequences: take another layer, or say where the channels are with channels="
            )

        def sized(size: float) -> int:
            return max(1, round(width * size))

        on: Any = {"device": "meta"}
        if self._maps:
            a, b, c = sized(2 * count), sized(4 * count), sized(count)
            self.body: nn.Module = nn.Sequential(
                nn.Conv2d(count, a, 4, 2, 1, **on), nn.BatchNorm2d(a, track_running_stats=False, **on), nn.LeakyReLU(0.2),
                nn.Conv2d(a, b, 4, 2, 1, **on), nn.BatchNorm2d(b, track_running_stats=False, **on), nn.LeakyReLU(0.2),
                nn.Conv2d(b, c, 3, 1, 1, **on), nn.BatchNorm2d(c, track_running_stats=False, **on), nn.LeakyReLU(0.2),
                nn.Flatten(),
            )  # fmt: skip
            hidden = [c * (shape[0] // 4) * (shape[1] // 4), sized(512), sized(256)]
        else:
            self.body = nn.LSTM(count, sized(count), batch_first=True, **on)
            hidden = [sized(count), sized(128)]
        dense = [
            part for a, b in pairwise(hidden) for part in (nn.Linear(a, b, **on), nn.LeakyReLU(0.2))
        ]
        self.head = nn.Sequential(*dense, nn.Linear(hidden[-1], 1, **on))
        self.to_empty(device=features.device).to(features.dtype)
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
            elif own:
                bound = (
                    module.hidden_size if isinstance(module, nn.LSTM) else own[0][0].numel()
                ) ** -0.5
                for parameter in own:
                    nn.init.uniform_(parameter, -bound, bound, generator=draw)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, ...) → (batch, 1)."""
        if self._maps:
            scores: Tensor = self.head(self.body(features.movedim(self._channels, 1)))
        else:
            scores = self.head(self.body(features.movedim(self._channels, 2))[1][0][-1])
        return scores
