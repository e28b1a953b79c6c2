"""Every method meets the same mistakes with the same errors, and says what to type next."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import captum_mipin
from captum_mipin import (
    IBA,
    InputIBA,
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    MIPINError,
    NeighbourInverse,
    check,
    compare,
    for_photographs,
    methods,
    metrics,
)
from captum_mipin.bottleneck import Adversary, Bottleneck, ThreeStages
from captum_mipin.errors import (
    ArgumentError,
    CaptureError,
    FitError,
    InputError,
    MissingNameError,
    TargetError,
    TargetRangeError,
)
from captum_mipin.methods import (
    LRP,
    Chefer,
    Gamma,
    GradCAM,
    LayerPropagation,
    PatternAttribution,
    PatternNet,
    Patterns,
    SmoothGrad,
    ZBox,
)
from captum_mipin.metrics import deletion, mosaics, pointing_game

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Blocks(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.last = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Of(nn.Module):
    """A network of a function of its parts and one input."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleDict(parts), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.parts, x)


def _cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().eval()


def _made(name: str) -> Any:
    """Return a method, fitted if it needs a fit."""
    model, quiet = _cnn(), {"progress": False}
    if name in ("AttentionRollout", "Chefer", "LeGrad"):
        return getattr(methods, name)(_vit())
    if name in ("PatternAttribution", "PatternNet"):
        patterns = Patterns(model, estimator="linear").fit(X, **quiet)
        return getattr(methods, name)(model, patterns)
    short = Bottleneck(steps=1)
    stages = ThreeStages(short, Adversary(samples=2, groups=1, epochs=1), short)
    others: dict[str, Callable[[], Any]] = {
        "MIPINAttribution": lambda: MIPINAttribution(model, InverseNetwork(model).fit(X, **quiet)),
        "LayerMIPINAttribution": lambda: LayerMIPINAttribution(
            model, InverseNetwork(model, layer="1").fit(X, **quiet)
        ),
        "of neighbours": lambda: MIPINAttribution(model, NeighbourInverse(model).fit(X, **quiet)),
        "IBA": lambda: IBA(model, "1", short).estimate(X, **quiet),
        "InputIBA": lambda: InputIBA(model, "1", stages).estimate(X, **quiet),
        "GradCAM": lambda: GradCAM(model, "1"),
        "SmoothGrad": lambda: SmoothGrad(model, samples=1),
        "LayerPropagation": lambda: LayerPropagation(LRP(model), "1"),
    }
    return others[name]() if name in others else getattr(methods, name)(model)


#: All methods of the package; those without a target are tried with inputs alone.
METHODS = [
    *("MIPINAttribution", "LayerMIPINAttribution", "of neighbours", "IBA", "InputIBA"),
    *(name for name in methods.__all__ if hasattr(getattr(methods, name), "attribute")),
]
#: Mistake → target, error, what the error says.
TARGETS: dict[str, tuple[Any, type[MIPINError], str]] = {
    "missing": (None, TargetError, r"outputs of shape \(3,\): choose one .* target="),
    "out of range": (7, TargetRangeError, "expected an index from -3 to 2"),
    "below": ([0, -4], TargetRangeError, "expected an index from -3 to 2"),
    "three": ([0, 1, 2], TargetError, "3 targets were given for 2 examples"),
    "tensor of three": (torch.arange(3), TargetError, "3 targets were given for 2 examples"),
    "text": ("cat", TargetError, "target 'cat' is a str, expected integers: pass for example"),
    "texts": (["a", "b"], TargetError, "target 'a' is a str, expected integers"),
    "floating": (1.5, TargetError, r"target 1\.5 is a float, expected integers"),
    "floating tensor": (torch.zeros(2), TargetError, r"pass target\.long\(\)"),
    "one-hot": (torch.eye(3)[:2], TargetError, r"pass target\.argmax\(1\)"),
    "pair": ((0, 1), TargetError, "pass several classes as a list"),
    "bool": (True, TargetError, "True is a bool, expected integers"),
    "network": (_cnn(), TargetError, "the target is a Sequential, expected integers"),
}
_FORMS = r"x\.to\(torch\.float32\)|x\.float\(\)"
#: Mistake → inputs, what the error says.
INPUTS: dict[str, tuple[Any, str]] = {
    "no batch": (X[0], r"x\.unsqueeze\(0\)"),
    "channels last": (X[:2].movedim(1, -1), r"pass x\.movedim\(-1, 1\)\."),
    "grey": (X[:2, :1], r"pass x\.repeat\(1, 3, 1, 1\)\."),
    "float64": (X[:2].double(), r"pass x\.to\(torch\.float32\)\."),
    "integers": (X[:2].long(), _FORMS),
    "pixels": (X[:2].byte(), _FORMS),
    "array": (X[:2].numpy(), r"pass torch\.as_tensor\(inputs, dtype=torch\.float32\)"),
    "list": ([X[0], X[1]], r"torch\.stack\(inputs\) for several examples"),
    "class": (0, r"classes, which come second.*: pass the inputs first"),
    "classes": ([0, 1], r"classes, which come second.*: pass the inputs first"),
    "network": (_cnn(), r"a network is no input and comes before the inputs"),
    "nothing": (None, "pass the model's inputs"),
    "empty": (X[:0], "pass at least one example"),
    "NaN": (X[:2] * float("nan"), "contains NaN or Inf"),
}


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.DataWarning")  # of the pixels
@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_is_wrong(name: str) -> None:
    method = _made(name)
    if name != "AttentionRollout":  # it has no target
        for mistake, (target, error, message) in TARGETS.items():
            with pytest.raises(error, match=message):
                pytest.fail(f"{mistake}: {method.attribute(X[:2], target=target)}")
    for mistake, (inputs, message) in INPUTS.items():
        with pytest.raises(MIPINError, match=message):
            pytest.fail(f"{mistake}: {method.attribute(inputs, target=0)}")
    if not isinstance(method.forward_func, Blocks):  # which take images of other sizes
        with pytest.raises(CaptureError, match="cannot run on inputs"):
            method.attribute(torch.randn(2, 3, 9, 9), target=0)


