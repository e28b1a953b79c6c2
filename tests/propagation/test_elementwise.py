"""Activations written by hand are treated like those of torch, and any function like one."""

import math

import every_method
import pytest
import torch
from oracle import regress
from rule_checks import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.methods import LRP, GuidedBackprop, PatternNet, Patterns
from captum_mipin.methods.gradients import Gradient

ROOT = math.sqrt(2 / math.pi)


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


#: Name → (a function written by hand, the same function of torch).
SPELLED = {
    "GELU of GPT-2": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        tanh_gelu,
    ),
    "GELU by products": (
        lambda x: x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))) * 0.5,
        tanh_gelu,
    ),
    "GELU by erf": (lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2, F.gelu),
    "Mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    "Mish by exp": (lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), F.mish),
    "SiLU by exp": (lambda x: x / (1 + torch.exp(-x)), F.silu),
    "sigmoid by exp": (lambda x: 1 / (1 + torch.exp(-x)), torch.sigmoid),
    "softplus by exp": (lambda x: torch.log(1 + torch.exp(x)), F.softplus),
    "softplus by log2": (lambda x: torch.log2(1 + torch.exp(x)) * math.log(2), F.softplus),
    "Hardswish": (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    "Hardswish by a minimum": (
        lambda x: x * torch.minimum(F.relu(x + 3), torch.tensor(6.0)) / 6,
        F.hardswish,
    ),
    "SiLU by the negative": (lambda x: x + F.silu(-x), F.silu),
    "Hardswish by the negative": (lambda x: F.hardswish(-x) + x, F.hardswish),
    "ReLU by the negative": (lambda x: x + (-x).relu(), F.relu),
    "sigmoid by a power": (lambda x: (1 + torch.exp(-x)) ** -1, torch.sigmoid),
    "sigmoid by its logarithm": (lambda x: F.logsigmoid(x).exp(), torch.sigmoid),
    "sigmoid by tanh": (lambda x: (torch.tanh(x / 2) + 1) / 2, torch.sigmoid),
    "sigmoid by the negative": (lambda x: -(torch.sigmoid(-x) - 1), torch.sigmoid),
    "hard sigmoid": (lambda x: F.relu6(x + 3) / 6, F.hardsigmoid),
    "hard sigmoid by bounds": (lambda x: (x + 3).clamp(0, 6) / 6, F.hardsigmoid),
    "hard sigmoid by bounds of 1": (lambda x: (x / 6 + 0.5).clamp(0, 1), F.hardsigmoid),
    "hard sigmoid by a minimum": (
        lambda x: torch.minimum(F.relu(x + 3), torch.tensor(6.0)) / 6,
        F.hardsigmoid,
    ),
    "tanh by a sigmoid": (lambda x: 2 * torch.sigmoid(2 * x) - 1, torch.tanh),
    "square": (lambda x: x * x, torch.square),
    "squared ReLU": (lambda x: x.relu() * x.relu(), lambda x: x.relu().square()),
}


def network(which):
    """A network that sums up all functions, each with layers of its own, and no biases in them."""
    torch.manual_seed(0)
    first, last = (
        {f"{where} {name}": nn.Linear(*size, bias=False) for name in SPELLED}
        for where, size in (("first", (4, 6)), ("last", (6, 2)))
    )

    def run(m, *xs):
        pairs = zip(SPELLED.items(), xs, strict=True)
        return sum(m[f"last {name}"](fs[which](m[f"first {name}"](x))) for (name, fs), x in pairs)

    return Function(run, **first, **last).double().eval()


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return tuple(torch.randn(40, 4, dtype=torch.float64) for _ in SPELLED)


@pytest.mark.parametrize("method", ["MIP-IN", "LRP", "Guided Backprop", "PatternNet"])
def test_an_activation_written_by_hand_is_that_of_torch(method, inputs):
    few, maps = tuple(x[:5] for x in inputs), []
    for which in (0, 1):
        model = network(which)
        if method == "MIP-IN":
            inverse = InverseNetwork(model).fit(inputs, 1, progress=False)
            maps.append(inverse.source_signal(few, 1))
        elif method == "PatternNet":
            patterns = Patterns(model).fit(inputs, progress=False)
            maps.append(PatternNet(model, patterns).attribute(few, 1))
        else:
            kind = LRP if method == "LRP" else GuidedBackprop
            maps.append(kind(model).attribute(few, 1))
    for name, one, other in zip(SPELLED, *maps, strict=True):
        # constants with 10 digits in the formulas
        torch.testing.assert_close(
            one, other, rtol=1e-7, atol=1e-7 * float(other.abs().max()), msg=name
        )


