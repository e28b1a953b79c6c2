"""A fit on few examples, and explained inputs of another scale than those of the fit."""

import warnings

import pytest
import torch
from torch import nn

from captum_mipin import InverseNetwork, MIPINAttribution, NeighbourInverse
from captum_mipin.errors import DataWarning
from captum_mipin.inverse.scale import Scale, warn_of_scale


def fitted(x, kind=InverseNetwork):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    return kind(model).fit(x, targets=0, progress=False)


def images(count=12, seed=0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [InverseNetwork, NeighbourInverse])
def test_another_scale_than_that_of_the_fit_is_warned_of(kind):
    """Fitted on 0 to 1 and explained on 0 to 255, and the other way round; the place is ours."""
    x = images(64)
    for factor, other in ((1, 255), (255, 1 / 255)):
        inverse = fitted(factor * x, kind)
        with pytest.warns(
            DataWarning, match=r"mean .*, expected about .* 0 to|0 \.\.\. 1"
        ) as caught:
            inverse.source_signal(factor * other * x[:2], target=0)
        assert caught[0].filename == __file__
        with pytest.warns(DataWarning, match="as in the fit"):
            MIPINAttribution(inverse.model, inverse).attribute(factor * other * x[:2], target=0)


def test_images_that_were_not_normalised_are_warned_of():
    """Fitted on images normalised as for ImageNet, and explained on the same images without."""
    x = images(64)
    inverse = fitted((x - 0.45) / 0.225)
    with pytest.warns(DataWarning, match=r"and normalise them"):
        inverse.source_signal(x[:2], target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in ((x[:2] - 0.45) / 0.225, (0.3 * x[:1] - 0.45) / 0.225, torch.zeros(1, 3, 8, 8)):
            inverse.source_signal(same, target=0)
        fitted(x).source_signal(x[:2], target=0)


def test_images_that_alone_are_normalised_are_warned_of():
    x = images(64)
    with pytest.warns(DataWarning, match=r"or not if those of the fit were not"):
        fitted(x).source_signal((x[:2] - 0.45) / 0.225, target=0)


def test_a_file_keeps_the_scale(tmp_path):
    inverse = fitted(images())
    inverse.save(tmp_path / "inverse.safetensors")
    loaded = InverseNetwork.load(tmp_path / "inverse.safetensors", inverse.model)
    assert [tuple(pair) for pair in loaded._state.origin.scale] == inverse._state.origin.scale
    with pytest.warns(DataWarning, match="as in the fit"):
        loaded.source_signal(255 * images(2), target=0)


def test_inputs_of_the_same_kind_give_no_warning():
    """Also dark, bright, constant, black-and-white and single images."""
    inverse, x = fitted(images()), images(4, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for explained in (
            x, x[:1], 0.1 * x, 0.9 + 0.1 * x, torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8),
            (x > 0.5).float(),
        ):  # fmt: skip
            inverse.source_signal(explained, target=0)


def test_a_fit_on_three_images_is_warned_of():
    with pytest.warns(
        DataWarning, match="only 3 examples, expected at least 10: dense layers.*Pass more data"
    ) as caught:
        fitted(images(3))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(images(12))


def test_the_scale_is_that_of_all_values_whatever_the_batches():
    """By hand, in one pass and in a second that must change nothing; integers have none."""
    x, tokens = 100 + torch.randn(50, 7), torch.arange(100).view(50, 2)
    for size in (50, 8, 1):
        scale = Scale()
        for _ in range(2):
            for index, part in enumerate(zip(x.split(size), tokens.split(size), strict=True)):
                scale.add(part, index)
        (mean, deviation), none = scale.moments()
        assert (scale.examples, none) == (50, None)
        assert mean == pytest.approx(float(x.double().mean()), rel=1e-6)
        assert deviation == pytest.approx(float(x.double().std(correction=0)), rel=1e-4)
    warn_of_scale((x, tokens), [(0.0, 0.0), None])  # a fit on one value has no scale
