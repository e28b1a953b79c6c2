"""What each operation does with the signal on its way back: one table, :data:`MIPIN`.

An operation sends the signal back using what this sample's own forward pass recorded about where the value came
from: ReLU mask, max-pool switch, average-pool share. Learned inverses stand where the operation has weights. Plain
linear rearrangements need no rule, for their adjoint is right.
"""

from collections.abc import Mapping
from types import MappingProxyType

from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.arithmetic import ARITHMETIC, Fork
from captum_mipin.rules.attention import ATTENTION, RECORDABLE
from captum_mipin.rules.base import Back, Inverse, Inverter, Learned, Options, Passes, Recorded, Rule, operation
from captum_mipin.rules.linear import LINEAR, PooledLinear
from captum_mipin.rules.normalization import NORMALIZATION
from captum_mipin.rules.pooling import POOLING
from captum_mipin.rules.rearrangement import REARRANGEMENT

#: Operation (as ``torch.export`` names it, "aten.relu.default") → rule.
MIPIN: Mapping[str, Rule] = MappingProxyType(
    {**LINEAR, **ACTIVATIONS, **POOLING, **NORMALIZATION, **ARITHMETIC, **REARRANGEMENT, **ATTENTION}
)

__all__ = [
    "MIPIN",
    "RECORDABLE",
    "Back",
    "Fork",
    "Inverse",
    "Inverter",
    "Learned",
    "Options",
    "Passes",
    "PooledLinear",
    "Recorded",
    "Rule",
    "operation",
]
