"""Paired differences: means, standard errors, and what is within noise."""

import numpy as np
import pytest
import torch

from captum_mipin import compare
from captum_mipin.comparison.differences import student
from captum_mipin.errors import InputError
from captum_mipin.metrics import Result


def scored(values, better="higher"):
    """Return a metric with these scores for each method, told apart by the first pixel."""

    def metric(method, inputs, target):
        chosen = values[int(method(inputs, target)[0, 0])]
        return Result.of("m", torch.tensor(chosen, dtype=torch.float64), better, {})

    return metric


def compared(values, better="higher", controls=0):
    methods = {f"m{i}": lambda x, t, i=i: torch.full_like(x, i) for i in range(len(values))}
    x = torch.zeros(len(values[0]), 2)
    return compare(methods, x, metrics={"m": scored(values, better)}, controls=False,
                   progress=False)  # fmt: skip


def test_a_small_difference_on_every_image_is_more_than_noise():
    """The scores vary by 10, the pairs by 0.1: only paired differences see it."""
    base = [0.0, 10.0, -10.0, 5.0, 3.0, 8.0]
    more = [b + d for b, d in zip(base, (0.9, 1.0, 1.1, 1.0, 0.95, 1.05), strict=True)]
    wild = [b + d for b, d in zip(base, (4.0, -4.0, 3.0, -3.0, 2.0, -1.0), strict=True)]
    found = compared([base, more, wild])
    to_best = {one.name: one for one in found.differences()}
    assert set(to_best) == {"m0", "m2"}
    paired = np.array(base) - np.array(more)
    assert to_best["m0"].result.mean == pytest.approx(paired.mean())
    assert to_best["m0"].result.standard_error == pytest.approx(paired.std(ddof=1) / 6**0.5)
    assert not to_best["m0"].within_noise
    assert to_best["m2"].within_noise
    assert "m: best is m1; within noise of it: m2" in str(found).splitlines()
    (one,) = [one for one in found.differences("m", to="m0") if one.name == "m1"]
    assert one.result.mean == pytest.approx(-paired.mean())
    assert str(to_best["m2"]).endswith(", within noise")
    data = found.to_dict()["differences"]
    assert [(d["method"], d["to"], d["within noise"]) for d in data] == [
        ("m0", "m1", False),
        ("m2", "m1", True),
    ]
    lower = compared([base, more, wild], "lower")
    assert "m: best is m0; within noise of it: m2" in str(lower)
    with pytest.raises(InputError, match="metric='x'"):
        found.differences("x")
    with pytest.raises(KeyError):
        found.differences(to="x")


def test_two_images_say_nothing_and_images_without_a_score_are_left_out():
    assert all(one.within_noise for one in compared([[1.0, 1.1], [5.0, 5.1]]).differences())
    nan = float("nan")
    (one,) = compared([[1.0, 2.0, 3.0, nan], [0.0, 1.1, nan, 9.0]]).differences(to="m0")
    assert one.result.n == 2
    assert one.result.mean == pytest.approx(-0.95)
    assert compared([[nan, nan], [nan, nan]]).differences() == ()
    assert compared([[1.0, 1.0], [2.0, 2.0]], "neither").differences() == ()


def test_a_method_no_better_than_a_control_is_named(cnn):
    x = cnn.x[:5]
    best = torch.ones_like(x)
    found = compare({"a": best, "b": best}, x, 0, model=cnn.model, metrics={"m": control_is_best},
                    progress=False)  # fmt: skip
    assert "m: not better than centre prior: a, b" in str(found).splitlines()


def control_is_best(method, inputs, target, model=None):
    centred = callable(method) and getattr(method, "__name__", "") == "centre"
    return Result.of("m", torch.rand(len(inputs)) + 9 * centred, "higher", {})


def test_quantiles_of_students_t_are_those_of_simulated_means():
    """Means of n normal numbers leave the interval of t standard errors in 5 % of all draws."""
    random = np.random.default_rng(0)
    for n in (3, 6, 30):
        draws = random.standard_normal((200_000, n))
        t = np.abs(draws.mean(1)) / (draws.std(1, ddof=1) / n**0.5)
        assert (t > student(n - 1)).mean() == pytest.approx(0.05, abs=0.004)
