"""Information bottlenecks: IBA at a layer, InputIBA at the input."""

from captum_mipin.bottleneck.gaussian import Bottleneck
from captum_mipin.bottleneck.iba import IBA, EstimateReport
from captum_mipin.bottleneck.input_iba import Adversary, InputIBA, ThreeStages

__all__ = ["IBA", "Adversary", "Bottleneck", "EstimateReport", "InputIBA", "ThreeStages"]
