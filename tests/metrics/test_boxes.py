"""Metrics of boxes: scores by hand, known scores of known maps, ties, layers."""

import math

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from small import normal

from captum_mipin.errors import ChanceWarning, InputError
from captum_mipin.metrics import (
    bounding_box_accuracy,
    box_masks,
    effective_heat_ratio,
    pointing_game,
)
from captum_mipin.metrics.case import Case
from captum_mipin.metrics.maps import dilated

NAN = math.nan


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def masks(*boxes, size=8):
    return box_masks(list(boxes), (size, size))


def test_boxes_in_any_form_are_the_same():
    box = [(1, 2, 5, 7), (0, 0, 8, 3)]
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[0, 2:7, 1:5] = expected[1, :3] = True
    tensor = torch.tensor(box)
    lists = (box, [[b] for b in box], np.array(box), tensor, tensor[:, None])
    for form in (*lists, expected, expected[:, None], expected.float()):
        assert torch.equal(box_masks(form, (8, 8)), expected)
    assert box_masks([(-5, -5, 99, 99), (3, 3, 3, 8), (9, 9, 12, 12)], (8, 8)).flatten(1).sum(
        1
    ).tolist() == [64, 0, 0]


def test_boxes_that_are_none_are_refused():
    for bad in ([(1, 2, 3)], [(0, 0, NAN, 1)], torch.ones(1, 7, 8), [[(0, 0, 1)]]):
        with pytest.raises(InputError):
            box_masks(bad, (8, 8))
    with pytest.raises(InputError, match="boxes for 1 images, but 2 images"):
        bounding_box_accuracy(torch.ones(2, 8, 8), torch.ones(2, 1, 8, 8), boxes=[(0, 0, 1, 1)])
    with pytest.raises(InputError, match="boxes need images"):
        pointing_game(torch.ones(2, 8), torch.ones(2, 8), boxes=[(0, 0, 1, 1)] * 2)
    with pytest.raises(InputError, match="needs one map per image"):
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


# random boxes, with a pixel around them, can cover a small image
@pytest.mark.filterwarnings("ignore::captum_mipin.errors.ChanceWarning")
@given(
    count=st.integers(1, 4),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 2, 1000]),
    ties=st.sampled_from(["expected", "random", "first"]),
)
@settings(max_examples=60, deadline=None)
def test_localization_for_any_shape_ties_and_nan(count, size, seed, levels, ties):
    random = generator(seed)
    maps = (torch.rand(count, 2, *size, generator=random) * levels).round() - levels / 2
    inside = torch.rand(count, *size, generator=random) > 0.7
    broken = torch.rand(count, generator=random) > 0.7
    maps[broken, 0, 0, 0] = NAN
    x = torch.zeros(count, 3, *size)
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
    # 3 and 4 pixels away from the box's corner (8, 7)
    for tolerance, hit in ((4, 0), (5, 1), (4.9, 0)):
        assert pointing_game(maps, maps, boxes=[(0, 0, 9, 8)], tolerance=tolerance).mean == hit
    for box, tolerance in (((0, 0, 9, 8), 100), ((0, 0, 1, 1), math.inf)):
        with pytest.warns(ChanceWarning, match="a random map scores 1 "):
            assert pointing_game(maps, maps, boxes=[box], tolerance=tolerance).mean == 1
    both = maps.clone()
    both[0, 0, 0, 0] = 1
    assert pointing_game(both, both, boxes=[(0, 0, 9, 8)], tolerance=0).mean == 0.5
    with pytest.raises(InputError, match="tolerance=-1"):
        pointing_game(maps, maps, boxes=[(0, 0, 9, 8)], tolerance=-1)


@pytest.mark.parametrize(
    ("height", "width", "tolerance"),
    [(224, 224, 15), (224, 300, 15), (448, 448, 30), (16, 16, 15 / 14), (300, 28, 1.875)],
)
def test_the_tolerance_of_the_pointing_game_grows_with_the_image(height, width, tolerance):
    """It is 15 pixels for a shorter side of 224; a hit is at most that far from the box."""
    x, boxes = torch.zeros(1, 1, height, width), [(2, 3, 5, 6)]
    for far, hit in ((math.floor(tolerance), 1), (math.floor(tolerance) + 1, 0)):
        maps = x.clone()
        maps[0, 0, 4, 4 + far] = 1  # the last column of the box is 4
        result = pointing_game(maps, x, boxes=boxes)
        assert (result.mean, result.settings["tolerance"]) == (hit, pytest.approx(tolerance))
        assert result.mean == pointing_game(maps, x, boxes=boxes, tolerance=tolerance).mean
    assert pointing_game(maps, x, boxes=boxes, tolerance=far).mean == 1


@pytest.mark.parametrize("tolerance", [0, 1, 2**0.5, 1.9, 3, 5**0.5, 40, math.inf])
@pytest.mark.parametrize(("height", "width"), [(1, 9), (7, 1), (6, 11), (12, 5)])
def test_near_pixels_are_those_at_most_the_tolerance_away(height, width, tolerance):
    masks = torch.rand(5, height, width, generator=generator()) > 0.9
    masks[0] = False
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    for mask, near in zip(masks, dilated(masks, tolerance), strict=True):
        squared = (places[:, None] - places[mask.flatten()]).square().sum(2)
        expected = (squared <= tolerance**2).any(1).view(height, width)
        assert torch.equal(near, expected)


def test_random_maps_do_not_win_the_pointing_game_on_small_images():
    """On 16 x 16 pixels, a box of 6 x 6 with one pixel around it has 60 of 256 pixels."""
    maps = torch.rand(2000, 1, 16, 16, generator=generator())
    result = pointing_game(maps, maps, boxes=[(5, 5, 11, 11)] * 2000)
    assert result.mean == pytest.approx((36 + 4 * 6) / 256, abs=4 * result.standard_error)


def test_a_pointing_game_that_random_maps_win_is_warned_of():
    x = torch.rand(4, 1, 20, 20, generator=generator())
    empty, boxes = [(0, 0, 0, 0)], [(0, 0, 20, 18)] * 3
    # 18 of 20 rows are a chance of 0.9, which is still allowed; empty boxes are not scored
    assert pointing_game(x, x, boxes=boxes + empty, tolerance=0).n == 3
    with pytest.warns(ChanceWarning) as caught:
        pointing_game(x, x, boxes=boxes + empty, tolerance=1)
    (warning,) = caught
    assert str(warning.message) == (
        "a random map scores 0.95 in this pointing game: the boxes with a tolerance of 1 cover "
        "nearly all of images of 20 x 20 pixels. Expected a score of at most 0.9: pass a smaller "
        "tolerance= or smaller boxes"
    )
    assert warning.filename == __file__


def test_pointing_game_by_class():
    maps = torch.cat([INSIDE, INSIDE[:1], -INSIDE[:1]])
    x, boxes = torch.zeros(5, 1, 8, 8), [*BOXES, BOXES[0], BOXES[0]]
    result = pointing_game(maps, x, [0, 0, 0, 1, 1], boxes=boxes, tolerance=0, average="classes")
    assert result.mean == (1 + 0.5) / 2
    with pytest.raises(InputError, match="a target for each example"):
        pointing_game(maps, x, 0, boxes=boxes, average="classes")


def test_effective_heat_ratio_by_hand():
    """Heats are 1, 0.5 inside and 0.5, 0.05 outside, of which the last is below the threshold.

    Quantiles of (0.5, 0.5, 1) up to the median give three hot pixels, 1.5 / 3; later one, 1 / 1.
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
    (maps,) = Case.of(cam, x, 0).maps
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
