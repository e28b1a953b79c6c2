"""What all metrics share, and completeness and localization: scores by hand, known scores of known maps, what is not scored."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam, Saliency
from captum.testing.helpers.basic_models import BasicModel_MultiLayer
from hypothesis import given, settings
from hypothesis import strategies as st
from small import normal

from captum_mipin.errors import InputError, TargetError, TrainingModeError
from captum_mipin.metrics import (
    Result,
    bounding_box_accuracy,
    box_masks,
    completeness,
    effective_heat_ratio,
    grid_pointing_game,
    mosaics,
    pointing_game,
)
from captum_mipin.metrics.common import Examples, explain, heat, outputs, resized

NAN = math.nan


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------- results


def test_means_standard_errors_and_counts_by_hand():
    result = Result.of(
        "m",
        torch.tensor([1.0, 2.0, 6.0, NAN, 9.0, math.inf]),
        "lower",
        {},
        {"empty": torch.arange(6) == 4},
    )
    assert (result.n, len(result)) == (3, 6)
    assert result.unscored == {"NaN": (3, 5), "empty": (4,)}
    assert result.values.isnan().tolist() == [False, False, False, True, True, True]
    assert result.mean == 3
    assert result.median == 2
    assert result.standard_error == pytest.approx(math.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2 = 7


def test_means_over_classes_first():
    values, classes = (
        torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0, NAN]),
        torch.tensor([0, 0, 1, 1, 1, 2]),
    )
    result = Result.of("m", values, "lower", {}, classes=classes)
    assert result.mean == (2 + 20) / 2  # the class that was not scored has no say
    assert result.standard_error == pytest.approx(math.sqrt(2 / 2 + 100 / 3) / 2)


@pytest.mark.parametrize(
    ("values", "mean"),
    [(torch.tensor([NAN, NAN]), NAN), (torch.tensor([4.0]), 4.0), (torch.zeros(0), NAN)],
    ids=str,
)
def test_too_little_to_say(values, mean):
    result = Result.of("m", values, "neither", {"ratio": 1 / 3, "list": list(range(9))})
    assert result.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(result.standard_error)
    assert "9 values" in str(result)


def test_an_example_has_one_reason():
    result = Result.of(
        "m",
        torch.tensor([NAN, NAN, 1.0]),
        "lower",
        {},
        {"empty": [0], "large": torch.tensor([True, False, True])},
    )
    assert result.unscored == {"NaN": (1,), "empty": (0,), "large": (2,)}
    assert sum(map(len, result.unscored.values())) + result.n == len(result)


def test_a_result_is_frozen_and_goes_to_json():
    part = Result.of("p", torch.tensor([1.0, NAN]), "lower", {"k": torch.float32})
    result = Result.of(
        "m",
        torch.tensor([NAN, 0.5]),
        "higher",
        {"a": (1, 2.5)},
        curves=torch.ones(2, 3),
        parts={"p": part},
    )
    with pytest.raises(AttributeError):
        result.metric = "other"
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["mean"] == 0.5
    assert found["standard error"] is None
    assert found["values"] == [None, 0.5]
    assert found["parts"]["p"]["unscored"] == {"NaN": [1]}
    assert found["parts"]["p"]["settings"] == {"k": "torch.float32"}
    assert str(result).splitlines() == [
        "m: 0.5 ± nan (higher is better; 1 of 2 scored, 1 NaN; a: (1, 2.5))",
        "  p: 1 ± nan",
    ]


# --------------------------------------------------------------------------------------------------------- methods


def test_any_kind_of_method_gives_its_maps(mlp):
    x, targets = mlp.x[:5], [0, 1, 2, 1, 0]
    examples, saliency = Examples.of(x, targets), Saliency(mlp.model)
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
            (found,) = explain(method, examples, size)
            assert torch.equal(found, expected)
            assert not found.requires_grad


def test_options_bound_to_attribute_are_not_taken_for_targets(mlp):
    """``IntegratedGradients.attribute`` has baselines where others have the target."""
    x = mlp.x[:3]
    ig = IntegratedGradients(mlp.model)
    (found,) = explain(partial(ig.attribute, n_steps=7), Examples.of(x, 2))
    assert torch.equal(found, ig.attribute(x, target=2, n_steps=7))


def test_further_arguments_go_with_their_examples():
    model = BasicModel_MultiLayer().eval()
    x, extra = normal(6, 3), normal(6, 3, seed=1)

    def method(inputs, target, extras):
        assert extras[0].shape == inputs.shape
        return inputs * extras[0] + target.view(-1, 1) + extras[1]

    examples = Examples.of(x, torch.arange(6), (extra, 2))
    (found,) = explain(method, examples, 4)
    assert torch.equal(found, x * extra + torch.arange(6).view(-1, 1) + 2)
    picked = Examples.of(x, [0, 1] * 3, (extra[:1],)).pick(torch.tensor([5, 0, 0]))
    assert picked.target == [1, 0, 0]
    assert torch.equal(picked.extras[0], extra[:1])
    assert torch.equal(
        outputs(lambda a, add: model(a, add), Examples.of(x, 1, extra)),
        model(x, extra)[:, 1].detach().double(),
    )


def test_several_inputs():
    a, b = normal(4, 3), normal(4, 2, seed=1)
    (first, second) = explain(
        lambda inputs, target: tuple(2 * x for x in inputs), Examples.of((a, b), 0), 3
    )
    assert torch.equal(first, 2 * a)
    assert torch.equal(second, 2 * b)
    with pytest.raises(InputError, match="needs one input tensor, but there are 2"):
        Examples.of((a, b), 0).one("deletion")


def test_nothing_of_the_users_is_touched(mlp, untouched):
    x = mlp.x[:4].clone()
    with untouched(mlp.model, x):
        explain(lambda inputs, target: inputs.mul_(0), Examples.of(x, 0))
        explain(Saliency(mlp.model), Examples.of(x, 0))
        completeness(mlp.mipin, x, [0, 1, 2, 0])
    with untouched(mlp.model, x), pytest.raises(ZeroDivisionError):
        explain(lambda inputs, target: 1 / 0, Examples.of(x, 0))


def test_works_under_no_grad_and_in_inference_mode(mlp):
    x = mlp.x[:4]
    (expected,) = explain(Saliency(mlp.model), Examples.of(x, 0))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(explain(Saliency(mlp.model), Examples.of(x, 0))[0], expected)


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
            lambda: explain(lambda a, b: a[:2], Examples.of(x, 0)),
            InputError,
            "one map for each of 4",
        ),
        (lambda: explain(lambda a, b: "no", Examples.of(x, 0)), InputError, "gave a str"),
        (lambda: explain("Saliency", Examples.of(x, 0)), InputError, "the method is a str"),
        (lambda: explain(x[:2], Examples.of(x, 0)), InputError, "one map for each of 4"),
        (lambda: explain(lambda a, b: a, Examples.of(x, 0), 0), InputError, "batch_size=0"),
        (lambda: completeness(x, x, 0), InputError, "that has source_signal"),
        (lambda: completeness(mlp.inverse, x, 0), InputError, "pass control=False"),
        (lambda: completeness(mlp.inverse, x, 0, control=False), InputError, "pass model="),
        (lambda: completeness(mlp.mipin, x, 0, average="both"), InputError, "average='both'"),
        (lambda: completeness(mlp.mipin, x, 9), IndexError, "outside"),
        (lambda: outputs(lambda a: (a, a), Examples.of(x, 0)), InputError, "gives a tuple"),
        (lambda: outputs(lambda a: a.sum(), Examples.of(x, 0)), InputError, "one tensor"),
        (
            lambda: outputs(lambda a: a[:, 0], Examples.of(x, None), "softmax"),
            InputError,
            "use score='logit'",
        ),
        (
            lambda: outputs(lambda a: a, Examples.of(x, 0), "probability"),
            InputError,
            "score='probability'",
        ),
        (
            lambda: heat(normal(2, 3, 4, 4), normal(2, 3, 4, 4), "median"),
            InputError,
            "reduction='median'",
        ),
        (lambda: resized(normal(2, 4), (4, 4)), InputError, "cannot be laid over"),
    ):
        with pytest.raises(error, match=message):
            bad()


def test_a_model_in_training_mode_is_refused(mlp, make_mlp):
    with pytest.raises(TrainingModeError, match="Sequential is in training mode"):
        completeness(mlp.mipin, mlp.x, 0, model=make_mlp().train())


def test_reductions_by_hand():
    maps = torch.tensor([1.0, -3.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    found = {
        r: heat(maps, maps, r)[0, 0, 0].item()
        for r in ("sum", "relu_of_sum", "sum_of_relu", "sum_of_abs", "max_of_abs")
    }
    assert found == {
        "sum": -1,
        "relu_of_sum": 0,
        "sum_of_relu": 2,
        "sum_of_abs": 5,
        "max_of_abs": 3,
    }
    assert torch.equal(
        heat(maps, maps, lambda m: m[:, 1])[0], torch.full((2, 2), -3.0, dtype=torch.float64)
    )
    assert heat(maps[:, 0], maps, "sum_of_abs").shape == (1, 2, 2)
    assert heat(normal(2, 5), normal(2, 5)).shape == (2, 5)


def test_tokens_are_not_taken_for_pixels():
    """A transformer's layer gives (examples, tokens, features), which looks like maps without channels."""
    x = torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match="other proportions"):
        bounding_box_accuracy(normal(2, 17, 64), x, boxes=[(0, 0, 8, 8)] * 2)
    for places in ((4, 4), (3, 4), (13, 13), (40, 40)):
        assert bounding_box_accuracy(normal(2, *places), x, boxes=[(0, 0, 8, 8)] * 2).n == 2


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_maps_of_any_dtype(dtype):
    maps = torch.arange(64).view(1, 1, 8, 8).to(dtype)
    result = bounding_box_accuracy(maps, maps.float(), boxes=[(0, 7, 8, 8)])
    assert result.values.dtype == torch.float64
    assert result.mean == pytest.approx(1 if dtype != torch.bool else 1 / 63 * 8)


