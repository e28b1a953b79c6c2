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
    TargetError,
    TargetRangeError,
    TrainingModeError,
    UnsupportedOperationError,
)  # fmt: skip
from captum_mipin.inverse import InverseNetwork, check

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "FitError",
    "InputError",
    "InverseFileError",
    "InverseNetwork",
    "LayerMIPINAttribution",
    "MIPINAttribution",
    "MIPINError",
    "ModelChangedError",
    "NotFittedError",
    "TargetError",
    "TargetRangeError",
    "TrainingModeError",
    "UnsupportedOperationError",
    "__version__",
    "check",
]
