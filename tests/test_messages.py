"""Frequent mistakes, each with an error that says what to type next."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_mipin import (
    IBA,
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    check,
    compare,
)
from captum_mipin.errors import CaptureError, FitError, InputError, TargetError
from captum_mipin.methods import LRP, GuidedBackprop
from captum_mipin.methods.gradients import Gradient
from captum_mipin.metrics import completeness, deletion


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()


class Of(nn.Module):
    """A network of a function of one or several inputs, with a layer behind."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.function, self.last = nn.ModuleDict(parts), function, nn.Linear(4, 3)

    def forward(self, *inputs: Tensor) -> Any:
        return self.last(self.function(self.parts, *inputs))


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.last(a + b)


X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("inputs", "reason", "advice"),
    [
        (X[0], r"mat1 and mat2 shapes", r"takes x\.unsqueeze\(0\), of shape \(batch, 3, 4, 4\)"),
        (X.movedim(1, -1), "to have 3 channels, but got 4", r"pass x\.movedim\(-1, 1\)\.$"),
        (X[:, :1], "to have 3 channels, but got 1", r"pass x\.repeat\(1, 3, 1, 1\)\.$"),
        (X.double(), r"Input type \(double\)", r"pass x\.to\(torch\.float32\)\.$"),
        (torch.randn(5, 3, 5, 5), "mat1 and mat2 shapes", "Pass inputs of the shape"),
    ],
    ids=["no batch", "channels last", "grey", "float64", "size"],
)
def test_inputs_that_the_model_does_not_take(
    inputs: Tensor, reason: str, advice: str, caplog: Any
) -> None:
    for call in (lambda x: check(_net(), x), lambda x: LRP(_net()).attribute(x, 0)):
        message = rf"^Sequential cannot run on inputs \({len(inputs)}, .*{reason}.*{advice}"
        with caplog.at_level(logging.WARNING), pytest.raises(CaptureError, match=message) as caught:
            call(inputs)
        assert "\n" not in str(caught.value)
    assert not caplog.records, "torch prints no traceback of its own"


def test_one_example_that_convolutions_take_without_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(CaptureError, match=r"batch size as a fixed number.*x\.unsqueeze\(0\)"):
        check(model, X[0])
    with pytest.raises(CaptureError, match=r"of shape \(3,\) for inputs of shape \(4,\).*x\.u"):
        check(nn.Linear(4, 3).eval(), ROWS[0])


def test_a_recurrent_layer_that_takes_the_batch_second() -> None:
    model = Of(lambda parts, x: parts["lstm"](x)[0][:, -1], lstm=nn.LSTM(4, 4)).eval()
    for batch in (1, 3):
        with pytest.raises(
            CaptureError,
            match=r"Module 'parts\.lstm' \(LSTM\) has batch_first=False.*batch_first=True",
        ):
            check(model, torch.randn(batch, 6, 4))


def test_a_batch_size_that_is_read_as_a_number() -> None:
    with pytest.raises(
        CaptureError, match=r"fixed number, .* x\.shape\[0\] keeps the batch size free"
    ):
        check(Of(lambda parts, x: x / len(x)).eval(), ROWS)


def test_too_few_and_too_many_arguments() -> None:
    model = Two().eval()
    loader = DataLoader(TensorDataset(ROWS, ROWS), 5)
    message = r"missing 1 required positional argument: 'b'\. Pass .*unpack=lambda batch"
    for call in (
        lambda: check(model, ROWS),
        lambda: InverseNetwork(model).fit(loader, progress=False),
    ):
        with pytest.raises(CaptureError, match=message):
            call()
    InverseNetwork(model).fit(  # what the message says
        loader, unpack=lambda batch: ((batch[0], batch[1]), None), progress=False
    )
    with pytest.raises(
        CaptureError, match=r"takes 2 .*has 1 input\(s\) and 1 additional_f.*leave out"
    ):
        LRP(_net()).attribute(X, 0, ROWS)


