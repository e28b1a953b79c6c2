"""Insertion, deletion, sensitivity-n, infidelity: against loops, closed forms and Captum."""

import math

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from hypothesis import given, settings
from hypothesis import strategies as st
from small import normal
from torch import nn

from captum_mipin.errors import InputError
from captum_mipin.metrics import deletion, infidelity, insertion, sensitivity_n
from captum_mipin.metrics.baselines import blur
from captum_mipin.metrics.replacement import _sizes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_by_one(model, maps, start, finish, *, target, step):
    """The protocol, one image and one step at a time; maps without ties."""
    curves = []
    for heat, first, last in zip(maps.sum(1), start, finish, strict=True):
        order = heat.flatten().argsort(descending=True)
        scores = []
        for done in range(0, len(order) + step, step):
            now = first.clone()
            for pixel in order[:done].tolist():
                row, column = divmod(pixel, first.shape[2])
                now[:, row, column] = last[:, row, column]
            scores.append(float(model(now[None]).softmax(1)[0, target]))
        curves.append(scores)
    return torch.tensor(curves, dtype=torch.float64)


@pytest.mark.parametrize("size", [None, 7])
def test_insertion_and_deletion_are_the_protocol_of_rise(cnn, size):
    x = cnn.x[:3]
    (maps,) = (normal(3, 3, 8, 8, seed=1),)
    with torch.no_grad():
        gone = one_by_one(cnn.model, maps, x, torch.zeros_like(x), target=1, step=8)
        back = one_by_one(cnn.model, maps, blur(x), x, target=1, step=8)
    for metric, curves in ((deletion, gone), (insertion, back)):
        result = metric(maps, x, 1, model=cnn.model, batch_size=size)
        assert result.settings["step"] == 8
        torch.testing.assert_close(result.curves, curves, rtol=1e-5, atol=1e-6)
        area = (curves.sum(1) - curves[:, 0] / 2 - curves[:, -1] / 2) / 8  # as RISE writes it
        torch.testing.assert_close(result.values, area, rtol=1e-5, atol=1e-6)


def test_a_step_is_one_row_of_an_image_that_is_not_square():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 6, 2)).eval()
    x, maps = normal(2, 3, 4, 6), normal(2, 4, 6)
    assert deletion(maps, x, 1, model=model).settings["step"] == 6


def test_one_input_may_come_as_a_tuple(cnn):
    x, maps = cnn.x[:2], normal(2, 8, 8)
    for metric in (deletion, insertion, sensitivity_n, infidelity):
        given = maps if metric is not infidelity else normal(2, 3, 8, 8)
        assert torch.equal(
            metric(given, (x,), 0, model=cnn.model).values,
            metric(given, x, 0, model=cnn.model).values,
        )


def test_the_last_step_may_be_smaller():
    x = torch.arange(5.0)[None]
    result = deletion(x, x, model=lambda x: x.sum(1), score="logit", step=2)
    assert result.curves.tolist() == [[10, 3, 0, 0]]


def test_known_maps_of_a_linear_model_are_best_and_worst():
    """Deletion by the terms of a sum is lowest in their order, highest in the reverse."""
    x, weight = normal(40, 12), normal(12, seed=1)
    terms = x * weight
    ask = {"model": lambda x: x @ weight, "score": "logit"}
    best, worst = (deletion(maps, x, **ask) for maps in (terms, -terms))
    random, constant = (
        deletion(maps, x, **ask) for maps in (normal(40, 12, seed=2), torch.ones(40, 12))
    )
    for between in (random, constant):
        assert (best.values <= between.values + 1e-9).all()
        assert (between.values <= worst.values + 1e-9).all()
    halves = terms.sum(1).double() / 2  # what a random order leaves on average
    draws = torch.stack(
        [deletion(torch.ones(40, 12), x, generator=generator(s), **ask).values for s in range(60)]
    )
    assert ((draws.mean(0) - halves).abs() < 5 * draws.std(0) / 60**0.5).all()
    put = insertion(terms, x, baseline=0.0, **ask)
    torch.testing.assert_close(
        put.values, worst.values, rtol=1e-5, atol=1e-5
    )  # put in first is left out last


