"""Products, ratios, sums and norms: the way they are written changes no map of any method."""

from functools import reduce

import pytest
import torch
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, MIPINAttribution, check
from captum_mipin.methods import (
    LRP,
    DeepTaylor,
    ExcitationBackprop,
    GuidedBackprop,
    PatternNet,
    Patterns,
)  # fmt: skip
from captum_mipin.methods.gradients import Gradient


def maps(run, x, **modules):
    """Return the output and the map of every method for a network of these modules."""
    model = Function(run, **modules).double().eval()
    inverse = InverseNetwork(model).fit(x, 1, progress=False)
    few = x[:5]
    patterns = Patterns(model).fit(x, progress=False)
    methods = [LRP(model), ExcitationBackprop(model), PatternNet(model, patterns)]
    return [
        model(few).detach(),
        *(maps[0] for maps in inverse.explain((few,), 1, biases=(False, True)).signals),
        *(method.attribute(few, 1) for method in methods),
    ]


def alike(runs, x, **modules):
    first, *others = (maps(run, x, **modules) for run in runs)
    for other in others:
        for a, b in zip(other, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def pooled(weights, how):
    """A network that pools five instances by weights from the instances."""

    def run(m, x):
        h = m["p"](x).relu()
        return m["last"](how(weights(m["a"](h)), h))

    return run


POOLED = {
    "sum": lambda w, h: (w * h).sum(1),
    "bmm": lambda w, h: torch.bmm(w.transpose(1, 2), h).squeeze(1),
    "matmul": lambda w, h: (w.mT @ h).flatten(1),
    "einsum": lambda w, h: torch.einsum("bno,bnc->bc", w, h),
    "einsum of vectors": lambda w, h: torch.einsum("bn,bnc->bc", w[..., 0], h),
    "values first": lambda w, h: (h.mT @ w).squeeze(2),
    "kept dimension": lambda w, h: torch.mul(h, w).sum(dim=-2, keepdim=True).squeeze(1),
    "transposed": lambda w, h: (h.mT * w.mT).sum(-1),
    "sum behind a transposition": lambda w, h: (h * w).transpose(1, 2).sum(2),
    "kept behind a transposition": lambda w, h: (h * w).mT.sum(2, keepdim=True).squeeze(2),
    "expanded": lambda w, h: (w.expand_as(h) * h).sum(1),
    "baddbmm": lambda w, h: torch.baddbmm(h.new_zeros(1, 1, 1), w.mT, h).squeeze(1),
    "in place": lambda w, h: h.clone().mul_(w).sum(1),
}


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_spelling_of_a_weighted_sum_does_not_matter(gate):
    torch.manual_seed(0)
    parts = {"p": nn.Linear(4, 8), "a": nn.Linear(8, 1), "last": nn.Linear(8, 2)}
    names = list(POOLED) if gate == "softmax" else ["sum", "matmul", "einsum of vectors"]
    weights = torch.sigmoid if gate == "sigmoid" else lambda a: a.softmax(1)
    runs = [pooled(weights, POOLED[name]) for name in names]
    alike(runs, normal(60, 5, 4, dtype=torch.float64), **parts)


#: Spellings of Σ_i z_i w_i for vectors z, w of each example.
DOTS = {
    "bmm": lambda z, w: torch.bmm(z[:, None], w[..., None])[:, 0, 0],
    "matmul, squeezed": lambda z, w: (w[:, None] @ z[..., None]).squeeze(),
    "einsum": lambda z, w: torch.einsum("bi,bi->b", z, w),
    "sum": lambda z, w: (z * w).sum(1),
    "kept": lambda z, w: (w * z).sum(-1, keepdim=True)[:, 0],
    "columns": lambda z, w: (z.T * w.T).sum(0),
    "flattened": lambda z, w: (z.view(-1, 2, 4) * w.view(-1, 2, 4)).flatten(1).sum(1),
    "unflattened": lambda z, w: (z * w).unflatten(1, (2, 4)).sum((1, 2)),
    "vecdot": torch.linalg.vecdot,
    "vmap of dot": lambda z, w: torch.vmap(torch.dot)(z, w),
    "vmap of inner": lambda z, w: torch.vmap(torch.inner)(w, z),
    "vmap of tensordot": lambda z, w: torch.vmap(lambda a, b: torch.tensordot(a, b, 1))(z, w),
    "loop": lambda z, w: torch.stack([a @ b for a, b in zip(z, w, strict=True)]),
    "matrix and vector": lambda z, w: torch.stack(
        [torch.mv(a[None], b)[0] for a, b in zip(z, w, strict=True)]
    ),
}


def test_spelling_of_a_product_with_a_vector_of_the_example_does_not_matter():
    torch.manual_seed(0)
    x, w, expected = normal(60, 4, dtype=torch.float64), normal(60, 8, dtype=torch.float64), None
    for name, dot in DOTS.items():
        torch.manual_seed(0)
        model = Function(
            lambda m, x, w, dot=dot: dot(m["p"](x).relu(), w), p=nn.Linear(4, 8)
        ).double()
        inverse = InverseNetwork(model.eval()).fit([(x, w)], unpack=tuple, progress=False)
        methods = (LRP(model), DeepTaylor(model), GuidedBackprop(model), ExcitationBackprop(model))
        maps = []
        for method in (*methods, MIPINAttribution(model, inverse)):
            maps.append(method.attribute(x[:3], additional_forward_args=w[:3]))
            rows = zip(x[:3].split(1), w[:3].split(1), strict=True)
            alone = [method.attribute(a, additional_forward_args=b) for a, b in rows]
            torch.testing.assert_close(torch.cat(alone), maps[-1], msg=name)
        expected = expected or maps
        for a, b in zip(maps, expected, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_a_product_with_a_constant_vector_is_a_layer():
    torch.manual_seed(0)
    x, w = normal(60, 5, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    runs = (
        lambda m, x: F.linear(m["p"](x).relu(), w[None])[..., 0] @ m["last"].weight.T,
        lambda m, x: m["last"](m["p"](x).relu() @ w),
        lambda m, x: m["last"](w @ m["p"](x).relu().mT),
        lambda m, x: m["last"](m["p"](x).relu().flatten(0, 1).mv(w).view(-1, 5)),
    )
    alike(runs, x, p=nn.Linear(4, 8), last=nn.Linear(5, 2, bias=False))


def test_bilinear_is_a_layer_and_a_product():
    torch.manual_seed(0)
    parts = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 2), "last": nn.Bilinear(3, 2, 2)}

    def by_hand(m, x):
        layer = m["last"]
        h = torch.stack([m["a"](x).relu() @ w for w in layer.weight], 1)
        return (h * m["b"](x)[:, None]).sum(-1) + layer.bias

    def run(m, x):
        return m["last"](m["a"](x).relu(), m["b"](x))

    x = normal(60, 4, dtype=torch.float64)
    first, other = (Function(how, **parts).double().eval() for how in (run, by_hand))
    for method in (LRP, GuidedBackprop):
        torch.testing.assert_close(method(first).attribute(x, 1), method(other).attribute(x, 1))
    assert not check(first, x).refused


AVERAGES = {
    "sum": lambda w, h: (w * h).sum(1) / 5,
    "mean": lambda w, h: (w * h).mean(1),
    "bmm": lambda w, h: torch.bmm(w.mT, h).squeeze(1) / 5,
    "mean behind a transposition": lambda w, h: (h * w).mT.mean(-1),
    "average pooling": lambda w, h: F.avg_pool1d((w * h).mT, 5).flatten(1),
    "adaptive pooling": lambda w, h: F.adaptive_avg_pool1d((h * w).mT, 1).squeeze(2),
    "kept dimension": lambda w, h: (h * w).mT.mean(-1, keepdim=True).squeeze(2),
    "pooling of images": lambda w, h: F.adaptive_avg_pool2d(
        h.mT[..., None] * w.mT[..., None], 1
    ).flatten(1),
}


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_an_average_by_weights_is_a_weighted_sum(gate):
    torch.manual_seed(0)
    parts = {"p": nn.Linear(4, 8), "a": nn.Linear(8, 1), "last": nn.Linear(8, 2)}
    weights = torch.sigmoid if gate == "sigmoid" else lambda a: a.softmax(1)
    runs = [pooled(weights, how) for how in AVERAGES.values()]
    alike(runs, normal(60, 5, 4, dtype=torch.float64), **parts)


@pytest.mark.parametrize("total", [torch.sum, torch.mean], ids=["sum", "mean"])
def test_an_activation_is_no_weighted_sum(total):
    torch.manual_seed(0)
    parts = {"p": nn.Linear(4, 8), "last": nn.Linear(8, 2)}
    with torch.no_grad():
        parts["last"].bias.fill_(2)
    x = normal(60, 5, 4, dtype=torch.float64)
    hows = (F.silu, lambda h: h * torch.sigmoid(h))
    runs = [lambda m, x, f=f: m["last"](total(f(m["p"](x)), 1)) for f in hows]
    alike(runs, x, **parts)


def attention(how):
    def run(m, x):
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in m["qkv"](x).chunk(3, -1))
        if how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif how == "by hand":
            scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) / 3**0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            y = (weights[..., None] * v[:, :, None]).sum(3)
        else:
            scores = torch.einsum("bhic,bhjc->bhij", q, k) * 3**-0.5
            scores = scores - scores.amax(-1, keepdim=True)
            y = torch.einsum("bhij,bhjc->bhic", scores.softmax(-1), v)
        return m["last"](m["out"](y.transpose(1, 2).flatten(2)).mean(1))

    return run


