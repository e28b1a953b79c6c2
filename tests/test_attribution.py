"""The Captum contract: all that Captum's methods, tools and users expect of an attribution."""

import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import (
    GradientAttribution,
    LayerActivation,
    LayerAttribution,
    LayerGradientXActivation,
    NoiseTunnel,
    Saliency,
)
from captum.attr import visualization as viz
from captum.attr._utils.attribution import PerturbationAttribution
from captum.metrics import infidelity, sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Scaled
from torch import Tensor, nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, check
from captum_mipin.errors import (
    CaptureError,
    InputError,
    NotFittedError,
    TargetError,
    TargetRangeError,
    UnsupportedOperationError,
)
from captum_mipin.graph.capture import capture
from captum_mipin.rules.pooling import evidence

matplotlib.use("Agg")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class TwoInputs(nn.Module):
    """Two inputs, a per-example scale, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(
        self, a: Tensor, b: Tensor, scale: Tensor | None = None, factor: float = 1.0
    ) -> Tensor:
        h = torch.relu(self.first(a) + self.second(b))
        if scale is not None:
            h = h * scale
        return self.last(h * factor)


class Shaped(nn.Module):
    """Outputs of any shape behind the batch."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, int(np.prod(dims)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))).reshape(x.shape[0], *self.dims)


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Remembers(nn.Module):
    """Keeps notes of its own on what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.calls, self.shapes = 0, [(0, 0)]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        return self.last(torch.relu(self.first(x)))


@lru_cache
def shaped(*dims: int) -> tuple[MIPINAttribution, Tensor]:
    torch.manual_seed(5)
    model, x = Shaped(*dims).eval(), torch.randn(40, 4)
    return MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False)), x


@lru_cache
def two_inputs() -> tuple[MIPINAttribution, tuple[Tensor, Tensor], Tensor]:
    """Fitted with a per-example scale and the factor 2."""
    torch.manual_seed(6)
    model, inputs, scale = (
        TwoInputs().eval(),
        (torch.randn(60, 4), torch.randn(60, 2)),
        torch.rand(60, 1) + 0.5,
    )
    batches = [
        (tuple(x[i : i + 20] for x in inputs), (scale[i : i + 20], 2.0)) for i in range(0, 60, 20)
    ]
    inverse = InverseNetwork(model).fit(batches, unpack=lambda batch: batch, progress=False)
    return MIPINAttribution(model, inverse), inputs, scale


@lru_cache
def mixed_layers() -> tuple[nn.Sequential, InverseNetwork, Tensor]:
    """A convolution whose inverse stops at its ReLU."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    ).eval()  # fmt: skip
    x = torch.randn(60, 1, 8, 8)
    return model, InverseNetwork(model, layer=model[1]).fit(x, progress=False), x


# ----------------------------------------------------------------------------- class and signature


def test_is_a_gradient_attribution_and_not_a_perturbation_attribution(mlp: Any) -> None:
    assert isinstance(mlp.mipin, GradientAttribution)
    assert issubclass(LayerMIPINAttribution, LayerAttribution)
    assert issubclass(LayerMIPINAttribution, GradientAttribution)
    for kind in (MIPINAttribution, LayerMIPINAttribution):
        assert not issubclass(kind, PerturbationAttribution)
    assert mlp.mipin.forward_func is mlp.model


@pytest.mark.parametrize("kind", [MIPINAttribution, LayerMIPINAttribution])
def test_attribute_has_captums_order_of_arguments_and_options_by_keyword_only(kind: type) -> None:
    parameters = list(inspect.signature(kind.attribute).parameters.values())
    assert [p.name for p in parameters[:4]] == [
        "self",
        "inputs",
        "target",
        "additional_forward_args",
    ]
    assert [p.default for p in parameters[2:4]] == [None, None]
    captums = ["attribute_to_layer_input"] if kind is LayerMIPINAttribution else []
    assert [p.name for p in parameters[4:] if p.kind is not p.KEYWORD_ONLY] == captums
    assert all(p.default is not inspect.Parameter.empty for p in parameters[4:])


def test_everything_is_usable_by_keyword(mlp: Any) -> None:
    mipin = MIPINAttribution(model=mlp.model, inverse=mlp.inverse)
    everything = {"inputs": mlp.x[:2], "target": 1, "additional_forward_args": None}
    plain = mipin.attribute(mlp.x[:2], 1, None)
    assert torch.equal(mipin.attribute(**everything), plain)
    a, delta = mipin.attribute(
        **everything,
        local=True,
        mask_input=False,
        multiply_by_inputs=False,
        return_convergence_delta=True,
    )
    assert torch.equal(a, plain)
    signal = mipin.source_signal(**everything, local=True, mask_input=False)
    assert torch.equal(
        mipin.distractor(**everything, local=True, mask_input=False), mlp.x[:2] - signal
    )
    assert torch.equal(mipin.compute_convergence_delta(source_signal=signal, **everything), delta)
    assert mipin.class_attribution(target=1, additional_forward_args=None).shape == (1, 6)
    layer = LayerMIPINAttribution(model=mlp.model, inverse=mlp.inverse, layer=mlp.model[1])
    assert layer.attribute(**everything, local=True, multiply_by_features=False).shape == (2, 8)
    assert layer.source_signal(**everything, local=True).shape == (2, 8)


def test_attribute_has_a_wrapped_that_works_and_checks_its_arguments(mlp: Any) -> None:
    mipin, bare = mlp.mipin, MIPINAttribution.attribute.__wrapped__
    assert torch.equal(bare(mipin, mlp.x[:2], target=0), mipin.attribute(mlp.x[:2], target=0))
    with torch.no_grad():
        assert torch.equal(bare(mipin, mlp.x[:2], target=0), mipin.attribute(mlp.x[:2], target=0))
    with pytest.raises(InputError):
        bare(mipin, [mlp.x[:2]], target=0)
    with pytest.raises(TargetRangeError):
        bare(mipin, mlp.x[:2], target=3)
    layer = LayerMIPINAttribution(mlp.model, mlp.inverse, mlp.model[1])
    assert torch.equal(
        LayerMIPINAttribution.attribute.__wrapped__(layer, mlp.x[:2], target=0),
        layer.attribute(mlp.x[:2], target=0),
    )


def test_names(mlp: Any) -> None:
    assert MIPINAttribution.get_name() == mlp.mipin.get_name() == "MIP-IN"
    assert LayerMIPINAttribution.get_name() == "Layer MIP-IN"


def test_attribute_future_is_not_implemented(mlp: Any) -> None:
    for mipin in (mlp.mipin, LayerMIPINAttribution(mlp.model, mlp.inverse, mlp.model[1])):
        with pytest.raises(NotImplementedError, match=type(mipin).__name__):
            mipin.attribute_future(mlp.x[:2], target=0)


def test_constructors_refuse_what_does_not_belong_together(mlp: Any, make_mlp: Any) -> None:
    with pytest.raises(InputError, match=r"made for another model object.*InverseNetwork\.load"):
        MIPINAttribution(make_mlp(), mlp.inverse)
    with pytest.raises(InputError, match="inverse is a Sequential, expected an InverseNetwork"):
        MIPINAttribution(mlp.model, mlp.model)
    with pytest.raises(
        InputError, match=r"layer is None and the inverse was made without layer=.*pass layer="
    ):
        LayerMIPINAttribution(mlp.model, mlp.inverse)


