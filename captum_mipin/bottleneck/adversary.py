"""The prior of InputIBA: a mask of the input, found in a game against a critic of features.

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

from captum_mipin.bottleneck.gaussian import check_settings, is_whole, normal, settled
from captum_mipin.errors import InputError


@dataclass(frozen=True)
class Adversary:
    """How the prior is found: a mask whose features a critic cannot tell from the bottleneck's.

    Attributes:
        samples: Features behind the bottleneck that the critic sees.
        groups: Groups of them. Each has noise of its own mean, uniform in (−2, 2), and standard
            deviation, uniform in (0, 5).
        epochs: Passes over these features.
        batch: Features in a batch.
        critic_rate: Learning rate of the critic (RMSprop).
        clip: The critic's weights are clipped to ± ``clip``.
        critic_steps: Steps of the critic for each step of the generator, which takes its first one
            at once in each epoch.
        mask_rate: Learning rate of the generator's mask.
        mean_rate: Learning rate of the mean of its noise.
        std_rate: Learning rate of the standard deviation of its noise.
        noise: "channel" or "position": what has a mean and standard deviation of its own.
        bottleneck: What weighs the features: "capacity" (nats, as in the released code) or
            "passed" (the mask λ).
        width: Size of the critic; 1 as published.
        tolerance: Stop once the mean loss of three epochs differs from that of the three before by
            at most this share; None for never.

    Raises:
        InputError: A value is out of its range.
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
        rules = {}
        least = {"samples": 1, "groups": 1, "epochs": 0, "batch": 2, "critic_steps": 1}
        for name, low in least.items():
            whole = is_whole(getattr(self, name), low)
            rules[name] = whole, f"must be a whole number of at least {low}"
        for name in ("critic_rate", "clip", "mask_rate", "mean_rate", "std_rate", "width"):
            rules[name] = 0 < getattr(self, name) < math.inf, "must be above 0"
        tolerance = self.tolerance is None or 0 < self.tolerance < math.inf
        rules["tolerance"] = tolerance, "must be above 0, or None"
        channel, passed = self.noise in ("channel", "position"), ("capacity", "passed")
        rules["noise"] = channel, "is not one of 'channel', 'position'"
        rules["bottleneck"] = self.bottleneck in passed, "is not one of 'capacity', 'passed'"
        check_settings(self, rules)
        if self.samples % self.groups:
            raise InputError(f"samples={self.samples} must be a multiple of groups={self.groups}")
        if self.samples % self.batch == 1:
            raise InputError(
                f"samples={self.samples} leave a batch={self.batch} of one, over which the critic "
                "cannot normalise: take another batch="
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
    """Play a Wasserstein game with clipped weights: a mask of one input against a critic.

    Args:
        x: (1, ...) the input.
        features: (1, ...) its features f.
        weight: (1, ...) w: features behind the bottleneck are w f + (1 − w) · noise.
        initial: (1, ...) the first α; the mask is sigmoid(α).
        above: Masked inputs → features.
        settings: How the game is played.
        channels: The dimension of the features that holds the channels.
        input_channels: That of the input.
        draw: Draws all that is random.
        first: Number of the sample, for errors.
        bar: A progress bar.

    Returns:
        The mask (1, ...), and the losses (iterations,) of critic and generator; NaN for none.

    Raises:
        InputError: A loss is NaN or Inf, or there is no critic for such features.
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
    """Return samples w f + (1 − w) · noise, with other noise in each group."""
    groups, size = settings.groups, settings.samples // settings.groups
    shape = (2, groups, *(1,) * features.ndim)
    mean, std = torch.rand(shape, generator=draw, device=draw.device, dtype=torch.float32)
    noise = 5 * std * normal(draw, groups, size, *features.shape[1:]) + 4 * mean - 2
    mixed: Tensor = weight * features + (1 - weight) * noise.to(features.dtype)
    return mixed.flatten(0, 1)


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor, where: str) -> Tensor:
    """Take one step down, and return the loss before it; raise InputError if it is not finite."""
    if not bool(torch.isfinite(loss)):
        raise InputError(
            f"the adversarial prior's loss {where}: the model overflows when noise replaces its "
            "input. Standardise the inputs, or leave this sample out"
        )
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
    return loss.detach()


class _Generator:
    """Masked inputs z = m x + (1 − m) (σ n + μ); the mask m = sigmoid(α), μ and σ are learned."""

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
        """M = sigmoid(α)."""
        return self._alpha.sigmoid()

    def __call__(self, noise: Tensor) -> Tensor:
        """Return masked inputs for standard normal noise n."""
        mask = self.mask
        return mask * self._x + (1 - mask) * (self._std * noise + self._mean)


class Critic(nn.Module):
    """A score of features, with the published layers.

    Images have three convolutions and three dense layers, sequences an LSTM and two dense layers.

    Args:
        features: (1, ...) such features.
        channels: The dimension that holds the channels.
        width: Factor of its hidden sizes.
        draw: Draws its initial weights, uniformly as torch does.

    Raises:
        InputError: The features have neither one nor two dimensions of positions, or are maps
            smaller than 4 x 4.
    """

    def __init__(
        self, features: Tensor, channels: int, width: float, draw: torch.Generator
    ) -> None:
        super().__init__()
        self._channels, self._maps = channels % features.ndim, features.ndim == 4
        count, shape = features.shape[self._channels], features.movedim(self._channels, 1).shape[2:]
        if len(shape) not in (1, 2) or (self._maps and min(shape) < 4):
            raise InputError(
                f"the layer's output has shape {tuple(features.shape[1:])}, but the prior is known "
                "for maps of at least 4 x 4 and for sequences: take another layer, or say where "
                "the channels are with channels="
            )

        def sized(size: float) -> int:
            return max(1, round(width * size))

        # on the meta device, where torch's global generator is not drawn from
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
        """Draw weights from U(−1/√n, 1/√n), n being the inputs of a unit, or an LSTM's size."""
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
