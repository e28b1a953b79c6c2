"""Assignments, casts and detached values are treated like what they compute."""

import pytest
import torch
from rule_checks import alike
from torch import nn


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
