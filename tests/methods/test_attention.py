"""Attention rollout, Chefer's relevance and LeGrad: by loops over a network with hooks."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small import Function, normal
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from captum_mipin import check
from captum_mipin.errors import InputError, TargetError, UnsupportedOperationError
from captum_mipin.methods import AttentionRollout, Chefer, LeGrad, patch_map

METHODS = (AttentionRollout, Chefer, LeGrad)
TOKENS = 5


class Block(nn.Module):
    """A block of a transformer, with the norm before or behind, and attention in some spelling."""

    def __init__(self, how="by hand", post=False):
        super().__init__()
        self.how, self.post = how, post
        self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.weights = nn.Identity()  # a place for hooks

    def look(self, x):
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "folded":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q / 3**0.5, k.mT).softmax(2), v).unflatten(0, (-1, 2))
        elif self.how == "in float32":
            y = (q @ k.mT / 3**0.5).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        else:
            y = self.weights((q @ k.mT / 3**0.5).softmax(-1)) @ v
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        first, second = self.norms
        if self.post:
            x = first(x + self.look(x))
            return second(x + self.mlp(x))
        x = x + self.look(first(x))
        return x + self.mlp(second(x))


class Transformer(nn.Module):
    """A class from a class token, or from the mean over all tokens."""

    def __init__(self, how="by hand", mean=False, post=False, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.mean = mean
        self.embed, self.token = nn.Linear(4, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.blocks = nn.ModuleList([Block(how, post) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        nn.init.normal_(self.head.weight)

    def tail(self, z):
        z = self.norm(z)
        return self.head(z.mean(1) if self.mean else z[:, 0])

    def forward(self, x):
        z = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        for block in self.blocks:
            z = block(z)
        return self.tail(z)


def attended(model, x):
    """Return the attention weights, the tokens behind each block, and the output, by hooks."""
    weights, tokens, handles = [], [], []
    for block in model.blocks:
        handles.append(block.weights.register_forward_hook(lambda m, i, a: weights.append(a)))
        handles.append(block.register_forward_hook(lambda m, i, z: tokens.append(z)))
    output = model(x)
    for handle in handles:
        handle.remove()
    return weights, tokens, output


def row_of(model, product):
    return product.mean(0) if model.mean else product[0]


def by_hand(model, x, target):
    """Return rollout, Chefer's relevance and LeGrad of one example, from their definitions."""
    weights, tokens, output = attended(model, x)
    a = [w[0].detach().numpy() for w in weights]  # (heads, tokens, tokens) per block
    n = a[0].shape[-1]
    rollout = np.eye(n)
    for one in a:
        mixed = 0.5 * one.mean(0) + 0.5 * np.eye(n)
        rollout = mixed / mixed.sum(1, keepdims=True) @ rollout
    gradients = torch.autograd.grad(output[0, target], weights, retain_graph=True)
    relevance = np.eye(n)
    for one, gradient in zip(a, gradients, strict=True):
        relevance = relevance + np.maximum(gradient[0].numpy() * one, 0).mean(0) @ relevance
    legrad = np.zeros(n)
    for z, w in zip(tokens, weights, strict=True):
        score = model.head(model.norm(z.mean(1)))[0, target]
        (gradient,) = torch.autograd.grad(score, w, retain_graph=True)
        legrad += np.maximum(gradient[0].numpy(), 0).mean(0).mean(0) / len(tokens)
    return row_of(model, rollout), row_of(model, relevance), legrad


@pytest.mark.parametrize(
    ("how", "mean"),
    [
        ("by hand", False),
        ("fused", True),
        ("folded", False),
        pytest.param("by hand", True, marks=pytest.mark.full),
        pytest.param("fused", False, marks=pytest.mark.full),
        pytest.param("folded", True, marks=pytest.mark.full),
    ],
)
def test_all_three_by_their_definitions(how, mean):
    model, reference = (Transformer(h, mean).double().eval() for h in (how, "by hand"))
    x, targets = normal(4, TOKENS - 1, 4, dtype=torch.float64), [0, 2, 1, 1]
    found = [method(model).attribute(x, targets) for method in METHODS]
    for i, target in enumerate(targets):
        expected = by_hand(reference, x[i : i + 1], target)
        for relevance, one in zip(found, expected, strict=True):
            torch.testing.assert_close(relevance[i], torch.from_numpy(one))


