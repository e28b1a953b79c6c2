"""Attributions by information bottlenecks: IBA at a layer, and InputIBA at the input."""

from captum_mipin.bottleneck.adversary import Adversary
from captum_mipin.bottleneck.features import EstimateReport
from captum_mipin.bottleneck.gaussian import Bottleneck
from captum_mipin.bottleneck.iba import IBA
from captum_mipin.bottleneck.input_iba import InputIBA, ThreeStages

__all__ = ["IBA", "Adversary", "Bottleneck", "EstimateReport", "InputIBA", "ThreeStages"]
