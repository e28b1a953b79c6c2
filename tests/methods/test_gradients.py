"""Deconvnet and Guided Backprop: Captum's where those are right, and every spelling of a gate."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import invariance
import pytest
import torch
from captum.attr import Deconvolution, NoiseTunnel, Saliency
from captum.attr import GuidedBackprop as CaptumsGuidedBackprop
from captum.metrics import sensitivity_max
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import LRP, check
from captum_mipin.errors import CaptureError, InputError, UnsupportedOperationError
from captum_mipin.methods import (  # fmt: skip
    Deconvnet,
    DeepTaylor,
    GuidedBackprop,
    LayerPropagation,
)
from captum_mipin.methods.gradients import Gradient

BOTH = pytest.mark.parametrize("method", [Deconvnet, GuidedBackprop])
CAPTUMS = {Deconvnet: Deconvolution, GuidedBackprop: CaptumsGuidedBackprop}


@cache
def _plain(dtype=torch.float64):
    """Shared: not to be changed."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.ReLU(), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(),
        nn.Linear(5, 3),
    ).to(dtype).eval()  # fmt: skip


def _captums(method, model, x, target):
    with pytest.warns(UserWarning):
        return CAPTUMS[method](model).attribute(x.clone(), target=target)


@BOTH
def test_equals_captum_on_plain_modules(method):
    model, x, target = _plain(), normal(4, 3, 8, 8, dtype=torch.float64), [0, 1, 2, 2]
    found = method(model).attribute(x, target)
    assert found.any()
    torch.testing.assert_close(found, _captums(method, model, x, target), rtol=1e-6, atol=1e-12)


def test_spellings_of_a_residual_network_are_the_same():
    x, target = invariance.images(4), [0, 1, 2, 0]
    reference = invariance.network(invariance.SPELLINGS[invariance.REFERENCE])
    expected = {method: method(reference).attribute(x, target) for method in (LRP, DeepTaylor)}
    expected |= {
        method: _captums(method, reference, x, target) for method in CAPTUMS
    }  # its ReLUs are modules
    for name in ("one nn.ReLU reused", "y.add_(x)", "clamp(min=0)", "functional throughout"):
        model = invariance.network(invariance.SPELLINGS[name])
        for method, maps in expected.items():
            assert invariance.difference(method(model).attribute(x, target), maps) < 1e-6, name