#: Metric → its own options.
METRICS: dict[str, dict[str, Any]] = {
    "deletion": {},
    "infidelity": {},
    "sensitivity_max": {},
    "class_sensitivity": {},
    "randomization": {},
    "sensitivity_n": {"n": [4]},
    "pointing_game": {"boxes": [(0, 0, 4, 4)] * 2},
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_is_wrong_with_targets_and_inputs(name: str) -> None:
    """Also if the method is Captum's, and its errors would be Captum's."""
    metric, options = getattr(metrics, name), METRICS[name]
    for mistake, (target, error, _) in TARGETS.items():
        with pytest.raises(error):
            pytest.fail(f"{mistake}: {metric(Saliency(_cnn()), X[:2], target, **options)}")
    for mistake in ("no batch", "channels last", "grey", "float64", "integers", "list", "class"):
        inputs, _ = INPUTS[mistake]
        with pytest.raises(MIPINError):
            pytest.fail(f"{mistake}: {metric(Saliency(_cnn()), inputs, 0, **options)}")


def _last(parts: Any, x: Tensor) -> Any:
    return parts["last"](parts["rnn"](x)[0][:, -1])


def _mean(parts: Any, x: Tensor) -> Any:
    return parts["last"](parts["first"](x).mean(1))


_LAYER = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Of(_last, rnn=nn.LSTM(4, 6, batch_first=True), last=nn.Linear(6, 3)), (5, 4)),
        (Of(_last, rnn=nn.GRU(4, 6, batch_first=True), last=nn.Linear(6, 3)), (50, 4)),
        (Of(_mean, first=nn.TransformerEncoder(_LAYER, 1), last=nn.Linear(4, 3)), (6, 4)),
        (Of(_mean, first=nn.Embedding(9, 4), last=nn.Linear(4, 3)), (6,)),
        (nn.Sequential(nn.Conv1d(6, 2, 3), nn.Flatten(), nn.Linear(12, 3)), (6, 8)),
        (nn.Sequential(nn.Conv2d(6, 2, 3), nn.Flatten(), nn.Linear(72, 3)), (6, 8, 8)),
        (Of(lambda parts, x: parts["c"](x).mean((-1, -2)), c=nn.Conv2d(6, 3, 3)), (6, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(30, 3)), (5, 6)),
        (nn.Sequential(nn.Linear(7, 3)), (7,)),
    ],
)
def test_one_example_without_a_batch_is_shown_with_its_own_shape(
    model: nn.Module, x: tuple[int, ...]
) -> None:
    """Formerly four rows of it were taken for the example."""
    torch.manual_seed(0)
    tokens = any(isinstance(module, nn.Embedding) for module in model.modules())
    inputs = torch.arange(6) if tokens else torch.randn(x)
    shape = ", ".join(map(str, x))
    message = rf"for inputs of shape \({shape},?\)|on inputs \({shape},?\)"
    with pytest.raises(CaptureError, match=message) as caught:
        check(model.eval(), inputs, layer="parts.first" if tokens else None)
    assert f"of shape (batch, {shape}): pass x.unsqueeze(0)." in str(caught.value)
    if not tokens:
        with pytest.raises(CaptureError, match=rf"\(batch, {shape}\): pass x\.unsqueeze\(0\)"):
            SmoothGrad(model).attribute(inputs, 0)