def test_every_step_goes_through_the_model_in_few_calls(cnn):
    calls = []

    def spy(x):
        calls.append(len(x))
        return cnn.model(x)

    for options, expected in (
        ({}, [4 * 8 + 1]),  # one baseline
        ({"baseline": lambda x: torch.zeros_like(x)}, [4 * 9]),  # not known to be the same
        ({"target": [0, 1, 2, 0]}, [4 * 9]),
        ({"batch_size": 20}, [17, 16]),
        ({"batch_size": 5}, [5] * 5 + [4] * 2),
    ):
        calls.clear()
        deletion(torch.rand(4, 8, 8), cnn.x[:4], **{"target": 0, "model": spy, **options})
        assert calls == expected


@pytest.mark.parametrize(
    ("metric", "baseline"),
    [(deletion, 0.0), (insertion, 0.0), (insertion, "blur"), (deletion, 0.5)],
)
@pytest.mark.parametrize("target", [1, [2, 0, 1]])
def test_no_input_is_run_twice_and_the_curves_are_those_of_the_loop(cnn, metric, baseline, target):
    """Few pixels, many ties: most steps change nothing, and one target has one baseline."""
    x = cnn.x[:3] * (torch.rand(3, 1, 8, 8, generator=generator(1)) > 0.8)
    maps = (x.sum(1) > 0) * torch.rand(3, 8, 8, generator=generator(2)).mul(3).round()
    ties = torch.rand(3, 64, generator=generator(3))
    seen = []

    def spy(x):
        seen.extend(x.clone())
        return cnn.model(x)

    result = metric(
        maps, x, target, model=spy, baseline=baseline, step=3, generator=generator(3), batch_size=5
    )
    other = blur(x) if baseline == "blur" else torch.full_like(x, baseline)
    start, finish = (x, other) if metric is deletion else (other, x)
    inputs, curves = [], []
    for i in range(3):
        order = np.lexsort((ties[i].numpy(), -maps[i].flatten().numpy()))
        for done in range(0, 67, 3):
            now = start[i].clone()
            now.flatten(1)[:, order[:done]] = finish[i].flatten(1)[:, order[:done]]
            inputs.append((now.numpy().tobytes(), target if isinstance(target, int) else i))
            with torch.no_grad():
                curves.append(
                    float(
                        cnn.model(now[None]).softmax(1)[
                            0, target if isinstance(target, int) else target[i]
                        ]
                    )
                )
    expected = torch.tensor(curves, dtype=torch.float64).view(3, -1)
    torch.testing.assert_close(result.curves, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        result.values, torch.trapezoid(expected, dx=1 / 22), rtol=1e-6, atol=1e-6
    )
    assert len(seen) == len(set(inputs))
    assert {one.numpy().tobytes() for one in seen} == {one for one, _ in inputs}


def test_inputs_that_equal_the_baseline_are_run_once(cnn):
    calls = []

    def spy(x):
        calls.append(len(x))
        return cnn.model(x)

    for metric in (deletion, insertion):
        result = metric(torch.rand(3, 8, 8), torch.zeros(3, 3, 8, 8), 0, model=spy, baseline=0.0)
        with torch.no_grad():
            blank = cnn.model(torch.zeros(1, 3, 8, 8)).softmax(1)[0, 0].double()
        torch.testing.assert_close(result.curves, blank.expand(3, 9))
    assert calls == [1, 1]


