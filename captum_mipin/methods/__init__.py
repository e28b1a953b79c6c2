"""Further methods on the same mechanism: each a table of rules, and a Captum attribution."""

from captum_mipin.methods.base import LayerPropagation
from captum_mipin.methods.excitation import ExcitationBackprop
from captum_mipin.methods.gradients import Deconvnet, GuidedBackprop
from captum_mipin.methods.lrp import (
    LRP,
    AlphaBeta,
    DeepTaylor,
    Epsilon,
    Flat,
    Gamma,
    WSquare,
    ZBox,
    ZPlus,
)
from captum_mipin.methods.patterns import PatternAttribution, PatternNet, Patterns
from captum_mipin.methods.standard import GradCAM, SmoothGrad

__all__ = [
    "LRP",
    "AlphaBeta",
    "Deconvnet",
    "DeepTaylor",
    "Epsilon",
    "ExcitationBackprop",
    "Flat",
    "Gamma",
    "GradCAM",
    "GuidedBackprop",
    "LayerPropagation",
    "PatternAttribution",
    "PatternNet",
    "Patterns",
    "SmoothGrad",
    "WSquare",
    "ZBox",
    "ZPlus",
]
