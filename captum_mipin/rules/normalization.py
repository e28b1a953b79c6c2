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

from captum_mipin.rules.base import Options, Recorded, Recording, along

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
        variance: σ², ε included, shaped to broadcast with x.
        weight: γ, shaped to broadcast with x; None for 1.
        kept: Whether the model keeps σ². If not, it is that of the sample.
    """

    variance: Tensor
    weight: Tensor | None
    kept: bool = False

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
        """
        passed = {**dict(zip(_PARAMETERS[name], arguments, strict=False)), **named}
        eps, weight = passed.get("eps", 1e-5), passed.get("weight")
        if name in ("layer_norm", "rms_norm"):
            dims = tuple(range(-len(passed["normalized_shape"]), 0))
            # σ² = variance + ε, for RMS norm mean square + ε
            if name == "layer_norm":
                return cls(x.var(dims, correction=0, keepdim=True) + eps, weight)
            eps = torch.finfo(x.dtype).eps if passed.get("eps") is None else eps
            return cls(x.square().mean(dims, keepdim=True) + eps, weight)
        weight = None if weight is None else along(weight, x, 1)
        if not passed.get("use_input_stats", True):
            return cls(along(passed["running_var"], x, 1) + eps, weight, kept=True)
        groups = passed.get("num_groups", x.shape[1])  # instance norm: one channel each
        variance = x.reshape(len(x), groups, -1).var(-1, correction=0)
        variance = variance.repeat_interleave(x.shape[1] // groups, 1)
        return cls(variance.view(*variance.shape, *(1,) * (x.ndim - 2)) + eps, weight)


def batch_norm(options: Options, operation: Any, x: Tensor, *arguments: Any) -> Recording:
    """Send back S: a convolution and its batch norm are inverted as the one map they are."""
    return operation(x, *arguments)[0], lambda s: s


def sample_norm(
    name: str, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> Recording:
    """Send back S ⊙ σ, σ = √(variance + ε) of this sample, or S where the model keeps σ."""
    value = operation(x, *arguments, **named)
    norm = NormArguments.of(name, x, arguments, named)
    if not options.local or norm.kept:
        return value, lambda s: s
    # y = γ (x − μ) / σ + β: the inverse before learns γ, β and μ, but not the σ of each sample
    sigma = norm.variance.sqrt()
    return value, lambda s: s * sigma


def _scale(name: str, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Return γ / σ, what a normalisation multiplies x by, shaped to broadcast with x."""
    norm = NormArguments.of(name, x, arguments, named)
    scale = norm.variance.rsqrt()
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
