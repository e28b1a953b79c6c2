"""Several methods side by side: rows, errors, controls, and what is refused."""

import re
from functools import partial

import pytest
import torch
from captum.attr import Saliency

from captum_mipin import InverseNetwork, LayerMIPINAttribution, compare
from captum_mipin.comparison import METHODS, METRICS, drawing
from captum_mipin.errors import InputError
from captum_mipin.metrics import bounding_box_accuracy, deletion

CONTROLS = ["random", "centre prior", "mask only", "pattern only"]
BOXES = [(0, 0, 4, 4), (2, 2, 6, 6), (4, 4, 8, 8)]


def test_rows_are_methods_then_controls(found):
    assert [row.name for row in found.rows] == ["MIP-IN", "S", "broken", "nan", "0", *CONTROLS]
    assert [row.control for row in found.rows] == [False] * 5 + [True] * 4
    assert found.metrics == ("bounding_box_accuracy", "deletion", "completeness")


def test_a_method_that_fails_leaves_its_error_and_others_finish(found):
    broken = found["broken"]
    assert (broken.maps, broken.results) == (None, {})
    assert broken.error == "ValueError: this network <i>is not</i> supported"
    assert found["S"].errors == {
        "completeness": "the method has no source_signal; completeness needs a method "
        "that has source_signal, as MIPINAttribution has"
    }
    assert found["S"].results["deletion"].n == 3
    assert found["MIP-IN"].results["completeness"].n == 3
    assert found["nan"].results["bounding_box_accuracy"].unscored == {"NaN": (0, 1, 2)}
    with pytest.raises(KeyError, match="'Grad-CAM' is not one of 'MIP-IN'"):
        found["Grad-CAM"]


def test_scores_are_those_of_the_metrics(found, cnn):
    expected = bounding_box_accuracy(cnn.mipin, cnn.x[:3], [0, 1, 2], boxes=BOXES)
    result = found["MIP-IN"].results["bounding_box_accuracy"]
    assert torch.equal(result.values, expected.values)
    assert result.settings == {**expected.settings, "method": "MIP-IN"}
    area = 16 / 64
    assert found["0"].results["bounding_box_accuracy"].mean == area
    assert torch.equal(
        found["S"].maps,
        Saliency(cnn.model).attribute(cnn.x[:3].clone().requires_grad_(), target=[0, 1, 2]),
    )


def test_each_method_is_measured_on_the_network_that_it_explains(cnn):
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval()
    found = compare(
        {"S": Saliency(cnn.model), "other": Saliency(other)},
        cnn.x[:2],
        0,
        metrics=["deletion"],
        progress=False,
    )
    with torch.no_grad():
        for name, model in (("S", cnn.model), ("other", other)):
            torch.testing.assert_close(
                found[name].results["deletion"].curves[:, 0],
                model(cnn.x[:2]).softmax(1)[:, 0].double(),
            )


def test_in_inference_mode_and_with_a_tuple_of_one(cnn):
    ask = {"model": cnn.model, "metrics": ["deletion", "randomization"], "progress": False}
    expected = compare(["Saliency", "SmoothGrad"], cnn.x[:2], 0, **ask)
    with torch.inference_mode():
        found = compare(["Saliency", "SmoothGrad"], (cnn.x[:2].clone(),), 0, **ask)
    assert str(found) == str(expected)
    assert not any(row.error for row in found.rows)


def test_every_method_meets_the_same_draws(cnn, side_by_side):
    """Two rows of the same method are equal in all that is random, whatever comes before them."""
    methods = {"first": cnn.mipin, "other": "Saliency", "second": cnn.mipin}
    metrics = ["sensitivity_max", "infidelity", "sensitivity_n", "class_sensitivity", "deletion"]
    found = side_by_side(
        methods, metrics=metrics, boxes=None, generator=torch.Generator().manual_seed(5)
    )
    for metric in metrics:
        assert torch.equal(
            found["first"].results[metric].values, found["second"].results[metric].values
        )
    again = side_by_side(
        methods, metrics=metrics, boxes=None, generator=torch.Generator().manual_seed(5)
    )
    other = side_by_side(
        methods, metrics=metrics, boxes=None, generator=torch.Generator().manual_seed(6)
    )
    assert torch.equal(found["random"].maps, again["random"].maps)
    assert torch.equal(
        found["first"].results["infidelity"].values, again["first"].results["infidelity"].values
    )
    assert not torch.equal(
        found["first"].results["infidelity"].values, other["first"].results["infidelity"].values
    )