def test_a_model_that_takes_the_first_example_is_refused_in_one_line() -> None:
    """Formerly each operation behind the selection had a line of its own."""
    steps = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(30)])
    for function in (
        lambda parts, x: parts["steps"](x[0]),
        lambda parts, x: parts["steps"](x.mean(0)),
        lambda parts, x: parts["steps"](x.sum(0, keepdim=True)),
    ):
        model = Of(function, steps=steps).eval()
        for call in (
            lambda model=model: LRP(model).attribute(ROWS, 0),
            lambda model=model: InverseNetwork(model).fit(ROWS, progress=False),
            lambda model=model: SmoothGrad(model).attribute(ROWS, 0),
        ):
            with pytest.raises(CaptureError, match="Let forward keep the dimension of") as caught:
                call()
            assert len(str(caught.value).splitlines()) == 3
        assert len(check(model, ROWS).refused) == 61  # the table has them all


@pytest.mark.parametrize("slices", [slice(1), slice(-1, None)])
def test_an_output_without_a_row_for_each_example_is_refused(slices: slice) -> None:
    """Formerly SmoothGrad gave a map to all examples, and IBA raised an IndexError."""
    model = Of(lambda parts, x: parts["net"](x)[slices], net=_mlp()).eval()
    for call in (
        lambda: SmoothGrad(model).attribute(ROWS[:5], 0),
        lambda: IBA(model, "parts.net.1").estimate(ROWS, progress=False),
    ):
        with pytest.raises(CaptureError, match="mixes the examples of a batch"):
            call()


def test_layers_that_grad_cam_cannot_use() -> None:
    model = _cnn()
    model.register_module("spare", nn.Conv2d(1, 1, 1))
    model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)  # without the spare layer
    with pytest.raises(CaptureError, match=r"layer Conv2d is not called .*: name another module"):
        GradCAM(model, "spare").attribute(X[:2], 0)
    with pytest.raises(InputError, match="layer Flatten has an output of 2 dimensions, expected"):
        GradCAM(_cnn(), "2").attribute(X[:2], 0)


FITS = [InverseNetwork, NeighbourInverse, Patterns, lambda model: IBA(model, "0")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2, 3], r"a batch is an int, .*come second, as in fit\(data, targets\)"),
        ((0, 1), r"a batch is an int, .*come second, as in fit\(data, targets\)"),
        (3, r"cannot fit on an int, .*come second, as in fit\(data, targets\)"),
        (["a.jpg", "b.jpg"], "a batch is a str, .*load files into a tensor"),
        ([Path("a.jpg")], r"a batch is a (Posix|Windows)Path, .*load files into a tensor"),
        ("folder", "cannot fit on a str, .*load files into a tensor"),
        (ROWS.numpy(), r"cannot fit on a numpy array, .*torch\.as_tensor\(inputs, dtype="),
        ([ROWS.numpy()], r"a batch is a numpy array, .*torch\.as_tensor\(inputs, dtype="),
        ([0.5, 1.5], r"a batch is a float, .*torch\.as_tensor\(inputs, dtype="),
        (ROWS.tolist(), r"a batch is a list, .*torch\.as_tensor\(inputs, dtype="),
        ({"x": ROWS}, r"cannot fit on a dict, .*such as data\['x'\]"),
        (_mlp(), "cannot fit on a Sequential, .*a network is no input"),
        (LRP(_mlp()), "cannot fit on a LRP, .*a method is no input and comes first"),
        (None, "cannot fit on None, .*pass the model's inputs"),
    ],
)
def test_data_that_is_no_data(data: Any, message: str) -> None:
    for made in FITS:
        method: Any = made(_mlp())
        with pytest.raises(FitError, match=message):
            getattr(method, "fit", getattr(method, "estimate", None))(data, progress=False)


