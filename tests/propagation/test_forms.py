"""Products, ratios, sums and norms: the way they are written changes no map of any method."""

from functools import reduce

import pytest
import torch
from every_method import alike, maps
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, MIPINAttribution, check
from captum_mipin.graph.capture import capture
from captum_mipin.graph.nodes import operation
from captum_mipin.methods import LRP, DeepTaylor, ExcitationBackprop, GuidedBackprop
from captum_mipin.methods.gradients import Gradient
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.rules import table


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


def test_a_sum_of_products_behind_a_reshape_of_the_batch():
    torch.manual_seed(0)
    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "last": nn.Linear(3, 2)}
    nn.init.constant_(parts["last"].bias, 30.0)
    hows = (
        lambda a, b: (a * b).sum(-1),
        lambda a, b: (a * b).reshape(1, -1, 6).sum(2).view(-1, 3),
        lambda a, b: (a * b).flatten(0, 1).sum(1, keepdim=True).view(-1, 3),
    )
    runs = [lambda m, x, how=how: m["last"](how(m["a"](x), m["b"](x))) for how in hows]
    alike(runs, normal(60, 3, 4, dtype=torch.float64), **parts)


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


def single(how):
    """A network with attention of one head; ``how`` takes scores and values."""

    def run(m, x):
        q, k, v = m["qkv"](x).chunk(3, -1)
        return m["last"](how(q @ k.mT * 6**-0.5, v).mean(1))

    return run


def exponentials(s):
    return (s - s.amax(-1, keepdim=True)).exp()


SINGLE = {
    "softmax": lambda s, v: s.softmax(-1) @ v,
    "before": lambda s, v: (s.exp() / s.exp().sum(-1, keepdim=True)) @ v,
    "behind": lambda s, v: (lambda w: (w @ v) / w.sum(-1, keepdim=True))(s.exp()),
    "twice": lambda s, v: (s.exp() @ v) / s.exp().sum(-1, keepdim=True),
    "less the maximum": lambda s, v: (lambda w: (w @ v) * (1 / w.sum(-1, keepdim=True)))(
        exponentials(s)
    ),
    "einsum": lambda s, v: (
        torch.einsum("bij,bjc->bic", s.exp(), v) / torch.einsum("bij->bi", s.exp())[..., None]
    ),
    "expanded": lambda s, v: (s.exp() @ v) / s.exp().sum(-1, keepdim=True).expand_as(v),
}


def test_a_sum_of_weights_may_divide_before_or_behind_the_product():
    torch.manual_seed(0)
    parts = {"qkv": nn.Linear(6, 18), "last": nn.Linear(6, 2)}
    nn.init.constant_(parts["last"].bias, 3.0)
    runs = [single(how) for how in SINGLE.values()]
    alike(runs, normal(60, 5, 6, dtype=torch.float64), **parts)
    pools = [
        pooled(lambda a: a.softmax(1), lambda w, h: (w * h).sum(1)),
        pooled(torch.exp, lambda w, h: (w * h).sum(1) / w.sum(1)),
        pooled(torch.exp, lambda w, h: ((w.mT @ h) / w.mT.sum(-1, keepdim=True)).squeeze(1)),
        pooled(torch.exp, lambda w, h: torch.einsum("bno,bnc->bc", w, h) / w.sum((1, 2))[:, None]),
    ]
    parts = {"p": nn.Linear(4, 8), "a": nn.Linear(8, 1), "last": nn.Linear(8, 2)}
    nn.init.constant_(parts["last"].bias, 3.0)
    alike(pools, normal(60, 5, 4, dtype=torch.float64), **parts)


COSINES = {
    "normalize": lambda h, w: F.linear(F.normalize(h), F.normalize(w)),
    "cosine_similarity": lambda h, w: F.cosine_similarity(h[:, None], w[None], dim=2),
    "behind": lambda h, w: F.linear(h, F.normalize(w)) / h.norm(dim=1, keepdim=True),
    "einsum": lambda h, w: torch.einsum("bc,oc->bo", F.normalize(h), F.normalize(w)),
    "product": lambda h, w: (F.normalize(h)[:, None] * F.normalize(w)).sum(2),
}


