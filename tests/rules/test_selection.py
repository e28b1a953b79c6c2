"""Switches: each signal goes to where its value came from."""

import pytest
import torch
from oracle import regress
from rule_checks import alike
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.methods import LRP, GuidedBackprop


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


SELECTED = {
    "max": lambda h: h.max(1)[0],
    "min": lambda h: h.min(1)[0],
    "amax": lambda h: h.amax(1),
    "amin": lambda h: h.amin(1),
    "median": lambda h: h.median(1)[0],
    "kthvalue": lambda h: h.kthvalue(2, 1)[0],
    "topk": lambda h: h.topk(3, 1)[0].flatten(1),
    "sort": lambda h: h.sort(1)[0][:, 1:3].flatten(1),
    "maximum so far": lambda h: h.cummax(1)[0].flatten(1),
    "gathered": lambda h: h.gather(1, h.argmax(1, keepdim=True)).flatten(1),
    "sorted and indexed": lambda h: h.gather(1, h.argsort(1)[:, -2:]).flatten(1),
}


@pytest.fixture(scope="module")
def selections():
    """One network of a sum over all selections, each of its own positions, and what S is there."""
    torch.manual_seed(0)
    model = Function(
        lambda m, *xs: sum(
            m[name](SELECTED[name](x)) for name, x in zip(SELECTED, xs, strict=True)
        ),
        **{name: nn.Linear(run(torch.ones(1, 5, 3)).shape[1], 2) for name, run in SELECTED.items()},
    ).double()
    inputs = tuple(torch.randn(40, 5, 3).double() for _ in SELECTED)
    inverse = InverseNetwork(model.eval(), ridge=0).fit(inputs, 1, progress=False)
    return model, inputs, inverse.source_signal(inputs, 1)


@pytest.mark.parametrize("name", SELECTED)
def test_a_selection_sends_back_to_the_position_it_chose_by_hand(name, selections):
    """Regress what was chosen on the output, and put the result where each value came from."""
    model, inputs, signals = selections
    at = list(SELECTED).index(name)
    x, y = inputs[at], model(*inputs)[:, 1:].detach()
    chosen = SELECTED[name](x)
    weight, bias = regress(chosen.numpy(), y.numpy(), 0)
    signal = torch.as_tensor(y.numpy() @ weight.T + bias)
    expected = torch.zeros_like(x)
    for example, values in enumerate(chosen):
        for position, value in enumerate(values):
            expected[example][x[example] == value] += signal[example, position]
    torch.testing.assert_close(signals[at], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpooling_sends_back_from_the_places_where_it_put_the_values_by_hand(dims):
    """Regress what was put there on the output: only the largest value of a window has a signal."""
    pool, unpool = (getattr(F, f"max_{name}{dims}d") for name in ("pool", "unpool"))

    def put(x):
        return unpool(*pool(x, 2, return_indices=True), 2)

    torch.manual_seed(0)
    shape = {1: (2, 6), 2: (1, 4, 4), 3: (1, 2, 4, 4)}[dims]
    x = torch.randn(80, *shape, dtype=torch.float64)
    last = nn.Linear(x[0].numel(), 2, bias=False)
    model = Function(lambda m, x: m["last"](put(x).flatten(1)), last=last).double().eval()
    found = InverseNetwork(model, ridge=0).fit(x, 1, progress=False).source_signal(x[:5], 1)
    y = model(x)[:, 1:].detach().numpy()
    weight, bias = regress(put(x).flatten(1).numpy(), y, 0)
    signal = torch.as_tensor(y @ weight.T + bias).view_as(x)
    expected = torch.where(put(x) != 0, signal, 0)[:5]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    relevance = LRP(model).attribute(x[:5], 1)
    torch.testing.assert_close(
        relevance, put(x)[:5] * last.weight[1].view(shape), rtol=1e-4, atol=0
    )
    guided = GuidedBackprop(model).attribute(x[:5], 1)
    torch.testing.assert_close(guided, (put(x) != 0)[:5] * last.weight[1].view(shape))


@pytest.mark.parametrize("name", ["quantile", "nanquantile"])
def test_a_quantile_sends_back_to_the_elements_that_it_lies_between_by_hand(name):
    """Of five sorted values, the 0.3-quantile is 0.8 times the second and 0.2 times the third."""
    torch.manual_seed(0)
    x, quantile = torch.randn(80, 3, 5, dtype=torch.float64), getattr(torch, name)
    model = Function(
        lambda m, x: m["last"](quantile(x, 0.3, dim=2)), last=nn.Linear(3, 2, bias=False)
    )
    model = model.double().eval()
    found = InverseNetwork(model, ridge=0).fit(x, 1, progress=False).source_signal(x[:5], 1)
    values, order = x.sort(2)
    q = 0.8 * values[..., 1] + 0.2 * values[..., 2]
    y = model(x)[:, 1:].detach().numpy()
    weight, bias = regress(q.numpy(), y, 0)
    signal = torch.as_tensor(y @ weight.T + bias)[..., None]
    expected = torch.zeros_like(x).scatter(2, order[..., 1:3], signal.expand(-1, -1, 2))
    torch.testing.assert_close(found, expected[:5], rtol=1e-6, atol=1e-6)
    parts = (
        values[..., 1:3]
        * torch.tensor([0.8, 0.2]).double()
        * model.layers["last"].weight[1][:, None]
    )
    expected = torch.zeros_like(x).scatter(2, order[..., 1:3], parts.detach())
    relevance = LRP(model).attribute(x[:5], 1)
    torch.testing.assert_close(relevance, expected[:5], rtol=1e-3, atol=1e-6)


LOSSES = {
    "mse_loss": lambda z, y: F.mse_loss(z, y, reduction="none"),
    "l1_loss": lambda z, y: F.l1_loss(z, y, reduction="none").mean(1),
    "huber_loss": lambda z, y: F.huber_loss(z, y, reduction="none").sum(1),
    "kl_div": lambda z, y: F.kl_div(z, y, reduction="none"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_refused_with_the_advice_to_return_what_goes_into_it(name):
    class Losing(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x, y):
            return LOSSES[name](self.last(x), y)

    model, x, y = Losing().eval(), torch.randn(3, 4), torch.rand(3, 2)
    (row,) = check(model, x, y).refused
    assert row.operation == f"aten.{name}.default"
    with pytest.raises(UnsupportedOperationError, match=f"{name}.*: return what the loss is comp"):
        LRP(model).attribute(x, 0 if model(x, y).ndim > 1 else None, y)


def test_several_quantiles_are_refused_with_what_to_write():
    model = Function(
        lambda m, x: m["last"](torch.quantile(x, torch.tensor([0.2, 0.7]), dim=2)[0]),
        last=nn.Linear(3, 2),
    ).eval()
    with pytest.raises(UnsupportedOperationError, match=r"stack torch\.quantile\(h, q, dim\)"):
        LRP(model).attribute(torch.randn(2, 3, 5), 0)