# --------------------------------------------------------------------------------------------------------- completeness


class Scaled:
    """A source signal S = A + B that keeps a share of x; outputs are the inputs themselves."""

    def __init__(self, share, bias=0.0):
        self.share, self.bias = share, bias

    def attribute(self, inputs, target=None):
        return self.share * inputs

    def source_signal(self, inputs, target=None):
        return self.share * inputs + self.bias


def test_apc_by_hand():
    x = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, -10.0], [5.0, 0.0]])
    result = completeness(Scaled(0.5, 2.0), x, [0, 0, 1, 1], model=lambda x: x)
    # Φ(S) = 3, 4, −3; losses −1/2, 0, (−10 + 3)/10; the last output is 0
    assert result.values[:3].tolist() == pytest.approx([50, 0, 70])
    assert result.parts["positive APC"].values[:3].tolist() == pytest.approx([0, 0, 0])
    assert result.unscored == {"zero output": (3,)}
    assert result.mean == pytest.approx((25 + 70) / 2)
    assert completeness(
        Scaled(0.5, 2.0), x, [0, 0, 1, 1], model=lambda x: x, average="samples"
    ).mean == pytest.approx(40)


def test_perfect_and_empty_signals():
    x = normal(9, 4).abs() + 1
    perfect, nothing = (
        completeness(Scaled(share), x, 1, model=lambda x: x) for share in (1.0, 0.0)
    )
    assert perfect.mean == perfect.parts["positive APC"].mean == 0
    assert (
        nothing.mean
        == nothing.parts["positive APC"].mean
        == nothing.parts["shuffled output"].mean
        == 100
    )


