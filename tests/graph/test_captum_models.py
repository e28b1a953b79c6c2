"""Captum's own toy models: each works, or is refused for a reason that names what to do."""

import copy
import inspect
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from captum_mipin import InverseNetwork, MIPINAttribution, MIPINError, check
from captum_mipin.errors import CaptureError, FitError, LogitsWarning, UnsupportedOperationError

helpers, reason = "captum.testing.helpers", "Captum 0.8 comes without its models for tests"
basic = pytest.importorskip(f"{helpers}.basic_models", reason=reason)
classification = pytest.importorskip(f"{helpers}.classification_models", reason=reason)

BATCH = 40


class Case(NamedTuple):
    """A model, what it is given, and what comes of it.

    Attributes:
        model: The model.
        shapes: Of one example of each input; a tensor stands for itself.
        target: The output explained.
        extras: Further arguments.
        refused: Error and pattern of its message; None for a model that works.
        ending: Name of the softmax or sigmoid that ends the model.
    """

    model: nn.Module
    shapes: tuple[Any, ...]
    target: Any = None
    extras: tuple[Any, ...] = ()
    refused: tuple[type[MIPINError], str] | None = None
    ending: str = ""


INTEGERS = (
    FitError,
    r"dtype torch\.int64, expected a floating dtype.*"
    "explain the output of a layer instead, such as its embedding",
)
BOOLEANS = FitError, r"dtype torch\.bool, expected a floating dtype.*Convert it"
FUTURES = CaptureError, r"returns a Future, expected one tensor"
TOKENS = torch.arange(BATCH * 3).view(BATCH, 3) % 10
SWITCHES = torch.arange(BATCH * 3).view(BATCH, 3) % 2 == 0