def test_classes_before_the_data() -> None:
    labels = torch.zeros(64, dtype=torch.long)
    for data in (labels, DataLoader(TensorDataset(labels, ROWS), 8)):
        with pytest.raises(FitError, match="If they are classes, pass them second"):
            InverseNetwork(_mlp()).fit(data, progress=False)
    for call in (
        lambda: InverseNetwork(_mlp()).fit(0, ROWS, progress=False),
        lambda: InverseNetwork(_mlp()).fit([0, 1], ROWS, progress=False),
        lambda: LRP(_mlp()).attribute(0, ROWS),
        lambda: deletion(LRP(_mlp()), 0, ROWS),
        lambda: compare(["LRP"], 0, ROWS, model=_mlp(), progress=False),
    ):
        with pytest.raises(MIPINError, match="classes, which come second"):
            call()
    with pytest.raises(TargetError, match="inputs first and classes second: swap them"):
        deletion(LRP(_mlp()), labels, ROWS)
    with pytest.raises(TargetError, match="the target is a list, expected integers"):
        InverseNetwork(_mlp()).fit(ROWS, torch.randn(64, 99), progress=False)


def test_networks_methods_and_data_in_each_others_places() -> None:
    model = _mlp()
    inverse = InverseNetwork(model).fit(ROWS, progress=False)
    patterns = Patterns(model, estimator="linear").fit(ROWS, progress=False)
    network_first = "the model is a Tensor, expected .*: pass the network first, and data"
    network = "a network is no input and comes before the inputs"
    no_method = r"is a Sequential, expected .*captum\.attr\.Saliency\(model\), and the network"
    of_method = "expected a torch.nn.Module: pass its network, which comes first"
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: check(ROWS, model), network_first),
        (lambda: check(inverse, ROWS), of_method),
        (lambda: check(model, LRP(model)), "a method is no input .*method=method"),
        (lambda: compare(model, ROWS, progress=False), no_method),
        (lambda: compare([model], ROWS, 0, progress=False), no_method),
        (lambda: compare(ROWS, model, 0, progress=False), network),
        (lambda: compare(ROWS, [LRP(model)], 0, progress=False), "a method is no input"),
        (lambda: compare(ROWS, ["LRP"], 0, progress=False), "names of methods come first"),
        (lambda: compare(inverse, ROWS, 0, progress=False), r"MIPINAttribution\(model, inv"),
        (lambda: deletion(ROWS, LRP(model), 0), "a method is no input and comes first"),
        (lambda: deletion(model, ROWS, 0), no_method),
        (lambda: mosaics(X, model, [0]), "the model is a Tensor, .*pass the network first"),
        (lambda: LRP(ROWS), network_first),
        (lambda: LRP(LRP(model)), of_method),
        (lambda: LRP("net"), r"with its weights loaded\. A path comes first only in load"),
        (lambda: LRP(nn.Linear), r"is the class Linear, .*: model = Linear\(\.\.\.\)"),
        (lambda: LRP(model.state_dict()), r"model\.load_state_dict\("),
        (lambda: SmoothGrad(ROWS), network_first),
        (lambda: Chefer(ROWS), network_first),
        (lambda: Patterns(ROWS), network_first),
        (lambda: InverseNetwork(ROWS), network_first),
        (lambda: NeighbourInverse(inverse), of_method),
        (lambda: IBA("0", model), "the model is a str"),
        (lambda: GradCAM("0", model), "the model is a str"),
        (lambda: GradCAM(model[0], model), "pass the whole network first, and then a layer"),
        (lambda: MIPINAttribution(inverse, model), of_method),
        (lambda: MIPINAttribution(model, ROWS), r"pass InverseNetwork\(model\)\.fit\(data\)"),
        (lambda: LayerMIPINAttribution(model, "0"), r"fit\(data\), and a layer only after it"),
        (lambda: PatternNet(patterns, model), "the model is a Patterns"),
        (lambda: PatternAttribution(model, inverse), r"pass Patterns\(model\)\.fit\(data\)"),
        (lambda: LayerPropagation("0", LRP(model)), r"method is a str, .*pass LRP\(model\)"),
        (lambda: InverseNetwork.load(model, "file"), "the model is a str, .*load.path, model"),
    ]
    for call, message in calls:
        with pytest.raises(MIPINError, match=message):
            call()