def test_attention_by_hand_equals_the_fused_one_and_the_module():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, batch_first=True)
    parts = {"qkv": nn.Linear(6, 18), "out": module.out_proj, "last": nn.Linear(6, 2)}
    with torch.no_grad():
        parts["qkv"].weight.copy_(module.in_proj_weight)
        parts["qkv"].bias.copy_(module.in_proj_bias)
    x = normal(60, 5, 6, dtype=torch.float64)
    alike([attention(how) for how in ("fused", "by hand", "einsum")], x, **parts)
    one = maps(attention("by hand"), x, **parts)
    other = maps(lambda m, x: m["last"](m["module"](x, x, x, need_weights=False)[0].mean(1)),
                 x, module=module, last=parts["last"])  # fmt: skip
    for a, b in zip(one[:1] + one[3:5], other[:1] + other[3:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


STACKED = {
    "+": lambda a, b: a + b,
    "sum": lambda a, b: torch.stack([a, b]).sum(0),
    "mean": lambda a, b: torch.stack([a, b], -1).mean(-1) * 2,
    "mean of a sum": lambda a, b: (a + b) / 2 * 2,
    "cat": lambda a, b: torch.cat([a[:, None], b.unsqueeze(1)], 1).sum(1),
    "kept": lambda a, b: torch.stack([a, b], 1).sum(1, keepdim=True)[:, 0],
    "Python": lambda a, b: sum([a, b]),
    "loop": lambda a, b: reduce(torch.add, [a, b]),
    "weights of 1": lambda a, b: (torch.stack([a, b], 1) * a.new_ones(2, 1)).sum(1),
}


WEIGHTED = [
    lambda a, b, w: w[0] * a + w[1] * b,
    lambda a, b, w: (torch.stack([a, b]) * w[:, None, None]).sum(0),
    lambda a, b, w: (w * torch.stack([a, b], -1)).sum(-1),
]


@pytest.mark.parametrize(
    "spellings",
    [[lambda a, b, w, how=how: how(a, b) for how in STACKED.values()], WEIGHTED],
    ids=["plain", "weighted"],
)
def test_spelling_of_a_sum_of_tensors_does_not_matter(spellings):
    torch.manual_seed(0)
    modules = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "last": nn.Linear(6, 2)}

    def run(how):
        def forward(m, x):
            h, weights = m["a"](x).relu(), m["b"].bias[:2].softmax(0)
            return m["last"](how(m["b"](h), h, weights).relu())

        return forward

    alike([run(how) for how in spellings], normal(60, 4, dtype=torch.float64), **modules)


LAYER_NORMS = {
    "module": lambda n, h: n(h),
    "mean and var": lambda n, h: (
        (
            (h - h.mean(-1, keepdim=True))
            / torch.sqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-5)
        )
        * n.weight
        + n.bias
    ),
    "var_mean": lambda n, h: (
        n.bias
        + n.weight
        * (h - torch.var_mean(h, -1, correction=0, keepdim=True)[1])
        * torch.rsqrt(torch.var_mean(h, -1, correction=0, keepdim=True)[0] + 1e-5)
    ),
    "squares": lambda n, h: torch.addcmul(
        n.bias,
        (h - h.mean(-1, True)) * ((h - h.mean(-1, True)).pow(2).mean(-1, True) + 1e-5).pow(-0.5),
        n.weight,
    ),
    "difference of squares": lambda n, h: (
        (h - h.mean(2, True))
        .div(((h * h).mean(2, True) - h.mean(2, True).square() + 1e-5).sqrt())
        .mul(n.weight)
        .add(n.bias)
    ),
    "along another dimension": lambda n, h: (
        (
            lambda t: (
                (t - t.mean(1, True))
                / (t.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                * n.weight[:, None]
                + n.bias[:, None]
            )
        )(h.mT).mT
    ),
}


def normed(norm):
    return lambda m, x: m["last"](norm(m["n"], m["a"](x)).relu().flatten(1))


def test_layer_norms_by_hand_equal_the_module():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    modules = {"a": nn.Linear(4, 6), "n": norm, "last": nn.Linear(18, 2)}
    runs = [normed(one) for one in LAYER_NORMS.values()]
    alike(runs, normal(80, 3, 4, dtype=torch.float64), **modules)
    model = Function(normed(LAYER_NORMS["mean and var"]), **modules).double().eval()
    rows = check(model, normal(2, 3, 4, dtype=torch.float64)).rows
    assert ("aten.div.Tensor", "times the recorded σ") in [(r.operation, r.note) for r in rows]


def test_rms_norms_by_hand_equal_the_module():
    torch.manual_seed(0)
    norm = nn.RMSNorm(6, eps=1e-6)
    nn.init.normal_(norm.weight)

    def of_language_models(n, h):
        dtype, t = h.dtype, h.to(torch.float64)
        t = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6)
        return n.weight * t.to(dtype)

    def by_ratio(n, h):
        return h / torch.sqrt(torch.mean(h * h, dim=2, keepdim=True) + 1e-6) * n.weight

    def by_reciprocal(n, h):
        return h * (1 / (h.square().sum(-1, True) / 6 + 1e-6) ** 0.5) * n.weight

    def by_length(n, h):  # ScaleNorm with the length of √6 has no ε
        return h / h.norm(dim=-1, keepdim=True) * 6**0.5 * n.weight

    modules = {"a": nn.Linear(4, 6), "n": norm, "last": nn.Linear(18, 2)}
    runs = [normed(one) for one in (lambda n, h: n(h), of_language_models, by_ratio, by_reciprocal)]
    x = normal(80, 3, 4, dtype=torch.float64)
    alike(runs, x, **modules)
    maps(normed(by_length), x, **modules)