def test_spelling_of_a_cosine_does_not_matter():
    torch.manual_seed(0)
    modules = {"p": nn.Linear(4, 8), "w": nn.Linear(8, 3)}
    runs = [lambda m, x, how=how: how(m["p"](x), m["w"].weight) for how in COSINES.values()]
    alike(runs, normal(60, 4, dtype=torch.float64), **modules)


@pytest.mark.parametrize(
    "how",
    [
        lambda h, w: (lambda y: y / y.norm(dim=-1, keepdim=True))(F.linear(h, w)),
        lambda h, w: (lambda a, b: (a @ b) / (a * b.mT).sum(-1, keepdim=True))(
            h, F.linear(h, w).mT
        ),
        lambda h, w: F.linear(h, w) / (F.linear(h, w).square().sum(-1, keepdim=True) + 1),
    ],
    ids=["of the product", "of both factors", "of the product again"],
)
def test_other_divisors_stay_behind_the_product(how):
    torch.manual_seed(0)
    modules = {"p": nn.Linear(4, 8), "w": nn.Linear(8, 8)}
    run = lambda m, x: how(m["p"](x).relu(), m["w"].weight).flatten(1)  # noqa: E731
    x = normal(9, 5, 4, dtype=torch.float64)
    model = Function(run, **modules).double().eval()
    made = draft(capture(model, (x,)), table(), passes=MARKING)
    ratio = next(n for n in made.graph.nodes if operation(n) in ("divided", "rms_norm"))
    assert operation(ratio.args[0]) in ("linear", "matmul")


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


MEANS = {
    "einsum": lambda h: (torch.einsum("bnc->bn", h) / 6)[..., None],
    "einsum with numbers": lambda h: torch.einsum("bnc,c->bn", h, h.new_full((6,), 1 / 6))[
        ..., None
    ],
    "layer": lambda h: F.linear(h, torch.full((1, 6), 1 / 6, dtype=h.dtype)),
    "layer of ones": lambda h: F.linear(h, h.new_ones(1, 6)) / 6,
    "layer in the code": lambda h: F.linear(h, torch.tensor([[1 / 6] * 6], dtype=h.dtype)),
    "adaptive pooling": lambda h: F.adaptive_avg_pool1d(h, 1),
    "pooling": lambda h: F.avg_pool1d(h, 6),
    "matrix": lambda h: h @ torch.full((6, 1), 1 / 6, dtype=h.dtype),
    "vector": lambda h: (h @ h.new_full((6,), 1 / 6))[..., None],
    "sum of products": lambda h: (h * h.new_full((6,), 1 / 6)).sum(-1, keepdim=True),
    "slices": lambda h: (sum(h[..., i] for i in range(6)) / 6).unsqueeze(-1),
}


def by_means(mean):
    def norm(n, h):
        centred = h - mean(h)
        return centred / (mean(centred * centred) + 1e-5).sqrt() * n.weight + n.bias

    return norm


#: A norm of centred values.
CENTRED = {
    "rms_norm": lambda n, c: F.rms_norm(c, (6,), None, 1e-5) * n.weight + n.bias,
    "rms_norm with weights": lambda n, c: F.rms_norm(c, (6,), n.weight, 1e-5) + n.bias,
    "layer_norm": lambda n, c: F.layer_norm(c, (6,), n.weight, n.bias, 1e-5),
    "exp and log": lambda n, c: (
        torch.exp(-0.5 * torch.log(c.square().mean(-1, True) + 1e-5)) * c * n.weight + n.bias
    ),
}


def normed(norm):
    return lambda m, x: m["last"](norm(m["n"], m["a"](x)).relu().flatten(1))


def test_layer_norms_by_hand_equal_the_module():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    modules = {"a": nn.Linear(4, 6), "n": norm, "last": nn.Linear(18, 2)}
    norms = [*LAYER_NORMS.values(), *map(by_means, MEANS.values())]
    norms += [
        lambda n, h, how=how: how(n, h - h.mean(-1, keepdim=True)) for how in CENTRED.values()
    ]
    runs = [normed(one) for one in norms]
    alike(runs, normal(80, 3, 4, dtype=torch.float64), **modules)
    model = Function(normed(LAYER_NORMS["mean and var"]), **modules).double().eval()
    rows = check(model, normal(2, 3, 4, dtype=torch.float64)).rows
    assert ("aten.div.Tensor", "times the recorded σ") in [(r.operation, r.note) for r in rows]