@pytest.mark.parametrize("room", [captum_mipin, methods, captum_mipin.bottleneck, metrics])
def test_python_names_no_private_class_if_an_argument_is_missing(room: Any) -> None:
    for name in room.__all__:
        public = getattr(room, name)
        for function in (public, getattr(public, "explain", None), getattr(public, "fit", None)):
            assert not re.search(r"\b_[A-Za-z]", _without_arguments(function)), function


def _without_arguments(function: Any) -> str:
    """Return Python's error of a call without arguments."""
    try:
        if callable(function):
            function()
    except TypeError as error:
        return str(error)
    return ""


BRANCHES = {
    "any": lambda h: h if (h > 0).any() else 2 * h,
    "allclose": lambda h: h if torch.allclose(h, 0 * h) else 2 * h,
    "equal": lambda h: h if torch.equal(h, 0 * h) else 2 * h,
    "item": lambda h: h if h.mean().item() > 0 else 2 * h,
    "number": lambda h: h * float(h.max()),
    "list": lambda h: h if max(h.flatten().tolist()) > 0 else 2 * h,
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_values_is_refused_by_every_method_with_a_graph(name: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 5), Of(lambda m, h: BRANCHES[name](h)), nn.Linear(5, 3)
    ).eval()
    expected = r"an if, a loop or a shape depends on the values .*torch\.where"
    for call in (
        lambda: check(model, ROWS),
        lambda: LRP(model).attribute(ROWS, 1),
        lambda: methods.GuidedBackprop(model).attribute(ROWS, 1),
        lambda: InverseNetwork(model).fit(ROWS, 1, progress=False),
        lambda: IBA(model, "0").estimate(ROWS, progress=False),
    ):
        with pytest.raises(CaptureError, match=expected):
            call()


def test_a_conversion_to_numpy_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Of(lambda m, h: h * h.detach().numpy().max())).eval()
    with pytest.raises(CaptureError, match=r"to a NumPy array, .*write this part with torch\."):
        LRP(model).attribute(ROWS, 1)


def test_an_unknown_keyword_is_named_with_those_that_there_are() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    inverse = InverseNetwork(model).fit(ROWS, 1, progress=False)
    for method, keyword in (
        (LRP(model), "baselines"),
        (MIPINAttribution(model, inverse), "n_steps"),
        (SmoothGrad(model), "nt_samples"),
    ):
        expected = f"{keyword!r}, expected some of inputs, target, .*among the arguments of the c"
        with pytest.raises(TypeError, match=expected):
            method.attribute(ROWS, target=1, **{keyword: 1})


def test_explain_takes_a_tensor_as_attribute_does() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    inverse = InverseNetwork(model).fit(ROWS, 1, progress=False)
    for method in (LRP(model), methods.GuidedBackprop(model), inverse):
        one, other = (method.explain(x, 1).signals for x in (ROWS, (ROWS,)))
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_check_says_which_methods_it_takes() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    for method in ("LRP", Saliency, methods.LeGrad):
        with pytest.raises(
            InputError, match=r"expected an object such as LRP\(model\) or a class "
        ):
            check(model, ROWS, method=method)


