"""Models without a free batch size are explained as the same network with one is."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from designs import aside
from small import Function
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from captum_mipin import InverseNetwork, MIPINAttribution, check
from captum_mipin.bottleneck import IBA
from captum_mipin.errors import CaptureError
from captum_mipin.methods import LRP, Epsilon, GuidedBackprop
from captum_mipin.methods.gradients import Gradient


def _parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {
        "conv": nn.Conv2d(2, 3, 3),
        "norm": nn.BatchNorm2d(3),
        "head": nn.Linear(27, 4),
        "dense": nn.Linear(25, 6),
        "layer": nn.LayerNorm(25),
        "last": nn.Linear(6, 4),
        "attention": nn.MultiheadAttention(6, 2, batch_first=True),
        "recurrent": nn.GRU(25, 6, batch_first=True),
        "frames": nn.Conv2d(1, 3, 3),
        "out": nn.Linear(3, 4),
    }
    return {name: part.double() for name, part in parts.items()}


def _body(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m["head"](torch.relu(m["norm"](m["conv"](x))).flatten(1))
    return y


def _tokens(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m["dense"](m["layer"](x.flatten(2))))


def _frames(m: Any, x: Tensor) -> Tensor:
    """Take the channels of an image (C, H, W) for frames of a film."""
    h = torch.relu(m["frames"](x[:, None]))
    return m["out"](h.mean((0, 2, 3)))


def _packed(m: Any, x: Tensor, apart: bool = True) -> Tensor:
    """Put the tokens of all examples into one sequence, in which attention stays within each."""
    sequences = [one.flatten(1) for one in x]
    counts = torch.tensor([one.shape[0] for one in sequences])
    owner = torch.arange(len(x)).repeat_interleave(counts)
    h = torch.relu(m["dense"](m["layer"](pad_sequence([torch.cat(sequences)], batch_first=True))))
    filled = torch.arange(h.shape[1]) < torch.tensor([h.shape[1]])
    own = ((owner[:, None] == owner) | (not apart)) & filled
    h = F.scaled_dot_product_attention(h, h, h, attn_mask=own)
    queries = m["last"].weight[None, :1].expand(1, len(x), -1)
    h = F.scaled_dot_product_attention(
        queries, h, h, attn_mask=(torch.arange(len(x))[:, None] == owner) & filled
    )
    filled = torch.arange(h.shape[1]) < torch.tensor([len(x)])
    y: Tensor = m["last"](h.flatten(0, 1)[filled])
    return y


def _unpacked(m: Any, x: Tensor) -> Tensor:
    h = _tokens(m, x)
    h = F.scaled_dot_product_attention(h, h, h)
    queries = m["last"].weight[None, :1].expand(x.shape[0], -1, -1)
    y: Tensor = m["last"](F.scaled_dot_product_attention(queries, h, h)[:, 0])
    return y


Spelling = Callable[[Any, Tensor], Tensor]

#: Name → the spelling without and the one with a free batch size.
PAIRS: dict[str, tuple[Spelling, Spelling]] = {
    "loop over batches of one": (
        lambda m, x: torch.cat([_body(m, x[i : i + 1]) for i in range(len(x))]),
        _body,
    ),
    "loop over examples": (
        lambda m, x: torch.stack(
            [m["head"](F.relu(m["norm"](m["conv"](one)[None]))[0].flatten()) for one in x]
        ),
        _body,
    ),
    "chunks": (
        lambda m, x: torch.cat([_body(m, part) for part in x.chunk(max(1, len(x) // 2))]),
        _body,
    ),
    "chunks of at least four": (
        lambda m, x: torch.cat(
            [_body(m, part) for part in x.chunk(math.ceil(x.shape[0] / 4))]
        ),
        _body,
    ),
    "split": (lambda m, x: torch.cat([_body(m, part) for part in x.split([1] * len(x))]), _body),
    "number in a shape": (
        lambda m, x: m["head"](F.relu(m["norm"](m["conv"](x))).view(len(x), 27)),
        lambda m, x: m["head"](F.relu(m["norm"](m["conv"](x))).view(x.shape[0], 27)),
    ),
    "zeros": (
        lambda m, x: _body(m, x) + torch.zeros(len(x), 4, dtype=x.dtype),
        _body,
    ),
    "vmap": (
        lambda m, x: torch.vmap(lambda one: m["last"](_tokens(m, one[None])[0].mean(0)))(x),
        lambda m, x: m["last"](_tokens(m, x).mean(1)),
    ),
    "class token": (
        lambda m, x: m["last"](
            torch.cat([m["last"].weight[None, :1].expand(len(x), -1, -1), _tokens(m, x)], 1).mean(1)
        ),
        lambda m, x: m["last"](
            torch.cat(
                [m["last"].weight[None, :1].expand(x.shape[0], -1, -1), _tokens(m, x)], 1
            ).mean(1)
        ),
    ),
    "attention of one at a time": (
        lambda m, x: torch.stack(
            [m["last"](m["attention"](h, h, h, need_weights=False)[0].mean(0))
             for h in _tokens(m, x.view(len(x), 2, 5, 5))]
        ),
        lambda m, x: m["last"](
            m["attention"](h := _tokens(m, x), h, h, need_weights=False)[0].mean(1)
        ),
    ),
    "recurrent, one at a time": (
        lambda m, x: torch.stack([m["last"](m["recurrent"](one.flatten(1))[0][-1]) for one in x]),
        lambda m, x: m["last"](m["recurrent"](x.flatten(2))[0][:, -1]),
    ),
    "frames": (
        lambda m, x: torch.stack([_frames(m, one) for one in x]),
        lambda m, x: m["out"](
            torch.relu(m["frames"](x.flatten(0, 1)[:, None])).unflatten(0, (-1, 2)).mean((1, 3, 4))
        ),
    ),
    "packed into one sequence": (_packed, _unpacked),
    "sums of scalars": (
        lambda m, x: torch.stack(
            [torch.stack([(w[0, 0, 0] * one).sum() for w in m["conv"].weight]) for one in x]
        ),
        lambda m, x: torch.stack([(w[0, 0, 0] * x).sum((1, 2, 3)) for w in m["conv"].weight], 1),
    ),
}  # fmt: skip


#: The hidden states are (batch, 1, 6) in one spelling, and (1, batch, 6) in the other. So other
#: dimensions count as their channels, and the factors of the branches differ.
OTHER_FORKS = ("recurrent, one at a time",)


@pytest.fixture(scope="module")
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 2, 5, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    "name",
    aside(PAIRS, "loop over batches of one", "split", "attention of one at a time", "frames"),
)
def test_a_fixed_batch_size_gives_the_maps_of_a_free_one(name: str, x: Tensor) -> None:
    one, free = (Function(spelling, **_parts()).eval() for spelling in PAIRS[name])
    assert torch.allclose(one(x[:3]), free(x[:3]))
    if name != "chunks of at least four":  # of these, torch makes a single one for any batch
        assert "captured for one example" in str(check(one, x[:3]))
    assert "captured for one example" not in str(check(free, x[:3]))
    maps: list[list[Tensor]] = []
    for model in (one, free):
        maps.append([GuidedBackprop(model).attribute(x[:4], target=[0, 1, 2, 1])])
        if name not in OTHER_FORKS:
            inverse = InverseNetwork(model).fit(x, targets=[0, 2], progress=False)
            maps[-1].append(MIPINAttribution(model, inverse).attribute(x[:4], target=[0, 2, 2, 0]))
    for found, expected in zip(*maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_other_methods_give_the_maps_of_a_free_batch_size(x: Tensor) -> None:
    one, free = (Function(spelling, **_parts()).eval() for spelling in PAIRS["loop over examples"])
    maps = [LRP(model).attribute(x[:4], target=[0, 1, 2, 3]) for model in (one, free)]
    torch.testing.assert_close(*maps, rtol=1e-7, atol=1e-10)
    maps = []
    for model in (one, free):
        iba = IBA(model, model.layers["norm"]).estimate(x, progress=False)
        maps.append(iba.attribute(x[:4], target=[0, 1, 2, 3]))
    torch.testing.assert_close(*maps, rtol=1e-6, atol=1e-9)


class Several(nn.Module):
    """Takes two inputs, one tensor with a row per example, and one that all examples share."""

    def __init__(self, free: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.free, self.a, self.b = free, nn.Linear(3, 5), nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor, scale: Tensor, shared: Tensor) -> Tensor:
        if self.free:
            return self._forward(x, y, scale, shared)
        rows = [self._forward(*row, shared) for row in zip(x, y, scale, strict=True)]
        return torch.stack(rows)

    def _forward(self, x: Tensor, y: Tensor, scale: Tensor, shared: Tensor) -> Tensor:
        h = torch.relu(self.a(x) * scale + self.b(y) + shared)
        result: Tensor = self.head(h)
        return result


def test_several_inputs_and_further_arguments_are_taken_by_example() -> None:
    one, free = Several(False).eval().double(), Several(True).eval().double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    scale, shared = torch.rand(30, 1, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    call = ((x[:4], y[:4]), [0, 1, 2, 0], (scale[:4], shared))
    maps = [GuidedBackprop(model).attribute(*call) for model in (one, free)]
    by_hand = [
        GuidedBackprop(one).attribute(
            (x[i : i + 1], y[i : i + 1]), i % 3, (scale[i : i + 1], shared)
        )
        for i in range(4)
    ]
    torch.testing.assert_close(*maps)
    torch.testing.assert_close(maps[0], tuple(map(torch.cat, zip(*by_hand, strict=True))))


def test_a_tensor_as_long_as_the_batch_that_is_no_row_per_example_is_shared() -> None:
    def run(m: Any, x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([m["out"](one * w) for one in x])

    model, x, w = Function(run, **_parts()).eval(), torch.randn(3, 3).double(), torch.rand(3)
    expected = (model.layers["out"].weight[[0, 1, 2]] * w).detach()
    torch.testing.assert_close(GuidedBackprop(model).attribute(x, [0, 1, 2], w.double()), expected)


def _assigned(o: Tensor, y: Tensor) -> Tensor:
    mask = torch.zeros(len(o), 4, dtype=o.dtype)
    mask[torch.arange(len(o)), y] = 1.0
    return (o * mask).sum(1)


def _put(o: Tensor, y: Tensor) -> Tensor:
    """Put the chosen entries into zeros, at places that the example chooses."""
    rows, zeros = torch.arange(len(o)), torch.zeros(len(o), 3, 4, dtype=o.dtype)
    chosen = o.gather(1, y[:, None])
    return zeros.index_put((rows[:, None], (y % 3)[:, None], y[:, None]), chosen).sum((1, 2))


#: Spellings of o.gather(1, y[:, None])[:, 0] for outputs o (batch, 4) and classes y.
CHOSEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "free": lambda o, y: o[torch.arange(o.shape[0]), y],
    "squeezed": lambda o, y: o.gather(1, y[:, None]).squeeze(),
    "length of o": lambda o, y: o[torch.arange(len(o)), y],
    "length of y": lambda o, y: o[torch.arange(0, len(y), device=y.device), y],
    "a number": lambda o, y: o[torch.arange(int(o.shape[0])), y],
    "range": lambda o, y: o[range(len(o)), y],
    "list": lambda o, y: o[y.new_tensor(list(range(len(y)))), y],
    "column": lambda o, y: o[torch.arange(len(o))[:, None], y[:, None]].squeeze(),
    "in two dimensions": lambda o, y: o.view(-1, 2, 2)[torch.arange(len(o)), y // 2, y % 2],
    "around a slice": lambda o, y: o.view(-1, 2, 1, 2)[range(len(o)), y // 2, :, y % 2][:, 0],
    "behind a slice": lambda o, y: torch.cat(
        [row[:, c] for row, c in zip(o.split(1), y, strict=True)]
    ),
    "taken": lambda o, y: o.take(y + 4 * torch.arange(len(y))),
    "along a dimension": lambda o, y: torch.take_along_dim(o, y.view(len(y), 1), 1).squeeze(),
    "loop": lambda o, y: torch.stack([o[i, y[i]] for i in range(len(o))]),
    "loop over numbers": lambda o, y: torch.stack([a[b.item()] for a, b in zip(o, y, strict=True)]),
    "vmap": lambda o, y: torch.vmap(lambda a, b: a.gather(0, b[None])[0])(o, y),
    "assigned": _assigned,
    "put": _put,
}  # fmt: skip


def _choosing(choose: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    return Function(lambda m, x, y: choose(_body(m, x), y), **_parts()).eval()


def _chosen(choose: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Return the maps of the first three examples, which are those of each example alone."""
    y, model, maps = torch.arange(40) % 4, _choosing(choose), []
    inverse = InverseNetwork(model).fit([(x, y)], unpack=tuple, progress=False)
    for method in (GuidedBackprop(model), LRP(model), MIPINAttribution(model, inverse)):
        maps.append(method.attribute(x[:3], additional_forward_args=y[:3]))
        rows = zip(x[:3].split(1), y[:3].split(1), strict=True)
        alone = [method.attribute(a, additional_forward_args=b) for a, b in rows]
        torch.testing.assert_close(torch.cat(alone), maps[-1], rtol=1e-9, atol=1e-12)
    return maps