# ------------------------------------------------------------------------------ inputs and outputs


def test_tensor_in_tensor_out_tuple_in_tuple_out(mlp: Any) -> None:
    x = mlp.x[:3]
    for call in (mlp.mipin.attribute, mlp.mipin.source_signal, mlp.mipin.distractor):
        plain, one = call(x, target=0), call((x,), target=0)
        assert isinstance(plain, Tensor)
        assert isinstance(one, tuple)
        assert len(one) == 1
        assert torch.equal(one[0], plain)
    a, delta = mlp.mipin.attribute((x,), target=0, return_convergence_delta=True)
    assert isinstance(a, tuple)
    assert isinstance(delta, Tensor)


@pytest.mark.parametrize(
    "wrap",
    [list, np.asarray, lambda tensors: None, lambda tensors: [tensors[0]], lambda tensors: "x"],
)
def test_lists_and_other_things_are_refused(mlp: Any, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(
        InputError, match=r"inputs are .*, expected a torch\.Tensor or a tuple of them"
    ) as caught:
        mlp.mipin.attribute(wrap((mlp.x[:2],)), target=0)
    assert isinstance(caught.value, AssertionError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_has_the_shape_dtype_and_device_of_the_input(dtype: torch.dtype) -> None:
    model = (
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        )
        .eval()
        .to(dtype)
    )
    x = torch.randn(64, 2, 6, 6).to(dtype)
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
    x = x[:3].requires_grad_()
    for result in (
        *mipin.attribute((x,), target=[0, 1, 0]),
        mipin.source_signal(x, target=1),
        mipin.distractor(x, target=1),
    ):
        assert (result.shape, result.dtype, result.device) == (x.shape, dtype, x.device)
        assert result.is_contiguous()
        assert not result.requires_grad
        assert result.grad_fn is None
        assert torch.isfinite(result).all()
        assert result.abs().sum() > 0


def test_output_is_not_the_input_nor_part_of_the_model(mlp: Any) -> None:
    x, before = mlp.x[:3].clone(), mlp.mipin.attribute(mlp.x[:3], target=1)
    for options in ({}, {"multiply_by_inputs": True}, {"local": False}, {"mask_input": True}):
        mlp.mipin.attribute(x, target=1, **options).fill_(7)
    mlp.mipin.class_attribution(1).fill_(7)
    assert torch.equal(x, mlp.x[:3])
    assert torch.equal(mlp.mipin.attribute(x, target=1), before)


def test_the_same_bits_when_called_twice(cnn: Any) -> None:
    x, targets = cnn.x[:5], [0, 1, 2, 1, 0]
    first, again = (
        cnn.mipin.attribute(x, targets, return_convergence_delta=True) for _ in range(2)
    )
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    anew = MIPINAttribution(cnn.model, InverseNetwork(cnn.model).fit(cnn.x, progress=False))
    assert torch.equal(anew.attribute(x, targets), first[0]), "nor does a second fit differ"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_each_example_is_independent_of_the_rest_of_its_batch(
    cnn: Any, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=6))
    targets = data.draw(st.lists(st.integers(0, 2), min_size=16, max_size=16))
    whole = cnn.mipin.attribute(cnn.x[:16], targets)
    part = cnn.mipin.attribute(cnn.x[rows], [targets[row] for row in rows])
    assert torch.allclose(part, whole[rows], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the inputs have mean")  # one example is 1000 times as large
def test_what_happens_to_one_example_does_not_reach_another(cnn: Any) -> None:
    x, other = cnn.x[:4].clone(), cnn.x[:4].clone()
    other[1:] = other[1:] * 1e3 - 5
    for call in (cnn.mipin.attribute, cnn.mipin.source_signal):
        assert torch.equal(call(x, 0)[0], call(other, 0)[0])


def test_a_batch_of_one(cnn: Any, own_cnn: Any) -> None:
    expected = cnn.mipin.attribute(cnn.x[:4], [2, 0, 1, 2])
    single = own_cnn.mipin.attribute(cnn.x[3:4], 2)  # captured from one example
    assert single.shape == (1, 3, 8, 8)
    assert torch.allclose(single, expected[3:], rtol=1e-4, atol=1e-6)
    assert torch.allclose(
        own_cnn.mipin.attribute(cnn.x[:4], [2, 0, 1, 2]), expected, rtol=1e-4, atol=1e-6
    )


def test_channels_last_and_other_strides(cnn: Any) -> None:
    x = cnn.x[:3]
    expected = cnn.mipin.attribute(x, target=1)
    strided = torch.stack([x, -x], -1)[..., 0]
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        strided,
        x.flip(3).flip(3),
        x[:1].expand(3, 3, 8, 8),
    ):
        found = cnn.mipin.attribute(same, target=1)
        assert found.is_contiguous()
        assert torch.allclose(found[0], expected[0], rtol=1e-4, atol=1e-6)


def test_a_channels_last_model(cnn: Any) -> None:
    model = copy.deepcopy(cnn.model).to(memory_format=torch.channels_last)
    x = cnn.x.contiguous(memory_format=torch.channels_last)
    found = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False)).attribute(
        x[:3], target=1
    )
    assert found.is_contiguous()
    assert torch.allclose(found, cnn.mipin.attribute(cnn.x[:3], target=1), rtol=1e-2, atol=1e-4)


def test_output_is_contiguous_where_the_model_turns_its_input() -> None:
    model, x = (
        nn.Sequential(Turn(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).eval(),
        torch.randn(60, 3, 4),
    )
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
    for found in (
        mipin.attribute(x[:2], [0, 1]),
        mipin.source_signal(x[:2], 0),
        mipin.class_attribution(1),
    ):
        assert found.shape[1:] == (3, 4)
        assert found.is_contiguous()


def test_relevance_of_a_linear_model_adds_up_to_its_output() -> None:
    model, x = nn.Linear(6, 3).double().eval(), torch.randn(80, 6, dtype=torch.float64)
    mipin = MIPINAttribution(model, InverseNetwork(model, ridge=0).fit(x, progress=False))
    relevance = mipin.attribute(x[:3], [0, 1, 2], multiply_by_gradients=True)
    torch.testing.assert_close(relevance.sum(1), model(x[:3]).diagonal().detach())


def test_gradients_at_a_layer_are_those_of_the_model(cnn: Any) -> None:
    layer, x, target = (
        next(m for m in cnn.model.modules() if isinstance(m, nn.ReLU)),
        cnn.x[:4],
        [0, 1, 2, 0],
    )
    mipin = LayerMIPINAttribution(cnn.model, cnn.inverse, layer)
    bare = LayerGradientXActivation(cnn.model, layer, multiply_by_inputs=False)
    expected = mipin.attribute(x, target) * bare.attribute(x, target)
    torch.testing.assert_close(
        mipin.attribute(x, target, multiply_by_gradients=True), expected.detach()
    )
    product = mipin.attribute(x, target, multiply_by_features=True, multiply_by_gradients=True)
    torch.testing.assert_close(
        product, (expected * LayerActivation(cnn.model, layer).attribute(x)).detach()
    )


def test_gradients_leave_out_what_the_model_computes_without() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.first(x))
            with torch.no_grad():
                gate = torch.sigmoid(self.gate(h))
                with torch.enable_grad():
                    other = torch.sigmoid(self.gate(h) + gate)
                last = torch.sigmoid(self.gate(h * other))
            return self.last(h * gate * other * last)

    model, x, target = (
        Gated().double().eval(),
        torch.randn(60, 6, dtype=torch.float64),
        [0, 1, 2, 0],
    )
    mipin, few = (
        MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False)),
        x[:4].clone().requires_grad_(),
    )
    (gradient,) = torch.autograd.grad(model(few)[range(4), target].sum(), few)
    found, a = (
        mipin.attribute(few, target, multiply_by_gradients=True),
        mipin.attribute(few, target),
    )
    torch.testing.assert_close(found, a * gradient)