CALLS: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "no data": (lambda m, i, r: i.fit(target=1), r"'target', .*: pass targets=$"),
    "classes alone": (lambda m, i, r: i.fit(targets=1), "without data, .*: pass d"),
    "labels": (lambda m, i, r: i.fit(ROWS, y=1), "'y', .*: pass targets=$"),
    "of neighbours": (
        lambda m, i, r: NeighbourInverse(m).fit(ROWS, target=1),
        r"NeighbourInverse\.fit has no argument 'target', .*: pass targets=$",
    ),
    "patterns": (lambda m, i, r: Patterns(m).fit(ROWS, target=1), ": leave it out$"),
    "no features": (lambda m, i, r: IBA(m, "0").estimate(), r"^IBA\.est.*without data"),
    "beta": (lambda m, i, r: IBA(m, "0", beta=1), r"settings=Bottleneck\(beta=\.\.\.\)$"),
    "epsilon": (lambda m, i, r: LRP(m, epsilon=1), r"pass rule=Epsilon\(epsilon\), a"),
    "gamma": (lambda m, i, r: LRP(m, gamma=1), r"pass rule=Gamma\(gamma\), a class"),
    "near": (lambda m, i, r: SmoothGrad(m, n_samples=1), "'n_samples', .*: pass samples="),
    "ridge": (lambda m, i, r: InverseNetwork(m, lambda_=1), "'lambda_', .*: pass ridge=$"),
    "no inverse": (lambda m, i, r: MIPINAttribution(m), r"expected .*\(model, inverse\): p"),
    "targets": (lambda m, i, r: LRP(m).attribute(ROWS, targets=1), ": pass target=, or"),
    "no inputs": (lambda m, i, r: LRP(m).attribute(target=1), "called without inputs, "),
    "twice": (lambda m, i, r: LRP(m).attribute(ROWS, inputs=1), "got inputs twice, exp"),
    "network first": (
        lambda m, i, r: deletion(m, LRP(m), ROWS, 1),
        r"4 values .* a network goes by name, .*\(method, inputs, target, model=model\)",
    ),
    "option of all": (lambda m, i, r: deletion(LRP(m), ROWS, targets=1), ": pass target="),
    "no boxes": (lambda m, i, r: pointing_game(LRP(m), X, 1), r"boxes=\.\.\.\): pass boxes$"),
    "table": (lambda m, i, r: compare("LRP", ROWS, target=1), "'target', .*: pass targets="),
    "list of methods": (lambda m, i, r: check(m, ROWS, methods=LRP), ": pass method=$"),
    "no path": (lambda m, i, r: i.save(), r"Network\.save was called without path, "),
    "no model": (lambda m, i, r: InverseNetwork.load("a"), r"load\(path, model\): pass m"),
    "number": (lambda m, i, r: float(r), "is no number: take result.mean, or"),
    "rounded": (lambda m, i, r: f"{r:.2f}", "is no number: take result.mean, or"),
    "index": (lambda m, i, r: r[0], r"is no list: take result\.values\[0\]"),
    "key": (lambda m, i, r: r["mean"], r"is no list: take result\.mean"),
    "seed": (lambda m, i, r: deletion(LRP(m), ROWS, 1, seed=1), r"pass generator=torch\.Gen"),
    "spelling": (lambda m, i, r: NeighbourInverse(m, neighbors=5), "'neighbors', .*neighbours="),
    "of a signal": (lambda m, i, r: i.source_signal(ROWS, targets=1), ": pass target=$"),
    "of a class": (lambda m, i, r: i.class_attribution(targets=1), "'targets', .*: pass target=$"),
    "no target": (lambda m, i, r: i.explain(ROWS), "without target, .*: pass target$"),
    "no rule": (lambda m, i, r: captum_mipin.register_rule("a::b"), "without rule, .*: pass rule"),
    "photographs": (lambda m, i, r: for_photographs(m, X, target=1), ": pass targets=$"),
    "an abbreviation": (lambda m, i, r: Gamma(g=1), r"Gamma has no argument 'g', .*: pass gamma=$"),
    "half a box": (lambda m, i, r: ZBox(0), r"without high, .*: pass high"),
    "a field": (lambda m, i, r: Bottleneck(betas=1), "'betas', .*: pass beta="),
    "a rate": (lambda m, i, r: Bottleneck(lr=1), ": pass learning_rate="),
    "stages": (lambda m, i, r: ThreeStages(beta=1), r": pass input=Bottleneck\(beta="),
    "a critic": (lambda m, i, r: Adversary(epoch=1), "'epoch', .*: pass epochs="),
    "a row of a report": (lambda m, i, r: check(m, ROWS)[0], r"no list, .*: take report\.rows"),
    "rows of a report": (lambda m, i, r: list(check(m, ROWS)), r"no list, .*: take report\.rows"),
    "a layer of a report": (
        lambda m, i, r: i.fit(ROWS, 1, progress=False).report[0], r"no list, .* report\.layers"
    ),
    "loop": (lambda m, i, r: list(r), "is no list: take result.values"),
}  # fmt: skip