@pytest.mark.parametrize(
    "f",
    [
        lambda h: (h / (1 + torch.exp(-h))).clamp(max=1000),
        lambda h: torch.minimum(F.relu(h) + F.relu(-h) + h, torch.tensor(2000.0)) / 2,
        lambda h: F.relu(h - 1e-7) + 1e-7,
        lambda h: 2 * F.relu(h),
    ],
    ids=["bound", "minimum", "lower bound", "multiple"],
)
def test_what_is_an_activation_only_near_zero_is_none(f):
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "last": nn.Linear(6, 2)}
    model = Function(lambda m, x: m["last"](f(m["first"](x))), **layers).double().eval()
    x = 1e4 * normal(40, 4, dtype=torch.float64)
    result = InverseNetwork(model).fit(x, 1, progress=False).explain((x,), 1, biases=(True,))
    torch.testing.assert_close(result.output, model(x)[:, 1].detach(), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    "f",
    [
        lambda h: -((-h).masked_fill(h < 0.1, 0.0)),
        lambda h: torch.where(h > 0.1, h, 0.0).clamp(max=5e6),
        lambda h: (h / 0.05).clamp(0, 1) * h,
        lambda h: torch.where((h - 1.23).abs() < 0.02, 0.0, 1.0) * F.relu(h),
    ],
    ids=["threshold", "threshold with a bound", "ramp", "gap"],
)
def test_what_differs_from_an_activation_near_zero_or_between_is_none(f):
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "last": nn.Linear(6, 2)}
    model = Function(lambda m, x: m["last"](f(m["first"](x))), **layers).double().eval()
    x = normal(400, 4, dtype=torch.float64).requires_grad_()
    model(x)[:, 1].sum().backward()
    torch.testing.assert_close(Gradient(model).attribute(x.detach(), 1), x.grad)


def test_any_function_of_a_single_tensor_is_one_activation_by_hand():
    """For w · f(U x) with f(h) = h / (a + |h|) + b: regress h's signal on f's share (f − b) / h."""
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    model = Function(
        lambda m, x: m["last"]((lambda h: h / (scale + h.abs()))(m["first"](x))),
        first=nn.Linear(4, 3),
        last=nn.Linear(3, 1),
    ).double()
    x = torch.randn(60, 4, dtype=torch.float64)
    s = InverseNetwork(model.eval(), ridge=0).fit(x, progress=False).source_signal(x)
    with torch.no_grad():
        h, y = model.layers["first"](x), model(x).numpy()
        f = h / (scale + h.abs())
    weight, bias = regress(f.numpy(), y, 0)
    signal = torch.as_tensor(y @ weight.T + bias) * (f / h)
    weight, bias = regress(x.numpy(), signal.numpy(), 0)
    torch.testing.assert_close(s, torch.as_tensor(signal.numpy() @ weight.T + bias))


def test_functions_are_joined_only_where_they_have_a_single_argument():
    model = Function(
        lambda m, x: m["last"](m["a"](x) * torch.tanh(m["b"](x))),
        a=nn.Linear(4, 3), b=nn.Linear(4, 3), last=nn.Linear(3, 1),
    ).eval()  # fmt: skip
    rows = check(model, torch.ones(2, 4)).rows
    assert [row.operation for row in rows].count("aten.mul.Tensor") == 1
    assert {row.operation for row in rows} >= {"aten.tanh.default", "aten.mul.Tensor"}


def test_a_function_that_is_infinite_at_zero_is_refused():
    model = Function(
        lambda m, x: m["last"](m["first"](x).pow(-2)), first=nn.Linear(4, 3), last=nn.Linear(3, 1)
    ).eval()
    with pytest.raises(UnsupportedOperationError, match="infinite at 0"):
        InverseNetwork(model).fit(torch.randn(20, 4), progress=False)