def test_data_that_is_not_the_inputs() -> None:
    labels = torch.zeros(5, dtype=torch.long)
    with pytest.raises(
        FitError, match=r"input 1 has dtype torch\.int64.*Labels are no input: leave"
    ):
        InverseNetwork(_net()).fit((X, labels), progress=False)
    for size, found in ((5, "Tensor"), (2, "Tensor")):
        with pytest.raises(
            FitError, match=rf"unpack= returned a {found} .*unpack=lambda batch: \("
        ):
            InverseNetwork(_net()).fit(
                DataLoader(TensorDataset(X), size), unpack=lambda batch: batch[0], progress=False
            )
    with pytest.raises(FitError, match="returned a tuple of 3 for batch 0, expected a pair"):
        InverseNetwork(_net()).fit([(X,)], unpack=lambda batch: (batch, 0, 1), progress=False)


def test_integers_beside_floating_inputs() -> None:
    ids = torch.zeros(5, dtype=torch.long)
    with pytest.raises(
        InputError, match=r"input 1 has dtype torch\.int64.*mask, goes into additional"
    ):
        check(
            Of(lambda parts, x, ids: x + parts["e"](ids), e=nn.Embedding(2, 4)).eval(), (ROWS, ids)
        )
    with pytest.raises(
        InputError, match=r"Convert it, .*by layer= of InverseNetwork or LayerPropag"
    ):
        check(nn.Sequential(nn.Embedding(2, 4), nn.Linear(4, 3)).eval(), ids)


def test_arguments_that_the_fit_did_not_have(mlp: Any) -> None:
    with pytest.raises(
        CaptureError, match=r"fitted without additional_forward_args: leave them out"
    ):
        mlp.mipin.attribute(mlp.x[:2], 0, torch.ones(2))
    model = Of(lambda parts, x, y: x + y).eval()
    inverse = InverseNetwork(model).fit(
        [(ROWS, ROWS)], unpack=lambda batch: (batch[0], batch[1]), progress=False
    )
    with pytest.raises(CaptureError, match=r"fitted with additional_forward_args: pass them"):
        MIPINAttribution(model, inverse).attribute(ROWS, 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda parts, x, y: x + y,
        lambda parts, x, y: x + y.expand(4),
        lambda parts, x, y: x * y.reshape(1, 1),
        lambda parts, x, y: x + torch.cat([y] * 4),
        lambda parts, x, y: x * y.view(-1, 1),
        lambda parts, x, y: x * y[0],
    ],
)
def test_an_argument_as_long_as_a_batch_of_one(function: Any) -> None:
    """The model decides whether all examples share the argument."""
    torch.manual_seed(0)
    model, x, y = Of(function).eval(), ROWS[:1], torch.tensor([1.5])
    assert not check(model, x, y).refused
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf, y)[:, 1].sum(), leaf)
    assert torch.allclose(Gradient(model).attribute(x, 1, y), expected)


def test_a_layer_with_nothing_behind() -> None:
    model = _net()
    with pytest.raises(CaptureError, match=r"layer is the model's output, .*closer to the input"):
        IBA(model, "3").estimate(X, progress=False)


def test_below_no_grad() -> None:
    def function(parts: Any, x: Tensor) -> Any:
        with torch.no_grad():
            return parts["first"](x)

    model = Of(function, first=nn.Linear(4, 4)).eval()
    for method in (Gradient, GuidedBackprop):
        with pytest.raises(
            CaptureError, match=r"under torch\.no_grad\(\) or behind detach\(\), where"
        ):
            method(model).attribute(ROWS, 0)
    assert LRP(model).attribute(ROWS, 0).any()  # the way out


def test_metrics_and_tables(mlp: Any) -> None:
    x = mlp.x[:5]
    with pytest.raises(
        TargetError, match=r"shape \(5, 1\), .*each of the 5 examples: pass target\.fl"
    ):
        deletion(LRP(mlp.model), x, torch.zeros(5, 1, dtype=torch.long))
    with pytest.raises(TargetError, match=r"no targets were given, .*pass targets="):
        compare("Saliency", x, model=mlp.model, progress=False)
    inverse = InverseNetwork(mlp.model, layer="1").fit(mlp.x, progress=False)
    with pytest.raises(
        InputError, match=r"inverse stops at a layer: pass a method whose inverse rea"
    ):
        completeness(LayerMIPINAttribution(mlp.model, inverse), x, 0)