@pytest.fixture(scope="module")
def gathered(x: Tensor) -> list[Tensor]:
    return _chosen(lambda o, y: o.gather(1, y[:, None])[:, 0], x)


@pytest.mark.parametrize(
    "name",
    aside(
        CHOSEN, "length of o", "length of y", "range", "list", "column", "around a slice",
        "loop over numbers",
    ),
)  # fmt: skip
def test_an_entry_that_each_example_chooses_is_taken_in_every_spelling(
    name: str, x: Tensor, gathered: list[Tensor]
) -> None:
    for found, expected in zip(_chosen(CHOSEN[name], x), gathered, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_iba_takes_channels_that_each_example_chooses(x: Tensor) -> None:
    y, maps = torch.arange(40) % 3, []
    for count in (lambda h: h.shape[0], len):

        def run(m: Any, x: Tensor, y: Tensor, count: Any = count) -> Tensor:
            h = torch.relu(m["norm"](m["conv"](x)))
            chosen = h.flatten(2)[torch.arange(count(h)), y]
            return m["head"](torch.cat([h.flatten(1)[:, :18], chosen], 1))

        model = Function(run, **_parts()).eval()
        iba = IBA(model, model.layers["norm"]).estimate([(x, y)], unpack=tuple, progress=False)
        maps.append(iba.attribute(x[:4], [0, 1, 2, 3], additional_forward_args=y[:4]))
    torch.testing.assert_close(*maps, rtol=1e-6, atol=1e-9)


#: Entries of other examples, chosen by an index.
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the first": lambda o, y: o[torch.zeros(len(o), dtype=torch.long), y],
    "the last": lambda o, y: o[torch.full((len(o),), -1), y],
    "the next": lambda o, y: o[(torch.arange(len(o)) + 1) % len(o), y],
    "of another class": lambda o, y: o[torch.arange(len(o)), y[list(range(len(y)))[::-1]]],
}