def test_bounds_of_numbers_and_of_tensors_are_the_same():
    torch.manual_seed(0)
    low, high = torch.tensor(-0.3, dtype=torch.float64), torch.full((6,), 0.4, dtype=torch.float64)
    spellings = (
        lambda h: h.clamp(-0.3, 0.4),
        lambda h: h.clamp(low.to(h), high.to(h)),
        lambda h: h.clamp_min(low.to(h)).clamp_max(high.to(h)),
        lambda h: torch.minimum(torch.maximum(low.to(h), h), high.to(h)),
        lambda h: torch.min(h, high.to(h)).clamp_min(-0.3),
    )
    alike(
        torch.randn(60, 4, dtype=torch.float64),
        *(lambda m, x, f=f: m["last"](f(m["first"](x))) for f in spellings),
        first=nn.Linear(4, 6),
        last=nn.Linear(6, 2),
    )


@pytest.mark.parametrize(
    "f",
    [
        lambda h: h.clamp(min=0.5),
        lambda h: h.clamp_max(-1),
        lambda h: F.threshold(h, 1, 5),
        lambda h: torch.maximum(h, torch.full((6,), 0.5, dtype=torch.float64)),
    ],
)
def test_a_bound_that_moves_zero_passes_its_share(f):
    """S_x = S_y (f(x) − f(0)) / x, as of every function; by hand in float64."""
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 2).double()
    model = Function(lambda m, x: m["last"](f(m["first"](x))), first=first, last=last).double()
    inverse = InverseNetwork(model.eval(), ridge=0).fit(x, 1, progress=False)
    with torch.no_grad():
        h = first(x)
        y, share = f(h), (f(h) - f(torch.zeros_like(h))) / h
        s = last(y)[:, 1:]
        for features, factor in ((y, share), (x, 1)):
            weight, bias = regress(features.numpy(), s.numpy(), 0)
            s = (s @ torch.from_numpy(weight).T + torch.from_numpy(bias)) * factor
    torch.testing.assert_close(inverse.source_signal(x, 1), s, rtol=1e-6, atol=1e-8)


def test_decibels_are_logarithms():
    def power(m, x):
        return m["p"](x).square().clamp(min=1e-6)

    torch.manual_seed(0)
    parts = {"p": nn.Linear(4, 6), "last": nn.Linear(6, 2)}
    runs = [
        lambda m, x: m["last"](10 * torch.log10(power(m, x))),
        lambda m, x: m["last"](10 / math.log(10) * torch.log(power(m, x))),
        lambda m, x: m["last"](10 / math.log2(10) * torch.log2(power(m, x))),
    ]
    x = normal(60, 4, dtype=torch.float64)
    first, *others = (every_method.maps(run, x, **parts) for run in runs)
    for other in others:  # all but PatternNet, whose scale is that of the constants
        for a, b in zip(other[:-1], first[:-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_logarithm_without_a_bound_is_refused_with_advice():
    model = Function(
        lambda m, x: m["last"](m["first"](x).abs().log()),
        first=nn.Linear(4, 5),
        last=nn.Linear(5, 2),
    ).eval()
    with pytest.raises(UnsupportedOperationError, match=r"log\(x\.clamp\(min=1e-6\)\)"):
        LRP(model).attribute(torch.randn(3, 4), target=0)


def test_what_a_gate_takes_away_is_what_the_rest_of_the_gate_keeps():
    torch.manual_seed(0)
    parts = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "last": nn.Linear(8, 3)}
    x = normal(60, 6, dtype=torch.float64)
    smooth = (
        lambda a, b: a * b.sigmoid(),
        lambda a, b: a - a * torch.sigmoid(-b),
        lambda a, b: a - torch.sigmoid(-b) * a,
    )
    masked = (
        lambda a, b: a * (a > 0.3),
        lambda a, b: a - a * ~(a > 0.3),
        lambda a, b: a - a.masked_fill(a > 0.3, 0.0),
        lambda a, b: a - torch.where(a > 0.3, 0.0, a),
    )
    for kind in (smooth, masked):
        runs = [lambda m, x, f=f: m["last"](f(m["a"](x), m["b"](x))) for f in kind]
        every_method.alike(runs, x, more=kind is smooth, **parts)
