"""Results by hand: means, standard errors, what is not scored, and JSON."""

import json
import math

import pytest
import torch

from captum_mipin.metrics import Result

NAN = math.nan


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
