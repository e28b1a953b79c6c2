"""Names that version 0.1 had at the top are found where they are now, with a word."""

import subprocess
import sys
from importlib import import_module

import pytest

import captum_mipin

#: Where the public names of version 0.1 are now, all of them.
NOW = {
    "captum_mipin": [
        "IBA", "LRP", "InputIBA", "InverseNetwork", "LayerMIPINAttribution", "MIPINAttribution",
        "MIPINError", "NeighbourInverse", "__version__", "check", "compare", "register_rule",
    ],
    "captum_mipin.bottleneck": ["Adversary", "Bottleneck", "ThreeStages"],
    "captum_mipin.comparison": ["Comparison"],
    "captum_mipin.errors": [
        "CaptureError", "FitError", "InputError", "InverseFileError", "ModelChangedError",
        "ModelChangedWarning", "NotFittedError", "RuleError", "TargetError", "TargetRangeError",
        "TrainingModeError", "UnsupportedOperationError",
    ],
    "captum_mipin.methods": [
        "AlphaBeta", "Deconvnet", "DeepTaylor", "Epsilon", "ExcitationBackprop", "Flat", "Gamma",
        "GradCAM", "GuidedBackprop", "LayerPropagation", "PatternAttribution", "PatternNet",
        "Patterns", "SmoothGrad", "WSquare", "ZBox", "ZPlus",
    ],
    "captum_mipin.rules": ["Learned", "Passes", "Recorded", "unregister_rule"],
}  # fmt: skip
#: Functions of version 0.1 that only made an object of a class.
CLASSES = {
    "deep_lift": ("captum.attr", "DeepLift"),
    "grad_cam": ("captum_mipin.methods", "GradCAM"),
    "integrated_gradients": ("captum.attr", "IntegratedGradients"),
    "saliency": ("captum.attr", "Saliency"),
    "smooth_grad": ("captum_mipin.methods", "SmoothGrad"),
}
MOVED = {name: (module, name) for module, names in NOW.items() for name in names} | CLASSES


@pytest.mark.parametrize("name", MOVED)
def test_every_name_of_version_0_1_is_found(name: str) -> None:
    module, new = MOVED[name]
    if module == "captum_mipin":
        assert name in captum_mipin.__all__
        return
    with pytest.warns(DeprecationWarning, match=f"write from {module} import {new}$") as caught:
        value = getattr(captum_mipin, name)
    assert value is getattr(import_module(module), new)
    assert caught[0].filename == __file__


def test_a_script_of_version_0_1_runs_and_is_told_the_new_address() -> None:
    script = (
        "from captum_mipin import LRP, Passes, saliency; print(Passes.__name__, saliency.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "Passes Saliency\n"
    assert "captum_mipin.Passes is now captum_mipin.rules.Passes" in done.stderr


@pytest.mark.parametrize("name", ["Any", "nothing", "__wrapped__", "_Any", "import_module"])
def test_other_names_are_not_there(name: str) -> None:
    assert name not in dir(captum_mipin)
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(captum_mipin, name)


def test_old_names_are_not_listed() -> None:
    assert not {"Passes", "saliency", "GradCAM"} & set(dir(captum_mipin))