@pytest.mark.parametrize("step", [64, 65, 1000])
def test_one_step_and_one_image(cnn, step):
    x, maps = cnn.x[:1], normal(1, 3, 8, 8)
    with torch.no_grad():
        ends = cnn.model(torch.cat([x, torch.zeros_like(x)])).softmax(1)[:, 2].double()
    result = deletion(maps, x, 2, model=cnn.model, step=step)
    torch.testing.assert_close(result.curves, ends[None])
    assert float(result.values[0]) == pytest.approx(float(ends.mean()))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.cfloat,
        torch.cdouble,
    ],
    ids=str,
)
def test_pixels_of_every_type_are_taken_bit_by_bit(dtype):
    """Also NaN, infinities and the sign of zero."""
    special = [0.0, 1.0, 2.0, 5.0]
    if dtype.is_floating_point:
        special = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-3]
    values = torch.tensor(special, dtype=dtype)
    x, other = (
        values[torch.randint(len(values), (2, 2, 3, 3), generator=generator(seed))]
        for seed in (0, 1)
    )
    x, seen = x.transpose(2, 3), []  # not contiguous

    def model(x):
        seen.extend(x)
        return torch.zeros(len(x))

    deletion(torch.rand(2, 3, 3), x, model=model, baseline=lambda x: other, score="logit", step=9)
    expected = [one for pair in zip(x, other, strict=True) for one in pair]
    assert [one.dtype for one in seen] == [dtype] * 4
    found, expected = (torch.stack(some).contiguous() for some in (seen, expected))
    assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def test_pixels_and_maps_however_they_are_kept():
    def model(x):
        return x.real.sum((1, 2)) + x.imag.sum((1, 2)) if x.is_complex() else x.sum((1, 2))

    x, maps = normal(3, 2, 4, dtype=torch.complex64), normal(3, 2, 4, seed=1).round()
    asked = {"model": model, "baseline": 0.0, "score": "logit"}
    assert x.conj().is_conj()
    assert x.conj().imag.is_neg()
    weight = torch.ones((), requires_grad=True)
    for metric in (deletion, insertion):
        for kept in (x.conj(), x.conj().imag):
            assert torch.equal(
                metric(maps, kept, **asked).curves,
                metric(maps, kept.resolve_conj().resolve_neg(), **asked).curves,
            )
    for metric in (deletion, sensitivity_n):
        expected = metric(maps, x.real, **asked).curves
        for reduction in (lambda m: m.sum(1) * weight, lambda m: m.sum(1).bfloat16()):
            assert torch.equal(metric(maps, x.real, reduction=reduction, **asked).curves, expected)


def test_a_model_may_ask_for_gradients_and_write_on_its_input():
    """An energy that descends once: what it is given is its own."""

    def model(x):
        with torch.enable_grad():
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad((x**3).sum(), x)
        return x.detach().mul_(2).sum(1) + slope.sum(1)

    x = torch.tensor([[3.0, 2.0]], requires_grad=True)
    with torch.inference_mode(False):
        result = deletion(x.detach(), x, model=model, score="logit")
    assert result.curves.tolist() == [[10 + 39, 4 + 12, 0]]
    assert x.tolist() == [[3, 2]]


def test_each_example_has_its_own_target_and_arguments():
    x, scale = normal(3, 4).abs(), torch.tensor([[1.0], [2.0], [3.0]])
    found = deletion(
        x,
        x,
        [0, 1, 2],
        model=lambda x, s: x * s,
        score="logit",
        additional_forward_args=scale,
        batch_size=2,
    )
    for i in range(3):
        alone = deletion(
            x[i : i + 1],
            x[i : i + 1],
            i,
            model=lambda x, s: x * s,
            score="logit",
            additional_forward_args=scale[i : i + 1],
        )
        assert torch.equal(found.curves[i], alone.curves[0])


def test_blur_is_that_of_rise():
    ndimage = pytest.importorskip("scipy.ndimage", reason="an independent blur to compare with")
    import numpy as np

    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(ndimage.gaussian_filter(point, 5))
    x = normal(2, 3, 20, 14, dtype=torch.float64)
    expected = nn.functional.conv2d(x.view(6, 1, 20, 14), kernel[None, None], padding=5).view_as(x)
    torch.testing.assert_close(blur(x), expected)


def test_a_score_may_be_one_of_all_outputs(cnn):
    x, maps = cnn.x[:2], normal(2, 8, 8)
    one = deletion(maps, x, [0, 2], model=cnn.model, score=lambda y: y.logsumexp(1))
    with torch.no_grad():
        torch.testing.assert_close(one.curves[:, 0], cnn.model(x).logsumexp(1).double())
    assert one.settings["score"] == "<lambda>"  # no address: settings are the same in each run