def pooled(last: nn.Module | None = None) -> nn.Sequential:
    """A network that ends with an average over places, or a dense layer on one."""
    torch.manual_seed(0)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    head = [*pool, nn.Linear(6, 3)] if last is None else [last, *pool]
    return (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), *head)
        .double()
        .eval()
    )


def test_evidence_is_what_speaks_for_the_target_place_by_place() -> None:
    model, x = pooled(), torch.rand(80, 3, 8, 8, dtype=torch.float64)
    model[-1].bias.data -= model(x).mean(0)  # logits of both signs
    inverse = InverseNetwork(model).fit(x, progress=False)
    mipin, last = MIPINAttribution(model, inverse), LayerMIPINAttribution(model, inverse, model[3])
    few, target = x[:12], [0, 1, 2] * 4
    features = model[:4](few).detach()
    at_places = nn.functional.linear(
        features.movedim(1, -1), model[-1].weight, model[-1].bias
    ).detach()
    logits = at_places.mean((1, 2))[range(12), target]
    assert (logits > 0).any()
    assert (logits < 0).any()
    speaks = at_places[range(12), ..., target].clamp(min=0)
    a, found = mipin.attribute(few, target), mipin.attribute(few, target, evidence=True)
    assert (speaks.mean((1, 2)) > logits.clamp(min=0)).any(), "places of both signs in one image"
    for one, whole, logit, places in zip(found, a, logits, speaks, strict=True):
        if logit > 0:
            torch.testing.assert_close(one, whole * places.mean() / logit)
    weights = torch.stack(
        [inverse._fitted().fitted.inverses[t,]["6/linear"].weight[:, 0] for t in target]
    )
    expected = weights[:, :, None, None] * speaks[:, None] * (features != 0)
    torch.testing.assert_close(last.attribute(few, target, evidence=True), expected)
    for i in range(12):  # alone as among others
        torch.testing.assert_close(
            mipin.attribute(few[i : i + 1], target[i], evidence=True)[0], found[i]
        )


def test_evidence_is_told_at_the_last_average_alone() -> None:
    torch.manual_seed(0)
    pool = nn.AvgPool2d(2)  # of values of both signs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)]
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 3), pool, nn.Conv2d(8, 6, 2), nn.ReLU(), *head)
        .double()
        .eval()
    )
    x = torch.rand(60, 3, 8, 8, dtype=torch.float64) - 0.5
    model[-1].bias.data -= model(x).mean(0)  # logits of both signs
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, 0, progress=False))
    few = x[model(x)[:, 0] > 0][:4]
    a, found = (mipin.attribute(few, 0, evidence=evidence).flatten(1) for evidence in (False, True))
    assert len(few)
    torch.testing.assert_close(
        found / found.norm(dim=1, keepdim=True), a / a.norm(dim=1, keepdim=True)
    )


def test_evidence_is_in_units_of_what_is_averaged() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]])
    back = evidence(lambda t: t.mean(1), x, x)
    assert back(torch.tensor([2.0])).tolist() == [[2, 0, 6]]
    assert back(torch.tensor([-2.0])).tolist() == [[0, -4, 0]]


AVERAGED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean((2, 3)),
    "sum": lambda y: y.sum((2, 3)),
    "negative": lambda y: -y.mean((2, 3)),
    "adaptive": lambda y: nn.functional.adaptive_avg_pool2d(y, 1).flatten(1),
    "window": lambda y: nn.functional.avg_pool2d(y, 4).flatten(1),
    "lines": lambda y: nn.functional.adaptive_avg_pool1d(y.flatten(2), 1).squeeze(2),
}


@pytest.mark.parametrize("end", AVERAGED)
def test_evidence_of_maps_that_are_averaged_or_summed_up(end: str) -> None:
    sign = -1 if end == "negative" else 1

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return AVERAGED[end](self.body(x))

    torch.manual_seed(0)
    model, x = Ends().double().eval(), torch.rand(60, 3, 8, 8, dtype=torch.float64) - 0.5
    model.body[2].bias.data -= model.body(x).mean((0, 2, 3))  # at places of both signs
    inverse = InverseNetwork(model, layer=model.body).fit(x, progress=False)
    mipin, target = LayerMIPINAttribution(model, inverse), [0, 1, 2, 0]
    y, found = model.body(x[:4]).detach(), mipin.attribute(x[:4], target, evidence=True)
    own = torch.eye(3, dtype=torch.float64)[target][:, :, None, None]
    speaks = y * (sign * y > 0) * own
    assert speaks.flatten(1).any(1).all()
    for one, places in zip(found, speaks, strict=True):  # what stops there has a factor a channel
        torch.testing.assert_close(one / one.abs().max(), places / places.abs().max())


def test_evidence_is_refused_where_there_are_no_places(mlp: Any, cnn: Any) -> None:
    with pytest.raises(
        UnsupportedOperationError, match=r"the output is that of .*linear: it has to be an average"
    ):
        mlp.mipin.attribute(mlp.x[:2], 0, evidence=True)
    model, x = pooled(), torch.rand(40, 3, 8, 8, dtype=torch.float64)
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, 0, progress=False))
    with pytest.raises(InputError, match='evidence=True needs local=True and pooling="shares"'):
        mipin.attribute(x[:2], 0, evidence=True, local=False)
    with pytest.raises(InputError, match="only a part of the output: pass only one"):
        mipin.attribute(x[:2], 0, evidence=True, return_convergence_delta=True)
    even = MIPINAttribution(model, InverseNetwork(model, pooling="even").fit(x, 0, progress=False))
    with pytest.raises(InputError, match='evidence=True needs local=True and pooling="shares"'):
        even.attribute(x[:2], 0, evidence=True)


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sub": lambda y: y - y.mean(1, keepdim=True),
    "mean": lambda y: y.mean(1),
    "sum": lambda y: torch.relu(y * 2).sum(1),
    "cat": lambda y: torch.cat([y, 2 * y], 1),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("dense", "pool"), [(True, "mean"), (False, "mean"), (False, "adaptive")])
def test_evidence_is_not_told_by_classes(end: str, dense: bool, pool: str) -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = pooled()[:4], pooled()[6]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = AVERAGED[pool](self.body(x))
            return ENDS[end](self.last(y) if dense else y)

    model, x = Ends().eval(), torch.rand(20, 3, 8, 8, dtype=torch.float64)
    mipin = LayerMIPINAttribution(
        model, InverseNetwork(model, layer=model.body).fit(x, progress=False)
    )
    target = None if end in ("mean", "sum") else 0
    assert mipin.attribute(x[:2], target).any()
    with pytest.raises(
        UnsupportedOperationError,
        match=rf"the output is that of .*/{end}\S*: it has to be an average",
    ):
        mipin.attribute(x[:2], target, evidence=True)