def test_blocks_that_end_with_a_norm():
    model = Transformer(post=True).double().eval()
    x = normal(1, TOKENS - 1, 4, dtype=torch.float64)
    for method, expected in zip(METHODS, by_hand(model, x, 1), strict=True):
        torch.testing.assert_close(method(model).attribute(x, 1)[0], torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_may_have_a_dtype_of_their_own(dtype):
    """In transformers, they are computed in float32."""
    x = normal(2, TOKENS - 1, 4).to(dtype)
    for kind in METHODS:
        found = kind(Transformer("in float32").to(dtype).eval()).attribute(x, 1)
        expected = kind(Transformer().eval()).attribute(x.float(), 1)
        assert found.dtype == dtype
        close = (
            {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.05}
        )
        torch.testing.assert_close(found.float(), expected, **close)


def test_batches_dtypes_threads_and_the_model_are_as_ever():
    model = Transformer("fused").double().eval()
    x, targets = normal(4, TOKENS - 1, 4, dtype=torch.float64), [0, 2, 1, 1]
    for kind in METHODS:
        method = kind(model)
        together = method.attribute(x, targets)
        alone = [method.attribute(x[i : i + 1], target) for i, target in enumerate(targets)]
        torch.testing.assert_close(torch.cat(alone), together)
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(method.attribute, x, targets) for _ in range(8)]
            assert all(torch.equal(job.result(), together) for job in jobs)
        with torch.inference_mode():
            assert torch.equal(method.attribute(x.clone(), targets), together)
        (in_tuple,) = (method.attribute((x,), targets),)
        assert torch.equal(in_tuple, together)
        single = kind(Transformer("fused").eval()).attribute(x.float(), targets)
        torch.testing.assert_close(single.double(), together, rtol=1e-4, atol=1e-5)
        assert not together.requires_grad
    assert not any(p.grad is not None for p in model.parameters())
    rollout = AttentionRollout(model)
    assert torch.equal(rollout.attribute(x), rollout.attribute(x, targets))
    with pytest.raises(TargetError):
        Chefer(model).attribute(x, 3)


def test_rows_and_blocks_that_are_asked_for():
    model, x = Transformer("fused").double().eval(), normal(2, 4, 4, dtype=torch.float64)
    for kind in (AttentionRollout, Chefer):
        rows = [kind(model, row=i).attribute(x, 1) for i in range(TOKENS)]
        assert torch.equal(rows[0], kind(model).attribute(x, 1))
        torch.testing.assert_close(
            kind(model, row="mean").attribute(x, 1), torch.stack(rows).mean(0)
        )
        torch.testing.assert_close(kind(model, row=-1).attribute(x, 1), rows[-1])
    with pytest.raises(InputError, match="5 tokens"):
        AttentionRollout(model, row=5).attribute(x)
    for row in ("first", 0.5, True):
        with pytest.raises(InputError, match="row="):
            Chefer(model, row=row)
    whole, last = (LeGrad(model, blocks=n).attribute(x, 1) for n in (None, 1))
    few = LeGrad(model, blocks=2).attribute(x, 1)
    assert not torch.allclose(whole, few)
    assert not torch.allclose(few, last)
    torch.testing.assert_close(LeGrad(model, blocks=3).attribute(x, 1), whole)
    with pytest.raises(InputError, match="blocks="):
        LeGrad(model, blocks=0)
    with pytest.raises(UnsupportedOperationError, match="single block"):
        LeGrad(Transformer(blocks=1).double().eval()).attribute(x, 1)


