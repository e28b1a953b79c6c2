"""What is a rectifier and what is none, against autograd with the rectifiers' definition by hand.

The reference is the same network, whose ReLU has the backward pass of the method; all else in it
has the derivative of autograd.
"""

from functools import partial

import pytest
import torch
from captum.attr import GuidedBackprop as CaptumsGuidedBackprop
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import check
from captum_mipin.methods import Deconvnet, GuidedBackprop

BOTH = pytest.mark.parametrize("method", [Deconvnet, GuidedBackprop])


class _Rectifier(torch.autograd.Function):
    """ReLU with the backward pass of a method, s⁺ or s⁺ · [x > 0]."""

    @staticmethod
    def forward(context, x, masked):
        context.mask = (x > 0) if masked else torch.ones_like(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(context, s):
        return s.clamp(min=0) * context.mask, None


def _network(tail, relu=torch.relu):
    torch.manual_seed(0)
    layers = {"first": nn.Linear(6, 10), "middle": nn.Linear(10, 12), "last": nn.Linear(12, 3)}
    layers = {name: layer.double() for name, layer in layers.items()}

    def run(m, x):
        h = tail(m["middle"](relu(m["first"](x))))
        return h @ m["last"].weight.T[: h.shape[1]]

    return Function(run, **layers).eval()


def _difference(method, tail, rectified=None):
    """Return the relative difference to the reference, with ``rectified`` in the place of tail."""
    masked = method is GuidedBackprop
    x = 2 * normal(5, 6, dtype=torch.float64)
    reference = _network(rectified or tail, lambda h: _Rectifier.apply(h, masked))
    probe = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(probe)[:, 1].sum(), probe)
    result = method(_network(tail)).attribute(x, 1)
    return float((result - expected).norm() / expected.norm())


def _norm(h):
    return h.norm(dim=1, keepdim=True)


def _variance(h):
    return h.var(1, keepdim=True)


def _mean(h):
    return h.mean(1, keepdim=True)


def _split(h):
    return h.unflatten(1, (4, 3))


def _compared(h, scale):
    return h.masked_fill(scale > 1, 0.5) * scale


