"""The public names of version 0.1 that are elsewhere now."""

import warnings
from importlib import import_module
from typing import Any

_PACKAGE = __name__.partition(".")[0]

#: Function of version 0.1 → the class that it made an object of.
_CLASSES = {
    "deep_lift": "captum.attr.DeepLift",
    "grad_cam": "captum_mipin.methods.GradCAM",
    "integrated_gradients": "captum.attr.IntegratedGradients",
    "saliency": "captum.attr.Saliency",
    "smooth_grad": "captum_mipin.methods.SmoothGrad",
}


def find(name: str) -> Any:
    """Return a name that the package itself had from where it is now, with a DeprecationWarning.

    Raises:
        AttributeError: There is no such name.
    """
    rooms = ("methods", "bottleneck", "comparison", "rules", "errors")
    for address in (_CLASSES.get(name, ""), *(f"{_PACKAGE}.{room}.{name}" for room in rooms)):
        module, _, new = address.rpartition(".")
        value = getattr(import_module(module), new, None) if module else None
        if callable(value) and new[0] != "_" and value.__module__.startswith(module.split(".")[0]):
            text = f"{_PACKAGE}.{name} is now {address}: write from {module} import {new}"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return value
    raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