def test_evidence_of_one_map_is_told_by_places_and_sums_of_pools_are_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 2, 12, dtype=torch.float64)
    line = nn.Sequential(nn.Conv1d(2, 1, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double().eval()
    mipin = MIPINAttribution(line, InverseNetwork(line).fit(x, 0, progress=False))
    assert mipin.attribute(x[:2], 0, evidence=True).any()
    sums = (
        nn.Sequential(nn.AvgPool1d(4), nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.AvgPool1d(4))
        .double()
        .eval()
    )
    mipin = MIPINAttribution(sums, InverseNetwork(sums).fit(x, 0, progress=False))
    with pytest.raises(UnsupportedOperationError, match="it has to be an average over positions"):
        mipin.attribute(x[:2], 0, evidence=True)


def test_heads_that_each_average_for_themselves() -> None:
    class Heads(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.heads = (
                pooled()[:4],
                nn.ModuleList(nn.Linear(6, 2).double() for _ in range(count)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return torch.cat([head(y.mean((2, 3))) for head in self.heads], 1)

    x, found = torch.rand(30, 3, 8, 8, dtype=torch.float64), []
    for count in (1, 2):  # of the second head, nothing comes back for classes of the first
        model = Heads(count).eval()
        inverse = InverseNetwork(model, forks="sum", layer=model.body).fit(
            x, targets=[0, 1], progress=False
        )
        found.append(LayerMIPINAttribution(model, inverse).attribute(x[:4], [0, 1, 1, 0]))
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_options_are_what_they_say(cnn: Any) -> None:
    x = cnn.x[:3] - 0.5
    x[:, :, :2] = 0
    a, s = cnn.mipin.attribute(x, target=0), cnn.mipin.source_signal(x, target=0)
    assert torch.equal(cnn.mipin.attribute(x, target=0, multiply_by_inputs=True), a * x)
    gradient = Saliency(cnn.model).attribute(x.clone().requires_grad_(), 0, abs=False)
    torch.testing.assert_close(
        cnn.mipin.attribute(x, target=0, multiply_by_gradients=True), a * gradient
    )
    both = cnn.mipin.attribute(x, target=0, multiply_by_inputs=True, multiply_by_gradients=True)
    torch.testing.assert_close(both, a * x * gradient)
    assert torch.equal(cnn.mipin.attribute(x, target=0, mask_input=True), a * (x != 0))
    assert torch.equal(cnn.mipin.source_signal(x, target=0, mask_input=True), s * (x != 0))
    assert torch.equal(cnn.mipin.distractor(x, target=0), x - s)
    assert not torch.equal(cnn.mipin.attribute(x, target=0, local=False), a)
    far = cnn.mipin.attribute(x, target=0, local=False) / cnn.model(x)[:, :1, None, None].detach()
    assert torch.allclose(
        far, cnn.mipin.class_attribution(0).expand_as(far), rtol=1e-3, atol=1e-5
    ), "no example in it"


# ----------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "target",
    [
        1,
        -2,
        np.int64(1),
        np.array(1),
        torch.tensor(1),
        torch.tensor([1]),
        torch.tensor([1], dtype=torch.int32),
    ],
)
def test_one_target_in_every_form(mlp: Any, target: Any) -> None:
    assert torch.equal(
        mlp.mipin.attribute(mlp.x[:3], target), mlp.mipin.attribute(mlp.x[:3], [1, 1, 1])
    )


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([0, 2, 1]),
        torch.tensor([0, 2, 1], dtype=torch.int32),
        [0, -1, 1],
        [np.int64(0), np.int32(2), 1],
        np.array([0, 2, 1]),
        [(0,), (2,), (1,)],
    ],
)
def test_targets_of_each_example_in_every_form(mlp: Any, targets: Any) -> None:
    expected = torch.cat(
        [mlp.mipin.attribute(mlp.x[i : i + 1], t) for i, t in enumerate((0, 2, 1))]
    )
    assert torch.allclose(mlp.mipin.attribute(mlp.x[:3], targets), expected, atol=1e-6)


def test_tuples_for_outputs_of_more_dimensions() -> None:
    mipin, x = shaped(2, 3)
    assert mipin.inverse.targets == [(i, j) for i in range(2) for j in range(3)]
    each = [mipin.attribute(x[:3], target) for target in ((1, 2), (0, 0), (1, 0))]
    mixed = mipin.attribute(x[:3], [(1, 2), (0, -3), (-1, 0)])
    assert torch.allclose(mixed, torch.stack([each[i][i] for i in range(3)]), atol=1e-6)
    assert not torch.allclose(each[0], each[1])


@pytest.mark.parametrize("dims", [(), (1,), (1, 1)])
def test_no_target_for_models_with_one_output(dims: tuple[int, ...]) -> None:
    mipin, x = shaped(*dims)
    found, delta = mipin.attribute(x[:3], return_convergence_delta=True)
    assert found.shape == (3, 4)
    assert delta.shape == (3,)
    assert found.abs().sum() > 0
    if dims:
        assert torch.equal(mipin.attribute(x[:3], (0,) * len(dims)), found)
    with pytest.raises(TargetError):
        mipin.attribute(x[:3], (9999,) * 20)


@pytest.mark.parametrize(
    "target",
    [
        None,
        "0",
        1.0,
        True,
        slice(0, 1),
        torch.tensor([0.0, 1.0]),
        [0],
        [0, 1, 2],
        (9999,) * 20,
        (0, 0),
        [[0], [1]],
    ],
)
def test_bad_targets_are_assertion_errors(mlp: Any, target: Any) -> None:
    with pytest.raises(AssertionError, match="target") as caught:
        mlp.mipin.attribute(mlp.x[:2], target)
    assert isinstance(caught.value, TargetError)


@pytest.mark.parametrize("target", [3, -4, [0, 3], torch.tensor([0, 3])])
def test_targets_out_of_range_are_index_errors(mlp: Any, target: Any) -> None:
    with pytest.raises(IndexError, match=r"outside the model's outputs of shape \(3,\)") as caught:
        mlp.mipin.attribute(mlp.x[:2], target)
    assert isinstance(caught.value, TargetRangeError)


def test_a_class_without_inverse_is_an_error_that_lists_those_with(mlp: Any) -> None:
    inverse = InverseNetwork(mlp.model).fit(mlp.x, targets=[2, 0], progress=False)
    mipin = MIPINAttribution(mlp.model, inverse)
    for call in (mipin.attribute, mipin.source_signal, mipin.distractor):
        with pytest.raises(
            NotFittedError,
            match=r"fitted for target 1; fitted are \[2, 0\]\. Fit all .*=\[2, 0, 1\]\)",
        ):
            call(mlp.x[:2], [0, 1])
    with pytest.raises(NotFittedError, match=r"fitted are \[2, 0\]"):
        mipin.class_attribution(1)
    with pytest.raises(NotFittedError, match=r"not fitted yet: call fit"):
        MIPINAttribution(mlp.model, InverseNetwork(mlp.model)).attribute(mlp.x[:2], 0)


# ----------------------------------------------------------------------------- modes and arguments


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_every_gradient_mode(cnn: Any, own_cnn: Any, mode: Callable[[], Any]) -> None:
    expected = cnn.mipin.attribute(cnn.x[:3], [0, 1, 2], return_convergence_delta=True)
    signal = cnn.mipin.source_signal(cnn.x[:3], 0)
    with mode():
        x = cnn.x[:3] + 0  # made in this mode
        found = own_cnn.mipin.attribute(x, [0, 1, 2], return_convergence_delta=True)
        assert torch.equal(own_cnn.mipin.source_signal(x, 0), signal)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fits_in_every_gradient_mode(cnn: Any, mode: Callable[[], Any]) -> None:
    with mode():
        inverse = InverseNetwork(cnn.model).fit(cnn.x + 0, progress=False)  # data made in this mode
    assert torch.equal(
        inverse.source_signal(cnn.x[:3], [0, 1, 2]), cnn.inverse.source_signal(cnn.x[:3], [0, 1, 2])
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_further_arguments_may_be_made_in_any_gradient_mode(mode: Callable[[], Any]) -> None:
    mipin, inputs, scale = two_inputs()
    a, b = (x[:4] for x in inputs)
    with mode():
        found = mipin.attribute((a + 0, b + 0), 1, (scale[:4] + 0, 2.0))
    expected = mipin.attribute((a, b), 1, (scale[:4], 2.0))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_further_arguments_may_require_gradients() -> None:
    mipin, inputs, scale = two_inputs()
    a, b = (x[:4] for x in inputs)
    wants = scale.clone().requires_grad_()  # as what comes out of another network does
    found = mipin.attribute((a, b), 1, (wants[:4], 2.0))
    expected = mipin.attribute((a, b), 1, (scale[:4], 2.0))
    assert all(
        torch.equal(f, e) and not f.requires_grad for f, e in zip(found, expected, strict=True)
    )
    batches = [
        (tuple(x[i : i + 20] for x in inputs), (wants[i : i + 20], 2.0)) for i in range(0, 60, 20)
    ]
    inverse = InverseNetwork(mipin.model).fit(batches, unpack=lambda batch: batch, progress=False)
    again = MIPINAttribution(mipin.model, inverse).attribute((a, b), 1, (scale[:4], 2.0))
    assert all(torch.equal(f, e) for f, e in zip(again, expected, strict=True))
    assert wants.grad is None


def test_several_inputs_and_per_example_arguments() -> None:
    mipin, inputs, scale = two_inputs()
    a, b = (x[:6] for x in inputs)
    targets = [0, 1, 2, 2, 1, 0]
    found, delta = mipin.attribute((a, b), targets, (scale[:6], 2.0), return_convergence_delta=True)
    assert [f.shape for f in found] == [(6, 4), (6, 2)]
    assert all(f.abs().sum() > 0 and f.is_contiguous() for f in found)
    for i in range(6):
        row, one = mipin.attribute(
            (a[i : i + 1], b[i : i + 1]),
            targets[i],
            (scale[i : i + 1], 2.0),
            return_convergence_delta=True,
        )
        assert all(torch.allclose(r[0], f[i], atol=1e-5) for r, f in zip(row, found, strict=True))
        assert torch.allclose(one[0], delta[i], atol=1e-5)
    assert not torch.allclose(
        mipin.attribute((a, b), targets, (scale[:6] + 1, 2.0))[0], found[0]
    ), "the scale counts"
    signal = mipin.source_signal((a, b), targets, (scale[:6], 2.0))
    rest = mipin.distractor((a, b), targets, (scale[:6], 2.0))
    assert all(
        torch.allclose(s + r, x, atol=1e-6) for s, r, x in zip(signal, rest, (a, b), strict=True)
    )


@pytest.mark.parametrize("argument", [None, 0.5, (0.5,), "tensor", ("tensor",)])
def test_further_arguments_in_every_form(argument: Any) -> None:
    model, x, scale = Scaled().eval(), torch.randn(40, 4), torch.rand(40, 1)
    values: dict[Any, Any] = {"tensor": scale, ("tensor",): (scale,), None: ()}
    given_ = values.get(argument, argument)
    inverse = InverseNetwork(model).fit([(x, given_)], unpack=lambda batch: batch, progress=False)
    mipin = MIPINAttribution(model, inverse)
    call = {"tensor": scale[:3], ("tensor",): (scale[:3],)}.get(argument, argument)
    found, delta = mipin.attribute(x[:3], 1, call, return_convergence_delta=True)
    assert torch.isfinite(found).all()
    signal = mipin.source_signal(x[:3], 1, call)
    arguments = call if isinstance(call, tuple) else () if call is None else (call,)
    with torch.no_grad():
        assert torch.allclose(delta, (model(signal, *arguments) - model(x[:3], *arguments))[:, 1])
    assert torch.equal(mipin.compute_convergence_delta(signal, x[:3], 1, call), delta)


@pytest.mark.parametrize("batch", [3, 4, 5])
def test_a_shared_tensor_argument_may_be_as_long_as_the_batch(batch: int) -> None:
    model, x, shared = Scaled().eval(), torch.randn(40, 4), torch.rand(4) + 0.5
    inverse = InverseNetwork(model).fit([(x, shared)], unpack=lambda batch: batch, progress=False)
    mipin = MIPINAttribution(model, inverse)
    each = torch.cat([mipin.attribute(x[i : i + 1], 0, shared) for i in range(batch)])
    assert torch.allclose(mipin.attribute(x[:batch], 0, shared), each, atol=1e-6)


# ------------------------------------------------------------------------------- convergence delta


def test_convergence_delta_is_the_completeness_error_of_the_source_signal(cnn: Any) -> None:
    assert cnn.mipin.has_convergence_delta() is True
    x, targets = cnn.x[:4], [0, 1, 2, 1]
    a, delta = cnn.mipin.attribute(x, targets, return_convergence_delta=True)
    assert torch.equal(a, cnn.mipin.attribute(x, targets))
    signal = cnn.mipin.source_signal(x, targets)
    with torch.no_grad():
        expected = (cnn.model(signal) - cnn.model(x))[range(4), targets]
    assert delta.shape == (4,)
    assert not delta.requires_grad
    assert torch.allclose(delta, expected, atol=1e-6)
    assert torch.allclose(
        cnn.mipin.compute_convergence_delta(signal, x, targets), expected, atol=1e-6
    )
    assert torch.equal(cnn.mipin.compute_convergence_delta(x, x, targets), torch.zeros(4))


def test_convergence_delta_of_outputs_of_more_dimensions() -> None:
    mipin, x = shaped(2, 3)
    _, delta = mipin.attribute(x[:2], [(0, 1), (1, 2)], return_convergence_delta=True)
    with torch.no_grad():
        change = mipin.model(mipin.source_signal(x[:2], [(0, 1), (1, 2)])) - mipin.model(x[:2])
    assert torch.allclose(delta, torch.stack([change[0, 0, 1], change[1, 1, 2]]), atol=1e-6)


# ---------------------------------------------------------------------------------- Captum's tools


@pytest.mark.parametrize("partial", [None, 1, 2, 3])
def test_noise_tunnel_without_noise_gives_the_attribution(cnn: Any, partial: int | None) -> None:
    x, targets = cnn.x[:3], [0, 1, 2]
    plain, tunnel = cnn.mipin.attribute(x, targets), NoiseTunnel(cnn.mipin)
    for kind, expected in (
        ("smoothgrad", plain),
        ("smoothgrad_sq", plain**2),
        ("vargrad", torch.zeros_like(plain)),
    ):
        found = tunnel.attribute(
            x, nt_type=kind, nt_samples=4, nt_samples_batch_size=partial, stdevs=0.0, target=targets
        )
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), kind


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel_with_noise(cnn: Any, kind: str) -> None:
    x, targets = cnn.x[:3], torch.tensor([0, 1, 2])
    found, delta = NoiseTunnel(cnn.mipin).attribute(
        x, nt_type=kind, nt_samples=4, stdevs=0.1, target=targets, return_convergence_delta=True
    )
    assert found.shape == x.shape
    assert torch.isfinite(found).all()
    assert delta.shape == (12,)
    assert not torch.allclose(found, cnn.mipin.attribute(x, targets))
    assert isinstance(
        NoiseTunnel(cnn.mipin).attribute((x,), nt_type=kind, nt_samples=2, target=0), tuple
    )


def test_noise_tunnel_hands_on_several_inputs_and_arguments() -> None:
    mipin, inputs, scale = two_inputs()
    few = tuple(x[:4] for x in inputs)
    arguments = {"target": [0, 1, 2, 0], "additional_forward_args": (scale[:4], 2.0)}
    found = NoiseTunnel(mipin).attribute(
        few, nt_samples=3, nt_samples_batch_size=2, stdevs=0.0, **arguments
    )
    expected = mipin.attribute(few, **arguments)
    assert all(torch.allclose(f, e, atol=1e-5) for f, e in zip(found, expected, strict=True))


def test_infidelity(cnn: Any) -> None:
    x = cnn.x[:3]

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(inputs) * 0.1
        return noise, inputs - noise

    for normalize in (False, True):
        score = infidelity(
            cnn.model,
            perturb,
            x,
            cnn.mipin.attribute(x, 1),
            target=1,
            n_perturb_samples=5,
            normalize=normalize,
        )
        assert score.shape == (3,)
        assert torch.isfinite(score).all()
        assert (score >= 0).all()


def test_sensitivity_max(cnn: Any) -> None:
    still = sensitivity_max(
        cnn.mipin.attribute, cnn.x[:3], perturb_radius=0.0, n_perturb_samples=2, target=[0, 1, 2]
    )
    assert torch.allclose(still, torch.zeros(3), atol=1e-5)
    for x in (cnn.x[:3], cnn.x[:3].contiguous(memory_format=torch.channels_last), (cnn.x[:3],)):
        score = sensitivity_max(
            cnn.mipin.attribute, x, n_perturb_samples=3, max_examples_per_batch=6, target=[0, 1, 2]
        )
        assert score.shape == (3,)
        assert torch.isfinite(score).all()
    mipin, inputs, scale = two_inputs()
    few = tuple(x[:4] for x in inputs)
    score = sensitivity_max(
        mipin.attribute, few, target=0, additional_forward_args=(scale[:4], 2.0)
    )
    assert score.shape == (4,)


@pytest.mark.parametrize(
    "method", ["heat_map", "blended_heat_map", "masked_image", "alpha_scaling", "original_image"]
)
def test_visualize_image_attr(cnn: Any, method: str) -> None:
    maps = cnn.mipin.attribute(cnn.x[:1], target=0)[0].permute(1, 2, 0).numpy()
    image = cnn.x[0].permute(1, 2, 0).numpy()
    figure, axes = viz.visualize_image_attr(
        maps, image, method=method, sign="absolute_value", use_pyplot=False
    )
    assert figure is not None
    assert axes.images


def test_visualize_image_attr_multiple(cnn: Any) -> None:
    maps = cnn.mipin.attribute(cnn.x[:1], target=0)[0].permute(1, 2, 0).numpy()
    image = cnn.x[0].permute(1, 2, 0).numpy()
    methods, signs = ["original_image", "heat_map", "blended_heat_map"], ["all", "all", "positive"]
    figure, _ = viz.visualize_image_attr_multiple(maps, image, methods, signs, use_pyplot=False)
    assert len(figure.axes) >= 3


# ------------------------------------------------------------------------------------------ layers


def test_a_layer_has_the_attribution_of_its_own_output() -> None:
    model, inverse, x = mixed_layers()
    mipin = LayerMIPINAttribution(model, inverse)
    assert mipin.layer is model[1]
    with torch.no_grad():
        features = model[:2](x[:4])
    a, s = mipin.attribute(x[:4], [0, 1, 2, 0]), mipin.source_signal(x[:4], [0, 1, 2, 0])
    assert a.shape == s.shape == features.shape
    assert (a.dtype, a.is_contiguous(), a.requires_grad) == (x.dtype, True, False)
    assert (a[features == 0] == 0).all()
    assert (s[features == 0] == 0).all()
    assert a.abs().sum() > 0
    assert torch.equal(mipin.attribute((x[:4],), [0, 1, 2, 0]), a)
    assert torch.allclose(
        mipin.attribute(x[:4], [0, 1, 2, 0], multiply_by_features=True), a * features, atol=1e-6
    )
    assert not torch.equal(mipin.attribute(x[:4], [0, 1, 2, 0], local=False), a)
    assert torch.allclose(mipin.attribute(x[2:3], 2), a[2:3], atol=1e-6)
    assert torch.allclose(
        a[1], LayerMIPINAttribution(model, inverse, model[1]).attribute(x[:4], 1)[1], atol=1e-6
    )


def test_layer_attributions_can_be_interpolated_and_go_through_noise_tunnel() -> None:
    model, inverse, x = mixed_layers()
    mipin = LayerMIPINAttribution(model, inverse)
    maps = mipin.attribute(x[:2], 0)
    assert LayerAttribution.interpolate(maps, (8, 8)).shape == (2, 4, 8, 8)
    assert LayerMIPINAttribution.interpolate(maps, (8, 8), interpolate_mode="bilinear").shape == (
        2,
        4,
        8,
        8,
    )
    found = NoiseTunnel(mipin).attribute(x[:2], nt_samples=3, stdevs=0.0, target=[0, 1])
    assert torch.allclose(found, mipin.attribute(x[:2], [0, 1]), atol=1e-5)


def test_a_layer_above_the_one_that_the_inverse_stops_at() -> None:
    model, inverse, x = mixed_layers()
    assert LayerMIPINAttribution(model, inverse, model[5]).attribute(x[:3], 1).shape == (3, 4, 2, 2)
    higher = InverseNetwork(model, layer=model[5]).fit(x, targets=1, progress=False)
    with pytest.raises(NotFittedError, match=r"stops at layer '5', and did not learn 4/conv2d"):
        LayerMIPINAttribution(model, higher, model[1]).attribute(x[:3], 1)
    with pytest.raises(NotFittedError, match="stops at layer '1', it does not reach the input"):
        MIPINAttribution(model, inverse).attribute(x[:3], 1)


def test_layers_that_have_no_one_output_are_refused(untouched: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.relu(self.b(self.relu(self.a(x)))))

    model, x, foreign = Twice().eval(), torch.randn(40, 4), nn.Linear(4, 5)
    inverse = InverseNetwork(model).fit(x, progress=False)
    with (
        pytest.raises(CaptureError, match=r"layer 'relu' \(ReLU\) is called 2 times"),
        untouched(model, x),
    ):
        LayerMIPINAttribution(model, inverse, model.relu).attribute(x[:2], 0)
    for make in (
        lambda: LayerMIPINAttribution(model, inverse, foreign),
        lambda: InverseNetwork(model, layer=foreign),
    ):
        with pytest.raises(InputError, match="a Linear, expected a module of the Twice"):
            make()
    sequence, stops, images = mixed_layers()
    with pytest.raises(
        CaptureError,
        match=r"layer '2' \(Dropout\).*does nothing at inference\. Name the module before it",
    ):
        LayerMIPINAttribution(sequence, stops, sequence[2]).attribute(images[:2], 0)


# ------------------------------------------------------------------------------ nothing is touched


def _used(fitted: Any) -> None:
    """Give a model what users' models have: hooks, gradients, frozen weights, attributes."""
    model = fitted.model
    handles = [
        model[0].register_forward_hook(lambda *_: None),
        model[0].register_full_backward_hook(lambda *_: None),
    ]
    model[1].note = "mine"
    model(fitted.x[:2].clone().requires_grad_()).sum().backward()
    model[0].bias.requires_grad_(False)
    model.handles = handles


SUCCESSES: dict[str, Callable[[Any, Path], Any]] = {
    "check": lambda f, path: check(f.model, f.x),
    "fit": lambda f, path: InverseNetwork(f.model).fit(f.x, targets=[0, 1], progress=False),
    "fit again": lambda f, path: f.inverse.fit(f.x, targets=1, progress=False),
    "fit a loader": lambda f, path: InverseNetwork(f.model).fit(
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(f.x, f.x), 16, shuffle=True),
        0,
        progress=False,
    ),
    "fit a data set": lambda f, path: InverseNetwork(f.model).fit(
        torch.utils.data.TensorDataset(f.x), 0, progress=False
    ),
    "fit by descent": lambda f, path: InverseNetwork(f.model, solver="sgd", epochs=2).fit(
        f.x, 0, progress=False
    ),
    "fit with a checkpoint": lambda f, path: InverseNetwork(f.model).fit(
        f.x, 0, progress=False, checkpoint=path
    ),
    "attribute": lambda f, path: f.mipin.attribute(f.x[:3], [0, 1, 2]),
    "attribute with delta": lambda f, path: f.mipin.attribute(
        f.x[:3], 0, return_convergence_delta=True
    ),
    "attribute with gradients wanted": lambda f, path: f.mipin.attribute(
        f.x[:3].requires_grad_(), 0
    ),
    "source signal": lambda f, path: f.mipin.source_signal(f.x[:3], 0),
    "distractor": lambda f, path: f.mipin.distractor(f.x[:3], 0),
    "class attribution": lambda f, path: f.mipin.class_attribution(0),
    "layer": lambda f, path: LayerMIPINAttribution(f.model, f.inverse, f.model[2]).attribute(
        f.x[:3], 0
    ),
    "save and load": lambda f, path: (f.inverse.save(path), InverseNetwork.load(path, f.model)),
    "copy": lambda f, path: copy.deepcopy(f.inverse),
}


def test_notes_that_a_model_keeps_are_untouched(untouched: Any) -> None:
    model, x = Remembers().eval(), torch.randn(40, 4)
    with untouched(model, x):
        check(model, x)
        mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
        mipin.attribute(x[:2], 0)
        mipin.source_signal(x[:1], [1])
    assert (model.calls, model.shapes) == (0, [(0, 0)])


class Fails:
    """Batches of which a later one raises."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.seen = x, 0

    def __iter__(self) -> Any:
        for i in range(0, len(self.x), 16):
            self.seen += 1
            if self.seen == 15:
                raise OSError("disk gone")
            yield self.x[i : i + 16]


def _load_foreign(fitted: Any, path: Path) -> None:
    path.write_bytes(b"not a file of ours")
    InverseNetwork.load(path, fitted.model)


FAILURES: dict[str, tuple[type[Exception], Callable[[Any, Path], Any]]] = {
    "check of a wrong shape": (CaptureError, lambda f, path: check(f.model, f.x[:, :2])),
    "fit of raising data": (
        OSError,
        lambda f, path: InverseNetwork(f.model).fit(Fails(f.x), memory=0, progress=False),
    ),
    "fit of an unknown class": (
        TargetRangeError,
        lambda f, path: InverseNetwork(f.model).fit(f.x, 5, progress=False),
    ),
    "attribute for a bad target": (
        TargetError,
        lambda f, path: f.mipin.attribute(f.x[:3], (9999,) * 20),
    ),
    "attribute of a wrong shape": (CaptureError, lambda f, path: f.mipin.attribute(f.x[:3, :2], 0)),
    "attribute of NaN": (InputError, lambda f, path: f.mipin.attribute(f.x[:3] * float("nan"), 0)),
    "source signal for a bad target": (
        TargetError,
        lambda f, path: f.mipin.source_signal(f.x[:3], "0"),
    ),
    "a foreign layer": (
        InputError,
        lambda f, path: LayerMIPINAttribution(f.model, f.inverse, nn.ReLU()).attribute(f.x, 0),
    ),
    "save to nowhere": (OSError, lambda f, path: f.inverse.save(path / "no" / "such")),
    "load of a foreign file": (ValueError, _load_foreign),
}


@pytest.mark.parametrize("name", [*SUCCESSES, *FAILURES])
def test_nothing_is_touched_by_success_or_failure(
    own_cnn: Any, untouched: Any, tmp_path: Path, name: str
) -> None:
    _used(own_cnn)
    own_cnn.x.requires_grad_(name.startswith("source signal"))
    error, call = FAILURES[name] if name in FAILURES else (None, SUCCESSES[name])
    with pytest.raises(error) if error else nullcontext(), untouched(own_cnn.model, own_cnn.x):
        call(own_cnn, tmp_path / "file")


# ------------------------------------------------------------------------------ copies and threads


@pytest.mark.parametrize("way", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_give_the_same_bits(cnn: Any, way: Callable[[Any], Any]) -> None:
    x, targets = cnn.x[:4], [0, 1, 2, 0]
    expected = cnn.mipin.attribute(x, targets, return_convergence_delta=True)
    twin = way(cnn.mipin)
    assert twin.model is twin.inverse.model
    assert twin.model is not cnn.model
    found = twin.attribute(x, targets, return_convergence_delta=True)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    inverse = way(cnn.inverse)
    assert inverse.targets == [0, 1, 2]
    assert inverse.report == cnn.inverse.report
    assert torch.equal(inverse.source_signal(x, targets), cnn.inverse.source_signal(x, targets))
    with torch.no_grad():
        twin.model[0].weight += 1
    assert torch.equal(cnn.mipin.attribute(x, targets), expected[0]), "copies share nothing"


def test_copies_of_layer_attributions_keep_their_layer() -> None:
    model, inverse, x = mixed_layers()
    mipin = LayerMIPINAttribution(model, inverse)
    for twin in (copy.deepcopy(mipin), pickle.loads(pickle.dumps(mipin))):
        assert twin.layer is twin.model[1]
        assert torch.equal(twin.attribute(x[:3], 2), mipin.attribute(x[:3], 2))


def _in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    barrier, results = threading.Barrier(count), [None] * count

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_eight_threads_give_what_one_gives(cnn: Any, own_cnn: Any, untouched: Any) -> None:
    chunks = [(cnn.x[i : i + 4 + i % 3], [(i + j) % 3 for j in range(4 + i % 3)]) for i in range(8)]
    expected = [cnn.mipin.attribute(*chunk, return_convergence_delta=True) for chunk in chunks]
    mipin = own_cnn.mipin  # nothing captured yet
    with untouched(own_cnn.model):
        for _ in range(3):
            results = _in_threads(
                8, lambda n: mipin.attribute(*chunks[n], return_convergence_delta=True)
            )
            for found, right in zip(results, expected, strict=True):
                assert isinstance(found, tuple), found
                assert all(torch.equal(f, r) for f, r in zip(found, right, strict=True))


def test_inverses_of_several_networks_may_be_used_in_threads(cnn: Any, mlp: Any) -> None:
    own = [copy.deepcopy((cnn if n % 2 else mlp).mipin) for n in range(4)]
    inputs = [(cnn if n % 2 else mlp).x[:3] for n in range(4)]
    results = _in_threads(4, lambda n: own[n].attribute(inputs[n], [0, 1, 2]))
    for n, found in enumerate(results):
        assert isinstance(found, Tensor), found
        assert torch.equal(found, (cnn if n % 2 else mlp).mipin.attribute(inputs[n], [0, 1, 2]))


@pytest.mark.captured_anew
def test_a_capture_in_another_thread_changes_no_bit(cnn: Any) -> None:
    """``torch.export`` switches oneDNN off for the whole process while it runs."""
    expected, started = cnn.mipin.attribute(cnn.x[:3], [0, 1, 2]), threading.Event()
    others = [copy.deepcopy(cnn.model) for _ in range(12)]

    def captures() -> None:
        for other in others:
            started.set()
            capture(other, (cnn.x[:3],))

    thread = threading.Thread(target=captures)
    thread.start()
    started.wait()
    found = []
    while thread.is_alive():
        found.append(cnn.mipin.attribute(cnn.x[:3], [0, 1, 2]))
    thread.join()
    assert len(found) > 1
    assert all(torch.equal(one, expected) for one in found)


# ---------------------------------------------------------------------------------------- warnings


def test_no_warnings_on_the_happy_path(
    own_cnn: Any, tmp_path: Path, recwarn: Any, capfd: Any
) -> None:
    model, x = own_cnn.model, own_cnn.x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, x)
        inverse = InverseNetwork(model).fit(x, targets=[0, 1], progress=False)
        inverse.save(tmp_path / "file")
        mipin = MIPINAttribution(model, InverseNetwork.load(tmp_path / "file", model))
        for wants in (False, True):
            mipin.attribute(
                x[:2].clone().requires_grad_(wants), target=[0, 1], return_convergence_delta=True
            )
        mipin.source_signal(x[:2], target=0)
        mipin.class_attribution(0)
        LayerMIPINAttribution(model, inverse, model[2]).attribute(x[:2], target=0)
        copy.deepcopy(mipin)
        pickle.dumps(mipin)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------ Captum's own table

try:
    from captum.testing.attr.helpers.test_config import config
except ImportError:  # Captum 0.8 comes without it
    config = []
TABLE = [entry for entry in config if Saliency in entry["algorithms"]]


@pytest.mark.parametrize("entry", TABLE, ids=[entry["name"] for entry in TABLE])
def test_captums_own_table(entry: dict[str, Any], untouched: Any) -> None:
    model, arguments = copy.deepcopy(entry["model"]).eval(), entry["attribute_args"]
    inputs = (
        arguments["inputs"] if isinstance(arguments["inputs"], tuple) else (arguments["inputs"],)
    )
    extras = arguments.get("additional_forward_args") or ()
    extras = extras if isinstance(extras, tuple) else (extras,)
    batch, target = len(inputs[0]), arguments["target"]

    def rows(index: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        return tuple(x[index] for x in inputs), tuple(
            e[index] if isinstance(e, Tensor) else e for e in extras
        )

    near, further = rows(torch.arange(64) % batch)
    near = tuple(x + (x.abs().mean() + 0.1) * torch.randn_like(x) for x in near)
    try:
        inverse = InverseNetwork(model).fit(
            [(near, further)], unpack=lambda batch: batch, progress=False
        )
    except (UnsupportedOperationError, CaptureError) as error:
        pytest.fail(f"a model of Captum's table is refused: {error}")
    mipin = MIPINAttribution(model, inverse)
    with untouched(model, *inputs):
        whole = mipin.attribute(inputs, target, extras)
    for i in range(batch):
        one, own = rows(slice(i, i + 1))
        each = (
            target[i]
            if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
            else target
        )
        single = mipin.attribute(one, each, own)
        assert all(
            torch.allclose(w[i : i + 1], s, rtol=1e-4, atol=1e-5)
            for w, s in zip(whole, single, strict=True)
        )
    assert all(
        w.shape == x.shape and torch.isfinite(w).all() for w, x in zip(whole, inputs, strict=True)
    )
    with pytest.raises(AssertionError), untouched(model, *inputs):
        mipin.attribute(inputs, (9999,) * 20, extras)
    if entry.get("noise_tunnel"):
        options = {
            key: value
            for key, value in arguments.items()
            if key in ("nt_samples", "nt_samples_batch_size", "stdevs")
        }
        found = NoiseTunnel(mipin).attribute(
            inputs, target=target, additional_forward_args=extras or None, **options
        )
        assert all(torch.isfinite(f).all() for f in found)


def test_an_unsupported_operation_is_refused_by_name(untouched: Any) -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 2)).eval(),
        torch.randn(8, 4),
    )
    with (
        pytest.raises(
            UnsupportedOperationError, match=r"aten\.softmax\.int in 1: no rule covers it"
        ),
        untouched(model, x),
    ):
        InverseNetwork(model).fit(x, progress=False)


# -------------------------------------------------------------------------------------------- CUDA


@needs_cuda
def test_cuda_gives_what_the_cpu_gives(own_cnn: Any) -> None:
    x, targets = own_cnn.x[:4], [0, 1, 2, 1]
    expected, delta = own_cnn.mipin.attribute(x, targets, return_convergence_delta=True)
    own_cnn.model.cuda()
    for inverse in (own_cnn.inverse, own_cnn.inverse.to("cuda")):
        mipin = MIPINAttribution(own_cnn.model, inverse)
        found, moved = mipin.attribute(
            x.cuda(), torch.tensor(targets, device="cuda"), return_convergence_delta=True
        )
        assert found.device.type == moved.device.type == "cuda"
        assert torch.allclose(found.cpu(), expected, rtol=1e-2, atol=1e-3)
        assert torch.allclose(moved.cpu(), delta, rtol=1e-2, atol=1e-3)
    with pytest.raises((CaptureError, InputError), match="cpu"):
        own_cnn.mipin.attribute(x, targets)


@needs_cuda
def test_cuda_fit_save_and_load(own_cnn: Any, untouched: Any, tmp_path: Path) -> None:
    model = own_cnn.model.cuda()
    with untouched(model):
        inverse = InverseNetwork(model).fit(
            own_cnn.x, progress=False
        )  # data on the CPU is moved batch by batch
        inverse.save(tmp_path / "file")
    loaded = InverseNetwork.load(tmp_path / "file", model)
    x = own_cnn.x[:3].cuda()
    assert torch.equal(loaded.source_signal(x, 0), inverse.source_signal(x, 0))
    on_cpu = own_cnn.inverse.source_signal(x, 0)
    assert torch.allclose(inverse.source_signal(x, 0), on_cpu, rtol=1e-2, atol=1e-2)