def test_the_control_is_another_examples_output():
    """With S = A = x, the control's signal for target c of example i has the output of another example j."""
    x = normal(7, 3) + 4
    targets = [0, 1, 2, 0, 1, 2, 0]
    result = completeness(Scaled(1.0), x, targets, model=lambda x: x, generator=generator(3))
    own = torch.stack([x[i, t] for i, t in enumerate(targets)]).double()
    for i, t in enumerate(targets):
        possible = [100 * abs(own[i] - x[j, t]) / abs(own[i]) for j in range(7) if j != i]
        assert (
            min(abs(float(p) - float(result.parts["shuffled output"].values[i])) for p in possible)
            < 1e-4
        )
    again, other = (
        completeness(Scaled(1.0), x, targets, model=lambda x: x, generator=generator(s))
        for s in (3, 4)
    )
    assert torch.equal(
        again.parts["shuffled output"].values, result.parts["shuffled output"].values
    )
    assert not torch.equal(
        other.parts["shuffled output"].values, result.parts["shuffled output"].values
    )


def test_a_single_example_has_no_other():
    result = completeness(Scaled(1.0), torch.ones(1, 3), 0, model=lambda x: x)
    assert (result.mean, result.parts["shuffled output"].n) == (0, 0)


def test_control_of_mip_in_is_the_inverse_restarted(mlp):
    """The identity that the control rests on: A is proportional to the logit, the rest does not depend on it."""
    x = mlp.x[:6]
    result = completeness(mlp.mipin, x, 1, batch_size=4)
    found = mlp.inverse.explain((x,), 1, biases=(False, True))
    (a,), (s,) = found.signals
    with torch.no_grad():
        logits, after = mlp.model(x)[:, 1], mlp.model(s)[:, 1]
        torch.testing.assert_close(
            result.values,
            (100 * (logits - after).abs() / logits.abs()).double(),
            rtol=1e-4,
            atol=1e-4,
        )
        possible = torch.stack(
            [mlp.model(s + a * (logits[j] / logits - 1)[:, None])[:, 1] for j in range(6)]
        )
    errors = (100 * (logits - possible).abs() / logits.abs()).double()
    near = (errors - result.parts["shuffled output"].values).abs() < 1e-3
    assert (near & ~torch.eye(6, dtype=torch.bool)).any(0).all()