def test_every_method_and_metric_has_a_name_that_works(own_cnn, untouched, side_by_side):
    own_cnn.inverse.changed = "ignore"
    metrics = [name for name in METRICS if name != "grid_pointing_game"]
    # this network does not end in an average, so that its outputs have no evidence by place;
    # its inverse does not stop at a layer, which the unsigned reading needs; nor has it attention
    others = ("evidence", "contrast", "unsigned", "Rollout", "Chefer", "LeGrad")
    names = [name for name in METHODS if not any(word in name for word in others)]
    with pytest.warns(UserWarning):  # Captum's, of its hooks
        found = side_by_side(
            inverse=own_cnn.inverse, methods=names, metrics=metrics, layer=own_cnn.model[3]
        )
    assert not [row.error for row in found.rows if row.error]
    for row in found.rows:
        assert {
            "bounding_box_accuracy",
            "deletion",
            "insertion",
            "class_sensitivity",
            "sensitivity_max",
        } <= set(row.results)
    assert {row.name for row in found.rows if "completeness" in row.results} == {"MIP-IN"}
    assert {row.name for row in found.rows if "randomization" in row.results} >= {
        "MIP-IN",
        "Saliency",
        "Grad-CAM",
        "pattern only",
    }


def test_nothing_of_the_users_model_is_touched(cnn, untouched, side_by_side):
    methods = [name for name in METHODS if name != "DeepLift"]  # which warns
    with untouched(cnn.model, cnn.x):
        side_by_side(methods, layer=cnn.model[3])


def test_mosaics_and_bound_metrics(cnn, side_by_side):
    metrics = {
        "steps of 16": partial(deletion, step=16),
        "area": partial(bounding_box_accuracy, boxes=[(0, 0, 8, 8)] * 3, largest=1.0),
        "mine": lambda method, inputs, target: deletion(
            method, inputs, target, model=cnn.model, score="logit"
        ),
    }
    found = side_by_side(metrics=metrics)
    assert found["Saliency"].results["steps of 16"].curves.shape == (3, 5)
    assert found["Saliency"].results["area"].mean == 1
    assert found["MIP-IN"].results["mine"].settings["score"] == "logit"


def test_random_maps_do_not_win_the_pointing_game_of_small_images():
    """With boxes of 6 x 6 in 16 x 16 pixels, one pixel beside them counts as a hit: not 15."""
    x = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    boxes = [(5, 5, 11, 11)] * 40
    inside = torch.zeros_like(x)
    inside[:, :, 5:11, 5:11] = 1
    metrics = ["pointing_game"]
    found = compare({"ours": inside}, x, 0, metrics=metrics, boxes=boxes, progress=False)
    assert found["ours"].results["pointing_game"].mean == 1
    assert found["random"].results["pointing_game"].mean < 0.5


def test_controls_know_what_they_say(found, cnn):
    x = cnn.x[:3]
    assert found["random"].maps.shape == found["centre prior"].maps.shape == (3, 1, 8, 8)
    centre = found["centre prior"].maps
    torch.testing.assert_close(centre, centre.flip(2))
    torch.testing.assert_close(centre, centre.flip(3))
    assert (centre.flatten(1).argmax(1) == 3 * 8 + 3).all()
    assert torch.equal(found["mask only"].maps, (x != 0).float())
    assert torch.equal(
        found["pattern only"].maps, cnn.mipin.attribute(x, target=[0, 1, 2], local=False)
    )


def test_controls_of_a_layer_lie_there(cnn):
    model, layer = cnn.model, cnn.model[3]
    inverse = InverseNetwork(model, layer=layer).fit(cnn.x, progress=False)
    found = compare(
        {"ours": LayerMIPINAttribution(model, inverse)}, cnn.x[:3], 0, metrics=[], progress=False
    )
    with torch.no_grad():
        features = model[:4](cnn.x[:3])
    assert torch.equal(found["mask only"].maps, (features != 0).float())
    assert found["random"].maps.shape == (3, 1, 4, 4)
    assert found["pattern only"].maps.shape == found["ours"].maps.shape == (3, 4, 4, 4)
    named = compare(["MIP-IN"], cnn.x[:3], 0, inverse=inverse, metrics=[], progress=False)
    assert torch.equal(named["MIP-IN"].maps, found["ours"].maps)
    assert found.figure().axes


