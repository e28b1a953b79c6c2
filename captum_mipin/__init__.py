"""MIP-IN for Captum: attributions from a learned inverse of the network."""

from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.errors import (
    CaptureError,
    FitError,
    InputError,
    InverseFileError,
    MIPINError,
    ModelChangedError,
    NotFittedError,
    RuleError,
    TargetError,
    TargetRangeError,
    TrainingModeError,
    UnsupportedOperationError,
)  # fmt: skip
from captum_mipin.inverse import InverseNetwork, check
from captum_mipin.methods import Deconvnet, GuidedBackprop, LayerPropagation
from captum_mipin.rules import Learned, Passes, Recorded, register_rule, unregister_rule

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Deconvnet",
    "FitError",
    "GuidedBackprop",
    "InputError",
    "InverseFileError",
    "InverseNetwork",
    "LayerMIPINAttribution",
    "LayerPropagation",
    "Learned",
    "MIPINAttribution",
    "MIPINError",
    "ModelChangedError",
    "NotFittedError",
    "Passes",
    "Recorded",
    "RuleError",
    "TargetError",
    "TargetRangeError",
    "TrainingModeError",
    "UnsupportedOperationError",
    "__version__",
    "check",
    "register_rule",
    "unregister_rule",
]
