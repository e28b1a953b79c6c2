"""Run Captum's own tests with the classes of this package in place of Captum's.

    python benchmarks/captum_tests.py FOLDER     FOLDER: Captum's repository at a release tag

Captum's tests for the replaced classes must pass, except those that docs/methods.md lists with the
reason. The tests import models from ``captum.testing``, which the wheels of Captum 0.9 contain.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from captum import attr

from captum_mipin.methods import LRP, Deconvnet, GuidedBackprop, LayerPropagation
from captum_mipin.methods.gradients import Gradient

FILES = (
    "saliency", "input_x_gradient", "guided_backprop", "deconvolution", "lrp", "guided_grad_cam",
    "data_parallel", "targets", "hook_removal", "layer_lrp", "layer_gradient_x_activation",
)  # fmt: skip


def _abs(maps: Any) -> Any:
    return tuple(map(_abs, maps)) if isinstance(maps, tuple) else maps.abs()


class Saliency(Gradient):
    """The gradient with Captum's order of arguments."""

    def attribute(  # type: ignore[override]  # Captum's order
        self, inputs: Any, target: Any = None, abs: bool = True, extras: Any = None, **named: Any
    ) -> Any:
        extras = named.get("additional_forward_args", extras)
        maps = Gradient.attribute(self, inputs, target, extras)
        return _abs(maps) if abs else maps

    attribute.__wrapped__ = attribute  # type: ignore[attr-defined]


class InputXGradient(Gradient):
    """The gradient times the input."""

    def attribute(self, *arguments: Any, **named: Any) -> Any:
        return Gradient.attribute(self, *arguments, **named, multiply_by_inputs=True)

    attribute.__wrapped__ = attribute  # type: ignore[attr-defined]

    @property
    def multiplies_by_inputs(self) -> bool:
        return True


class LayerLRP(LayerPropagation):
    """LRP at a layer, made as in Captum."""

    def __init__(self, model: Any, layer: Any) -> None:
        super().__init__(LRP(model), layer)


class LayerGradientXActivation(LayerPropagation):
    """The gradient times the activation at a layer, made as in Captum."""

    def __init__(
        self, forward_func: Any, layer: Any, device_ids: Any = None, multiply_by_inputs: bool = True
    ) -> None:
        super().__init__(Gradient(forward_func), layer)
        self.times = multiply_by_inputs

    def attribute(self, *arguments: Any, grad_kwargs: Any = None, **named: Any) -> Any:
        return LayerPropagation.attribute(
            self, *arguments, **named, multiply_by_features=self.times
        )

    attribute.__wrapped__ = attribute  # type: ignore[attr-defined]

    @property
    def multiplies_by_inputs(self) -> bool:
        return self.times


REPLACED = {
    "saliency.Saliency": Saliency,
    "input_x_gradient.InputXGradient": InputXGradient,
    "guided_backprop_deconvnet.GuidedBackprop": GuidedBackprop,
    "guided_backprop_deconvnet.Deconvolution": Deconvnet,
    "lrp.LRP": LRP,
    "layer.layer_lrp.LayerLRP": LayerLRP,
    "layer.layer_gradient_x_activation.LayerGradientXActivation": LayerGradientXActivation,
}


def main(folder: str) -> int:
    """Replace Captum's classes, run the tests, and return pytest's exit code."""
    for path, kind in REPLACED.items():
        module, _, name = path.rpartition(".")
        setattr(import_module(f"captum.attr._core.{module}"), name, kind)
        setattr(attr, name, kind)
    tests = [*Path(folder, "tests", "attr").rglob("test_*.py")]
    files = [str(path) for path in tests if path.stem.removeprefix("test_") in FILES]
    options = ["-q", "--import-mode=importlib", "--tb=line", "-W", "ignore", f"--rootdir={folder}"]
    names = "saliency or inputx or input_x or guided or deconv or lrp or gradientx or gradient_x"
    return int(
        pytest.main([*files, *options, "-k", names, "-c", "/dev/null", "-p", "no:cacheprovider"])
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
