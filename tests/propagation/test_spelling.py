"""Assignments, casts and detached values are treated like what they compute."""

import pytest
import torch
from rule_checks import alike
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork
from captum_mipin.methods import GuidedBackprop


def test_an_assignment_is_the_tensor_it_puts_together():
    def assigned(m, x):
        h = m["first"](x).clone()
        h[:, 0] = x[:, 0]
        h[:, 1:3] = m["one"](x)
        h[:, 3] = 0.0
        h[:, 4] = torch.tensor(1.0)
        return m["last"](h)

    def put_together(m, x):
        h = m["first"](x)
        zero, one = torch.zeros_like(h[:, 3:4]), torch.ones_like(h[:, 4:5])
        parts = [x[:, :1], m["one"](x).expand(-1, 2), zero, one, h[:, 5:]]
        return m["last"](torch.cat(parts, 1))

    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "one": nn.Linear(4, 1), "last": nn.Linear(6, 2)}
    x = torch.randn(60, 4, dtype=torch.float64)
    alike(x, put_together, assigned, **layers)


def test_values_that_are_cast_or_detached_are_the_same():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    alike(
        x,
        lambda m, x: m["last"](m["first"](x).relu() + x[:, :1]),
        lambda m, x: m["last"](m["first"](x).type_as(x).relu() + x[:, :1]),
        lambda m, x: m["last"](m["first"](x).detach().relu() + x[:, :1]),
        first=nn.Linear(4, 6),
        last=nn.Linear(6, 2),
    )


@pytest.mark.parametrize("dim", [1, -1])
def test_both_extremes_in_one_operation_are_two_operations(dim):
    torch.manual_seed(0)
    spellings = (
        lambda h: (h.amin(dim), h.amax(dim)),
        lambda h: h.aminmax(dim=dim),
        lambda h: [y.squeeze(dim) for y in torch.aminmax(h, dim=dim, keepdim=True)],
    )
    alike(
        torch.randn(60, 5, 4, dtype=torch.float64),
        *(lambda m, x, f=f: m["last"](torch.cat(list(f(m["one"](x))), 1)) for f in spellings),
        one=nn.Linear(4, 6),
        last=nn.Linear(12 if dim == 1 else 10, 2),
    )


def test_a_product_added_in_one_operation_is_both_operations():
    torch.manual_seed(0)
    x, scale = torch.randn(60, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    alike(
        x,
        lambda m, x: m["last"](m["one"](x) + m["two"](x) * scale * 0.5),
        lambda m, x: m["last"](torch.addcmul(m["one"](x), m["two"](x), scale, value=0.5)),
        one=nn.Linear(4, 6),
        two=nn.Linear(4, 6),
        last=nn.Linear(6, 2),
    )


@pytest.mark.parametrize("positions", [None, 4])
def test_zeros_around_a_convolution_are_its_padding(positions):
    torch.manual_seed(0)
    x = torch.randn(60, 3, 8, 8, dtype=torch.float64)
    layers = {"first": nn.Conv2d(3, 4, 3, padding=1), "last": nn.Linear(6 * 16, 2)}
    kernel = {"weight": torch.randn(6, 4, 3, 3).double(), "bias": torch.randn(6).double()}
    spellings = (
        lambda h: F.conv2d(h, **kernel, stride=2, padding=1),
        lambda h: F.conv2d(F.pad(h, (1, 1, 1, 1)), **kernel, stride=2),
        lambda h: F.conv2d(nn.ZeroPad2d((1, 1, 0, 0))(h), **kernel, stride=2, padding=(1, 0)),
        lambda h: F.conv2d(F.pad(F.pad(h, (1, 1)), (0, 0, 1, 1), value=0.0), **kernel, stride=2),
    )
    signals = []
    for f in spellings:
        model = Function(
            lambda m, x, f=f: m["last"](f(m["first"](x).relu()).relu().flatten(1)), **layers
        )
        inverse = InverseNetwork(model.double().eval(), positions=positions)
        signals.append(inverse.fit(x, 1, progress=False).source_signal(x[:6], 1))
    for other in signals[1:]:
        torch.testing.assert_close(other, signals[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "pad",
    [
        lambda h: F.pad(h, (0, 1, 0, 1)),
        lambda h: F.pad(h, (1, 1, 1, 1), value=0.5),
        lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
        lambda h: F.pad(h, (-1, -1, -1, -1)),
    ],
)
def test_other_paddings_stay_what_they_are(pad):
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 4, 3, padding=1), "last": nn.Conv2d(4, 2, 3)}
    model = Function(lambda m, x: m["last"](pad(m["first"](x))).mean((2, 3)), **layers)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    model.double().eval()(x)[:, 1].sum().backward()
    torch.testing.assert_close(GuidedBackprop(model).attribute(x.detach(), target=1), x.grad)


def test_rsub_is_the_difference_in_the_other_order():
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "second": nn.Linear(4, 6), "last": nn.Linear(6, 2)}
    x = torch.randn(40, 4, dtype=torch.float64)
    for spelled, plain in (
        (lambda a, b: torch.rsub(a, b), lambda a, b: b - a),
        (lambda a, b: torch.rsub(a, b, alpha=2), lambda a, b: b - 2 * a),
        (lambda a, b: torch.rsub(a, a.new_ones(6)), lambda a, b: 1 - a),
    ):
        one, other = (
            lambda m, x, run=run: m["last"](run(m["first"](x), m["second"](x)).relu())
            for run in (spelled, plain)
        )
        alike(x, one, other, **layers)
