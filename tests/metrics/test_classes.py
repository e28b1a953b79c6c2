"""Class sensitivity: by hand, known scores of known maps, what is unscored."""

import math

import pytest
import torch
from captum.attr import LayerGradCam, Saliency

from captum_mipin.errors import InputError, TargetError
from captum_mipin.metrics import class_sensitivity, sensitivity_max


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_class(*patterns):
    """A method that knows one map a class."""
    maps = torch.stack(patterns)

    def method(inputs, target):
        return maps[torch.as_tensor(target).expand(len(inputs))] * inputs

    return method


def test_class_sensitivity_by_hand():
    one, two = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.0, -4.0, 1.0])
    result = class_sensitivity(by_class(one, two), torch.ones(2, 3), 0, 1)
    assert result.values.tolist() == pytest.approx([5, 5])
    by_sum = math.sqrt(0.75**2 + 0.8**2 + (0.25 - 0.2) ** 2)
    assert result.parts["normalised L2"].values.tolist() == pytest.approx([by_sum] * 2)
    assert result.parts["cosine"].mean == pytest.approx(1 / math.sqrt(10 * 17))
    assert "SSIM" not in result.parts
    assert [r.better for r in (result, *result.parts.values())] == ["neither", "higher", "lower"]
    twice = class_sensitivity(by_class(2 * one, 2 * two), torch.ones(2, 3), 0, 1)
    assert twice.mean == pytest.approx(10)
    assert twice.parts["normalised L2"].mean == pytest.approx(by_sum)


def test_a_method_that_does_not_know_the_class_has_known_scores(cnn):
    x = cnn.x[:3]
    result = class_sensitivity(lambda inputs, target: inputs, x, 0, 1)
    assert result.mean == result.parts["normalised L2"].mean == 0
    assert result.parts["cosine"].mean == pytest.approx(1)
    assert result.parts["SSIM"].mean == pytest.approx(1)
    opposite = class_sensitivity(lambda inputs, target: inputs * (1 - 2 * target), x, 0, 1)
    assert opposite.parts["cosine"].mean == pytest.approx(-1)
    assert opposite.parts["normalised L2"].mean == pytest.approx(
        2 * float((x / x.sum((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1).mean())
    )


def test_another_class_is_drawn_for_each_example(mlp):
    x, own = mlp.x[:30], [0, 1, 2] * 10
    found = class_sensitivity(Saliency(mlp.model), x, own, generator=generator(1)).settings["other"]
    assert all(a != b for a, b in zip(own, found, strict=True))
    assert set(found) == {0, 1, 2}
    again, another = (
        class_sensitivity(Saliency(mlp.model), x, own, generator=generator(s)).settings["other"]
        for s in (1, 2)
    )
    assert again == found != another
    assert set(class_sensitivity(Saliency(mlp.model), x, -1).settings["other"]) == {0, 1}


def test_the_same_class_is_no_other(cnn):
    for target, other in (
        ([0, 1, 2], 1),
        (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])),
        (1, [0, 1, 2]),
    ):
        result = class_sensitivity(Saliency(cnn.model), cnn.x[:3], target, other)
        assert result.unscored == result.parts["cosine"].unscored == {"same class": (1,)}
    assert result.parts["SSIM"].settings["reduction"] == "sum"


def test_zero_and_broken_maps_are_counted(cnn):
    x = cnn.x[:3].clone()
    x[1] = 0
    result = class_sensitivity(lambda inputs, target: inputs * (1 + target), x, 0, 1)
    assert (
        result.parts["cosine"].unscored
        == result.parts["normalised L2"].unscored
        == {"zero map": (1,)}
    )
    assert result.unscored == result.parts["SSIM"].unscored == {}
    vanishing = class_sensitivity(
        lambda inputs, target: inputs * (1 - target), x, 0, 1
    )  # the second alone is zero
    assert vanishing.parts["cosine"].unscored == {"zero map": (0, 1, 2)}
    x[2, 0, 0, 0] = math.nan
    result = class_sensitivity(lambda inputs, target: inputs * (1 + target), x, 0, 1)
    assert [part.unscored.get("NaN") for part in (result, *result.parts.values())] == [(2,)] * 4


def test_several_inputs_count_together():
    x = (torch.ones(2, 3), torch.ones(2, 4))
    result = class_sensitivity(
        lambda inputs, target: tuple((1 + target) * one for one in inputs), x, 0, 1
    )
    assert result.mean == pytest.approx(math.sqrt(7))


def test_class_sensitivity_of_a_layer_and_of_mip_in(cnn, untouched):
    with untouched(cnn.model, cnn.x):
        layer = class_sensitivity(LayerGradCam(cnn.model, cnn.model[3]), cnn.x[:4], 0, 2)
        ours = class_sensitivity(cnn.mipin, cnn.x[:4], [0, 1, 2, 0], batch_size=3)
    assert layer.settings["maps"] == "1x4x4"
    assert layer.parts["SSIM"].settings["window"] == 3
    assert ours.n == 4


def test_what_has_no_other_class_is_refused(mlp):
    x = mlp.x[:2]
    for bad, error, message in (
        (lambda: class_sensitivity(x, x, 0, 1), InputError, "needs the maps of two"),
        (lambda: class_sensitivity(lambda a, b: a, x, 0), InputError, "pass model="),
        (
            lambda: class_sensitivity(lambda a, b: a, x, 0, model=lambda a: a[:, 0]),
            InputError,
            "pass other=",
        ),
        (lambda: class_sensitivity(Saliency(mlp.model), x, [0]), TargetError, "1 targets"),
        (lambda: class_sensitivity(Saliency(mlp.model), x, 0, [1, 2, 0]), TargetError, "3 targets"),
        (lambda: sensitivity_max(x, x, 0), InputError, "needs maps of changed"),
        (lambda: sensitivity_max(Saliency(mlp.model), x, 0, radius=-1), InputError, "radius=-1"),
        (lambda: sensitivity_max(Saliency(mlp.model), x, 0, samples=0), InputError, "samples=0"),
        (
            lambda: sensitivity_max(Saliency(mlp.model), x, 0, batch_size=0),
            InputError,
            "batch_size=0",
        ),
    ):
        with pytest.raises(error, match=message):
            bad()
