"""MIP-IN for Captum: attributions from a learned inverse of the network."""

from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.bottleneck import Bottleneck
from captum_mipin.compare import Comparison, compare
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
from captum_mipin.iba import IBA
from captum_mipin.input_iba import Adversary, InputIBA, ThreeStages
from captum_mipin.inverse import InverseNetwork, check
from captum_mipin.rules import Learned, Passes, Recorded, register_rule, unregister_rule

__version__ = "0.1.0"

__all__ = [
    "IBA",
    "Adversary",
    "Bottleneck",
    "CaptureError",
    "Comparison",
    "FitError",
    "InputError",
    "InputIBA",
    "InverseFileError",
    "InverseNetwork",
    "LayerMIPINAttribution",
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
    "ThreeStages",
    "TrainingModeError",
    "UnsupportedOperationError",
    "__version__",
    "check",
    "compare",
    "register_rule",
    "unregister_rule",
]
