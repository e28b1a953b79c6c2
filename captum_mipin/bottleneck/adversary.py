"""The prior of InputIBA: a mask of the input that is trained against a critic of features.

The training is that of a Wasserstein GAN. Its generator makes masked inputs. Its critic tries to
distinguish their features from those behind the bottleneck at the layer.

Source: Zhang et al., "Fine-Grained Neural Network Explanation by Identifying Input Features with
Predictive Information", NeurIPS 2021, and the released code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin.bottleneck.gaussian import check_tolerance, normal, settled
from captum_mipin.calls import made_by_name
from captum_mipin.errors import InputError
from captum_mipin.options import check_choice, check_number


@made_by_name
@dataclass(frozen=True)
class Adversary:
    """The settings of the adversarial training that gives the prior.

    Attributes:
        samples: Number of noisy copies of the layer's features, made by the bottleneck at the
            layer. They are the critic's real samples.
        groups: Number of groups of these copies. Each group has noise with its own mean, uniform
            in (−2, 2), and its own standard deviation, uniform in (0, 5).
        epochs: Number of passes over these copies.
        batch: Number of copies per batch.
        critic_rate: Learning rate of the critic (RMSprop).
        clip: Bound c of the critic's weights, which are clipped to [−c, c] after each step.
        critic_steps: Number of critic steps per generator step. In each epoch, the generator's
            first step comes in the first batch.
        mask_rate: Learning rate of the generator's mask (RMSprop).
        mean_rate: Learning rate of the mean of the generator's noise (RMSprop).
        std_rate: Learning rate of the standard deviation of the generator's noise (RMSprop).
        noise: "channel": the generator's noise has one mean and standard deviation per channel.
            "position": it has one per position.
        bottleneck: The weight w of a feature f in w f + (1 − w) · noise: "capacity", the feature's
            information in nats, as in the released code; or "passed", its mask λ.
        width: Factor of the critic's hidden sizes; 1 for the published critic.
        tolerance: Largest relative change of the mean loss, from three epochs to the next three,
            at which the training stops. None: it never stops early.

    Raises:
        InputError: A value is out of its range.

    Examples:
        >>> from dataclasses import replace
        >>> short = replace(Adversary(), epochs=2)
        >>> short.epochs
        2
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
        least = {"samples": 1, "groups": 1, "epochs": 0, "batch": 2, "critic_steps": 1}
        for name, low in least.items():
            check_number(name, getattr(self, name), low, whole=True)
        for name in ("critic_rate", "clip", "mask_rate", "mean_rate", "std_rate", "width"):
            check_number(name, getattr(self, name), above=True)
        check_tolerance(self.tolerance)
        check_choice("noise", self.noise, ("channel", "position"))
        check_choice("bottleneck", self.bottleneck, ("capacity", "passed"))
        if self.samples % self.groups:
            raise InputError(
                f"samples={self.samples} must be a multiple of groups={self.groups}: change one "
                "of them"
            )
        if self.samples % self.batch == 1:
            raise InputError(
                f"samples={self.samples} with batch={self.batch} leaves a last batch of one "
                "feature, over which the critic's batch norm is not defined: change batch="
            )


