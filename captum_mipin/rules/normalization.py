"""Normalisation, γ (x − μ) / σ + β.

If μ and σ are constants of the model, as in batch norm, this is an affine map. The learned inverse
of the operation before it includes that map. If μ and σ are statistics of the sample, the signal is
multiplied by the recorded σ: it differs from sample to sample, so a learned inverse cannot
contain it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_mipin.rules.base import Options, Recorded, Recording, along

#: Normalisation by statistics of the sample → names of its parameters after x, in ATen's order.
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
    """The variance and the weight of a normalisation γ (x − μ) / σ + β.

    Attributes:
        variance: Tensor σ², which includes ε, in a shape that broadcasts with x.
        weight: Tensor γ, in a shape that broadcasts with x; None for γ = 1.
        kept: Whether σ² is a constant of the model. If False, it is computed from the sample.
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
            name: Name of the operation, one of these four.
            x: Tensor (batch, ...) that is normalised.
            arguments: The positional arguments after x.
            named: The arguments passed by name.
        """
        passed = {**dict(zip(_PARAMETERS[name], arguments, strict=False)), **named}
        eps, weight = passed.get("eps", 1e-5), passed.get("weight")
        if name in ("layer_norm", "rms_norm"):
            dims = tuple(range(-len(passed["normalized_shape"]), 0))
            # σ² = variance + ε; for RMS norm, σ² = mean square + ε
            if name == "layer_norm":
                # 1/σ by the norm itself, since x.var takes several times as long on a CPU
                inverse = torch.native_layer_norm(x, x.shape[dims[0] :], None, None, eps)[2]
                return cls(inverse.to(x.dtype).pow(-2), weight)
            eps = torch.finfo(x.dtype).eps if passed.get("eps") is None else eps
            return cls(x.square().mean(dims, keepdim=True) + eps, weight)
        weight = None if weight is None else along(weight, x, 1)
        if not passed.get("use_input_stats", True):
            return cls(along(passed["running_var"], x, 1) + eps, weight, kept=True)
        groups = passed.get("num_groups", x.shape[1])  # instance norm: one channel per group
        variance = x.reshape(len(x), groups, -1).var(-1, correction=0)
        variance = variance.repeat_interleave(x.shape[1] // groups, 1)
        return cls(variance.view(*variance.shape, *(1,) * (x.ndim - 2)) + eps, weight)


def batch_norm(options: Options, operation: Any, x: Tensor, *arguments: Any) -> Recording:
    """Send back S: the inverse of the operation before batch norm includes the batch norm."""
    return operation(x, *arguments)[0], lambda s: s


def sample_norm(
    name: str, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> Recording:
    """Send back S ⊙ σ, σ = √(variance + ε) of the sample, or S if σ is constant in the model."""
    value = operation(x, *arguments, **named)
    norm = NormArguments.of(name, x, arguments, named)
    if not options.local or norm.kept:
        return value, lambda s: s
    # y = γ (x − μ) / σ + β: the inverse of the operation before learns γ and β, but not σ, which
    # differs from sample to sample
    sigma = norm.variance.sqrt()
    return value, lambda s: s * sigma


def _scale(name: str, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Return the factor γ / σ of a normalisation, in a shape that broadcasts with x."""
    norm = NormArguments.of(name, x, arguments, named)
    scale = norm.variance.rsqrt()
    return scale if norm.weight is None else scale * norm.weight


#: Operation → function of x and the operation's other arguments that returns γ / σ.
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