def test_texts_with_masks_and_the_sequence_first():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 9, activation="gelu", norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(m, ids, mask):
        z = m["encoder"](m["words"](ids).transpose(0, 1), src_key_padding_mask=~mask)
        z = z.transpose(0, 1) * mask[..., None]
        return m["head"](z.sum(1) / mask.sum(1, keepdim=True))

    model = Function(run, words=nn.Embedding(20, 6), encoder=encoder, head=nn.Linear(6, 3)).eval()
    ids, mask = torch.randint(0, 20, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    for kind in METHODS:
        found = kind(model).attribute(ids, [0, 2], mask)
        assert found.shape == (2, 7)
        alone = kind(model).attribute(ids[1:, :4], 2, mask[1:, :4])
        assert not found[1, 4:].any()
        if kind is not LeGrad:  # its mean over tokens counts padding
            torch.testing.assert_close(found[1:, :4], alone)


def test_an_output_per_token_reads_its_own_token():
    class Tagger(Transformer):
        def tail(self, z):
            return self.head(self.norm(z))

    model, x = Tagger("fused").double().eval(), normal(2, 4, 4, dtype=torch.float64)
    found = AttentionRollout(model).attribute(x, [(3, 1), (0, 2)])
    rows = [AttentionRollout(model, row=i).attribute(x) for i in (3, 0)]
    torch.testing.assert_close(found, torch.stack([rows[0][0], rows[1][1]]))


def test_vision_transformers_of_torchvision_and_their_patches():
    torch.manual_seed(0)
    model = VisionTransformer(8, 2, 2, 2, 8, 16, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    x = torch.rand(2, 3, 8, 8)
    for kind in METHODS:
        tokens = kind(model).attribute(x, [0, 1])
        assert tokens.shape == (2, 17)
        assert tokens.abs().max() > 0
        assert torch.equal(patch_map(tokens).flatten(1), tokens[:, 1:])
        assert torch.equal(patch_map(tokens, 2, 8)[:, 0, 0], tokens[:, 1:9])
    with pytest.raises(InputError, match="5 × 5 patches"):
        patch_map(tokens, 5, 5)


def windows(m, x):
    z = m["embed"](x)
    for _ in range(2):
        y = z.unflatten(1, (2, 2)).flatten(0, 1)
        z = z + m["block"].look(y).unflatten(0, (-1, 2)).flatten(1, 2)
    return m["head"](z.mean(1))


def cross(m, x):
    z = m["block"](m["embed"](x))
    y = F.scaled_dot_product_attention(z[:, :1], z, z)
    return m["head"](y[:, 0])


def pooled(m, x):
    z = m["block"](m["embed"](x))
    return m["head"](m["block"](z.unflatten(1, (2, 2)).mean(2)).mean(1))


def mixed(m, x):
    z = m["embed"](x)
    a = (z @ z.mT).softmax(-1)
    return m["head"]((z + F.linear(a, torch.ones(4, 4)) @ z).mean(1))


def branches(m, x):
    z = m["embed"](x)
    return m["head"]((m["block"](z) + m["block"](z.flip(1))).mean(1))


def channels(m, x):
    z = m["embed"](x)
    a = (z.mT @ z).softmax(-1)
    return m["head"]((z + z @ a).mean(1))


REFUSED = {
    "windows": (windows, "windows"),
    "cross-attention": (cross, "of 1 queries and 4 keys"),
    "fewer tokens": (pooled, "2, 4 tokens"),
    "mixed weights": (mixed, "mixed"),
    "branches": (branches, "branches"),
    "channels": (channels, "channels"),
    "no attention": (lambda m, x: m["head"](m["embed"](x).mean(1)), "no self-attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_row_of_self_attention_is_refused(name):
    run, reason = REFUSED[name]
    model = Function(run, embed=nn.Linear(4, 6), block=Block("fused"), head=nn.Linear(6, 3)).eval()
    with pytest.raises(UnsupportedOperationError, match=reason):
        AttentionRollout(model).attribute(normal(2, 4, 4))


def test_check_says_that_they_have_no_rules_of_operations():
    model = nn.Linear(4, 3).eval()
    for method in (Chefer, Chefer(model)):
        with pytest.raises(InputError, match="Chefer, which has no rules"):
            check(model, torch.ones(1, 4), method=method)
