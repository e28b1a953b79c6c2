"""Normalisation, γ (x − μ) / σ + β: an affine map that the inverse of the operation before absorbs.

Where μ and σ come from the sample itself, its signal is multiplied by the recorded σ: the forward
pass divided by it, and no inverse could know it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_mipin.rules.base import Back, Options, Recorded

#: Normalisation by the sample's own statistics → its parameters behind x, in the order of ATen.
_PARAMETERS = {
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
    "group_norm": ("num_groups", "weight", "bias", "eps"),
    "instance_norm": (
        "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class NormArguments:
    """What a normalisation divides and multiplies x by: γ (x − μ) / σ + β.

    Attributes:
        dims: The dimensions of x that share one σ; empty where each group of channels has one.
        groups: Number of groups of channels with one σ each; 0 where ``dims`` says what shares one.
        eps: ε in σ = √(variance + ε).
        weight: γ, shaped to multiply x; None for 1.
        centred: Whether the variance is taken about μ. RMS norm takes the mean square instead.
        kept: The variance that the model keeps, shaped to broadcast with x; None where it is taken
            from the sample.
    """

    dims: tuple[int, ...]
    groups: int
    eps: float
    weight: Tensor | None
    centred: bool = True
    kept: Tensor | None = None

    @classmethod
    def of(
        cls, name: str, x: Tensor, arguments: Sequence[Any], named: Mapping[str, Any]
    ) -> "NormArguments":
        """Parse the arguments of ``layer_norm``, ``rms_norm``, ``group_norm`` or ``instance_norm``.

        Args:
            name: Which of the four it is.
            x: What is normalised, with the batch along its first dimension.
            arguments: The positional arguments behind x.
            named: The arguments passed by name.

        Returns:
            The same arguments, with every default filled in.
        """
        passed = {**dict(zip(_PARAMETERS[name], arguments, strict=False)), **named}
        eps, weight = passed.get("eps", 1e-5), passed.get("weight")
        if name in ("layer_norm", "rms_norm"):
            dims, centred = tuple(range(-len(passed["normalized_shape"]), 0)), name == "layer_norm"
            eps = torch.finfo(x.dtype).eps if passed.get("eps") is None and not centred else eps
            return cls(dims, 0, eps, weight, centred)

        def channels(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.view(-1, *(1,) * (x.ndim - 2))

        own = passed.get("use_input_stats", True)
        kept = None if own else channels(passed["running_var"])
        return cls((), passed.get("num_groups", x.shape[1]), eps, channels(weight), kept=kept)

    def variance(self, x: Tensor) -> Tensor:
        """Return σ² = variance + ε, shaped to broadcast with x."""
        if self.kept is not None:
            return self.kept + self.eps
        if self.groups:
            parts = x.reshape(len(x), self.groups, -1).var(-1, correction=0)
            channels = parts.repeat_interleave(x.shape[1] // self.groups, 1)
            return channels.view(*channels.shape, *(1,) * (x.ndim - 2)) + self.eps
        if self.centred:
            return x.var(self.dims, correction=0, keepdim=True) + self.eps
        return x.square().mean(self.dims, keepdim=True) + self.eps


def batch_norm(options: Options, operation: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Back]:
    """Send back S: a convolution and its batch norm are inverted as the one map they are."""
    return operation(x, *arguments)[0], lambda s: s


def sample_norm(
    name: str, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """Send back S ⊙ σ, σ = √(variance + ε) of this sample, or S where the model keeps σ."""
    value = operation(x, *arguments, **named)
    norm = NormArguments.of(name, x, arguments, named)
    if not options.local or norm.kept is not None:
        return value, lambda s: s
    sigma = norm.variance(x).sqrt()
    return value, lambda s: s * sigma


def _scale(name: str, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Return γ / σ, what a normalisation multiplies x by, shaped to broadcast with x."""
    norm = NormArguments.of(name, x, arguments, named)
    scale = norm.variance(x).rsqrt()
    return scale if norm.weight is None else scale * norm.weight


#: Operation → γ / σ as a function of x and the operation's other arguments.
SCALES: Mapping[str, Callable[..., Tensor]] = {
    f"aten.{name}.default": partial(_scale, name) for name in _PARAMETERS
}

NORMALIZATION = {
    "aten._native_batch_norm_legit_no_training.default": Recorded(
        run=batch_norm,
        note="passed on; the next inverse absorbs the affine map",
        restores=False,
        exact=True,
    ),
    **{
        f"aten.{name}.default": Recorded(
            run=partial(sample_norm, name),
            note="times the recorded " + ("root mean square" if name == "rms_norm" else "σ"),
            restores=False,
        )
        for name in ("layer_norm", "rms_norm", "instance_norm", "group_norm")
    },
}
