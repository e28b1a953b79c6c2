"""Further methods on the same mechanism: each a table of rules, and a Captum attribution."""

from captum_mipin.methods.base import LayerPropagation
from captum_mipin.methods.gradients import Deconvnet, GuidedBackprop

__all__ = ["Deconvnet", "GuidedBackprop", "LayerPropagation"]