def test_layer_norms_without_a_constant():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6, eps=0)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    hows = {
        "module": lambda n, c: F.layer_norm(c, (6,), n.weight, n.bias, 0.0),
        "normalize": lambda n, c: F.normalize(c, dim=-1) * 6**0.5 * n.weight + n.bias,
        "weights first": lambda n, c: F.normalize(c, dim=-1) * (6**0.5 * n.weight) + n.bias,
        "length": lambda n, c: c / c.norm(dim=-1, keepdim=True) * n.weight * 6**0.5 + n.bias,
        "std": lambda n, c: c / c.std(-1, correction=0, keepdim=True) * n.weight + n.bias,
    }
    runs = [normed(lambda n, h, how=how: how(n, h - h.mean(-1, True))) for how in hows.values()]
    modules = {"a": nn.Linear(4, 6), "n": norm, "last": nn.Linear(18, 2)}
    alike(runs, normal(80, 3, 4, dtype=torch.float64), **modules)


@pytest.mark.parametrize(
    ("norm", "divides"),
    [
        (lambda h: h / h.norm(dim=-1, keepdim=True).clamp(1e-12, 100), True),
        (lambda h: h / h.norm(dim=-1, keepdim=True).clamp(min=0.1), True),
        (lambda h: h * (-h.square().mean(-1, True)).exp(), False),
    ],
    ids=["upper bound", "large bound", "bell"],
)
def test_what_is_nearly_a_norm_is_none(norm, divides):
    torch.manual_seed(0)
    modules = {"a": nn.Linear(4, 6), "n": nn.Identity(), "last": nn.Linear(18, 2)}
    model = Function(normed(lambda n, h: norm(h)), **modules).double().eval()
    x = normal(9, 3, 4, dtype=torch.float64) * 1e4
    notes = {row.note for row in check(model, x).rows}
    assert "times the recorded root mean square" not in notes
    assert ("times the recorded divisor" in notes) == divides
    torch.testing.assert_close(Gradient(model).attribute(x, 1), gradient(model, x))


def gradient(model, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0]


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

    def by_logarithms(n, h):
        return torch.exp(-0.5 * torch.log((h * h).mean(-1, True) + 1e-6)) * h * n.weight

    def of_base_2(n, h):
        square = torch.einsum("bnc,bnc->bn", h, h)[..., None] / 6
        return h / torch.exp2(0.5 * torch.log2(square + 1e-6)) * n.weight

    modules = {"a": nn.Linear(4, 6), "n": norm, "last": nn.Linear(18, 2)}
    norms = (of_language_models, by_ratio, by_reciprocal, by_logarithms, of_base_2)
    runs = [normed(one) for one in (lambda n, h: n(h), *norms)]
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
    "times an exponential": lambda h: (-0.5 * h.square().sum(-1, True).log()).exp() * h,
    "true_divide": lambda h: torch.true_divide(
        h, torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    ),
}


#: A length plus a constant: its reciprocal is finite at 0, and is still a scale of h alone.
GUARDED = {
    "by a sum": lambda h: h / (h.norm(dim=-1, keepdim=True) + 0.1),
    "times a reciprocal": lambda h: h * (1 / (h.norm(dim=-1, keepdim=True) + 0.1)),
    "times an exponential": lambda h: (-(h.norm(dim=-1, keepdim=True) + 0.1).log()).exp() * h,
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


def test_a_constant_beside_a_length_is_none_of_a_norm():
    def run(m, x):
        h = m["a"](x)
        return m["last"](h / (h.norm(dim=1, keepdim=True) + 1e-8))

    model = Function(run, a=nn.Linear(4, 6), last=nn.Linear(6, 2)).double().eval()
    graph = draft(capture(model, (normal(2, 4, dtype=torch.float64),)), table(), passes=MARKING)
    names = {operation(node) for node in graph.graph.nodes}
    assert "divided" in names and "rms_norm" not in names