def test_without_mip_in_there_is_no_pattern(cnn):
    found = compare(["Saliency"], cnn.x[:2], 0, model=cnn.model, metrics=[], progress=False)
    assert [row.name for row in found.rows] == ["Saliency", *CONTROLS[:3]]
    alone = compare(
        ["Saliency"], cnn.x[:2], 0, model=cnn.model, metrics=[], controls=False, progress=False
    )
    assert [row.name for row in alone.rows] == ["Saliency"]
    mine = compare({"random": Saliency(cnn.model)}, cnn.x[:2], 0, metrics=[], progress=False)
    assert [row.control for row in mine.rows] == [False, True, True]


def test_what_cannot_be_compared_is_refused(cnn):
    x, model = cnn.x[:3], cnn.model
    for bad, message in (
        (lambda: compare({}, x, 0), "methods is empty, expected at least one method"),
        (
            lambda: compare(["Saliencey"], x, 0, model=model),
            "no method has the name 'Saliencey'; known are MIP-IN, MIP-IN S, ",
        ),
        (lambda: compare(["Saliency"], x, 0), "pass model="),
        (
            lambda: compare(["Saliency"], x, 0, model=model, metrics=["accuracy"]),
            "expected a list of names among bounding_box_accuracy",
        ),
        (
            lambda: compare(["Saliency"], x, 0, model=model, metrics="deletion"),
            "expected a list of names among",
        ),
        (
            lambda: compare(["Saliency"], x, 0, model=model, metrics={"a": "deletion"}),
            "expected a function",
        ),
        (
            lambda: compare(["Saliency"], x, 0, model=model, boxes=BOXES[:2]),
            "boxes for 2 images, but 3",
        ),
        (lambda: compare(["Saliency"], x, 0, model=model, titles=["a"]), "1 titles, but 3 images"),
        (
            lambda: compare(["Saliency"], x, 0, model=model, step=3),
            r"no argument 'step', .*: pass steps=$",
        ),
        (
            lambda: compare(["Saliency"], x, 0, model=model, layers=0),
            r"no argument 'layers', .*: pass layer=$",
        ),
        (
            lambda: compare(["Saliency"], x.flatten(1), 0, model=model, boxes=BOXES),
            "boxes need images",
        ),
        (lambda: compare(["Saliency"], (x, x), 0, model=model), "one input tensor"),
        (lambda: compare(["Saliency"], x, [0], model=model), "1 targets were given for 3"),
    ):
        with pytest.raises((InputError, AssertionError), match=message):
            bad()
    failed = compare(["MIP-IN", "Grad-CAM"], x, 0, model=model, metrics=[], progress=False)
    assert "pass inverse=" in failed["MIP-IN"].error
    assert "pass layer=" in failed["Grad-CAM"].error


def test_an_interrupt_is_not_an_error_of_a_method(cnn):
    def interrupted(inputs, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"a": interrupted}, cnn.x[:2], 0, progress=False)


def test_other_inputs_have_a_table_but_no_picture(mlp):
    found = compare(
        ["MIP-IN", "Saliency"], mlp.x[:4], [0, 1, 2, 0], inverse=mlp.inverse, progress=False
    )
    assert list(found.metrics) == ["deletion"]
    assert not any(row.errors for row in found.rows)
    for picture in (found.figure, lambda: found.save_html("no.html")):
        with pytest.raises(InputError, match="pictures need images") as refused:
            picture()
        named = set(re.findall(r"draw_\w+", str(refused.value)))
        assert named == {name for name in drawing.__all__ if name.startswith("draw_")}
        assert drawing.__name__ in str(refused.value)


def test_progress_goes_to_the_error_stream_and_can_be_left_out(cnn, capsys, side_by_side):
    side_by_side(metrics=[])
    assert capsys.readouterr() == ("", "")
    side_by_side(metrics=[], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "compare" in err