torch.manual_seed(4)  # some of the models draw their weights
CASES = {
    "BasicLinearReLULinear": Case(basic.BasicLinearReLULinear(4), ((4,),)),
    "MixedKwargsAndArgsModule": Case(basic.MixedKwargsAndArgsModule(), ((4,),), 1),
    "MixedKwargsAndArgsModule, two": Case(basic.MixedKwargsAndArgsModule(), ((4,), (4,)), 1),
    "BasicModel": Case(basic.BasicModel(), ((4,),), 1),
    "BasicModel2": Case(basic.BasicModel2(), ((), ())),
    "BasicModel3": Case(basic.BasicModel3(), ((), ())),
    "BasicModel4_MultiArgs": Case(basic.BasicModel4_MultiArgs(), ((4,), (4,)), extras=(3, 1)),
    "BasicModel4_MultiArgs, a tensor": Case(
        basic.BasicModel4_MultiArgs(), ((4,), (4,)), extras=(2 * torch.ones(BATCH, 4), 1)
    ),
    "BasicModel5_MultiArgs": Case(basic.BasicModel5_MultiArgs(), ((4,), (4,)), extras=([3, 2], 1)),
    "BasicModel6_MultiTensor": Case(basic.BasicModel6_MultiTensor(), ((4,), (4,))),
    "BasicLinearModel": Case(basic.BasicLinearModel(), ((3,), (4,))),
    "BasicLinearModel2": Case(basic.BasicLinearModel2(3, 4), ((3,),), 2),
    "BasicLinearModel_Multilayer": Case(basic.BasicLinearModel_Multilayer(3, 4, 5), ((3,),), 2),
    "ReLUDeepLiftModel": Case(basic.ReLUDeepLiftModel(), ((), ())),
    "LinearMaxPoolLinearModel": Case(basic.LinearMaxPoolLinearModel(), ((4,),)),
    "BasicModelWithReusedModules": Case(basic.BasicModelWithReusedModules(), ((3,),), 1),
    "BasicModelWithReusedLinear": Case(basic.BasicModelWithReusedLinear(), ((3,),), 1),
    "BasicModelWithSparseInputs": Case(
        basic.BasicModelWithSparseInputs(),
        ((3,),),
        extras=(torch.tensor([1.0, 2.0]),),
        refused=(
            UnsupportedOperationError,
            r"aten\.sum\.default in the model itself: no rule covers it",
        ),  # over the batch
    ),
    "BasicModel_MaxPool_ReLU": Case(basic.BasicModel_MaxPool_ReLU(), ((2, 6),), 1),
    "BasicModel_MaxPool_ReLU, in place": Case(
        basic.BasicModel_MaxPool_ReLU(inplace=True), ((2, 6),), 1
    ),
    "TanhDeepLiftModel": Case(basic.TanhDeepLiftModel(), ((), ())),
    "ReLULinearModel": Case(basic.ReLULinearModel(inplace=True), ((3,), (3,)), extras=(2,)),
    "SimpleLRPModel": Case(basic.SimpleLRPModel(inplace=True), ((3,),)),
    "Conv1dSeqModel": Case(basic.Conv1dSeqModel(), ((4, 1000),), (1, 0)),
    "TextModule": Case(basic.TextModule(10, 4), (TOKENS,), (1, 0), refused=INTEGERS),
    "BasicEmbeddingModel": Case(basic.BasicEmbeddingModel(), (TOKENS, TOKENS), refused=INTEGERS),
    "PassThroughLayerOutput": Case(basic.PassThroughLayerOutput(), ((3,),), 0),
    "BasicModel_GradientLayerAttribution": Case(
        basic.BasicModel_GradientLayerAttribution(),
        ((3,),),
        0,
        refused=(
            CaptureError,
            r"returns a dict, expected one tensor. Choose one by output=, out of 'task 1'",
        ),
    ),
    "BasicModel_GradientLayerAttribution, integers": Case(
        basic.BasicModel_GradientLayerAttribution(dict_output=False),
        ((3,),),
        0,
        refused=(
            UnsupportedOperationError,
            r"aten\._to_copy\.default .* turns the input into torch\.int64",
        ),
    ),
    "MultiRelu": Case(
        basic.MultiRelu(),
        ((3,), (3,)),
        0,
        refused=(CaptureError, r"returns a tuple, .* or wrap the model in a module"),
    ),
    "BasicModel_MultiLayer": Case(basic.BasicModel_MultiLayer(), ((3,),), 0),
    "BasicModel_MultiLayer, all": Case(
        basic.BasicModel_MultiLayer(True, True), ((3,), (3,)), (0, 1, 1), (True,)
    ),
    "BasicModel_MultiLayer_with_Future": Case(
        basic.BasicModel_MultiLayer_with_Future(), ((3,),), 0, refused=FUTURES
    ),
    "BasicModelBoolInput_with_Future": Case(
        basic.BasicModelBoolInput_with_Future(), (SWITCHES,), 0, refused=BOOLEANS
    ),
    "BasicModelBoolInput": Case(basic.BasicModelBoolInput(), (SWITCHES,), 0, refused=BOOLEANS),
    "BasicModel_MultiLayer_MultiInput": Case(
        basic.BasicModel_MultiLayer_MultiInput(), ((3,), (3,), (3,)), 0, (4,)
    ),
    "BasicModel_MultiLayer_TupleInput": Case(
        basic.BasicModel_MultiLayer_TupleInput(),
        ((3,), (3,), (3,)),
        0,
        refused=(
            CaptureError,
            r"BasicModel_MultiLayer_TupleInput cannot run on inputs .*"
            "positional arguments",
        ),
    ),
    "BasicModel_MultiLayer_MultiInput_with_Future": Case(
        basic.BasicModel_MultiLayer_MultiInput_with_Future(), ((3,), (3,), (3,)), 0, (4,), FUTURES
    ),
    "BasicModel_MultiLayer_TrueMultiInput": Case(
        basic.BasicModel_MultiLayer_TrueMultiInput(), ((3,),) * 4, 0
    ),
    "BasicModel_MultiLayer_TrueMultiInput, three": Case(
        basic.BasicModel_MultiLayer_TrueMultiInput(), ((3,),) * 3, 0
    ),
    "BasicModel_ConvNet_One_Conv": Case(basic.BasicModel_ConvNet_One_Conv(), ((1, 4, 4),), 0),
    "BasicModel_ConvNet_One_Conv, two": Case(
        basic.BasicModel_ConvNet_One_Conv(inplace=True), ((1, 4, 4), (1, 4, 4)), 0
    ),
    "BasicModel_ConvNetWithPaddingDilation": Case(
        basic.BasicModel_ConvNetWithPaddingDilation(), ((1, 5, 5),), 0
    ),
    "BasicModel_ConvNet": Case(basic.BasicModel_ConvNet(), ((1, 10, 10),), 0, ending="softmax"),
    "BasicModel_ConvNet_MaxPool1d": Case(
        basic.BasicModel_ConvNet_MaxPool1d(), ((1, 10),), 0, ending="softmax"
    ),
    "BasicModel_ConvNet_MaxPool3d": Case(
        basic.BasicModel_ConvNet_MaxPool3d(), ((1, 10, 10, 10),), 0, ending="softmax"
    ),
    "SigmoidModel": Case(classification.SigmoidModel(4, 5, 3), ((4,),), 1, ending="sigmoid"),
    "SoftmaxModel": Case(classification.SoftmaxModel(4, 5, 3), ((4,),), 1, ending="softmax"),
    "SigmoidDeepLiftModel": Case(
        classification.SigmoidDeepLiftModel(4, 5, 3), ((4,),), 1, ending="sigmoid"
    ),
    "SoftmaxDeepLiftModel": Case(
        classification.SoftmaxDeepLiftModel(4, 5, 3), ((4,),), 1, ending="softmax"
    ),
}


