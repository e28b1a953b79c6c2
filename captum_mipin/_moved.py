"""The public names of version 0.1 that are elsewhere now."""

import warnings
from importlib import import_module
from typing import Any

from captum_mipin.errors import MissingNameError
from captum_mipin.options import closest

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
        MissingNameError: There is no such name.
    """
    rooms = ("methods", "bottleneck", "comparison", "rules", "errors")
    for address in (_CLASSES.get(name, ""), *(f"{_PACKAGE}.{room}.{name}" for room in rooms)):
        module, _, new = address.rpartition(".")
        value = getattr(import_module(module), new, None) if module else None
        if callable(value) and new[0] != "_" and value.__module__.startswith(module.split(".")[0]):
            text = f"{_PACKAGE}.{name} is now {address}: write from {module} import {new}"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return value
    names = {known: room for room in (*rooms, "metrics") for known in _public(f"{_PACKAGE}.{room}")}
    advice = f"it is {_PACKAGE}.{names[name]}.{name}" if name in names else "import another name"
    public = closest(name, {*names, *_public(_PACKAGE)})
    raise MissingNameError(
        f"module {_PACKAGE!r} has no attribute {name!r}, expected some of {public}: {advice}"
    )


def _public(module: str) -> list[str]:
    names: list[str] = getattr(import_module(module), "__all__", [])
    return names
