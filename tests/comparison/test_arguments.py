"""What users pass: methods in any form, layers by name, targets; all checked before any work."""

import json
import re
from functools import partial

import pytest
import torch
from captum import attr
from captum.attr import IntegratedGradients, Saliency
from small import Function
from torch import nn

from captum_mipin import LRP, InverseNetwork, LayerMIPINAttribution, MIPINAttribution, compare
from captum_mipin.comparison.arguments import named_methods
from captum_mipin.errors import InputError, TargetError, TrainingModeError
from captum_mipin.metrics import deletion
from captum_mipin.photographs import PhotographAttribution

ASK = {"metrics": ["deletion"], "controls": False, "progress": False}


def half(inputs, target):
    return inputs / 2


@pytest.fixture
def asked():
    """Calls of a method that notes them: there are none if arguments are checked before."""
    return []


@pytest.fixture
def noting(asked):
    def method(inputs, target):
        asked.append(len(inputs))
        return inputs

    return method


def test_methods_in_any_form_are_told_apart_and_shown(cnn, tmp_path):
    """Names, attributions, bound options, functions and maps, several of them of one name."""
    x, model = cnn.x[:2], cnn.model
    saliency, ig = Saliency(model), IntegratedGradients(model)
    methods = [
        *("Saliency", saliency, partial(saliency.attribute, abs=False), LRP(model), LRP(model)),
        *(half, lambda x, target: x, partial(half), partial(ig.attribute, n_steps=2), x, "LRP"),
    ]
    labels = [
        *("Saliency", "Saliency (2)", "Saliency (3)", "LRP", "LRP (2)"),
        *("half", "lambda", "half (2)", "Integrated Gradients", "maps", "LRP (3)"),
    ]
    for form in (methods, tuple(methods), iter(methods)):
        found = compare(form, x, [0, 1], model=model, **ASK)
        assert [row.name for row in found.rows] == labels
        assert not any(row.errors for row in found.rows)
    assert torch.equal(found["Saliency"].maps, found["Saliency (2)"].maps)
    assert not torch.equal(found["Saliency (2)"].maps, found["Saliency (3)"].maps)
    assert torch.equal(found["half (2)"].maps, x / 2)
    assert [line.split("  ")[0] for line in str(found).splitlines()[1:12]] == labels
    assert all(f"| {label} |" in found.table("markdown") for label in labels)
    assert [row["name"] for row in json.loads(json.dumps(found.to_dict()))["rows"]] == labels
    found.save_html(tmp_path / "page.html")
    drawn = found.figure().axes[1 : len(labels) + 1]
    assert [axis.get_title().replace("\n", " ") for axis in drawn] == labels


def test_one_method_needs_no_list(cnn):
    x, model = cnn.x[:2], cnn.model
    for method, label in (
        *(("MIP-IN", "MIP-IN"), (cnn.mipin, "MIP-IN"), (LRP(model), "LRP"), (half, "half")),
        *((Saliency(model).attribute, "Saliency"), (x, "maps")),
    ):
        found = compare(method, x, 0, inverse=cnn.inverse, **ASK)
        assert [row.name for row in found.rows] == [label]
        assert not found[label].errors
    assert len(found.figure("maps").axes) == 2 * 2 + 1  # two images with maps, and the legend


def test_labels_are_text(cnn, tmp_path):
    found = compare({1: half, "1": half, 2: "Saliency"}, cnn.x[:2], 0, model=cnn.model, **ASK)
    assert [row.name for row in found.rows] == ["1", "1 (2)", "2"]
    found = compare(half, cnn.x[:2], 0, model=cnn.model, **{**ASK, "metrics": {7: deletion}})
    assert str(found).splitlines()[0].split() == ["method", "7", "↓"]
    found.save_html(tmp_path / "page.html")