def test_completeness_agrees_with_the_benchmark(monkeypatch, mlp):
    import completeness as benchmark
    from data import Images

    labels = torch.arange(len(mlp.x)) % 3
    images = Images("made up", mlp.x, labels, mlp.x, labels, ("a", "b", "c"))
    expected = benchmark.apc(
        mlp.model, images, lambda x, label: mlp.inverse.source_signal(x, target=label)
    )
    result = completeness(mlp.mipin, mlp.x, labels, control=False)
    assert result.mean == pytest.approx(expected["APC %"], rel=1e-5)
    assert result.parts["positive APC"].mean == pytest.approx(expected["positive APC %"], rel=1e-5)


def test_completeness_of_several_inputs():
    class Both:
        def source_signal(self, inputs, target=None):
            return tuple(x / 2 for x in inputs)

    result = completeness(
        Both(), (torch.ones(3, 2), torch.ones(3, 2)), 0, model=lambda a, b: a + b, control=False
    )
    assert result.mean == 50


# --------------------------------------------------------------------------------------------------------- boxes


def masks(*boxes, size=8):
    return box_masks(list(boxes), (size, size))


def test_boxes_in_any_form_are_the_same():
    box = [(1, 2, 5, 7), (0, 0, 8, 3)]
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[0, 2:7, 1:5] = expected[1, :3] = True
    for form in (box, torch.tensor(box), torch.tensor(box)[:, None], np.array(box), [[b] for b in box], expected,
                 expected[:, None], expected.float()):  # fmt: skip
        assert torch.equal(box_masks(form, (8, 8)), expected)
    assert box_masks([(-5, -5, 99, 99), (3, 3, 3, 8), (5, 5, 2, 2)], (8, 8)).flatten(1).sum(
        1
    ).tolist() == [64, 0, 0]


