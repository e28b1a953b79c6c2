"""The rules by which operations send the signal back: the table :data:`MIPIN` and its parts.

There are three kinds of rule. An operation with weights is inverted by a learned regression. An
operation without weights uses values that the sample's own forward pass recorded: the mask of a
ReLU, the switches of maximum pooling, the shares in an average. A linear rearrangement, such as a
transposition, sends the signal back by its adjoint. Users can register rules for more operations.
"""

from captum_mipin.rules.arithmetic import DIVIDED, Fork
from captum_mipin.rules.attention import RECORDABLE, WEIGHTED_SUM
from captum_mipin.rules.base import (
    Back,
    Inverse,
    Inverter,
    Learned,
    Options,
    Passes,
    Recorded,
    Rule,
)
from captum_mipin.rules.pooled import POOLED_LINEAR
from captum_mipin.rules.table import MIPIN, register_rule, table, unregister_rule

__all__ = [
    "DIVIDED",
    "MIPIN",
    "POOLED_LINEAR",
    "RECORDABLE",
    "WEIGHTED_SUM",
    "Back",
    "Fork",
    "Inverse",
    "Inverter",
    "Learned",
    "Options",
    "Passes",
    "Recorded",
    "Rule",
    "register_rule",
    "table",
    "unregister_rule",
]
