"""Further attribution methods for Captum; most of them are tables of rules, like MIP-IN."""

from captum_mipin.methods.at_layer import LayerPropagation
from captum_mipin.methods.attention import AttentionRollout, Chefer, LeGrad, patch_map
from captum_mipin.methods.excitation import ExcitationBackprop
from captum_mipin.methods.gradients import Deconvnet, GuidedBackprop
from captum_mipin.methods.lrp.lrp import LRP, DeepTaylor
from captum_mipin.methods.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from captum_mipin.methods.patterns.attributions import PatternAttribution, PatternNet
from captum_mipin.methods.patterns.fit import Patterns
from captum_mipin.methods.standard import GradCAM, SmoothGrad

__all__ = [
    "LRP",
    "AlphaBeta",
    "AttentionRollout",
    "Chefer",
    "Deconvnet",
    "DeepTaylor",
    "Epsilon",
    "ExcitationBackprop",
    "Flat",
    "Gamma",
    "GradCAM",
    "GuidedBackprop",
    "LayerPropagation",
    "LeGrad",
    "PatternAttribution",
    "PatternNet",
    "Patterns",
    "SmoothGrad",
    "WSquare",
    "ZBox",
    "ZPlus",
    "patch_map",
]
