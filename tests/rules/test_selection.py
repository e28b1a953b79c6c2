"""Switches: each signal goes to where its value came from."""

import pytest
import torch
from oracle import regress
from rule_checks import alike
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork
from captum_mipin.errors import UnsupportedOperationError


def test_where_sends_each_signal_to_where_the_value_came_from_by_hand():
    """For y = w · (U a where a_0 > 0, else V b): regression on y, then each part on its share."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v, self.w = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, a, b):
            return self.w(torch.where(a[:, :1] > 0, self.u(a), self.v(b)))

    torch.manual_seed(0)
    model, a, b = Pair().double().eval(), torch.randn(60, 3).double(), torch.randn(60, 2).double()
    result = InverseNetwork(model, ridge=0).fit((a, b), progress=False).source_signal((a, b))
    here = (a[:, :1] > 0).numpy()
    with torch.no_grad():
        h, y = torch.where(a[:, :1] > 0, model.u(a), model.v(b)).numpy(), model(a, b).numpy()
    weight, bias = regress(h, y, 0)
    above = y @ weight.T + bias
    for x, signal, s in ((a, above * here, result[0]), (b, above * ~here, result[1])):
        weight, bias = regress(x.numpy(), signal, 0)
        torch.testing.assert_close(
            s, torch.as_tensor(signal @ weight.T + bias), rtol=1e-6, atol=1e-6
        )


def test_maximum_is_a_switch_as_pooling_is():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)

    def maxout(how):
        return lambda m, x: m["last"](how(*m["first"](x).chunk(2, 1)))

    alike(
        x,
        maxout(lambda a, b: F.max_pool1d(torch.stack([a, b], 2), 2).squeeze(2)),
        *map(
            maxout,
            (
                torch.maximum,
                torch.max,
                lambda a, b: torch.where(a > b, a, b),
                lambda a, b: -torch.minimum(-a, -b),
            ),
        ),
        maxout(lambda a, b: -torch.min(-b, -a)),
        first=nn.Linear(4, 6),
        last=nn.Linear(3, 2),
    )


SPREAD = {
    "maximum": lambda x, y: torch.maximum(x[:, None], y),
    "where": lambda x, y: torch.where(y > 0, x[:, None], y),
    "masked_fill": lambda x, y: x[:, None].masked_fill(torch.ones(8, 4, dtype=torch.bool), 0.0) + y,
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_switch_that_spreads_a_value_is_refused(name):
    """Its signal would be a sum over the places it is chosen at."""
    model = Function(
        lambda m, x, y: m["l"](SPREAD[name](x, y).flatten(1)), l=nn.Linear(32, 3)
    ).eval()
    data = torch.randn(60, 4), torch.randn(60, 8, 4)
    with pytest.raises(UnsupportedOperationError, match=r"spreads a smaller value.*expand"):
        InverseNetwork(model).fit(data, 0, progress=False)
