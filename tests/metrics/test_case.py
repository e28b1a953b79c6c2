"""Any method gives its maps, any model its scores; what cannot be asked is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from small import normal
from torch import nn

from captum_mipin.errors import InputError, TargetError, TrainingModeError
from captum_mipin.metrics import (
    bounding_box_accuracy,
    class_sensitivity,
    completeness,
    deletion,
    effective_heat_ratio,
    grid_pointing_game,
    infidelity,
    insertion,
    pointing_game,
    randomization,
    sensitivity_max,
    sensitivity_n,
)
from captum_mipin.metrics.case import Case
from captum_mipin.metrics.examples import Examples
from captum_mipin.metrics.maps import heat, resized


def maps_of(method, x, target, size=None):
    return Case.of(method, x, target, batch_size=size).maps


def scores(model, x, target, score="logit", **options):
    case = Case.of(x, x, target, model=model, **options)
    return case.scores(case.examples, score)


def test_any_kind_of_method_gives_its_maps(mlp):
    x, targets, saliency = mlp.x[:5], [0, 1, 2, 1, 0], Saliency(mlp.model)
    expected = saliency.attribute(x.clone().requires_grad_(), target=targets)
    for method in (
        saliency,
        saliency.attribute,
        partial(saliency.attribute, abs=True),
        lambda a, b: saliency.attribute(a.requires_grad_(), target=b),
        expected,
        (expected,),
    ):
        for size in (None, 2):
            (found,) = maps_of(method, x, targets, size)
            assert torch.equal(found, expected)
            assert not found.requires_grad


def test_options_bound_to_attribute_are_not_taken_for_targets(mlp):
    """``IntegratedGradients.attribute`` has baselines where others have the target."""
    x = mlp.x[:3]
    ig = IntegratedGradients(mlp.model)
    (found,) = maps_of(partial(ig.attribute, n_steps=7), x, 2)
    assert torch.equal(found, ig.attribute(x, target=2, n_steps=7))


def test_further_arguments_go_with_their_examples():
    reason = "Captum 0.8 comes without its models for tests"
    basic = pytest.importorskip("captum.testing.helpers.basic_models", reason=reason)
    model = basic.BasicModel_MultiLayer().eval()
    x, extra = normal(6, 3), normal(6, 3, seed=1)

    def method(inputs, target, extras):
        assert extras[0].shape == inputs.shape
        return inputs * extras[0] + target.view(-1, 1) + extras[1]

    options = {"additional_forward_args": (extra, 2), "batch_size": 4}
    (found,) = Case.of(method, x, torch.arange(6), **options).maps
    assert torch.equal(found, x * extra + torch.arange(6).view(-1, 1) + 2)
    picked = Examples.of(x, [0, 1] * 3, (extra[:1],)).select(torch.tensor([5, 0, 0]))
    assert picked.target == [1, 0, 0]
    assert torch.equal(picked.extras[0], extra[:1])
    assert torch.equal(
        scores(lambda a, add: model(a, add), x, 1, additional_forward_args=extra),
        model(x, extra)[:, 1].detach().double(),
    )


def test_several_inputs():
    a, b = normal(4, 3), normal(4, 2, seed=1)
    (first, second) = maps_of(lambda inputs, target: tuple(2 * x for x in inputs), (a, b), 0, 3)
    assert torch.equal(first, 2 * a)
    assert torch.equal(second, 2 * b)
    with pytest.raises(InputError, match="needs one input tensor, but there are 2"):
        _ = Examples.of((a, b), 0).x


def test_nothing_of_the_users_is_touched(mlp, untouched):
    x = mlp.x[:4].clone()
    with untouched(mlp.model, x):
        maps_of(lambda inputs, target: inputs.mul_(0), x, 0)
        maps_of(Saliency(mlp.model), x, 0)
        completeness(mlp.mipin, x, [0, 1, 2, 0])
    with untouched(mlp.model, x), pytest.raises(ZeroDivisionError):
        maps_of(lambda inputs, target: 1 / 0, x, 0)


def test_works_under_no_grad_and_in_inference_mode(mlp):
    x = mlp.x[:4]
    (expected,) = maps_of(Saliency(mlp.model), x, 0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(maps_of(Saliency(mlp.model), x, 0)[0], expected)


def test_what_cannot_be_a_question_is_refused(mlp):
    x = mlp.x[:4]
    for bad, error, message in (
        (lambda: Examples.of([x], 0), InputError, "inputs are a list"),
        (lambda: Examples.of(x[:0], 0), InputError, "at least one"),
        (lambda: Examples.of((x, x[:2]), 0), InputError, "same number"),
        (lambda: Examples.of(x, [0, 1]), TargetError, "2 targets were given for 4 examples"),
        (
            lambda: Examples.of(x, torch.tensor([0, 1])),
            TargetError,
            "2 targets were given for 4 examples",
        ),
        (
            lambda: maps_of(lambda a, b: a[:2], x, 0),
            InputError,
            "one map for each of 4",
        ),
        (lambda: maps_of(lambda a, b: "no", x, 0), InputError, "gave a str"),
        (lambda: maps_of("Saliency", x, 0), InputError, "the method is a str"),
        (lambda: maps_of(x[:2], x, 0), InputError, "one map for each of 4"),
        (lambda: maps_of(lambda a, b: a, x, 0, 0), InputError, "batch_size=0"),
        (lambda: completeness(x, x, 0), InputError, "that has source_signal"),
        (lambda: completeness(mlp.inverse, x, 0), InputError, "pass control=False"),
        (lambda: completeness(mlp.inverse, x, 0, control=False), InputError, "pass model="),
        (lambda: completeness(mlp.mipin, x, 0, average="both"), InputError, "average='both'"),
        (lambda: completeness(mlp.mipin, x, 9), IndexError, "outside"),
        (lambda: scores(lambda a: (a, a), x, 0), InputError, "gives a tuple"),
        (lambda: scores(lambda a: a.sum(), x, 0), InputError, "one tensor"),
        (
            lambda: scores(lambda a: a[:, 0], x, None, "softmax"),
            InputError,
            "use score='logit'",
        ),
        (
            lambda: scores(lambda a: a, x, 0, "probability"),
            InputError,
            "score='probability'",
        ),
        (
            lambda: heat(normal(2, 3, 4, 4), normal(2, 3, 4, 4), "median"),
            InputError,
            "reduction='median'",
        ),
        (lambda: resized(normal(2, 4), (4, 4)), InputError, "cannot be resized to inputs"),
    ):
        with pytest.raises(error, match=message):
            bad()


def test_labels_of_two_dimensions_are_refused_in_the_users_words(cnn):
    """Not in those of the metric's own batches, which have other shapes."""
    x, grid = cnn.x[:5], {"n": 1}
    boxes = {"boxes": [(0, 0, 4, 4)] * 5}
    metrics = {
        bounding_box_accuracy: boxes,
        pointing_game: boxes,
        effective_heat_ratio: boxes,
        deletion: {},
        insertion: {},
        sensitivity_n: {},
        infidelity: {},
        sensitivity_max: {},
        completeness: {},
        class_sensitivity: {},
        randomization: {},
        grid_pointing_game: grid,
    }
    message = r"shape \(5, 1\), expected one .* each of the 5 examples: pass target.flatten\(\)"
    for metric, options in metrics.items():
        for target in (torch.zeros(5, 1).long(), np.zeros((5, 1), int)):
            with pytest.raises(TargetError, match=message):
                metric(cnn.mipin, x, target, **options)
    with pytest.raises(TargetError, match=r"shape \(5, 2\), .* pass target\.argmax\(1\)"):
        deletion(cnn.mipin, x, torch.zeros(5, 2).long())


def test_outputs_that_do_not_fit_a_batch_are_told_with_the_batch(mlp):
    x = mlp.x[:4]
    with pytest.raises(
        InputError, match=r"for a batch of 4 inputs the model gives a tensor of shape \(1, 6\)"
    ):
        scores(lambda a: a[:1], x, 0)
    for score, kind in ((lambda y: y.mean(0), r"\(6,\)"), (lambda y: y.sum(), r"\(\)")):
        message = rf"function score= gives a tensor of shape {kind} .* shape \(4, 6\), expected"
        with pytest.raises(InputError, match=message):
            scores(lambda a: a, x, 0, score)
    with pytest.raises(InputError, match="function score= gives a float"):
        scores(lambda a: a, x, 0, lambda y: 1.0)


def test_a_model_in_training_mode_is_refused(mlp, make_mlp):
    with pytest.raises(TrainingModeError, match=r"in training mode, in which '1' \(Dropout\)"):
        completeness(mlp.mipin, mlp.x, 0, model=nn.Sequential(make_mlp(), nn.Dropout()))
    assert completeness(mlp.mipin, mlp.x, 0, model=make_mlp().train())  # its mode does not matter
