"""Further arguments of the model: of each example, also nested, and shared by all examples."""

from typing import Any

import pytest
import torch
from captum.attr import Saliency
from small import Weighted
from torch import Tensor

from captum_mipin.metrics import deletion, infidelity, sensitivity_max, sensitivity_n

X = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
SCALE = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) + 0.5


METRICS: dict[str, tuple[Any, dict[str, Any]]] = {
    "deletion": (deletion, {}),
    "sensitivity_n": (sensitivity_n, {"n": [2]}),
    "infidelity": (infidelity, {"samples": 3}),
    "sensitivity_max": (sensitivity_max, {"samples": 3}),
}


def _method(inputs: Tensor, target: Any, *extras: Any) -> Any:
    """Return gradients; the arguments are passed by this test, not by Captum."""
    model = Weighted().eval()
    x = inputs.clone().requires_grad_()
    return Saliency(lambda x: model(x, *extras[0])).attribute(x, target=target)


@pytest.mark.parametrize("name", METRICS)
def test_a_nested_argument_is_that_of_its_examples(name: str) -> None:
    """Formerly a tensor in a dictionary kept all its rows, whatever the examples."""
    metric, options = METRICS[name]
    options = {**options, "model": Weighted().eval(), "batch_size": 3}
    nested, plain = (
        metric(_method, X, 1, additional_forward_args=extra, **options).values
        for extra in (({"scale": SCALE},), SCALE)
    )
    assert torch.equal(nested, plain)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", METRICS)
def test_an_argument_as_long_as_the_batch_is_shared_if_the_model_takes_it_so(
    name: str, count: int
) -> None:
    """Formerly it was cut into rows, with which the model cannot run, or repeated by Captum."""
    metric, options = METRICS[name]
    shared = torch.arange(1.0, 5.0) if count == 4 else torch.tensor([2.0])
    options = {**options, "model": Weighted().eval(), "batch_size": 3}
    found, expected = (
        metric(_method, X[:count], 1, additional_forward_args=extra, **options).values
        for extra in (shared, shared.expand(count, 4))
    )
    torch.testing.assert_close(found, expected)


def test_a_shared_argument_as_long_as_a_part_of_the_examples_stays_whole() -> None:
    """Of 40 examples, the first 32 are one batch, as long as the argument."""
    x, weights = torch.rand(40, 4), torch.arange(32.0)
    found = infidelity(
        x, x, 1, model=lambda x, w: (x * w[:4]).exp(), additional_forward_args=weights
    )
    expected = infidelity(x, x, 1, model=lambda x: (x * weights[:4]).exp())
    torch.testing.assert_close(found.values, expected.values)
