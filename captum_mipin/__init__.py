"""Explain predictions with MIP-IN, inside Captum.

This module has the names that most users need. Further names are in ``captum_mipin.methods``,
``bottleneck``, ``metrics``, ``rules`` and ``errors``.
"""

from captum_mipin import _moved
from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.bottleneck import IBA, InputIBA
from captum_mipin.comparison import compare
from captum_mipin.errors import MIPINError
from captum_mipin.inverse import InverseNetwork, NeighbourInverse
from captum_mipin.methods import LRP
from captum_mipin.photographs import for_photographs
from captum_mipin.propagation.check import check
from captum_mipin.rules import register_rule
from captum_mipin.version import __version__

__all__ = [
    "IBA",
    "LRP",
    "InputIBA",
    "InverseNetwork",
    "LayerMIPINAttribution",
    "MIPINAttribution",
    "MIPINError",
    "NeighbourInverse",
    "__version__",
    "check",
    "compare",
    "for_photographs",
    "register_rule",
]

globals()["__getattr__"] = _moved.find  # in this form, type checkers still report unknown names