GUARDS = {
    "normalize": F.normalize,
    "norm.clamp(min=eps)": lambda h: h / _norm(h).clamp(min=1e-6),
    "norm.clamp(min=0)": lambda h: h / _norm(h).clamp(min=0),
    "maximum(norm, eps)": lambda h: h / torch.maximum(_norm(h), torch.full((), 1e-6).to(h)),
    "maximum(norm, 0)": lambda h: h / torch.maximum(_norm(h), torch.zeros_like(_norm(h))),
    "where(norm > eps)": lambda h: h / torch.where(_norm(h) > 1e-6, _norm(h), 1e-6),
    "where(norm > 0)": lambda h: h / torch.where(_norm(h) > 0, _norm(h), 0.0),
    "std.clamp_min": lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True).clamp_min(0),
    "var.clamp().sqrt()": lambda h: h / (_variance(h).clamp(min=0).sqrt() + 0.1),
    "rsqrt": lambda h: h * (_variance(h).clamp(min=0) + 0.1).rsqrt(),
    "pow(-0.5)": lambda h: h * (_variance(h).clamp(min=0) + 0.1).pow(-0.5),
    "masked_fill": lambda h: h / _norm(h).masked_fill(_norm(h) <= 0, 0.0),
    "threshold": lambda h: h / F.threshold(_norm(h), 0.0, 0.0),
    "a sum": lambda h: h / h.clamp(min=0).sum(1, keepdim=True),
}
DISTANT = {
    "cat": lambda h: h / torch.cat([_norm(h).clamp(min=0)] * 12, 1),
    "product with ones": lambda h: h / (_norm(h).clamp(min=0) @ torch.ones(1, 12).to(h)),
    "exp": lambda h: h / _norm(h).clamp(min=0).exp(),
    "log1p": lambda h: h / (1 + _norm(h).clamp(min=0).log1p()),
    "amax": lambda h: h / h.clamp(min=0).amax(1, keepdim=True),
    "cumsum": lambda h: h / (1 + h.clamp(min=0).cumsum(1)),
    "norm of bounds": lambda h: h / h.relu().norm(dim=1, keepdim=True),
    "relu": lambda h: h / _norm(h).relu(),
    "softplus": lambda h: h / F.softplus(_mean(h)),
    "gelu": lambda h: h / (F.gelu(_mean(h), approximate="tanh") + 2),
    "a clipped factor": lambda h: h * _mean(h).clamp(0, 1),
    "a bounded factor": lambda h: h * (1 - _mean(h)).clamp(min=0),
    "a rectified factor": lambda h: h * (1 - _mean(h)).relu(),
    "a maximum": lambda h: h * torch.maximum(1 - _mean(h), torch.zeros(()).to(h)),
    "an expanded factor": lambda h: h * _mean(h).clamp(0, 1).expand_as(h),
    "a factor of copies": lambda h: h * torch.cat([_mean(h).clamp(0, 1)] * 12, 1),
    "bmm": lambda h: (h.mean(1)[:, None, None].clamp(0, 1) @ h[:, None])[:, 0],
    "bmm from behind": lambda h: (h[:, :, None] @ h.mean(1)[:, None, None].clamp(0, 1))[:, :, 0],
    "einsum": lambda h: torch.einsum("n,nc->nc", h.mean(1).clamp(0, 1), h),
    "weights of a sum": lambda h: (_split(h) * (1 + _split(h).mean(2, keepdim=True)).relu()).sum(1),
    "weights of a product": lambda h: ((1 + _split(h).mean(2)).relu()[:, None] @ _split(h))[:, 0],
    "a factor of both": lambda h: h * _mean(h).clamp(min=0) / _norm(h),
    "a factor and a comparison": lambda h: _compared(h, (1 - _mean(h)).relu()),
}
ELSEWHERE = {
    "clamp(min=1e-6)": lambda h: h.clamp(min=1e-6).pow(3),
    "clamp(min=-0.3)": lambda h: h.clamp(min=-0.3),
    "clamp(0.1, 0.4)": lambda h: h.clamp(0.1, 0.4),
    "clamp(max=0.3)": lambda h: h.clamp(max=0.3),
    "clamp_min": lambda h: h.clamp_min(0.2),
    "clamp of a tensor": lambda h: h.clamp(min=torch.full((), 0.1, dtype=h.dtype)),
    "maximum": lambda h: torch.maximum(h, torch.tensor(-0.1, dtype=h.dtype)),
    "minimum": lambda h: torch.minimum(h, torch.full((), 0.3, dtype=h.dtype)),
    "threshold": lambda h: F.threshold(h, 0.1, 0.0),
    "where": lambda h: torch.where(h > 0.1, h, 0.0),
    "where below": lambda h: torch.where(h < 0, h, 0.0),
    "masked_fill": lambda h: h.masked_fill(h < -0.1, 0.0),
    "product": lambda h: h * (h > 0.1),
    "product below": lambda h: h * (1 - (h > 0).to(h.dtype)),
    "another value": lambda h: h * (h.flip(1) > 0),
}
DIMENSIONS = {
    "max(dim)": lambda h: h.unflatten(1, (4, 3)).max(2)[0],
    "max(dim, keepdim)": lambda h: h.unflatten(1, (4, 3)).max(2, keepdim=True)[0].flatten(1),
    "min(dim)": lambda h: torch.min(h.unflatten(1, (4, 3)), 1).values,
    "max(dim) by name": lambda h: torch.max(h.unflatten(1, (4, 3)), dim=-1).values,
}


@BOTH
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(function, id=f"{kind}: {name}")
        for kind, functions in {
            "guard of a division": GUARDS,
            "scale, whatever stands between": DISTANT,
            "bound elsewhere than at zero": ELSEWHERE,
        }.items()
        for name, function in functions.items()
    ],
)
def test_what_is_no_rectifier_has_its_derivative(method, function):
    assert _difference(method, function) < 1e-12