GATES = {
    "relu": (
        torch.relu, nn.ReLU(), nn.ReLU(inplace=True), F.relu, lambda h: h.clamp(min=0),
        lambda h: h.clamp_min(0),
        lambda h: torch.maximum(h, torch.zeros(())), lambda h: torch.max(torch.zeros_like(h), h),
        lambda h: h * (h > 0),
        lambda h: torch.where(h > 0, h, 0.0), lambda h: h.masked_fill(h <= 0, 0),
        lambda h: (h > 0).to(h.dtype) * h,
        lambda h: F.threshold(h, 0.0, 0.0), lambda h: F.leaky_relu(h, 0.0), lambda h: h.clip(0),
        lambda h: h.clamp(min=torch.zeros((), dtype=h.dtype)), lambda h: h.clone().relu_(),
    ),
    "relu6": (
        nn.ReLU6(), F.relu6, lambda h: h.clamp(0, 6), lambda h: F.hardtanh(h, 0.0, 6.0),
        lambda h: h.clamp(min=0).clamp(max=6),
        lambda h: torch.relu(h).clamp_max(6.0),
        lambda h: torch.minimum(torch.relu(h), torch.full((), 6.0)),
    ),
    "silu": (nn.SiLU(), F.silu, lambda h: h * torch.sigmoid(h), lambda h: h.sigmoid() * h),
    "hardswish": (nn.Hardswish(), F.hardswish, lambda h: h * F.hardsigmoid(h)),
    "gelu": (nn.GELU(), F.gelu),
    "leaky_relu": (nn.LeakyReLU(0.25), lambda h: F.leaky_relu(h, 0.25), nn.PReLU(init=0.25)),
}  # fmt: skip
DERIVATIVES = {
    "relu": lambda h: (h > 0).double(),
    "relu6": lambda h: ((h > 0) & (h < 6)).double(),
    "silu": lambda h: h.sigmoid() * (1 + h * (1 - h.sigmoid())),
    "hardswish": lambda h: ((h > -3) & (h < 3)) * (h / 3 + 0.5) + (h >= 3).double(),
    "gelu": lambda h: (
        0.5 * (1 + torch.erf(h / 2**0.5)) + h * torch.exp(-h * h / 2) / (2 * torch.pi) ** 0.5
    ),
    "leaky_relu": lambda h: 0.25 + 0.75 * (h > 0).double(),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_by_hand_in_every_spelling(name):
    w, v = normal(6, 5, dtype=torch.float64), normal(2, 6, seed=1, dtype=torch.float64)
    x = 4 * normal(7, 5, seed=2, dtype=torch.float64)
    x[0] = 0  # on the bound
    h = x @ w.T
    passed = v[1].clamp(min=0).expand_as(h)
    first, last = nn.Linear(5, 6, bias=False), nn.Linear(6, 2, bias=False)
    first.weight, last.weight = nn.Parameter(w), nn.Parameter(v)
    modules = {
        str(number): gate for number, gate in enumerate(GATES[name]) if isinstance(gate, nn.Module)
    }
    model = Function(  # all spellings side by side, an output each
        lambda m, x: torch.stack([m["last"](gate(m["first"](x))) for gate in GATES[name]], 1),
        first=first,
        last=last,
        **modules,
    )
    model = model.double().eval()
    by_guided, by_deconvnet = GuidedBackprop(model), Deconvnet(model)
    for number in range(len(GATES[name])):
        guided, deconvnet = (
            by_guided.attribute(x, (number, 1)),
            by_deconvnet.attribute(x, (number, 1)),
        )
        torch.testing.assert_close(
            guided,
            (passed * DERIVATIVES[name](h)) @ w,
            rtol=1e-9,
            atol=1e-9,
            msg=f"spelling {number}",
        )
        torch.testing.assert_close(
            deconvnet, passed @ w, rtol=1e-9, atol=1e-9, msg=f"spelling {number}"
        )


def test_sigmoids_keep_their_derivative_and_are_told():
    model = (
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 2))
        .double()
        .eval()
    )
    x = normal(4, 5, dtype=torch.float64)
    gradient = Saliency(model).attribute(x.clone().requires_grad_(), target=0, abs=False)
    torch.testing.assert_close(GuidedBackprop(model).attribute(x, 0), gradient)
    report = check(model, x, method=GuidedBackprop)
    assert [row.path for row in report.caveats] == ["1", "3"]
    assert "no rectifier" in str(report)


@pytest.mark.parametrize(
    ("gate", "operation"),
    [
        (lambda h: torch.where(h > 0, h, 0.1 * h), "where.self"),
        (lambda h: h * ((h > 0) & (h < 9)), "mul.Tensor"),
        (lambda h: h * ((h > 0) & (h < 9)).to(h.dtype), "mul.Tensor"),
        (lambda h: torch.where((h > 0) & (h < 9), h, 0), "where.ScalarOther"),
    ],
)
def test_choices_by_comparisons_that_are_no_known_gates_are_refused(gate, operation):
    model = Function(
        lambda m, x: m["last"](gate(m["first"](x))), first=nn.Linear(5, 6), last=nn.Linear(6, 2)
    ).eval()
    with pytest.raises(
        UnsupportedOperationError,
        match=rf"aten\.{operation} in the model itself: it chooses by a comparison",
    ):
        GuidedBackprop(model).attribute(normal(2, 5), 0)
    assert not check(model, normal(2, 5), method=GuidedBackprop).ok


def test_what_has_no_derivative_is_refused():
    half = torch.tensor(0.5)
    model = Function(
        lambda m, x: m["last"](x + torch.heaviside(m["first"](x), half)),
        first=nn.Linear(5, 5),
        last=nn.Linear(5, 2),
    )
    for method in (Deconvnet, GuidedBackprop):
        with pytest.raises(
            UnsupportedOperationError, match=r"aten\.heaviside.* it has no derivative"
        ):
            method(model.eval()).attribute(normal(2, 5), 0)
        assert not check(model, normal(2, 5), method=method).ok


def test_operations_that_may_hide_a_rectifier_are_told():
    def run(m, x):
        h = m["first"](x).clamp(-1, 1)
        return m["last"](h + h.abs() + h.softmax(1))

    model = Function(run, first=nn.Linear(5, 6), last=nn.Linear(6, 2)).eval()
    report = check(model, normal(2, 5), method=Deconvnet)
    assert [row.operation for row in report.caveats] == [
        "aten.clamp.default",
        "aten.abs.default",
        "aten.softmax.int",
    ]
    assert all("not treated as such" in row.caveat for row in report.caveats)


