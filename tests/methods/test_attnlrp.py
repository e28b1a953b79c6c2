"""AttnLRP: by gradients of a network whose gates are cut by hand, and in every spelling."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import check
from captum_mipin.errors import InputError
from captum_mipin.methods import LRP, Epsilon, Gamma, LayerPropagation

EXACT = {"rule": Epsilon(0), "attention": "attnlrp"}


def half(t):
    """Return t with half of its gradient: half of a product's relevance, times t."""
    return (t + t.detach()) / 2


def own_norm(x, norm):
    """Return a layer norm whose σ has no gradient."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / x.var(-1, correction=0, keepdim=True).add(norm.eps).sqrt().detach()


def own_share(f, x):
    """Return f(x) as x times a constant: the relevance of f(x) goes to x whole."""
    return x * (f(x) / x).detach()


def heads(t, count=2):
    return t.unflatten(-1, (count, -1)).transpose(1, 2)


def mask_of(kind):
    allowed = torch.ones(5, 5, dtype=torch.bool).tril(1)
    return allowed if kind == "bool" else torch.zeros(5, 5).double().masked_fill(~allowed, -1e4)


def look(q, k, v, how):
    """Return softmax(Q Kᵀ / √3) V in the spelling ``how``."""
    if how == "fused":
        return F.scaled_dot_product_attention(q, k, v)
    if how == "fused, masked":
        return F.scaled_dot_product_attention(q, k, v, mask_of("bool"), scale=0.3)
    if how == "fused, added mask":
        return F.scaled_dot_product_attention(q, k, v, mask_of("float"), scale=0.3)
    if how == "fused, causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if how in ("masked", "filled"):
        scores = 0.3 * q @ k.mT
        if how == "filled":
            scores = scores.masked_fill(~mask_of("bool"), -torch.inf)
        else:
            scores = scores + mask_of("float")
        return scores.softmax(-1) @ v
    if how == "causal":
        scores = torch.where(torch.ones(5, 5).tril() > 0, q @ k.mT / 3**0.5, -torch.inf)
        return scores.softmax(-1) @ v
    if how == "matmul":
        return (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1).matmul(v)
    if how == "scaled before":
        return F.softmax((q / 3**0.5) @ k.mT, dim=3) @ v
    if how == "exponentials":
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) / 3**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return (weights[..., None] * v[:, :, None]).sum(3)
    if how == "divided behind":
        weights = torch.exp(q @ k.mT / 3**0.5)
        return (weights @ v) * (1 / weights.sum(-1, keepdim=True))
    if how == "divided einsum":
        scores = torch.einsum("bhic,bhjc->bhij", q, k) * 3**-0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        total = torch.einsum("bhij->bhi", weights)[..., None]
        return torch.einsum("bhij,bhjc->bhic", weights, v) / total
    assert how == "einsum"
    scores = torch.einsum("bhic,bhjc->bhij", q, k) * 3**-0.5
    scores = scores - scores.amax(-1, keepdim=True)
    return torch.einsum("bhij,bhjc->bhic", scores.softmax(-1), v)


def transformer(how):
    """Return a block with attention and a gated unit, with norms, and a class."""

    def run(m, x):
        y = m["norm"](x)
        q, k, v = map(heads, m["qkv"](y).chunk(3, -1))
        h = x + m["out"](look(q, k, v, how).transpose(1, 2).flatten(2))
        a, b = m["up"](m["norm"](h)).chunk(2, -1)
        h = h + m["down"](F.silu(a) * b)
        return m["last"](h[:, 0])

    return run


def by_gradient(m, x, target, scale=3**-0.5, allowed=None):
    """Return x ⊙ gradient of the network of ``transformer``, with halves and constants."""
    x = x.clone().requires_grad_()
    norm = m["norm"]
    y = own_norm(x, norm) * norm.weight + norm.bias
    q, k, v = map(heads, m["qkv"](y).chunk(3, -1))
    scores = scale * half(q) @ half(k).mT
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e4)
    h = x + m["out"]((half(scores.softmax(-1)) @ half(v)).transpose(1, 2).flatten(2))
    y = own_norm(h, norm) * norm.weight + norm.bias
    a, b = m["up"](y).chunk(2, -1)
    h = h + m["down"](half(own_share(F.silu, a)) * half(b))
    (gradient,) = torch.autograd.grad(m["last"](h[:, 0])[:, target].sum(), x)
    return x.detach() * gradient


def modules():
    torch.manual_seed(0)
    layers = {"norm": nn.LayerNorm(6), "qkv": nn.Linear(6, 18), "out": nn.Linear(6, 6)}
    layers |= {"up": nn.Linear(6, 14), "down": nn.Linear(7, 6), "last": nn.Linear(6, 3)}
    nn.init.normal_(layers["norm"].weight)
    nn.init.normal_(layers["norm"].bias)
    return {name: layer.double() for name, layer in layers.items()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


#: Spellings with the same values, and the mask and the scale that they have.
SPELLINGS = {
    "plain": (
        ("fused", "matmul", "scaled before", "exponentials", "einsum", "divided behind",
         "divided einsum"), {}
    ),
    "masked": (
        ("fused, masked", "filled"), {"scale": 0.3, "allowed": mask_of("bool")}
    ),
    "causal": (
        ("fused, causal", "causal"), {"allowed": torch.ones(5, 5, dtype=torch.bool).tril()}
    ),
    "added": (
        ("fused, added mask", "masked"), {"scale": 0.3, "allowed": mask_of("bool")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_has_the_relevance_of_a_gradient_by_hand(kind):
    hows, options = SPELLINGS[kind]
    x, layers = normal(4, 5, 6, dtype=torch.float64), modules()
    expected = by_gradient(layers, x, 1, **options)
    for how in hows:
        model = Function(transformer(how), **layers).eval()
        close(LRP(model, **EXACT).attribute(x, 1), expected)


def test_modules_with_and_without_weights_and_heads_that_share_keys():
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(6, 2, batch_first=True), normal(4, 5, 6, dtype=torch.float64)
    parts = {"module": module, "last": nn.Linear(6, 2)}
    found = []
    for wanted in (False, True):
        run = lambda m, x, w=wanted: m["last"](m["module"](x, x, x, need_weights=w)[0].mean(1))  # noqa: E731
        found.append(LRP(Function(run, **parts).double().eval(), **EXACT).attribute(x, 1))
    close(*found)

    def shared(gqa):
        def run(m, x):
            q, kv = heads(m["q"](x), 4), heads(m["kv"](x))
            if not gqa:
                kv = kv.repeat_interleave(2, 1)
            y = F.scaled_dot_product_attention(q, kv, kv, enable_gqa=gqa)
            return m["last"](y.transpose(1, 2).flatten(2).mean(1))

        return run

    parts = {"q": nn.Linear(6, 12), "kv": nn.Linear(6, 6), "last": nn.Linear(12, 2)}
    a, b = (
        LRP(Function(shared(gqa), **parts).double().eval(), **EXACT).attribute(x, 1)
        for gqa in (True, False)
    )
    close(a, b)
    assert a.abs().max() > 0


def test_the_softmax_by_its_jacobian():
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 5).double(), "b": nn.Linear(5, 3).double()}
    model = Function(lambda m, x: m["b"](m["a"](x).softmax(1)), **layers).eval()
    x = normal(6, 4, dtype=torch.float64)
    found = LayerPropagation(LRP(model, **EXACT), layers["a"]).attribute(x, 1)
    for z, r in zip(layers["a"](x).detach(), found, strict=True):
        y = z.softmax(0)
        jacobian = torch.autograd.functional.jacobian(lambda t: t.softmax(0), z)  # ∂y_j / ∂z_i
        weight = layers["b"].weight[1].detach()
        total = y @ weight + layers["b"].bias[1].detach()
        relevance = y * weight / total * total
        close(r, z * (jacobian.mT @ (relevance / y)))
    with pytest.raises(Exception, match=r"aten\.softmax"):
        LRP(model).attribute(x, 1)


def test_relevance_is_conserved_where_no_softmax_is():
    def run(m, x):
        h = m["norm"](m["a"](x))
        h = h + F.gelu(m["b"](h)) * torch.sigmoid(m["c"](h)) + F.glu(torch.cat([h, m["b"](h)], -1))
        h = m["rms"](h @ h.mT @ h)
        return m["last"](h.mean(1) * (h.amax(1) > 0))

    torch.manual_seed(0)
    model = Function(
        run, a=nn.Linear(4, 6, bias=False), b=nn.Linear(6, 6, bias=False),
        c=nn.Linear(6, 6, bias=False), norm=nn.LayerNorm(6), rms=nn.RMSNorm(6),
        last=nn.Linear(6, 3, bias=False),
    ).double().eval()  # fmt: skip
    nn.init.normal_(model.layers["norm"].bias)  # takes nothing with bias="none"
    x = normal(4, 5, 4, dtype=torch.float64)
    for rule in (Epsilon(0), Gamma(0.25)):
        method = LRP(model, rule=rule, attention="attnlrp", bias="none")
        found, delta = method.attribute(x, [0, 1, 2, 0], return_convergence_delta=True)
        assert delta.abs().max() < 1e-6 * found.abs().sum()
    report = check(model, x, method=method)
    notes = [(row.operation, row.note) for row in report.rows]
    assert ("aten.mul.Tensor", "half to each factor") in notes
    assert ("aten.glu.default", "half to value and gate") in notes


@pytest.mark.parametrize(
    "gated", [lambda a, b: a * b.sigmoid(), lambda a, b: F.glu(torch.cat([a, b], 1))]
)
def test_halves_of_gates_by_hand(gated):
    def run(m, x):
        return m["last"](gated(m["a"](x), m["b"](x)))

    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5), "last": nn.Linear(5, 2)}
    model = Function(run, **layers).double().eval()
    x = normal(6, 4, dtype=torch.float64)
    a, b = (layers[name](x).detach() for name in ("a", "b"))
    r = a * b.sigmoid() * layers["last"].weight[1].detach()
    expected = sum(
        x * ((r / 2 / z) @ layers[name].weight.detach()) for name, z in (("a", a), ("b", b))
    )
    close(LRP(model, **EXACT).attribute(x, 1), expected)


def test_masks_of_minus_infinity_and_biases_that_take_nothing():
    def run(m, x):
        mask = torch.zeros(5, 5, dtype=x.dtype).masked_fill(~mask_of("bool"), -torch.inf)
        q, k, v = map(heads, m["qkv"](x).chunk(3, -1))
        return m["last"](((q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2).flatten(2).mean(1))

    parts = modules()
    model = Function(run, qkv=parts["qkv"], last=parts["last"]).eval()
    x = normal(4, 5, 6, dtype=torch.float64)
    for bias in ("take", "none"):
        found = LRP(model, **EXACT, bias=bias).attribute(x, 1)
        assert torch.isfinite(found).all()
        assert found.abs().max() > 0


def test_batches_dtypes_layers_and_threads():
    x, layers = normal(4, 5, 6, dtype=torch.float64), modules()
    model = Function(transformer("fused"), **layers).eval()
    targets = [0, 2, 1, 1]
    method = LRP(model, attention="attnlrp")
    together = method.attribute(x, targets)
    alone = [method.attribute(x[i : i + 1], targets[i]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), together)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(method.attribute, x, targets) for _ in range(8)]
        assert all(torch.equal(job.result(), together) for job in jobs)
    at_norm = LayerPropagation(method, layers["qkv"]).attribute(x, targets)
    assert at_norm.shape == (4, 5, 18)
    single = LRP(model.float(), attention="attnlrp").attribute(x.float(), targets)
    torch.testing.assert_close(single.double(), together, rtol=1e-2, atol=1e-3)


def test_other_names_are_refused():
    with pytest.raises(InputError, match="attention"):
        LRP(nn.Linear(2, 2), attention="chefer")