def test_baselines_are_not_rounded():
    x = torch.ones(1, 2, dtype=torch.float64)
    assert (
        deletion(x, x, model=lambda x: x.sum(1), score="logit", baseline=0.1).curves[0, -1] == 0.2
    )
    tokens = torch.tensor([[3, 5]])
    assert (
        deletion(
            torch.rand(1, 2), tokens, model=lambda x: x.sum(1), score="logit", baseline=1
        ).curves[0, -1]
        == 2
    )
    with pytest.raises(InputError, match="int64 cannot hold"):
        deletion(torch.rand(1, 2), tokens, model=lambda x: x.sum(1), score="logit", baseline=0.5)


def test_maps_of_tokens_and_their_features_are_not_summed_over_tokens():
    tokens, maps = torch.arange(4)[None], torch.rand(1, 4, 4, generator=generator())
    ask = {"model": lambda x: x.sum(1), "score": "logit"}
    with pytest.raises(InputError, match="map of shape"):
        deletion(maps, tokens, **ask)
    summed = deletion(maps, tokens, reduction=lambda maps: maps.sum(2), **ask)
    assert torch.equal(summed.values, deletion(maps.sum(2), tokens, **ask).values)


def test_baselines_of_every_kind(cnn):
    x = cnn.x[:2]
    maps, model = torch.rand(2, 8, 8, generator=generator(1)), cnn.model
    ends = [
        float(deletion(maps, x, 0, model=model, baseline=b, score="logit").curves[1, -1])
        for b in (0.5, torch.full((3, 8, 8), 0.5), lambda x: torch.full_like(x, 0.5))
    ]
    with torch.no_grad():
        assert ends == pytest.approx([float(model(torch.full_like(x, 0.5))[1, 0])] * 3)
    for bad, message in (
        ("noise", "baseline='noise' is not known: pass 'blur'"),
        (torch.ones(5), "does not fit inputs"),
    ):
        with pytest.raises(InputError, match=message):
            deletion(maps, x, 0, model=model, baseline=bad)
    with pytest.raises(InputError, match="a blur needs images"):
        insertion(normal(2, 6), normal(2, 6), model=lambda x: x)


def test_maps_of_a_layer_and_methods(cnn, untouched):
    x = cnn.x[:2]
    with untouched(cnn.model, x):
        cam = insertion(LayerGradCam(cnn.model, cnn.model[3]), x, [0, 2])
        pixels = insertion(Saliency(cnn.model), x, [0, 2])
    assert cam.settings["maps"] == "1x4x4"
    assert pixels.settings["maps"] == "3x8x8"
    assert torch.equal(cam.curves[:, [0, -1]], pixels.curves[:, [0, -1]])  # shared ends