def _inputs(case: Case) -> tuple[Tensor, ...]:
    """Large enough for the hand-made weights of these models to let something through."""
    random = torch.Generator().manual_seed(1)
    scale = 20 if isinstance(case.model, basic.BasicModel_ConvNet_One_Conv) else 4
    return tuple(
        shape if isinstance(shape, Tensor) else scale * torch.randn(BATCH, *shape, generator=random)
        for shape in case.shapes
    )


@pytest.mark.parametrize("name", CASES)
def test_toy_models_of_captum(name: str, untouched: Any) -> None:
    case = CASES[name]
    model, inputs, extras, target = case.model.eval(), _inputs(case), case.extras, case.target
    inverse = InverseNetwork(model)

    def fit() -> None:
        inverse.fit([(inputs, extras)], target, unpack=lambda batch: batch, progress=False)

    if case.refused is not None:
        error, message = case.refused
        with pytest.raises(error, match=message), untouched(model, *inputs):
            fit()
        return

    def warned(explained: str) -> Any:
        match = f"{case.ending} ends the model: {explained}"
        return pytest.warns(LogitsWarning, match=match) if case.ending else nullcontext()

    with untouched(model, *inputs):
        assert check(model, inputs, extras).ok
        with warned("the logits"):
            fit()
        mipin = MIPINAttribution(model, inverse)
        a, s = mipin.attribute(inputs, target, extras), mipin.source_signal(inputs, target, extras)
    if case.ending:
        bare = copy.deepcopy(model)
        setattr(bare, case.ending, nn.Identity())
        logits = InverseNetwork(bare).fit(inputs, target, progress=False)
        expected = MIPINAttribution(bare, logits).attribute(inputs, target)
        torch.testing.assert_close(a, expected)
    for found, x in zip((*a, *s), (*inputs, *inputs), strict=True):
        assert found.shape == x.shape
        assert torch.isfinite(found).all()
        assert found.any()
    if (
        name != "BasicModel_MultiLayer, all"
    ):  # torch itself cannot: the model changes what its ReLU needs
        leaves = tuple(x.clone().requires_grad_() for x in inputs)
        gradients = Saliency(model).attribute(leaves, target, False, extras)
        with warned("its result"):  # of which the gradient is
            read = mipin.attribute(inputs, target, extras, multiply_by_gradients=True)
        for found, plain, gradient in zip(read, a, gradients, strict=True):
            torch.testing.assert_close(found, plain * gradient)
    few = tuple(x[3:5] for x in inputs)
    per_example = tuple(e[3:5] if isinstance(e, Tensor) and len(e) == BATCH else e for e in extras)
    for one, whole in zip(mipin.source_signal(few, target, per_example), s, strict=True):
        torch.testing.assert_close(one, whole[3:5], rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_no_toy_model_is_left_out() -> None:
    there = {
        kind
        for module in (basic, classification)
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, nn.Module)
        and kind.__module__ == module.__name__
    }
    assert {type(case.model) for case in CASES.values()} == there