@BOTH
@pytest.mark.parametrize("bound", [torch.relu, lambda h: h.clamp(min=0)])
def test_a_bound_before_a_layer_of_a_gate_or_of_a_product_of_equals_is_a_rectifier(method, bound):
    """As in squeeze and excitation, and in a gated linear unit."""
    weight = normal(12, 12, seed=1, dtype=torch.float64)
    for tail in (
        lambda relu, h: h * (relu(_split(h)).flatten(1) @ weight).sigmoid(),
        lambda relu, h: h * F.linear(relu(h), weight).mean(1, keepdim=True),
        lambda relu, h: relu(h) * h.flip(1),
        lambda relu, h: (relu(_split(h)) @ _split(h.flip(1)).mT).flatten(1)[:, :12],
        # beside a gate, the value of fewer elements is what carries the signal
        lambda relu, h: (relu(h)[:, None] * (h[:, :, None] + h[:, None]).sigmoid()).sum(1),
        lambda relu, h: (relu(h)[:, None] * (h[:, :, None] + h[:, None] > 0).to(h)).sum(1),
    ):

        def by_hand(h, tail=tail):
            return tail(lambda z: _Rectifier.apply(z, method is GuidedBackprop), h)

        assert _difference(method, partial(tail, bound), by_hand) < 1e-12


@BOTH
@pytest.mark.parametrize("name", DIMENSIONS)
def test_extremes_over_a_dimension_have_their_derivative(method, name):
    assert _difference(method, DIMENSIONS[name]) < 1e-12
    rows = check(_network(DIMENSIONS[name]), normal(2, 6, dtype=torch.float64), method=method).rows
    (row,) = [row for row in rows if row.operation.endswith(".dim")]
    assert (row.status, row.note) == ("passes", "derivative")


@BOTH
def test_a_bound_of_zero_that_also_carries_the_signal_is_a_rectifier(method):
    def share(r):
        return r / (r.sum(1, keepdim=True) + 1)

    def by_hand(h):
        return share(_Rectifier.apply(h, method is GuidedBackprop))

    assert _difference(method, lambda h: share(h.clamp(min=0)), by_hand) < 1e-12


@BOTH
def test_a_tensor_of_bounds_is_a_rectifier_where_it_is_zero(method):
    masked = method is GuidedBackprop
    bound = torch.tensor([0.0, -0.3, 0.2] * 4, dtype=torch.float64)

    def by_hand(h):
        return torch.where(bound == 0, _Rectifier.apply(h, masked), torch.maximum(h, bound))

    assert _difference(method, lambda h: torch.maximum(h, bound), by_hand) < 1e-12
    assert _difference(method, lambda h: h.clamp(min=bound), by_hand) < 1e-12


def test_check_names_no_rectifier_where_there_is_none():
    x = normal(2, 6, dtype=torch.float64)
    for tail in (*GUARDS.values(), *DISTANT.values(), *ELSEWHERE.values()):
        report = check(_network(tail), x, method=GuidedBackprop)
        notes = [row.note for row in report.rows if row.operation != "aten.relu.default"]
        rectifiers = [note for note in notes if "positive part" in note]
        assert all(note.startswith("where the bound is 0") for note in rectifiers), report
        assert any("elsewhere the derivative" in n or n.startswith("derivative") for n in notes)


def test_normalised_embeddings_equal_captums():
    x = normal(4, 6)
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    model = Function(lambda m, x: F.normalize(m["body"](x)), body=body).eval()
    with pytest.warns(UserWarning):
        expected = CaptumsGuidedBackprop(model).attribute(x.clone(), target=1)
    torch.testing.assert_close(GuidedBackprop(model).attribute(x, 1), expected)


@BOTH
def test_a_number_of_comparisons_is_refused_as_integers_where_it_is_as_floats(method):
    def refused(kind):
        def tail(h):
            k = (h > 0).sum(1, keepdim=True).to(kind)
            bound = torch.full((), 0.5, dtype=h.dtype)
            return h * k + (h + k) + h * k.sigmoid() + torch.maximum(k, bound) + h / k

        rows = check(_network(tail), normal(2, 6, dtype=torch.float64), method=method).rows
        return [row.operation.split(".")[1] for row in rows if row.status == "refused"]

    assert refused(torch.int64) == ["mul", "add", "sigmoid", "maximum"]
    assert refused(torch.float64) == ["_to_copy"]