def test_nan_is_counted_and_others_go_on(cnn):
    x, maps = cnn.x[:3].clone(), torch.rand(3, 8, 8, generator=generator(1))
    maps[1, 2, 2] = math.nan
    for metric in (deletion, insertion, sensitivity_n):
        result = metric(maps, x, 0, model=cnn.model)
        assert result.unscored == {"NaN": (1,)}
        assert result.values[[0, 2]].isfinite().all()
    x[0, 0, 0, 0] = math.nan
    assert deletion(maps, x, 0, model=cnn.model).unscored == {"NaN": (0, 1)}


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    places=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    step=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 3]),
)
@settings(max_examples=50, deadline=None)
def test_any_shape_begins_whole_and_ends_at_the_baseline(size, places, step, seed, levels):
    count, channels = size
    x = torch.rand(count, channels, *places, generator=generator(seed)) + 0.1
    maps = (levels * torch.rand(x.shape, generator=generator(seed + 1))).round()
    result = deletion(maps, x, model=lambda x: x.flatten(1).sum(1), score="logit", step=step)
    pixels = math.prod(places) if places else channels
    assert result.curves.shape == (count, -(-pixels // step) + 1)
    torch.testing.assert_close(result.curves[:, 0], x.flatten(1).sum(1).double())
    assert (result.curves[:, -1] == 0).all()
    assert (result.curves.diff(dim=1) <= 1e-6).all()  # nothing comes back


def test_sensitivity_n_of_known_maps():
    x, weight = normal(5, 10), normal(10, seed=1)
    terms = x * weight
    ask = {"model": lambda x: x @ weight, "samples": 40}
    assert sensitivity_n(terms, x, **ask).values.tolist() == pytest.approx([1] * 5)
    assert sensitivity_n(3 * terms, x, **ask).values.tolist() == pytest.approx([1] * 5)
    assert sensitivity_n(-terms, x, **ask).values.tolist() == pytest.approx([-1] * 5)
    assert sensitivity_n(torch.ones(5, 10), x, **ask).unscored == {"constant": (0, 1, 2, 3, 4)}
    random = sensitivity_n(normal(200, 10, seed=2), normal(200, 10), **ask)
    assert abs(random.mean) < 4 * random.standard_error


def test_sensitivity_n_of_images_by_hand(cnn):
    """One pixel at a time: the sets are drawn again, and each pixel's loss is measured alone."""
    x, maps = cnn.x[:1], normal(1, 3, 8, 8)
    result = sensitivity_n(
        maps, x, 1, model=cnn.model, n=[1, 5], samples=30, generator=generator(7)
    )
    random = generator(7)
    torch.rand(1, 64, generator=random)  # breaks ties, of which there are none
    order = torch.rand(30, 64, generator=random).argsort().argsort()
    sums, losses = [], []
    with torch.no_grad():
        for one in order:
            pixel = int((one == 0).nonzero())
            without = x.clone()
            without[0, :, pixel // 8, pixel % 8] = 0
            sums.append(float(maps[0, :, pixel // 8, pixel % 8].sum()))
            losses.append(float(cnn.model(x)[0, 1] - cnn.model(without)[0, 1]))
    expected = torch.corrcoef(torch.tensor([sums, losses], dtype=torch.float64))[0, 1]
    assert float(result.curves[0, 0]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_maps_and_outputs_of_any_size_have_the_same_scores(scale):
    x, weight, maps = (
        normal(3, 10, dtype=torch.float64),
        normal(10, seed=1, dtype=torch.float64),
        normal(3, 10).double(),
    )
    for metric in (sensitivity_n, deletion):
        found, expected = (
            metric(maps * s, x, model=lambda x: x @ weight, score="logit").values
            for s in (scale, 1.0)
        )
        torch.testing.assert_close(found, expected)
    found = sensitivity_n(maps, x, model=lambda x: x @ weight * scale).values
    torch.testing.assert_close(found, sensitivity_n(maps, x, model=lambda x: x @ weight).values)


def test_numbers_of_pixels_are_log_spaced():
    assert _sizes(None, 50176)[0] == 1
    assert _sizes(None, 50176)[-1] == round(0.8 * 50176)
    assert len(_sizes(None, 50176)) == 16
    assert _sizes(None, 1) == [1]
    for bad in ([], [0], [65]):
        with pytest.raises(InputError, match="from 1 to 64"):
            sensitivity_n(
                torch.rand(1, 8, 8),
                torch.rand(1, 1, 8, 8),
                model=lambda x: x.flatten(1).sum(1),
                n=bad,
            )


def test_what_cannot_be_disturbed_is_refused(cnn):
    x = cnn.x[:2]
    for bad, message in (
        (lambda: infidelity(LayerGradCam(cnn.model, cnn.model[3]), x, 0), "shaped like the inputs"),
        (
            lambda: infidelity(x, x, 0, model=cnn.model, samples=0),
            "samples=0 must be a whole number of at least 1",
        ),
        (
            lambda: sensitivity_n(x, x, 0, model=cnn.model, samples=1),
            "samples=1 must be a whole number of at least 2",
        ),
        (lambda: deletion(x, x, 0, model=cnn.model, step=0), "step=0"),
        (lambda: deletion(x, x, 0), "pass model="),
        (lambda: deletion((x, x), (x, x), 0, model=cnn.model), "one input tensor"),
        (lambda: deletion(x, torch.ones(2), model=cnn.model), "needs inputs"),
        (
            lambda: deletion(torch.ones(2, 3), torch.ones(2, 4), 0, model=lambda x: x),
            "map of shape",
        ),
        (lambda: deletion(x, x, 0, model=lambda x: x.flatten(1).sum(1)), "use score='logit'"),
    ):
        with pytest.raises(InputError, match=message):
            bad()