def test_what_is_no_method_is_refused_before_any_work(cnn, noting, asked):
    x, model = cnn.x[:2], cnn.model
    for methods, options, message in (
        (5, {}, "methods is an int, expected methods or their names: pass a list"),
        ([], {}, "methods is empty, expected at least one method"),
        ([noting, "Saliencey"], {}, "no method has the name 'Saliencey'; known are MIP-IN,"),
        ("Saliencey", {}, "no method has the name 'Saliencey'"),
        ([noting, LRP], {}, r"method 'LRP' is the class LRP, .* pass for example LRP\(model\)"),
        ({"a": noting, "b": 3}, {}, "method 'b' is an int, expected a name, a Captum Attribution"),
        ([noting, None], {}, "method 'NoneType' is None, expected a name"),
        (noting, {"model": "resnet"}, "model is a str, expected a torch.nn.Module or a function"),
        (noting, {"inverse": model}, "inverse is a Sequential, expected an InverseNetwork"),
        (noting, {"metrics": [deletion]}, "expected a list of names among bounding_box_accuracy"),
        (
            noting,
            {"metrics": [["deletion"]]},
            "expected a list of names among bounding_box_accuracy",
        ),
    ):
        with pytest.raises(InputError, match=message):
            compare(methods, x, 0, **{"model": model, **ASK, **options})
    assert not asked


def test_a_layer_goes_by_its_dotted_name(cnn):
    parts = {"body": cnn.model[:4], "head": cnn.model[4:]}
    model = Function(lambda layers, x: layers["head"](layers["body"](x)), **parts)
    names = ["Grad-CAM", "Grad×Feature"]
    ask = {"model": model.eval(), **ASK}
    found = compare(names, cnn.x[:2], 0, layer="layers.body.3", **ask)
    assert not any(row.errors for row in found.rows)
    expected = compare(names, cnn.x[:2], 0, layer=model.layers["body"][3], **ask)
    for name in names:
        assert torch.equal(found[name].maps, expected[name].maps)
    wrapped = {**ask, "model": torch.nn.DataParallel(cnn.model).eval()}
    assert not compare("Grad-CAM", cnn.x[:2], 0, layer="3", **wrapped)["Grad-CAM"].errors


def test_a_layer_that_is_not_of_the_model_is_refused_before_any_work(cnn, noting, asked):
    for layer, message in (
        ("layer4", "layer is 'layer4', expected a module of the Sequential that is explained, or"),
        ("", "layer is '', expected a module"),
        (3, "layer is an int, expected a module"),
        (torch.nn.Linear(2, 2), r"layer is a Linear, expected .*model.named_modules\(\): pass"),
    ):
        with pytest.raises(InputError, match=message):
            compare(["Grad-CAM", noting], cnn.x[:2], 0, model=cnn.model, layer=layer, **ASK)
    with pytest.raises(InputError, match="layer='3' cannot be looked up without the network"):
        compare(noting, cnn.x[:2], 0, layer="3", **ASK)
    with pytest.raises(InputError, match="pass for example one of '3', "):
        compare("Grad-CAM", cnn.x[:2], 0, model=cnn.model, layer="3.weight", **ASK)
    assert not asked


def test_targets_that_fit_no_output_are_refused_before_any_work(cnn, noting, asked):
    x = cnn.x[:3]
    missing = (
        "no targets were given, but the model has outputs of shape (3,) for each image, expected "
        "the class to explain: pass targets=, one class for all images or a list with one class "
        "per image"
    )
    for methods in ("Saliency", [noting, Saliency(cnn.model)], {"a": noting, "b": cnn.mipin}):
        model = {"model": cnn.model} if methods == "Saliency" else {}
        with pytest.raises(TargetError, match=re.escape(missing)):
            compare(methods, x, **model, **ASK)
    for targets, message in (
        (3, r"target 3 is outside the model's outputs of shape \(3,\)"),
        ([0, 1, 7], "target 7 is outside"),
        (torch.zeros(3, 1).long(), r"shape \(3, 1\), expected one dimension"),
        ("cat", "target 'cat' is a str"),
    ):
        with pytest.raises(TargetError, match=message):
            compare([noting, "Saliency"], x, targets, model=cnn.model, **ASK)
    assert not asked


def test_no_target_is_needed_for_one_output(cnn):
    """Nor where a method explains a network of its own that has one."""
    one = torch.nn.Sequential(cnn.model, torch.nn.Linear(3, 1)).eval()
    options = {**ASK, "metrics": {"deletion": partial(deletion, score="logit")}}
    found = compare("Saliency", cnn.x[:2], model=one, **options)
    assert not found["Saliency"].errors
    methods = {"three": Saliency(cnn.model), "one": Saliency(one)}
    for named in (methods, dict(reversed(methods.items()))):
        found = compare(named, cnn.x[:2], **options)
        assert not found["one"].errors
        assert "no target was given" in found["three"].error


