"""Dense layers written as products; uses of operations that no rule treats."""

import pytest
import torch
from rule_checks import alike
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, MIPINError
from captum_mipin.methods import LRP, PatternNet, Patterns


def test_products_with_constant_matrices_are_dense_layers():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    alike(
        x,
        lambda m, x: m["last"](F.linear(x, m["first"].weight).relu()),
        lambda m, x: m["last"](torch.mm(x, m["first"].weight.t()).relu()),
        first=nn.Linear(4, 5),
        last=nn.Linear(5, 2),
    )
    alike(
        x,
        lambda m, x: m["last"](m["first"](x).relu()),
        lambda m, x: m["last"](torch.addmm(m["first"].bias, x, m["first"].weight.t()).relu()),
        lambda m, x: m["last"](
            torch.addmm(m["first"].bias, x, m["first"].weight.t() / 2, alpha=2).relu()
        ),
        first=nn.Linear(4, 5),
        last=nn.Linear(5, 2),
    )


NOT_TREATED = {
    "power": (lambda h: h**-2, r"aten\.pow\.Tensor_Scalar .*infinite at 0"),
    "exp": (torch.exp, r"aten\.exp\.default .*no rule covers it"),
    "logarithm": (torch.log, r"aten\.log\.default .*no rule covers it"),
    "reciprocal": (lambda h: 1 / h, r"aten\.reciprocal\.default .*no rule covers it"),
    "softmax": (lambda h: h.softmax(1), r"aten\.softmax\.int .*no rule covers it"),
    "matrix of the input": (
        lambda h: torch.mm(h[:, :5], h.t() @ h),
        "computes along the batch|depends on the input as well",
    ),
    "glu of the batch": (lambda h: torch.cat([F.glu(torch.cat([h, h], 0), 0)], 1), "batch"),
    "a choice of constants": (
        lambda h: h + torch.where(h > 0, torch.ones(5), torch.zeros(5)),
        "chooses between constants",
    ),
    "a comparison alone": (lambda h: (h > 0).float(), r"turns the input into torch\.bool"),
}


@pytest.mark.parametrize("name", NOT_TREATED)
def test_what_is_not_treated_is_refused_by_name(name):
    step, message = NOT_TREATED[name]
    model = Function(
        lambda m, x: m["last"](step(m["first"](x))), first=nn.Linear(4, 5), last=nn.Linear(5, 2)
    ).eval()
    with pytest.raises(MIPINError, match=message):
        InverseNetwork(model).fit(torch.randn(20, 4), 1, progress=False)


def _heads(x):
    """Return x (batch, 4, 6) as three heads of two channels, (batch, 3, 4, 2)."""
    return x.unflatten(2, (3, 2)).transpose(1, 2)


SIDES = {
    "on the left": (
        lambda m, x: m["mix"].weight @ x,
        lambda m, x: torch.matmul(m["mix"].weight.expand(x.shape[0], 5, 4), x),
        lambda m, x: torch.einsum("nm,bmf->bnf", m["mix"].weight, x),
        lambda m, x: m["mix"](x.mT).mT,
    ),
    "on the right": (
        lambda m, x: x @ m["own"].weight.t(),
        lambda m, x: torch.einsum("bmf,gf->bmg", x, m["own"].weight),
        lambda m, x: torch.bmm(x, m["own"].weight.t().expand(x.shape[0], 6, 7)),
        lambda m, x: m["own"](x),
    ),
    "one per head": (
        lambda m, x: _heads(x) @ m["heads"].weight.view(3, 5, 2).mT,
        lambda m, x: (m["heads"].weight.view(3, 5, 2) @ _heads(x).mT).mT,
        lambda m, x: torch.einsum("bhmk,hnk->bhmn", _heads(x), m["heads"].weight.view(3, 5, 2)),
        lambda m, x: m["heads"](x.reshape(-1, 6, 1)).reshape(-1, 4, 3, 5).transpose(1, 2),
    ),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", [None, LRP, PatternNet])
def test_a_product_with_a_constant_matrix_is_a_layer_in_every_spelling(side, method):
    torch.manual_seed(0)
    x = torch.randn(60, 4, 6, dtype=torch.float64)
    layers = {
        "mix": nn.Linear(4, 5, bias=False),
        "own": nn.Linear(6, 7, bias=False),
        "heads": nn.Conv1d(6, 15, 1, groups=3, bias=False),
    }
    size = SIDES[side][-1](layers, x[:1].float()).flatten(1).shape[1]
    layers["last"] = nn.Linear(size, 2)
    signals = []
    for run in SIDES[side]:
        model = Function(lambda m, x, run=run: m["last"](run(m, x).relu().flatten(1)), **layers)
        model = model.double().eval()
        if method is None:
            one = InverseNetwork(model).fit(x, 1, progress=False).source_signal(x[:5], 1)
        elif method is LRP:
            one = LRP(model).attribute(x[:5], 1)
        else:
            one = PatternNet(model, Patterns(model).fit(x)).attribute(x[:5], 1)
        signals.append(one)
    for other in signals[1:]:
        torch.testing.assert_close(other, signals[0], rtol=1e-9, atol=1e-12)
