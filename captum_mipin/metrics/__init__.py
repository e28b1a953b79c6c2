"""Metrics of attributions, whatever method they come from.

All are called alike, ``metric(method, inputs, target, ..., additional_forward_args=None, generator=None, batch_size=None)``,
take any Captum ``Attribution`` (or a callable, or maps), draw from the generator only, by default one with seed 0, leave the
model as it is, and return a :class:`Result`.
"""

from captum_mipin.metrics.common import Method
from captum_mipin.metrics.completeness import completeness
from captum_mipin.metrics.localization import (
    Boxes,
    Mosaics,
    bounding_box_accuracy,
    box_masks,
    effective_heat_ratio,
    grid_pointing_game,
    mosaics,
    pointing_game,
)
from captum_mipin.metrics.perturbation import deletion, infidelity, insertion, sensitivity_n
from captum_mipin.metrics.randomization import randomization
from captum_mipin.metrics.result import Result
from captum_mipin.metrics.sensitivity import class_sensitivity, sensitivity_max

__all__ = [
    "Boxes",
    "Method",
    "Mosaics",
    "Result",
    "bounding_box_accuracy",
    "box_masks",
    "class_sensitivity",
    "completeness",
    "deletion",
    "effective_heat_ratio",
    "grid_pointing_game",
    "infidelity",
    "insertion",
    "mosaics",
    "pointing_game",
    "randomization",
    "sensitivity_max",
    "sensitivity_n",
]
