"""Dense layers behind averages whose shares a softmax makes: pooling of a sequence by attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from every_method import alike
from small import Function
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.errors import NotFittedError
from captum_mipin.graph.capture import capture
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.rules import table

#: How tokens (batch, tokens, features) and scores (batch, tokens, 1) become features.
POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda h, z: (z.softmax(1) * h).sum(1),
    "exchanged": lambda h, z: (h * torch.softmax(z, -2)).sum(-2),
    "matmul": lambda h, z: torch.matmul(z.softmax(1).transpose(-1, -2), h).squeeze(-2),
    "bmm": lambda h, z: torch.bmm(h.transpose(1, 2), z.softmax(1)).squeeze(2),
    "@": lambda h, z: (z.squeeze(2).softmax(1)[:, None] @ h)[:, 0],
    "einsum": lambda h, z: torch.einsum("bt,btf->bf", z[..., 0].softmax(1), h),
    "channels first": lambda h, z: (h.transpose(1, 2) * z.transpose(1, 2).softmax(2)).sum(2),
    "by hand": lambda h, z: ((z.exp() / z.exp().sum(1, keepdim=True)) * h).sum(1),
    "divided behind": lambda h, z: (z.exp() * h).sum(1) / z.exp().sum(1),
    "sizes": lambda h, z: torch.bmm(z.softmax(1).view(h.shape[0], 1, 6), h).view(h.size(0), -1),
    "wider": lambda h, z: (z.softmax(1).double() * h).sum(1),
}
#: More of them, with other operations than the product and the sum; other methods have ε or
#: patterns at these.
MORE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "addcmul": lambda h, z: torch.addcmul(torch.zeros_like(h), z.softmax(1), h).sum(1),
    "average": lambda h, z: F.avg_pool1d((6 * z.softmax(1) * h).mT, 6).squeeze(2),
    "doubled": lambda h, z: (2 * z.softmax(1) * h).sum(1) / 2,
}


class Pooled(nn.Module):
    """A layer on tokens, their average by shares, and a dense layer."""

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor], even: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool = pool
        self.body, self.score, self.head = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 3)
        if even:
            nn.init.zeros_(self.score.weight)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        return self.head(self.pool(h, 3 * self.score(h)))


def mean(h: Tensor, z: Tensor) -> Tensor:
    """Return the plain mean over tokens."""
    return h.mean(1)


@pytest.mark.parametrize("pool", POOLS)
def test_equal_shares_are_a_plain_average(pool: str) -> None:
    x = torch.randn(80, 6, 5, dtype=torch.float64)
    found, expected = (
        MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
        for model in (Pooled(POOLS[pool], even=True), Pooled(mean, even=True))
    )
    target = [0, 1, 2, 0]
    for options in ({}, {"evidence": True}, {"contrast": True}):
        torch.testing.assert_close(
            found.attribute(x[:4], target, **options), expected.attribute(x[:4], target, **options)
        )


def attention(
    pool: Callable[[Tensor, Tensor], Tensor], scale: float
) -> Callable[[Any, Tensor], Tensor]:
    """Return the function of layers and inputs that pools tokens with scores times ``scale``."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.body(x).relu()
        result: Tensor = m.head(pool(h, scale * m.score(h)))
        return result

    return run


def layers_of(width: int) -> dict[str, nn.Module]:
    """Return a layer on tokens, one for their scores, and a dense one behind the average."""
    torch.manual_seed(0)
    return {"body": nn.Linear(5, width), "score": nn.Linear(width, 1), "head": nn.Linear(width, 3)}


def test_all_spellings_of_a_weighted_average_are_one() -> None:
    layers, x = layers_of(8), torch.randn(80, 6, 5, dtype=torch.float64)
    alike([attention(pool, 3) for pool in POOLS.values()], x, more=True, **layers)
    expected = mipin_map(attention(POOLS["sum"], 3), x, **layers)
    for pool in MORE.values():
        torch.testing.assert_close(mipin_map(attention(pool, 3), x, **layers), expected)


def test_the_evidence_is_that_of_each_token() -> None:
    model, x, target = Pooled(POOLS["sum"]), torch.randn(80, 6, 5, dtype=torch.float64), [0, 1, 2]
    inverse = InverseNetwork(model, layer=model.body).fit(x, progress=False)
    mipin = LayerMIPINAttribution(model, inverse)
    h = model.body(x[:3]).relu().detach()
    y = model.head(h).detach()  # Σ_p a_p y_p = W Σ_p a_p h_p + b, as Σ_p a_p = 1
    shares = (3 * model.score(h)).softmax(1).detach()
    torch.testing.assert_close((shares * y).sum(1), model(x[:3]).detach())
    weights = torch.stack(
        [inverse._fitted().fitted.inverses[t,]["head/linear"].weight[:, 0] for t in target]
    )
    others = y.clone()
    others[range(3), :, target] = -torch.inf
    own = y[range(3), :, target]
    for option, speaks in (("evidence", own), ("contrast", own - others.amax(2))):
        expected = weights[:, None] * speaks.clamp(min=0)[..., None] * (h > 0)
        assert expected.any()
        found = mipin.attribute(x[:3], target, **{option: True})
        # what stops at the layer has one more factor a channel
        ratio = (found / expected)[expected != 0]
        assert (found != 0).equal(expected != 0)
        torch.testing.assert_close(found, expected * (found / expected).nan_to_num().amax((0, 1)))
        assert ratio.isfinite().all()