def adversarial_mask(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    initial: Tensor,
    above: Callable[[Tensor], Tensor],
    *,
    settings: Adversary,
    channels: int = 1,
    input_channels: int = 1,
    draw: torch.Generator,
    first: int = 0,
    bar: "tqdm[Any] | None" = None,
) -> tuple[Tensor, ...]:
    """Return a mask of one input, trained against a critic (Wasserstein GAN, clipped weights).

    Args:
        x: (1, ...) the input.
        features: (1, ...) f, the layer's features for ``x``.
        weight: (1, ...) w; the features behind the bottleneck are w f + (1 − w) · noise.
        initial: The initial α, shaped like ``x``; the mask is sigmoid(α).
        above: Function that maps masked inputs (batch, ...) to the layer's features (batch, ...).
        settings: The settings of the training.
        channels: The dimension of ``features`` that holds the channels.
        input_channels: The dimension of ``x`` that holds the channels.
        draw: Generator of all random numbers.
        first: Number of the sample, for errors.
        bar: Progress bar, advanced by 1 after each epoch.

    Returns:
        The mask (1, ...), and the losses of critic and generator (iterations,); NaN: not computed.

    Raises:
        InputError: A loss is NaN or Inf, or no critic is defined for features of this shape.
    """
    real = _behind_bottleneck(features, weight, settings, draw)
    critic = Critic(features, channels, settings.width, draw)
    generator = _Generator(x, initial, input_channels, settings)
    critic_step = torch.optim.RMSprop(critic.parameters(), settings.critic_rate)
    count = -(-settings.samples // settings.batch)
    losses = x.new_full((2, settings.epochs, count), math.nan)
    for epoch in range(settings.epochs):
        order = torch.randperm(settings.samples, generator=draw, device=x.device)
        for index, batch in enumerate(order.split(settings.batch)):
            z = normal(draw, len(batch), *x.shape[1:]).to(x.dtype)
            with torch.set_grad_enabled(index % settings.critic_steps == 0):
                fake = above(generator(z))
            # the critic minimises E[critic(fake)] − E[critic(real)] with |weights| ≤ clip
            loss = critic(fake.detach()).mean() - critic(real[batch]).mean()
            where = f"of sample {first} is NaN or Inf at iteration {epoch * count + index}"
            losses[0, epoch, index] = _descend(critic_step, loss, where)
            critic.clip(settings.clip)
            if fake.requires_grad:
                # the generator minimises −E[critic(fake)]
                losses[1, epoch, index] = _descend(generator.step, -critic(fake).mean(), where)
        if bar is not None:
            bar.update()
        if bool(settled(losses[0, : epoch + 1].mean(1, keepdim=True), settings.tolerance)):
            break
    return generator.mask.detach(), *losses.flatten(1)


def _behind_bottleneck(
    features: Tensor, weight: Tensor, settings: Adversary, draw: torch.Generator
) -> Tensor:
    """Return samples w f + (1 − w) · noise; the noise of each group has its own mean and scale."""
    groups, size = settings.groups, settings.samples // settings.groups
    shape = (2, groups, *(1,) * features.ndim)
    mean, std = torch.rand(shape, generator=draw, device=draw.device, dtype=torch.float32)
    noise = 5 * std * normal(draw, groups, size, *features.shape[1:]) + 4 * mean - 2
    mixed: Tensor = weight * features + (1 - weight) * noise.to(features.dtype)
    return mixed.flatten(0, 1)


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor, where: str) -> Tensor:
    """Take one step of gradient descent, and return the loss before the step.

    Args:
        optimiser: The optimiser; it holds the parameters that are changed.
        loss: The loss, a scalar.
        where: Sample and iteration, for the error.

    Raises:
        InputError: The loss is NaN or Inf.
    """
    if not bool(torch.isfinite(loss)):
        raise InputError(
            f"the adversarial prior's loss {where}: the model's values overflow when noise "
            "replaces its input. Standardise the inputs, or remove this sample"
        )
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
    return loss.detach()


class _Generator:
    """Masked inputs z = m x + (1 − m) (σ n + μ) with learned α, μ, σ, where m = sigmoid(α)."""

    def __init__(self, x: Tensor, initial: Tensor, channels: int, settings: Adversary) -> None:
        by_channel = settings.noise == "channel"
        kept = [dim for dim in range(1, x.ndim) if (dim == channels % x.ndim) == by_channel]
        shape = [x.shape[dim] if dim in kept else 1 for dim in range(x.ndim)]
        self._x, self._alpha = x, initial.clone().requires_grad_()
        self._mean, self._std = (make(shape).requires_grad_() for make in (x.new_zeros, x.new_ones))
        rates = (
            (self._alpha, settings.mask_rate),
            (self._mean, settings.mean_rate),
            (self._std, settings.std_rate),
        )
        groups = [{"params": [parameter], "lr": rate} for parameter, rate in rates]
        self.step = torch.optim.RMSprop(groups)

    @property
    def mask(self) -> Tensor:
        """Return the mask m = sigmoid(α)."""
        return self._alpha.sigmoid()

    def __call__(self, noise: Tensor) -> Tensor:
        """Return the masked inputs (batch, ...) for standard normal noise n (batch, ...)."""
        mask = self.mask
        return mask * self._x + (1 - mask) * (self._std * noise + self._mean)