def test_a_maximum_of_two_branches_is_no_rectifier_seen_from_one_of_them():
    model = Function(lambda m, x: m["last"](torch.maximum(m["a"](x), m["b"](x))),
                     a=nn.Linear(5, 6), b=nn.Linear(5, 6),
                     last=nn.Linear(6, 2)).double().eval()  # fmt: skip
    x = normal(4, 5, dtype=torch.float64)
    a, b = model.layers["a"](x), model.layers["b"](x)
    found = LayerPropagation(GuidedBackprop(model), model.layers["a"]).attribute(x, 1)
    torch.testing.assert_close(found, ((a > b) * model.layers["last"].weight[1]).detach())


@BOTH
def test_captums_contract(method, untouched):
    model, x = _plain(torch.float32), normal(4, 3, 8, 8)
    found = method(model)
    with untouched(model, x), torch.no_grad():
        whole = found.attribute(x, torch.tensor([0, 1, 2, 0]))
        one, several = found.attribute(x, target=1), found.attribute((x,), 1)
    assert isinstance(several, tuple)
    assert torch.equal(several[0], one)
    assert whole.shape == x.shape
    assert not whole.requires_grad
    assert torch.equal(whole, found.attribute(x, [0, 1, 2, 0]))
    torch.testing.assert_close(found.attribute(x[1:2], 1), whole[1:2])
    torch.testing.assert_close(found.attribute(x, 1, multiply_by_inputs=True), one * x)
    copied = (
        copy.deepcopy(found) if method is Deconvnet else pickle.loads(pickle.dumps(found))
    )  # both go by its state
    assert torch.equal(copied.attribute(x, 1), one)
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(partial(found.attribute, x), [1] * 8):
            assert torch.equal(answer, one)
    assert NoiseTunnel(found).attribute(x, nt_samples=3, target=[0, 1, 2, 0]).shape == x.shape
    assert sensitivity_max(found.attribute, x, target=1).shape == (4,)
    assert not found.has_convergence_delta()
    with pytest.raises(NotImplementedError, match=method.__name__):
        found.attribute_future()
    with pytest.raises(AssertionError, match="list"):
        found.attribute([x], 1)
    with pytest.raises(IndexError):
        found.attribute(x, 7)
    with pytest.raises(AssertionError, match="no target"), untouched(model, x):
        found.attribute(x)
    with pytest.raises(InputError, match="NaN"):
        found.attribute(x * torch.nan, 1)


@BOTH
def test_several_inputs_extra_arguments_and_outputs(method):
    def run(m, x, y, scale):
        h = F.relu(m["a"](x) * scale + m["b"](y))
        return {"logits": m["last"](h), "h": h}

    model = (
        Function(run, a=nn.Linear(3, 5), b=nn.Linear(4, 5), last=nn.Linear(5, 2)).double().eval()
    )
    x, y, scale = (normal(6, n, seed=n, dtype=torch.float64) for n in (3, 4, 1))
    found = method(model, output="logits").attribute((x, y), 0, scale)
    h = model(x, y, scale)["h"]
    s = model.layers["last"].weight[0].clamp(min=0) * ((h > 0) if method is GuidedBackprop else 1)
    s = s.expand_as(h)
    torch.testing.assert_close(found[0], (s * scale) @ model.layers["a"].weight)
    torch.testing.assert_close(found[1], s @ model.layers["b"].weight)
    with pytest.raises(InputError, match="output="):
        method(model, output=1.5)


def test_what_is_detached_has_no_derivative():
    def run(m, x, detached):
        h = torch.tanh(m["first"](x))
        with torch.set_grad_enabled(not detached):
            bypass = m["other"](h)
        return m["last"](h + bypass) + (m["last"](h).detach() if detached else 0)

    x = normal(4, 5, dtype=torch.float64)
    for detached in (True, False):
        model = Function(
            partial(run, detached=detached),
            first=nn.Linear(5, 6),
            other=nn.Linear(6, 6),
            last=nn.Linear(6, 2),
        )
        first, other, last = (layer.weight for layer in model.double().eval().layers.values())
        through = last[1] if detached else last[1] + last[1] @ other
        slope = 1 - torch.tanh(model.layers["first"](x)) ** 2
        for method in (Gradient, Deconvnet, GuidedBackprop):
            torch.testing.assert_close(
                method(model).attribute(x, 1), ((through * slope) @ first).detach()
            )
    model = Function(lambda m, x: m["last"](x.detach()), last=nn.Linear(5, 2)).double().eval()
    with pytest.raises(CaptureError, match=r"behind detach\(\), where every gradient is 0"):
        Gradient(model).attribute(x, 1)


