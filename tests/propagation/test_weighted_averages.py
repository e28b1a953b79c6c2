"""Dense layers behind averages whose shares a softmax makes: pooling of a sequence by attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from every_method import alike
from torch import Tensor, nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution

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


def test_all_spellings_of_a_weighted_average_are_one() -> None:
    torch.manual_seed(0)
    layers = {"body": nn.Linear(5, 8), "score": nn.Linear(8, 1), "head": nn.Linear(8, 3)}

    def run(pool: Callable[[Tensor, Tensor], Tensor], m: Any, x: Tensor) -> Any:
        h = m.body(x).relu()
        return m.head(pool(h, 3 * m.score(h)))

    x = torch.randn(80, 6, 5, dtype=torch.float64)
    alike([partial(run, pool) for pool in POOLS.values()], x, more=True, **layers)


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