def test_boxes_that_are_none_are_refused():
    for bad in ([(1, 2, 3)], [(0, 0, NAN, 1)], torch.ones(1, 7, 8), [[(0, 0, 1)]]):
        with pytest.raises(InputError):
            box_masks(bad, (8, 8))
    with pytest.raises(InputError, match="boxes for 1 images, but 2 images"):
        bounding_box_accuracy(torch.ones(2, 8, 8), torch.ones(2, 1, 8, 8), boxes=[(0, 0, 1, 1)])
    with pytest.raises(InputError, match="needs images"):
        pointing_game(torch.ones(2, 8), torch.ones(2, 8), boxes=[(0, 0, 1, 1)] * 2)
    with pytest.raises(InputError, match="needs one map an image"):
        pointing_game(torch.ones(2, 8), torch.ones(2, 1, 8, 8), boxes=[(0, 0, 1, 1)] * 2)


BOXES = [(1, 2, 4, 6), (0, 0, 3, 3), (4, 4, 8, 8)]
X = torch.zeros(3, 1, 8, 8)
INSIDE = masks(*BOXES).double()[:, None]


def test_known_maps_have_known_scores():
    for metric, perfect, inverted in ((bounding_box_accuracy, 1, 0), (pointing_game, 1, 0)):
        more = {"tolerance": 0} if metric is pointing_game else {}
        assert metric(INSIDE, X, boxes=BOXES, **more).values.tolist() == [perfect] * 3
        assert metric(-INSIDE, X, boxes=BOXES, **more).values.tolist() == [inverted] * 3
        constant = metric(torch.ones_like(INSIDE), X, boxes=BOXES, **more)
        assert constant.values.tolist() == pytest.approx(
            (INSIDE.flatten(1).sum(1) / 64).tolist()
        )  # the area: chance
    assert effective_heat_ratio(INSIDE, X, boxes=BOXES).values.tolist() == pytest.approx([1] * 3)
    assert effective_heat_ratio(1 - INSIDE, X, boxes=BOXES).values.tolist() == [0] * 3
    assert effective_heat_ratio(-INSIDE, X, boxes=BOXES).unscored == {"no heat": (0, 1, 2)}
    assert effective_heat_ratio(
        torch.ones_like(INSIDE), X, boxes=BOXES
    ).values.tolist() == pytest.approx((INSIDE.flatten(1).sum(1) / 64).tolist())


def test_random_maps_score_the_area():
    x = torch.zeros(400, 1, 8, 8)
    maps = torch.rand(400, 1, 8, 8, generator=generator(1))
    boxes = [BOXES[2]] * 400
    for result in (
        bounding_box_accuracy(maps, x, boxes=boxes),
        pointing_game(maps, x, boxes=boxes, tolerance=0),
    ):
        assert abs(result.mean - 0.25) < 4 * result.standard_error


def test_bounding_box_accuracy_by_hand():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0] = torch.tensor([5.0, 4.0, 3.0, 3.0])
    boxes = [
        (0, 0, 1, 3)
    ]  # a column of 3: holds the 5, and of what else is chosen nothing but zeros
    result = bounding_box_accuracy(maps, maps, boxes=boxes)
    assert result.values.tolist() == pytest.approx([1 / 3])
    assert result.parts["tied"].values.tolist() == pytest.approx([1 / 3])  # one of the two 3s
    wide = [(2, 0, 3, 3)]  # the first of the 3s
    assert bounding_box_accuracy(maps, maps, boxes=wide).values.tolist() == pytest.approx([1 / 6])
    both = bounding_box_accuracy(maps, maps, boxes=[(2, 0, 4, 2)])  # n = 4: both of the 3s are in
    assert (both.mean, both.parts["tied"].mean) == (0.5, 0)
    assert bounding_box_accuracy(
        maps, maps, boxes=wide, ties="first"
    ).values.tolist() == pytest.approx([1 / 3])