def test_what_is_assigned_to_a_part_is_passed_on():
    def run(m, x):
        h = torch.tanh(m["first"](x)).clone()
        h[:, 0] = h[:, 1] * 2
        h[:, 2:4] = h[:, 4:5]
        h[:, 5] = 1.0
        return m["last"](h)

    model, x = (
        Function(run, first=nn.Linear(5, 6), last=nn.Linear(6, 2)).double().eval(),
        normal(4, 5, dtype=torch.float64),
    )
    probe = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(probe)[:, 1].sum(), probe)
    for method in (Gradient, Deconvnet, GuidedBackprop):  # there is no rectifier
        torch.testing.assert_close(method(model).attribute(x, 1), expected)


def test_nothing_is_lost_in_complex_numbers():
    model = Function(
        lambda m, x: m["last"](x * torch.sigmoid(torch.fft.rfft(x).angle()[:, :1])),
        last=nn.Linear(5, 2),
    ).eval()
    with pytest.raises(
        UnsupportedOperationError, match=r"fft_rfft.*: it turns the input into torch\.complex64"
    ):
        Gradient(model).attribute(normal(4, 5), 1)


def test_at_a_layer():
    model, x = _plain(), normal(4, 3, 8, 8, dtype=torch.float64)
    found = LayerPropagation(GuidedBackprop(model), model[3])
    whole = GuidedBackprop(model[4:].eval()).attribute(model[:4](x).detach(), 1)
    torch.testing.assert_close(found.attribute(x, 1), whole)
    torch.testing.assert_close(
        found.attribute(x, 1, multiply_by_features=True), whole * model[:4](x).detach()
    )
    assert LayerPropagation.interpolate(whole.sum(1, keepdim=True), (8, 8)).shape == (4, 1, 8, 8)
    tokens = torch.randint(0, 9, (4, 5))
    text = nn.Sequential(
        nn.Embedding(9, 6), nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2)
    ).eval()
    assert LayerPropagation(Deconvnet(text), text[0]).attribute(tokens, 0).shape == (4, 5, 6)
    with pytest.raises(AssertionError, match="integers carry no signal"):
        Deconvnet(text).attribute(tokens, 0)
    with pytest.raises(InputError, match="expected a method of this package"):
        LayerPropagation(Saliency(model), model[3])
    before = GuidedBackprop(model[3:].eval()).attribute(model[:3](x).detach(), 1)
    torch.testing.assert_close(found.attribute(x, 1, None, True), before)


def test_a_model_that_changes_is_captured_again():
    model, x = copy.deepcopy(_plain()), normal(2, 3, 8, 8, dtype=torch.float64)
    found = GuidedBackprop(model)
    before = found.attribute(x, 1)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.equal(found.attribute(x, 1), before)
    model[2] = nn.Tanh().eval()
    torch.testing.assert_close(found.attribute(x, 1), GuidedBackprop(model).attribute(x, 1))
    torch.testing.assert_close(
        found.attribute(x[..., :7], 1), GuidedBackprop(model).attribute(x[..., :7], 1)
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("method", [Gradient, Deconvnet, GuidedBackprop])
def test_batch_norm_before_tokens_of_one_example_by_hand(method, affine):
    """Autograd of torch 2.9 to 2.14 is wrong here: one example, channels last behind the norm."""
    norm = nn.BatchNorm2d(4, affine=affine)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    model = Function(
        lambda m, x: m["last"](m["norm"](x).flatten(2).transpose(1, 2).flatten(1)),
        norm=norm, last=nn.Linear(36, 2),
    ).double().eval()  # fmt: skip
    gamma = norm.weight if affine else 1
    slope = (gamma / (norm.running_var + norm.eps).sqrt()).detach()
    expected = (model.layers["last"].weight[1].view(9, 4) * slope).T.reshape(1, 4, 3, 3).detach()
    x = normal(2, 4, 3, 3, dtype=torch.float64)
    for batch in (x, x[1:]):
        found = method(model).attribute(batch, target=1)
        torch.testing.assert_close(found, expected.expand_as(batch))
