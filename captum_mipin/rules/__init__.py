"""What each operation does with the signal: the table :data:`MIPIN`, and what users add to it.

An operation sends the signal back using what this sample's own forward pass recorded about where
the value came from: ReLU mask, max-pool switch, average-pool share. Learned inverses stand where
the operation has weights. Plain linear rearrangements need no rule: their adjoint is right.
"""

from captum_mipin.rules.arithmetic import Fork
from captum_mipin.rules.attention import RECORDABLE
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
from captum_mipin.rules.linear import PooledLinear
from captum_mipin.rules.table import MIPIN, register_rule, table, unregister_rule

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
    "register_rule",
    "table",
    "unregister_rule",
]