RATIOS = {
    "normalize": lambda h: F.normalize(h, dim=-1),
    "by its length": lambda h: h / h.norm(dim=-1, keepdim=True),
    "times a reciprocal": lambda h: h * h.norm(dim=-1, keepdim=True).reciprocal(),
    "times a quotient": lambda h: h * (1 / h.norm(dim=-1, keepdim=True)),
    "by a root": lambda h: h / h.square().sum(-1, keepdim=True).sqrt(),
    "times a root": lambda h: (h * h).sum(-1, keepdim=True).rsqrt() * h,
    "times a power": lambda h: h * h.pow(2).sum(-1, True) ** -0.5,
    "expanded": lambda h: h / h.norm(dim=-1, keepdim=True).expand_as(h),
    "with a bound": lambda h: h / h.norm(dim=-1, keepdim=True).clamp(min=1e-12),
    "true_divide": lambda h: torch.true_divide(
        h, torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    ),
}


#: A length plus a constant: its reciprocal is finite at 0, and is still a scale of h alone.
GUARDED = {
    "by a sum": lambda h: h / (h.norm(dim=-1, keepdim=True) + 0.1),
    "times a reciprocal": lambda h: h * (1 / (h.norm(dim=-1, keepdim=True) + 0.1)),
}


@pytest.mark.parametrize("spellings", [RATIOS, GUARDED], ids=["bare", "plus a constant"])
def test_spelling_of_a_norm_by_length_does_not_matter(spellings):
    torch.manual_seed(0)
    modules = {"a": nn.Linear(4, 6), "n": nn.Identity(), "last": nn.Linear(18, 2)}
    runs = [normed(lambda n, h, how=how: how(h)) for how in spellings.values()]
    alike(runs, normal(80, 3, 4, dtype=torch.float64), **modules)


def test_gradients_of_respelled_operations_equal_autograd():
    torch.manual_seed(0)
    modules = {"a": nn.Linear(4, 6), "n": nn.LayerNorm(6), "last": nn.Linear(6, 2)}

    def run(m, x):
        h = m["a"](x)
        h = LAYER_NORMS["var_mean"](m["n"], h) + h**3 * h.square()
        h = torch.stack([h, h * torch.rsqrt(h.pow(2).sum(-1, True))]).mean(0)
        h = torch.addcmul(h, h, h.tanh(), value=2) + torch.lerp(h, h.sin(), 0.3)
        return m["last"]((h.softmax(1) * h).sum(1))

    model, x = Function(run, **modules).double().eval(), normal(4, 3, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(Gradient(model).attribute(x, 1), expected)