def mipin_map(run: Callable[[Any, Tensor], Tensor], x: Tensor, **layers: nn.Module) -> Tensor:
    """Return the map of MIP-IN for a network of layers, for the first examples and class 1."""
    model = Function(run, **layers).to(x.dtype).eval()
    inverse = InverseNetwork(model).fit(x, 1, progress=False)
    result: Tensor = MIPINAttribution(model, inverse).attribute(x[:5], 1)
    return result


def test_as_many_tokens_as_features() -> None:
    layers, x = layers_of(6), torch.randn(80, 6, 5, dtype=torch.float64)
    pools = (POOLS["sum"], POOLS["bmm"], mean)
    found = [mipin_map(attention(pool, 0), x, **layers) for pool in pools]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_a_sequence_before_the_batch() -> None:
    layers = layers_of(8)

    def first(m: Any, x: Tensor) -> Any:
        h = m.body(x.transpose(0, 1)).relu()
        return m.head((m.score(h).softmax(0) * h).sum(0))

    def second(m: Any, x: Tensor) -> Any:
        h = m.body(x).relu()
        return m.head((m.score(h).softmax(1) * h).sum(1))

    x = torch.randn(80, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(mipin_map(first, x, **layers), mipin_map(second, x, **layers))


def test_places_of_an_image_that_are_summed_one_dimension_after_the_other() -> None:
    torch.manual_seed(0)
    layers = {"body": nn.Conv2d(3, 8, 3), "score": nn.Conv2d(8, 1, 1), "head": nn.Linear(8, 3)}

    def run(sums: Callable[[Tensor], Tensor], m: Any, x: Tensor) -> Any:
        h = m.body(x).relu()
        shares = m.score(h).flatten(1).softmax(1).view(-1, 1, 4, 4)
        return m.head(sums(shares * h))

    x = torch.randn(60, 3, 6, 6, dtype=torch.float64)
    found = [
        mipin_map(partial(run, sums), x, **layers)
        for sums in (
            lambda y: y.sum((2, 3)),
            lambda y: y.sum(3).sum(2),
            lambda y: 16 * F.adaptive_avg_pool2d(y, 1).flatten(1),
        )
    ]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_part_in_another_precision_is_explained() -> None:
    layers = layers_of(8)

    def run(wide: torch.dtype, m: Any, x: Tensor) -> Any:
        h = m.body(x).relu()
        return m.head((m.score(h).to(wide).softmax(1) * h.to(wide)).sum(1).to(h.dtype))

    x = torch.randn(80, 6, 5)
    wide, same = (mipin_map(partial(run, t), x, **layers) for t in (torch.float64, torch.float32))
    torch.testing.assert_close(wide, same, rtol=1e-3, atol=1e-4)


def test_values_written_twice_stay_apart_where_there_is_no_average() -> None:
    torch.manual_seed(0)
    layers = {"body": nn.Linear(5, 8), "head": nn.Linear(8, 3)}

    def once(m: Any, x: Tensor) -> Any:
        z = m.body(x)
        return m.head(z.relu().sum(1) + z.relu()[:, 0])

    captured = capture(Function(once, **layers).eval(), (torch.randn(2, 6, 5),))
    graph = draft(captured, table(), passes=MARKING).graph
    assert sum(operation(node) == "relu" for node in graph.nodes) == 2


class Inside(nn.Module):
    """A weighted average whose product and whose result are outputs of modules."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.score, self.head = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 3)
        self.activation, self.shares = activation, nn.Softmax(1)
        self.product = Function(lambda m, a, h: a * h)
        self.result = Function(lambda m, y: y.sum(1))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.body(x))
        return self.head(self.result(self.product(self.shares(3 * self.score(h)), h)))


def test_at_the_average_the_same_coefficients_hold() -> None:
    model, x = Inside(nn.LeakyReLU(1.0)), torch.randn(80, 6, 5, dtype=torch.float64)
    inverse = InverseNetwork(model).fit(x, progress=False)
    pooled, tokens = (
        LayerMIPINAttribution(model, inverse, layer).attribute(x[:3], 1)
        for layer in (model.result, model.activation)
    )
    shares = (3 * model.score(model.body(x[:3]))).softmax(1)
    torch.testing.assert_close(pooled, (shares * tokens).sum(1))


def test_a_product_inside_the_average_needs_an_inverse_of_its_own() -> None:
    model, x = Inside(nn.ReLU()), torch.randn(80, 6, 5, dtype=torch.float64)
    inverse = InverseNetwork(model).fit(x, progress=False)
    with pytest.raises(NotFittedError, match="did not learn head/linear, alone"):
        LayerMIPINAttribution(model, inverse, model.product).attribute(x[:2], 0)
    own = InverseNetwork(model, layer=model.product).fit(x, progress=False)
    assert LayerMIPINAttribution(model, own).attribute(x[:2], 0).any()