def test_ties_broken_at_random_score_what_is_expected():
    maps, boxes = normal(1, 1, 6, 6).round(), [(1, 1, 4, 4)]
    expected = bounding_box_accuracy(maps, maps, boxes=boxes).mean
    draws = [
        bounding_box_accuracy(maps, maps, boxes=boxes, ties="random", generator=generator(s)).mean
        for s in range(400)
    ]
    spread = np.std(draws) / 20
    assert spread > 0
    assert abs(np.mean(draws) - expected) < 4 * spread


@given(
    st.integers(1, 4), st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**31), st.sampled_from([1, 2, 1000]),
    st.sampled_from(["expected", "random", "first"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_localization_for_any_shape_ties_and_nan(count, height, width, seed, levels, ties):
    random = generator(seed)
    maps = (torch.rand(count, 2, height, width, generator=random) * levels).round() - levels / 2
    inside = torch.rand(count, height, width, generator=random) > 0.7
    broken = torch.rand(count, generator=random) > 0.7
    maps[broken, 0, 0, 0] = NAN
    x = torch.zeros(count, 3, height, width)
    empty, large = ~inside.flatten(1).any(1), inside.flatten(1).double().mean(1) > 0.33
    box = bounding_box_accuracy(maps, x, boxes=inside, ties=ties)
    assert torch.equal(box.scored, ~broken & ~empty & ~large)
    assert sum(map(len, box.unscored.values())) == count - box.n
    points = pointing_game(maps, x, boxes=inside, tolerance=1)
    assert torch.equal(points.scored, ~broken & ~empty)
    heats = effective_heat_ratio(maps, x, boxes=inside)
    for result in (box, points, heats, box.parts["tied"]):
        assert (
            (result.values[result.scored] >= 0) & (result.values[result.scored] <= 1 + 1e-12)
        ).all()
    for i in box.scored.nonzero().flatten().tolist():  # by sorting in plain Python
        flat, mask = maps[i].sum(0).flatten().tolist(), inside[i].flatten().tolist()
        n = sum(mask)
        order = sorted(range(len(flat)), key=lambda k: -flat[k])
        sure = [k for k in order if flat[k] > flat[order[n - 1]]]
        tie = [k for k in order if flat[k] == flat[order[n - 1]]]
        score = sum(mask[k] for k in sure) + (n - len(sure)) / len(tie) * sum(mask[k] for k in tie)
        if ties == "expected":
            assert float(box.values[i]) == pytest.approx(score / n)
        if ties == "first":
            assert float(box.values[i]) == pytest.approx(sum(mask[k] for k in order[:n]) / n)


def test_relevance_rank_accuracy_of_quantus():
    quantus = pytest.importorskip("quantus", reason="an independent rank accuracy to compare with")
    maps = torch.rand(6, 1, 8, 8, generator=generator(2))
    inside = masks(*BOXES, *BOXES)
    found = quantus.RelevanceRankAccuracy(disable_warnings=True, display_progressbar=False)(
        model=None,
        x_batch=np.zeros((6, 1, 8, 8)),
        y_batch=np.zeros(6),
        a_batch=maps.numpy(),
        s_batch=inside.numpy()[:, None],
    )
    assert bounding_box_accuracy(
        maps, torch.zeros(6, 1, 8, 8), boxes=inside
    ).values.tolist() == pytest.approx(found)


def test_pointing_game_by_hand():
    maps = torch.zeros(1, 1, 20, 20)
    maps[0, 0, 10, 12] = 1
    for tolerance, hit in (
        (4, 0),
        (5, 1),
        (4.9, 0),
        (100, 1),
    ):  # 3 and 4 pixels away from the box's corner (8, 7)
        assert pointing_game(maps, maps, boxes=[(0, 0, 9, 8)], tolerance=tolerance).mean == hit
    assert pointing_game(maps, maps, boxes=[(0, 0, 1, 1)], tolerance=math.inf).mean == 1
    both = maps.clone()
    both[0, 0, 0, 0] = 1
    assert pointing_game(both, both, boxes=[(0, 0, 9, 8)], tolerance=0).mean == 0.5
    with pytest.raises(InputError, match="tolerance=-1"):
        pointing_game(maps, maps, boxes=[(0, 0, 9, 8)], tolerance=-1)


def test_pointing_game_by_class():
    maps = torch.cat([INSIDE, INSIDE[:1], -INSIDE[:1]])
    x, boxes = torch.zeros(5, 1, 8, 8), [*BOXES, BOXES[0], BOXES[0]]
    result = pointing_game(maps, x, [0, 0, 0, 1, 1], boxes=boxes, tolerance=0, average="classes")
    assert result.mean == (1 + 0.5) / 2
    with pytest.raises(InputError, match="a target for each example"):
        pointing_game(maps, x, 0, boxes=boxes, average="classes")


def test_effective_heat_ratio_by_hand():
    """Heats 1, 0.5 inside and 0.5, 0.05 outside: the last is below the threshold. Quantiles of (0.5, 0.5, 1) up to the median
    give three hot pixels, 1.5 / 3; beyond it one, 1 / 1.
    """
    maps = torch.tensor([[[[4.0, 2.0], [2.0, 0.2]]]])
    result = effective_heat_ratio(maps, maps, boxes=[(0, 0, 2, 1)], largest=0.5)
    assert result.curves[0].tolist() == pytest.approx([0.5] * 6 + [1.0] * 5)
    assert result.mean == pytest.approx((5 * 0.5 + 0.75 + 4) / 10)
    count = effective_heat_ratio(maps, maps, boxes=[(0, 0, 2, 1)], largest=0.5, weighted=False)
    assert count.curves[0].tolist() == pytest.approx([2 / 3] * 6 + [1.0] * 5)
    assert (
        effective_heat_ratio(100 * maps, maps, boxes=[(0, 0, 2, 1)], largest=0.5).mean
        == result.mean
    )
    with pytest.raises(InputError, match="threshold=1"):
        effective_heat_ratio(maps, maps, boxes=[(0, 0, 2, 1)], threshold=1)


def test_pixels_within_a_hundredth_of_the_hottest_are_hot_at_every_threshold():
    maps = torch.tensor([[[[1.0, 0.995], [0.5, 0.0]]]])
    result = effective_heat_ratio(maps, maps, boxes=[(0, 0, 1, 1)], largest=0.5)
    assert result.curves[0, -1].item() == pytest.approx(1 / 2)


def test_quantiles_are_those_of_numpy():
    maps = torch.rand(1, 1, 8, 8, generator=generator(5), dtype=torch.float64)
    warm, inside = (maps / maps.max()).flatten().numpy(), masks(BOXES[0]).flatten().numpy()
    counts = warm[warm >= 0.1]
    ratios = []
    for q in np.linspace(0, 1, 11):
        hot = warm >= min(np.quantile(counts, q), 0.99)
        ratios.append(warm[hot & inside].sum() / hot.sum())
    assert effective_heat_ratio(maps, maps, boxes=[BOXES[0]]).curves[0].tolist() == pytest.approx(
        ratios
    )


def test_maps_of_a_layer_are_laid_over_the_image(cnn):
    cam = LayerGradCam(cnn.model, cnn.model[3])
    x = cnn.x[:3]
    (maps,) = explain(cam, Examples.of(x, 0))
    result = bounding_box_accuracy(cam, x, 0, boxes=BOXES)
    assert result.settings["maps"] == "1x4x4"
    upsampled = LayerGradCam.interpolate(maps.double(), (8, 8), interpolate_mode="bilinear")
    assert torch.equal(result.values, bounding_box_accuracy(upsampled, x, 0, boxes=BOXES).values)


@pytest.mark.parametrize("size", [7, 13, 14])
def test_interpolation_breaks_no_ties(size):
    """A constant map scores the area, whatever its value and however rounding goes."""
    x, boxes = torch.ones(1, 3, 224, 224), [(100, 100, 150, 150)]
    for value in torch.linspace(0.1, 1, 19).double():
        maps = value.view(1, 1, 1, 1).expand(1, 1, size, size)
        assert pointing_game(maps, x, boxes=boxes, tolerance=0).mean == 50**2 / 224**2
        assert bounding_box_accuracy(maps, x, boxes=boxes).mean == pytest.approx(
            50**2 / 224**2, rel=1e-12
        )


# --------------------------------------------------------------------------------------------------------- mosaics


def bright(logit=20.0):
    """Four classes, one a channel: the brightest channel wins."""
    return lambda x: logit * x.mean((2, 3))


def shades(copies=2, size=4):
    x = torch.eye(4).repeat(copies, 1)[:, :, None, None].expand(-1, -1, size, size)
    return x.clone(), torch.arange(4).repeat(copies)


def test_grid_pointing_game_of_known_maps():
    x, labels = shades()
    grid = mosaics(bright(), x, labels, 2, 12)
    assert grid.x.shape == (12, 4, 8, 8)
    index = torch.arange(12)
    own = grid.x[index, grid.targets]  # 1 in the cell to be found, 0 elsewhere
    assert torch.equal(own.view(12, 2, 4, 2, 4).mean((2, 4)).flatten(1).argmax(1), grid.cells)
    assert grid_pointing_game(own, grid).values.tolist() == [1] * 12
    assert grid_pointing_game(1e-30 * own, grid).values.tolist() == [1] * 12
    assert grid_pointing_game(1 - own, grid).values.tolist() == [0] * 12
    assert grid_pointing_game(torch.ones_like(own), grid).values.tolist() == [0.25] * 12
    nothing = grid_pointing_game(-own, grid)
    assert (nothing.mean, nothing.parts["nothing positive"].mean) == (0, 1)
    own[3, 0, 0] = NAN
    assert grid_pointing_game(own, grid).unscored == {"NaN": (3,)}


def test_mosaics_are_made_on_the_way():
    x, labels = shades()

    def method(inputs, target):
        return inputs[torch.arange(len(inputs)), target]

    result = grid_pointing_game(
        method, x, labels, n=2, count=7, model=bright(), generator=generator(5), batch_size=3
    )
    assert (result.mean, len(result), result.settings["confidence"]) == (1, 7, 0.99)
    grid = mosaics(bright(), x, labels, 2, 7, generator=generator(5))
    assert result.settings["target"] == grid.targets.tolist()
    for bad, message in (
        (
            lambda: grid_pointing_game(method, x, labels, n=3, model=bright()),
            "4 classes have an image .* needs 9",
        ),
        (lambda: mosaics(bright(0.1), x, labels), "0 classes have"),
        (lambda: mosaics(bright(), x, labels, classes=[9]), "0 of them to be found"),
        (lambda: grid_pointing_game(method, x, 3, model=bright()), "the class of each image"),
        (lambda: grid_pointing_game(method, x, labels), "pass model="),
    ):
        with pytest.raises(InputError, match=message):
            bad()
    assert set(mosaics(bright(), x, labels, 2, 6, classes=[1, 3]).targets.tolist()) == {1, 3}