#: Values of an option that looked right, were taken, and gave another result than was meant.
VALUES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a seed": (
        lambda m: deletion(LRP(m), ROWS, 1, generator=0),
        r"an int, .*Generator\(\)",
    ),
    "a seed of mosaics": (lambda m: mosaics(m, X, [0] * 64, generator=0), "generator is an int"),
    "a seed of noise": (
        lambda m: (
            IBA(m, "0").estimate(ROWS, progress=False).attribute(ROWS, 1, at="layer", generator=3)
        ),
        "generator is an int",
    ),
    "a box by its size": (
        lambda m: pointing_game(X[:1], X[:1], boxes=[(4, 4, 2, 3)], model=m),
        r"box \(4, 4, 2, 3\) .* ends before it begins, .*\(left, top, left \+ width, top \+ hei",
    ),
    "a box in shares": (
        lambda m: pointing_game(X[:1], X[:1], boxes=[(0.1, 0.1, 0.5, 1)], model=m),
        "is a share of the image, .* multiply shares by width and height",
    ),
    "a module of a composite": (
        lambda m: LRP(m, composite=[(m[0], Gamma())]),
        "which is a Linear: pass a type of modules, a pattern of module paths, or",
    ),
    "maps as targets": (
        lambda m: deletion(m, ROWS, ROWS),
        "the method is a Sequential, .* and the network itself as model=",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_another_form_is_refused(name: str) -> None:
    call, message = VALUES[name]
    with pytest.raises(InputError, match=message):
        call(_mlp())


@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_other_arguments_says_which_there_are(name: str) -> None:
    """Formerly Python's own TypeError, which knows neither the closest name nor what to do."""
    model = _mlp()
    result = deletion(LRP(model), ROWS[:2], 1)
    call, message = CALLS[name]
    with pytest.raises(ArgumentError, match=message) as caught:
        call(model, InverseNetwork(model), result)
    assert isinstance(caught.value, TypeError)


def _compared(model: nn.Module, x: Tensor) -> Any:
    return compare("LRP", x[:1], 1, model=model, metrics=["deletion"], progress=False)


def test_a_comparison_says_which_rows_and_options_it_has() -> None:
    result = _compared(_cnn(), X)
    for call in (lambda: result[0], lambda: list(result), lambda: result["Saliency"]):
        with pytest.raises(MissingNameError, match=r"is not one of 'LRP', .*comparison\.rows") as e:
            call()
        assert isinstance(e.value, KeyError)
    with pytest.raises(ArgumentError, match=r"'signs', .*: pass sign=$"):
        result.figure(signs="positive")


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (InverseNetwork, "attribute", r": call MIPINAttribution\(model, inverse\)\.attribute\(inp"),
        (NeighbourInverse, "attribute", r": call MIPINAttribution\(model, inverse\)\.attribute"),
        (InverseNetwork, "predict", r": call source_signal\(inputs, target\)"),
        (InverseNetwork, "source_signals", "the closest names are 'source_signal'"),
        (Patterns, "attribute", r": call PatternAttribution\(model, patterns\)\.attribute"),
        (lambda model: IBA(model, "0"), "fit", r": call estimate\(data\)"),
        (LRP, "fit", r"it needs no fit: call attribute\(inputs, target\)"),
        (lambda m: MIPINAttribution(m, InverseNetwork(m)), "fit", r"fit its inverse: inverse\.fit"),
        (lambda m: deletion(LRP(m), ROWS[:2], 1), "score", r"take result\.mean, or result\.values"),
        (LRP, "eval", "call it on the network"),
        (InverseNetwork, "cuda", r"call to\('cuda'\)"),
        (lambda m: InverseNetwork(m).report, "explained_variance", r"take it from report\.layers"),
        (lambda m: check(m, ROWS), "supported", r"take report\.ok, or report\.rows"),
        (lambda m: _compared(m, ROWS), "maps", r"take comparison\[method\]\.maps"),
        (lambda m: _compared(m, ROWS), "plot", r"call comparison\.figure\(\)"),
        (lambda model: captum_mipin, "deletion", r"it is captum_mipin\.metrics\.deletion$"),
        (lambda model: captum_mipin, "MIPIn", "expected some of .*'MIPINAttribution'"),
    ],
)
def test_a_name_that_is_not_there_says_what_is(make: Any, name: str, message: str) -> None:
    thing = make(_mlp())
    assert not hasattr(thing, name)
    with pytest.raises(MissingNameError, match=message):
        getattr(thing, name)


def test_an_error_inside_a_property_or_a_call_stays_as_it_is() -> None:
    class Broken(LRP):
        @property
        def weight(self) -> Any:
            return self.model.absent

        def attribute(self, inputs: Any, target: Any = None) -> Any:
            return len(target)

    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'absent'"):
        _ = Broken(_mlp()).weight
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
        deletion(Broken(_mlp()), ROWS[:2], 1)