@pytest.mark.parametrize("name", OTHERS)
def test_entries_of_other_examples_are_refused(name: str, x: Tensor) -> None:
    with pytest.raises(CaptureError, match="other examples of its batch or on their number"):
        check(_choosing(OTHERS[name]), x[:4], torch.tensor([0, 1, 2, 1]))


def test_an_index_into_all_outputs_may_choose_each_examples_own(x: Tensor) -> None:
    """o.flatten()[y + 4 i] is o[i, y], which no shape tells: calls of the model do."""
    labels = torch.tensor([0, 1, 2, 1])
    runs = (
        lambda o, y: o.flatten()[y + 4 * torch.arange(o.shape[0])],
        lambda o, y: o.gather(1, y[:, None])[:, 0],
    )
    for method in (LRP, GuidedBackprop):
        found, expected = (
            method(_choosing(run)).attribute(x[:4], additional_forward_args=labels) for run in runs
        )
        torch.testing.assert_close(found, expected)
    other = _choosing(lambda o, y: o.flatten()[y + 4 * torch.arange(o.shape[0]).flip(0)])
    with pytest.raises(CaptureError, match=r"depends on its place in the batch"):
        LRP(other).attribute(x[:4], additional_forward_args=labels)


def _films(m: Any, x: Tensor, first: bool) -> Tensor:
    """Take the class token from the first rows of (films · frames, tokens, features)."""
    films, frames = x.shape[:2]
    h = torch.relu(m["dense"](x.flatten(0, 1).flatten(1))[:, None])
    token = (m["last"].weight[:1] + m["layer"].weight[:6])[None].expand(films * frames, -1, -1)
    h = torch.cat((token, h), 1)
    token = h[:films, 0] if first else h.unflatten(0, (-1, 2))[:, 0, 0]
    h = torch.cat((token[:, None], h[:, 1].unflatten(0, (-1, 2))), 1)
    y: Tensor = m["last"](F.scaled_dot_product_attention(h, h, h).mean(1))
    return y


