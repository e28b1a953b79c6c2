"""Metrics of attributions by any method.

Every metric has the same call, ``metric(method, inputs, target, *, ..., **options)``, and returns a
:class:`Result`. The options that every metric takes are those of :class:`Options`. The method is a
Captum ``Attribution``, a callable, or maps computed before, see ``Method``. All random numbers come
from the option ``generator``. No metric changes the model.

Every metric can raise :class:`~captum_mipin.errors.InputError` for arguments that do not fit each
other, :class:`~captum_mipin.errors.TargetError` for targets that do not fit the outputs, and
:class:`~captum_mipin.errors.TrainingModeError` for a model in training mode.
"""

from captum_mipin.metrics.apc import completeness
from captum_mipin.metrics.baselines import Baseline
from captum_mipin.metrics.boxes import (
    Boxes,
    bounding_box_accuracy,
    box_masks,
    effective_heat_ratio,
    pointing_game,
)
from captum_mipin.metrics.case import Method, Options
from captum_mipin.metrics.classes import class_sensitivity
from captum_mipin.metrics.grid import Mosaics, grid_pointing_game, mosaics
from captum_mipin.metrics.noise import infidelity, sensitivity_max
from captum_mipin.metrics.random_weights import randomization
from captum_mipin.metrics.replacement import deletion, insertion, sensitivity_n
from captum_mipin.metrics.result import Result

__all__ = [
    "Baseline",
    "Boxes",
    "Method",
    "Mosaics",
    "Options",
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
