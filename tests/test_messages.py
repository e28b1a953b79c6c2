"""Frequent mistakes, each with an error that says what to type next."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_mipin import (
    IBA,
    InputIBA,
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    NeighbourInverse,
    check,
    compare,
    for_photographs,
)
from captum_mipin.errors import CaptureError, FitError, InputError, TargetError
from captum_mipin.methods import LRP, Gamma, GradCAM, GuidedBackprop, LayerPropagation, Patterns
from captum_mipin.methods.gradients import Gradient
from captum_mipin.metrics import (
    completeness,
    deletion,
    mosaics,
    pointing_game,
    randomization,
    sensitivity_n,
)


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
        (torch.randn(5, 3, 5, 5), "mat1 and mat2 shapes", "Pass inputs of a shape, dtype and"),
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


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        (torch.eye(3)[:2], r"shape \(2, 3\), expected .*pass target\.argmax\(1\)"),
        (
            torch.eye(3)[:2].long(),
            r"if each row marks one class, pass target\.argmax\(1\)",
        ),
        (torch.zeros(2), r"of dtype torch\.float32.*pass target\.long\(\)"),
        (torch.zeros(2, 1).long(), r"shape \(2, 1\).*pass target\.flatten\(\)"),
        (torch.zeros(2, 3).max(1), "is a max, expected integers: pass for example target=3"),
        ("cat", "'cat' is a str, expected integers: pass for example target=3 for all"),
        (3, r"outputs of shape \(3,\), expected an index from -3 to 2: pass .* from 0"),
    ],
)
def test_targets_that_are_no_index(target: Any, advice: str) -> None:
    for call in (
        lambda: LRP(_net()).attribute(X[:2], target),
        lambda: deletion(Saliency(_net()), X[:2], target),
    ):
        with pytest.raises(TargetError, match=advice):
            call()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ridge": "low"}, r"ridge='low' must be a finite number of at least 0: change it"),
        ({"ridge": None}, "ridge=None must be a finite number"),
        ({"ridge": True}, "ridge=True must be a finite number"),
        ({"epochs": 2.5}, r"epochs=2\.5 must be a whole number of at least 1: change it"),
        ({"learning_rate": 0}, "learning_rate=0 must be a finite number above 0"),
        ({"pooling": 3}, "pooling=3 is not one of 'shares', 'even': pass one of them"),
    ],
)
def test_options_that_are_no_numbers(options: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        InverseNetwork(_net(), **options)


def test_options_of_a_fit_and_of_metrics_that_are_no_numbers() -> None:
    for size in ("8", 8.0, 0):
        message = f"batch_size={size!r} must be a whole number of at least 1"
        for fit in (InverseNetwork(_net()), NeighbourInverse(_net()), Patterns(_net())):
            with pytest.raises(InputError, match=message):
                fit.fit(X, batch_size=size, progress=False)
        with pytest.raises(InputError, match=message):
            IBA(_net(), "0").estimate(X, batch_size=size, progress=False)
    with pytest.raises(InputError, match="steps='3' must be a whole number of at least 1"):
        deletion(Saliency(_net()), X, 0, steps="3")
    with pytest.raises(InputError, match=r"n=2, expected a list of sizes.* n=\[1, 16\]"):
        sensitivity_n(Saliency(_net()), X, 0, n=2)


def test_data_of_another_type_is_told_how_to_convert() -> None:
    inverse = InverseNetwork(_net())
    for data, advice in (
        (
            X.numpy(),
            r"a numpy array, expected .*pass torch\.as_tensor\(inputs, dtype=torch\.float32",
        ),
        ({"image": X}, r"a dict, expected .*such as data\['image'\]"),
        ([{"image": X}], r"a batch is a dict, .*unpack=lambda batch: \(batch\['image'\], None\)"),
        (None, "cannot fit on None, expected a tensor"),
    ):
        with pytest.raises(FitError, match=advice):
            inverse.fit(data, progress=False)
    with pytest.raises(FitError, match="unpack= is a str, expected a function: pass for example"):
        inverse.fit([X], unpack="image", progress=False)
    with pytest.raises(InputError, match=r"inputs are a list.*torch\.stack\(inputs\) for several"):
        LRP(_net()).attribute(list(X), 0)


def test_calls_that_differ_from_those_of_the_fit() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(ROWS, progress=False))
    with pytest.raises(CaptureError, match=r"pass x\.unsqueeze\(0\)\.\n.*a batch of such examples"):
        mipin.attribute(ROWS[0], 0)
    with pytest.raises(InputError, match=r"Double and Float\. Pass x\.to\(torch\.float32\), the d"):
        mipin.attribute(ROWS.double(), 0)


def test_metrics_tell_inputs_that_the_model_does_not_take() -> None:
    for x in (X[0], torch.randn(2, 3, 5, 5)):
        with pytest.raises(CaptureError, match=r"cannot run on inputs of shape .*x\.unsqueeze"):
            deletion(Saliency(_net()), x, 0)
    for method, found in (("Saliency", "a str"), (Saliency, "the class Saliency")):
        with pytest.raises(InputError, match=f"the method is {found}, expected a Captum Attr"):
            deletion(method, X, 0)
    for boxes in (["left"] * 5, [None] * 5):
        with pytest.raises(InputError, match=r"expected four finite numbers.*an empty list for"):
            pointing_game(Saliency(_net()), X, 0, boxes=boxes)
    with pytest.raises(InputError, match=r"labels have shape \(1,\), .*each of the 5 images"):
        mosaics(_net(), X, [0])


def test_control_flow_that_depends_on_values() -> None:
    model = Of(lambda parts, x: x if x.sum() > 0 else -x).eval()
    with pytest.raises(CaptureError, match=r"depends on the values of a tensor, .*torch\.where"):
        check(model, ROWS)


class Misspelt(nn.Module):
    """Uses a layer that it does not have."""

    def forward(self, x: Tensor) -> Any:
        return self.absent(x)


def test_the_line_of_the_model_that_fails() -> None:
    with pytest.raises(CaptureError, match=r"at 'return self\.absent\(x\)' in the model itself"):
        check(Misspelt().eval(), ROWS)


def test_names_of_layers_are_the_closest_at_any_depth() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 16, 16)), nn.Flatten(), nn.Linear(8, 3))
    photographs = torch.randn(2, 3, 32, 32)
    for call in (
        lambda: InverseNetwork(model.eval(), layer="0.O"),
        lambda: for_photographs(model, photographs, layer="0.O"),
        lambda: IBA(model, "0.O"),
        lambda: InputIBA(model, "0", input_layer="0.O"),
        lambda: GradCAM(model, "0.O"),
        lambda: LayerPropagation(LRP(model), "0.O"),
        lambda: Patterns(model, layer="0.O"),
        lambda: randomization(Saliency(model), photographs, 0, layers=["0.O"]),
    ):
        with pytest.raises(InputError, match=r"pass for example (one of )?('0', '0\.0'|'0\.0')"):
            call()
    with pytest.raises(CaptureError, match=r"'relu_9' is missing in the graph .*'0'.*tensors: "):
        IBA(model, "relu_9").estimate(photographs, progress=False)


def test_rules_that_do_not_come_in_pairs() -> None:
    for composite in ({"0": Gamma()}, "epsilon_plus", [("0", Gamma(), 1)]):
        with pytest.raises(InputError, match=r"expected pairs \(layers, rule\): pass for example"):
            LRP(_net(), composite=composite)
    with pytest.raises(
        InputError, match=r"'features' matches no layer .*one of the paths '0', '3'"
    ):
        LRP(_net(), composite=[("features", Gamma())]).attribute(X, 0)


def test_a_folder_in_place_of_a_file(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    inverse = InverseNetwork(model).fit(ROWS, progress=False)
    with pytest.raises(IsADirectoryError, match="it is a folder; pass the path of a file in it"):
        inverse.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a folder, expected a file that this package"):
        InverseNetwork.load(tmp_path, model)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda parts, x: x.T, r"output has shape \(3, batch\), expected the batch as its first"),
        (lambda parts, x: x.flatten(), r"output has shape \(3\*batch,\), expected the batch"),
        (lambda parts, x: x.mean(0) + x, r"shape \(3,\), .* contains the batch: it mixes the ex"),
        (lambda parts, x: x * x.sum().item(), "a number computed from the whole batch, as a value"),
    ],
)
def test_shapes_say_batch(function: Any, message: str) -> None:
    class Behind(Of):
        def forward(self, *inputs: Tensor) -> Any:
            return self.function(self.parts, self.last(*inputs))

    with pytest.raises(CaptureError, match=message):
        LRP(Behind(function).eval()).attribute(ROWS, 0)