def _experts(m: Any, x: Tensor, each: bool) -> Tensor:
    """Send each token to two of three experts; ``each``: with a matrix of its own for each."""
    h = torch.relu(m["dense"](x.flatten(2)))
    tokens = h.flatten(0, 1)
    weights = torch.stack((m["last"].weight, m["own"].weight, m["own"].weight.flip(0)))
    share, chosen = m["gate"](tokens).softmax(-1).topk(2, -1)
    if each:
        many = weights[chosen.reshape(-1)]
        y = torch.bmm(many, tokens.repeat_interleave(2, dim=0).unsqueeze(-1)).squeeze(-1)
        y = (y * share.reshape(-1, 1)).view(tokens.shape[0], 2, 4).sum(1)
    else:
        share = torch.zeros(tokens.shape[0], 3, dtype=x.dtype).scatter(1, chosen, share)
        y = torch.stack([F.linear(tokens, weight) for weight in weights], 1)
        y = (share[:, :, None] * y).sum(1)
    return y.view(x.shape[0], 2, 4).sum(1)


@pytest.mark.parametrize("name", ["films", "experts"])
def test_examples_that_only_seem_to_be_mixed_are_explained(name: str, x: Tensor) -> None:
    parts = _parts() | {"own": nn.Linear(6, 4).double(), "gate": nn.Linear(6, 3).double()}
    spelling = {"films": _films, "experts": _experts}[name]
    one, other = (
        Function(lambda m, x, way=way: spelling(m, x, way), **parts).eval() for way in (True, False)
    )
    torch.testing.assert_close(one(x[:4]), other(x[:4]))
    assert check(one, x[:4]).ok
    leaf = x[:4].clone().requires_grad_()
    (expected,) = torch.autograd.grad(other(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(Gradient(one).attribute(x[:4], 1), expected)
    found = LRP(one, rule=Epsilon(1e-12)).attribute(x[:4], 1)
    torch.testing.assert_close(found, LRP(other, rule=Epsilon(1e-12)).attribute(x[:4], 1))
    inverse = InverseNetwork(one).fit(x, 1, progress=False)
    found = inverse.source_signal(x[:4], 1)
    torch.testing.assert_close(inverse.source_signal(x[2:3], 1), found[2:3])


def _carries(m: Any, x: Tensor) -> Tensor:
    rows, last = [], torch.zeros(4, dtype=x.dtype)
    for one in x:
        last = last * 0.5 + _body(m, one[None])[0]
        rows.append(last)
    return torch.stack(rows)


MIXING: dict[str, Spelling] = {
    "mean of the batch": lambda m, x: _body(m, x - x.sum(0) / len(x)),
    "divided by the batch size": lambda m, x: _body(m, x) / len(x),
    "a state carried on": _carries,
    "statistics of chunks": lambda m, x: torch.cat(
        [_body(m, F.batch_norm(h, None, None, training=True)) for h in x.chunk(max(1, len(x) // 2))]
    ),
    "packed without a mask": lambda m, x: _packed(m, x, apart=False),
    "branch": lambda m, x: _body(m, x) * (2 if x.shape[0] > 20 else 1),
    "branch for few": lambda m, x: _body(m, x) * (2 if x.shape[0] < 12 else 1),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_really_mixes_examples_is_refused(name: str, x: Tensor) -> None:
    model = Function(MIXING[name], **_parts()).eval()
    with pytest.raises(CaptureError, match="other examples of its batch or on their number"):
        check(model, x[:4])


def test_the_capture_for_one_example_is_logged(x: Tensor, caplog: Any) -> None:
    model = Function(lambda m, x: torch.cat([m["head"](o.view(1, 27)) for o in x]), **_parts())
    with caplog.at_level(logging.INFO, logger="captum_mipin"):
        check(model.eval(), x.new_ones(2, 3, 3, 3))
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("captum_mipin")]
    assert len(messages) == 1
    assert "Function takes no free batch size: it was captured for one example" in messages[0]