class Critic(nn.Module):
    """The critic: a network that gives each sample of features a score, as published.

    For images it has three convolutions and three dense layers, for sequences an LSTM and two dense
    layers.

    Args:
        features: (1, ...) an example of the features.
        channels: The dimension of ``features`` that holds the channels.
        width: Factor of the hidden sizes.
        draw: Generator of the initial weights, which have torch's usual uniform distribution.

    Raises:
        InputError: The features are neither maps of at least 4 x 4 positions nor sequences.
    """

    def __init__(
        self, features: Tensor, channels: int, width: float, draw: torch.Generator
    ) -> None:
        super().__init__()
        self._channels, self._maps = channels % features.ndim, features.ndim == 4
        count, shape = features.shape[self._channels], features.movedim(self._channels, 1).shape[2:]
        if len(shape) not in (1, 2) or (self._maps and min(shape) < 4):
            raise InputError(
                f"the layer's output has shape {tuple(features.shape[1:])}, but the prior is "
                "defined only for maps of at least 4 x 4 and for sequences: use another layer, or "
                "pass the dimension that holds the channels as channels="
            )

        def sized(size: float) -> int:
            return max(1, round(width * size))

        # On the meta device torch's global generator is not used: its state stays as it is.
        meta: Any = {"device": "meta"}
        if self._maps:
            sizes = (count, sized(2 * count), sized(4 * count), sized(count))
            layers: list[nn.Module] = []
            for (a, b), shaped in zip(
                pairwise(sizes), ((4, 2, 1), (4, 2, 1), (3, 1, 1)), strict=True
            ):
                norm = nn.BatchNorm2d(b, track_running_stats=False, **meta)
                layers += [nn.Conv2d(a, b, *shaped, **meta), norm, nn.LeakyReLU(0.2)]
            self.body: nn.Module = nn.Sequential(*layers, nn.Flatten())
            hidden = [sizes[3] * (shape[0] // 4) * (shape[1] // 4), sized(512), sized(256)]
        else:
            self.body = nn.LSTM(count, sized(count), batch_first=True, **meta)
            hidden = [sized(count), sized(128)]
        dense: list[nn.Module] = []
        for a, b in pairwise(hidden):
            dense += [nn.Linear(a, b, **meta), nn.LeakyReLU(0.2)]
        self.head = nn.Sequential(*dense, nn.Linear(hidden[-1], 1, **meta))
        self.to_empty(device=features.device).to(features.dtype)
        self._initialise(draw)

    def _initialise(self, draw: torch.Generator) -> None:
        """Draw weights from U(−1/√n, 1/√n); n is a unit's number of inputs, or the LSTM's size."""
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
            elif own:
                n = module.hidden_size if isinstance(module, nn.LSTM) else own[0][0].numel()
                for parameter in own:
                    nn.init.uniform_(parameter, -(n**-0.5), n**-0.5, generator=draw)

    def clip(self, bound: float) -> None:
        """Clip all weights to ± ``bound``."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores (batch, 1) of features (batch, ...)."""
        if self._maps:
            hidden = self.body(features.movedim(self._channels, 1))
        else:
            hidden = self.body(features.movedim(self._channels, 2))[1][0][-1]
        scores: Tensor = self.head(hidden)
        return scores