def test_a_model_in_training_mode_is_refused_and_left_alone(own_cnn, noting, asked, untouched):
    own_cnn.model.append(nn.Dropout())
    with untouched(own_cnn.model), pytest.raises(TrainingModeError, match=r"call model\.eval\(\)"):
        compare([noting, "Saliency"], own_cnn.x[:2], 0, model=own_cnn.model, **ASK)
    assert not asked


def test_a_model_that_cannot_be_asked_leaves_its_error_in_the_rows(cnn):
    found = compare([half], cnn.x[:2], 0, model=lambda x: [x], **ASK)
    assert "the model gives a list" in found["half"].errors["deletion"]


def test_the_unsigned_reading_is_the_map_for_photographs():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    ).eval()
    x = torch.rand(20, 3, 8, 8)
    inverse = InverseNetwork(model, layer=model[1]).fit(x, 0, progress=False)
    mipin = LayerMIPINAttribution(model, inverse)
    name = "MIP-IN unsigned × gradient"
    ask = {"inverse": inverse, "metrics": [], "controls": False, "progress": False}
    found = compare(["mip-in Unsigned x gradient"], x[:3], 0, **ask)
    expected = mipin.attribute(x[:3], target=0, multiply_by_gradients=True).abs().sum(1, True)
    assert list(named_methods([PhotographAttribution(model, inverse)])) == [name]
    torch.testing.assert_close(found[name].maps, expected)
    pixels = InverseNetwork(model).fit(x, 0, progress=False)
    found = compare([name, "Saliency"], x[:3], 0, **{**ask, "inverse": pixels})
    assert "fitted with layer=" in found[name].error


def test_evidence_times_input_is_that_of_the_pixels():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    x = torch.rand(20, 3, 8, 8)
    inverse = InverseNetwork(model).fit(x, 0, progress=False)
    ask = {"inverse": inverse, "metrics": [], "controls": False, "progress": False}
    found = compare(
        ["MIP-IN evidence x input", "MIP-IN × input", "MIP-IN contrast x input"], x[:3], 0, **ask
    )
    mipin = MIPINAttribution(model, inverse)
    for name, options in (
        ("MIP-IN evidence × input", {"evidence": True}),
        ("MIP-IN × input", {}),
        ("MIP-IN contrast × input", {"contrast": True}),
    ):
        expected = mipin.attribute(x[:3], target=0, **options) * x[:3]
        torch.testing.assert_close(found[name].maps, expected)


def test_labels_are_names_that_compare_takes(cnn, side_by_side):
    """Captum's own spellings, readings of MIP-IN, and controls come back under the same label."""
    model, mipin = cnn.model, cnn.mipin
    methods = [
        attr.IntegratedGradients(model),
        attr.InputXGradient(model),
        attr.DeepLift(model),
        attr.LayerGradCam(model, model[3]).attribute,
        mipin,
        partial(mipin.attribute, multiply_by_inputs=True),
        partial(mipin.attribute, multiply_by_gradients=True, evidence=True),
        partial(mipin.attribute, contrast=True, multiply_by_gradients=True),
        mipin.source_signal,
    ]
    names = list(named_methods(methods))
    assert names == [
        "Integrated Gradients",
        "Input×Gradient",
        "DeepLift",
        "Grad-CAM",
        "MIP-IN",
        "MIP-IN × input",
        "MIP-IN evidence × gradient",
        "MIP-IN contrast × gradient",
        "MIP-IN S",
    ]
    assert set(named_methods(names).values()) == set(names)
    assert list(named_methods(["gradcam", "mip-in s", "LRP", "lrp"])) == [
        "Grad-CAM",
        "MIP-IN S",
        "LRP",
        "LRP (2)",
    ]
    found = side_by_side(["Random", "MIP-IN S", "pattern only"], controls=False, metrics=[])
    assert [(row.name, row.control, row.error) for row in found.rows] == [
        ("MIP-IN S", False, ""),
        ("random", True, ""),
        ("pattern only", True, ""),
    ]
    x = cnn.x[:3]
    torch.testing.assert_close(found["MIP-IN S"].maps, mipin.source_signal(x, target=[0, 1, 2]))
    alone = side_by_side(["pattern only", "Saliency"], inverse=None, model=model, metrics=[])
    assert "add MIP-IN to the methods" in alone["pattern only"].error
