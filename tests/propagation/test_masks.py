"""Masks and masked means: the way they are written changes no map of any method."""

import pytest
import torch
from designs import aside
from every_method import alike
from small import Function, normal
from torch import nn

from captum_mipin import InverseNetwork, check
from captum_mipin.methods import (
    LRP,
    Deconvnet,
    DeepTaylor,
    Epsilon,
    ExcitationBackprop,
    GuidedBackprop,
    LayerPropagation,
)

X = normal(60, 5, 6, dtype=torch.float64)
MASK = torch.rand(60, 5, generator=torch.Generator().manual_seed(1)) < 0.6
MASK[:, 0] = True


def modules(**others):
    torch.manual_seed(0)
    return {"p": nn.Linear(6, 8), "last": nn.Linear(8, 2), **others}


def pooled(how, mask=lambda x, *given: given[0]):
    """A network that pools five tokens; ``how`` takes them and the mask."""
    return lambda m, x, *given: m["last"](how(m["p"](x).relu(), mask(x, *given)))


#: Spellings of the mean of h where k is true, for h (batch, tokens, features), k (batch, tokens).
MEANS = {
    "product": lambda h, k: (h * k[..., None]).sum(1) / k.sum(1, keepdim=True),
    "numbers": lambda h, k: (lambda m: (h * m).sum(1) / m.sum(1))(k[..., None].to(h.dtype)),
    "sentence-transformers": lambda h, k: (
        lambda m: torch.sum(h * m, 1) / torch.clamp(m.sum(1), min=1e-9)
    )(k.unsqueeze(-1).expand(h.size()).to(h.dtype)),
    "masked_fill": lambda h, k: h.masked_fill(~k[..., None], 0).sum(1) / k.sum(1, keepdim=True),
    "masked_fill_": lambda h, k: (
        h.clone().masked_fill_(k[..., None].logical_not(), 0.0).sum(1) / k.sum(1)[:, None]
    ),
    "where": lambda h, k: torch.where(k[..., None], h, 0).sum(1) / k.sum(1, keepdim=True),
    "where of zeros": lambda h, k: (
        torch.where(~k[..., None], torch.zeros_like(h), h).sum(1) / k.sum(1, keepdim=True)
    ),
    "where of a tensor": lambda h, k: (
        torch.where(k[..., None], h, torch.tensor(0.0, dtype=h.dtype)).sum(1) / k.sum(1)[:, None]
    ),
    "kept dimension": lambda h, k: (
        (h * k[..., None]).sum(1, keepdim=True) / k[..., None].sum(1, keepdim=True)
    ).squeeze(1),
    "weights": lambda h, k: (h * (k.to(h.dtype) / k.sum(1, keepdim=True))[..., None]).sum(1),
    "bmm": lambda h, k: torch.bmm((k.to(h.dtype) / k.sum(1, keepdim=True))[:, None], h)[:, 0],
    "divided behind bmm": lambda h, k: (
        torch.bmm(k.to(h.dtype)[:, None], h)[:, 0] / k.sum(1, keepdim=True)
    ),
    "matmul": lambda h, k: (k.to(h.dtype)[:, None] @ h / k.sum(1)[:, None, None]).squeeze(1),
    "einsum": lambda h, k: torch.einsum("bnc,bn->bc", h, k.to(h.dtype)) / k.sum(1, keepdim=True),
    "at least 1": lambda h, k: (h * k[..., None]).sum(1) / k.sum(1, keepdim=True).clamp(min=1),
    "mean by mean": lambda h, k: (h * k[..., None]).mean(1) / k.to(h.dtype).mean(1, keepdim=True),
    "times 1 / n": lambda h, k: (h * k[..., None]).sum(1) * (1 / k.to(h.dtype).sum(1)[:, None]),
    "divided before": lambda h, k: (h * k[..., None] / k.sum(1)[:, None, None]).sum(1),
    "padding": lambda h, k: (
        (h * (1 - (~k).to(h.dtype))[..., None]).sum(1) / (5 - (~k).sum(1, keepdim=True))
    ),
}
CONSTANT = torch.tensor([True, True, False, True, False])
MASKS = {
    "given": (lambda x, k: k, X, (MASK,)),
    "constant": (lambda x: CONSTANT.expand(len(x), 5), X, ()),
    "of the input": (lambda x: x.abs().sum(-1) > 0, X * MASK[..., None], ()),
}


@pytest.mark.parametrize("kind", MASKS)
def test_spelling_of_a_masked_mean_does_not_matter(kind):
    mask, x, given = MASKS[kind]
    # the first, and one in three of the others: each of them for one kind of mask
    first, *others = MEANS.values()
    runs = [pooled(how, mask) for how in (first, *others[list(MASKS).index(kind) :: 3])]
    alike(runs, x, *given, more=True, **modules())


def test_spelling_of_a_mean_by_given_weights_does_not_matter():
    hows = [
        lambda h, w: (h * w[..., None]).sum(1) / w.sum(1, keepdim=True),
        lambda h, w: (h * (w / w.sum(1, keepdim=True))[..., None]).sum(1),
        lambda h, w: torch.bmm((w / w.sum(1, keepdim=True))[:, None], h).squeeze(1),
    ]
    alike([pooled(how) for how in hows], X, normal(60, 5).abs().double(), more=True, **modules())


LENGTHS = {
    "behind": lambda h, n: h.sum(1) / n[:, None],
    "times": lambda h, n: h.sum(1) * (1 / n[:, None].to(h.dtype)),
    "before": lambda h, n: (h / n[:, None, None]).sum(1),
    "weights": lambda h, n: (h * (1 / n.to(h.dtype))[:, None, None]).sum(1),
    "einsum": lambda h, n: torch.einsum("bnc,b->bc", h, 1 / n.to(h.dtype)),
    "kept": lambda h, n: (h / n[:, None, None]).sum(1, keepdim=True)[:, 0],
}


def test_spelling_of_a_division_by_a_given_length_does_not_matter():
    runs = [pooled(how) for how in LENGTHS.values()]
    alike(runs, X, MASK.sum(1), more=True, **modules())


MASKED = {
    "masked_fill": lambda h, k: h.masked_fill(~k[..., None], 0),
    "where": lambda h, k: torch.where(k[..., None], h, 0.0),
    "product": lambda h, k: h * k[..., None],
    "numbers": lambda h, k: k[..., None].to(h.dtype) * h,
    "not the padding": lambda h, k: h * (1.0 - (~k).to(h.dtype))[..., None],
}


def test_spelling_of_a_mask_does_not_matter():
    runs = [
        lambda m, x, k, how=how: m["last"](m["q"](how(m["p"](how(x, k)).relu(), k)).relu().mean(1))
        for how in MASKED.values()
    ]
    alike(runs, X, MASK, more=True, **modules(q=nn.Linear(8, 8)))


def test_a_value_is_found_where_another_one_is_masked_out():
    run = pooled(lambda h, k: torch.where(k[..., None], h / k[..., None], 0).sum(1))
    model = Function(run, **modules()).double().eval()
    inverse = InverseNetwork(model).fit([(X, MASK)], unpack=tuple, progress=False)
    result = inverse.explain((X[:5],), 1, (MASK[:5],), biases=(False,))
    assert result.output.isfinite().all()
    torch.testing.assert_close(result.output, model(X[:5], MASK[:5])[:, 1])
    assert result.signals[0][0].isfinite().all()


def test_a_mask_of_tokens_gets_no_relevance():
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (20, 5))
    ids[:, 0] = 3
    layers = {"words": nn.Embedding(7, 6), **modules()}
    runs = [
        lambda m, ids, how=how: m["last"](how(m["p"](m["words"](ids)).relu(), ids != 0))
        for how in (MEANS["product"], MEANS["masked_fill"])
    ]
    for options in ({}, {"attention": "attnlrp"}):
        found = []
        for run in runs:
            model = Function(run, **layers).double().eval()
            with torch.no_grad():
                model.layers["last"].bias.zero_()
                model.layers["p"].bias.zero_()
            method = LRP(model, rule=Epsilon(0), **options)
            explained = LayerPropagation(method, model.layers["words"])
            found.append(explained.attribute(ids, 1))
            torch.testing.assert_close(found[-1].sum((1, 2)), model(ids)[:, 1])
        torch.testing.assert_close(*found)


def test_a_rectifier_by_a_mask_is_one():
    runs = [
        lambda m, x, how=how: m["last"](how(m["p"](x)).sum(1))
        for how in (
            torch.relu,
            lambda h: h.masked_fill(h <= 0, 0),
            lambda h: h.masked_fill(~(h > 0), 0),
            lambda h: torch.where(h > 0, h, 0),
            lambda h: h * (h > 0),
        )
    ]
    alike(runs, X, more=True, **modules())


def test_a_given_mask_makes_no_layer_the_first_one():
    model = Function(pooled(MEANS["masked_fill"]), **modules()).double().eval()
    method = DeepTaylor(model, low=-9, high=9)
    rows = check(model, (X,), additional_forward_args=(MASK,), method=method).rows
    assert [row.note for row in rows if row.operation.startswith("aten.linear")] == ["z^B", "z⁺"]


def test_weights_made_of_a_comparison_have_no_derivative():
    mask = MASKS["of the input"][0]
    model = Function(lambda m, x: m["last"](MEANS["bmm"](m["p"](x), mask(x))), **modules())
    x = (X * MASK[..., None])[:5].requires_grad_()
    (expected,) = torch.autograd.grad(model.double().eval()(x)[:, 1].sum(), x)
    torch.testing.assert_close(GuidedBackprop(model).attribute(x.detach(), 1), expected)


POOLED = {
    "product": lambda h, k: (h * k[..., None].to(h.dtype)).sum(1),
    "einsum": lambda h, k: torch.einsum("bnc,bn->bc", h, k.to(h.dtype)),
    "where": lambda h, k: torch.where(k[..., None] > 0, h, 0.0).sum(1),
    "integers": lambda h, k: (h * k[..., None]).sum(1),
    "beside a sum": lambda h, k: (h * k[..., None].to(h.dtype)).sum(1) + h[:, 0],
}


@pytest.mark.parametrize("how", POOLED)
def test_a_mask_among_the_inputs_gets_no_relevance(how):
    """Of (tokens, mask) the tokens alone are explained, as with the mask as a further argument."""
    torch.manual_seed(0)
    parts = {"embedding": nn.Embedding(20, 6), "p": nn.Linear(6, 8, bias=False)}
    parts["last"] = nn.Linear(8, 3, bias=False)

    def run(m, tokens, mask):
        return m["last"](POOLED[how](m["p"](m["embedding"](tokens)), mask))

    model = Function(run, **parts).double().eval()
    tokens, mask = torch.randint(0, 20, (4, 5)), MASK[:4].long()
    for rule in (LRP(model, rule=Epsilon(1e-12)), GuidedBackprop(model)):
        method = LayerPropagation(rule, parts["embedding"])
        found = method.attribute((tokens, mask), target=1)
        expected = method.attribute(tokens, target=1, additional_forward_args=(mask,))
        torch.testing.assert_close(found, expected)
        if isinstance(rule, LRP):
            torch.testing.assert_close(found.flatten(1).sum(1), model(tokens, mask)[:, 1])


#: Operations on h (batch, tokens, features) and integers k (batch, tokens, 1).
MIXED = {
    "product": lambda h, k: h * k,
    "product, integers first": lambda h, k: k * h,
    "sum": lambda h, k: h + k,
    "difference": lambda h, k: k - h,
    "quotient": lambda h, k: h / (k + 1),
    "maximum": lambda h, k: torch.maximum(h, k),
    "where": lambda h, k: torch.where(k > 0, h, k),
    "cat": lambda h, k: torch.cat([h[..., 1:], k], -1),
    "scaled": lambda h, k: h * (k * 0.5 + 0.25),
    "ratio": lambda h, k: h * (k / (k + 1)),
    "few": lambda h, k: h.sum(-1, keepdim=True) * k.expand(-1, -1, 8),
}
METHODS = {
    "LRP": LRP,
    "AttnLRP": lambda model: LRP(model, attention="attnlrp"),
    "Deep Taylor": DeepTaylor,
    "Guided Backprop": GuidedBackprop,
    "Deconvnet": Deconvnet,
    "Excitation Backprop": ExcitationBackprop,
}


def positive():
    """The modules, with positive outputs: of others Deep Taylor's maps are 0."""
    parts = modules()
    nn.init.constant_(parts["last"].bias, 50)
    return parts


@pytest.mark.parametrize(
    "how", aside(MIXED, "product, integers first", "sum", "maximum", "ratio", "scaled")
)
def test_integers_among_the_inputs_need_no_conversion(how):
    """Both spellings of (tokens, integers) have the map of the tokens alone, by every method."""
    parts = positive()
    found = []
    for convert in (lambda h, k: k, lambda h, k: k.to(h.dtype)):

        def run(m, x, k, convert=convert):
            h = m["p"](x).relu()
            return m["last"](MIXED[how](h, convert(h, k)[..., None]).sum(1))

        model = Function(run, **parts).double().eval()
        few, numbers = X[:5], MASK[:5].long()
        found.append(
            [
                LayerPropagation(method(model), parts["p"]).attribute((few, numbers), 1)
                for method in METHODS.values()
            ]
        )
        for method, own in zip(METHODS.values(), found[-1], strict=True):
            alone = LayerPropagation(method(model), parts["p"])
            expected = alone.attribute(few, 1, additional_forward_args=(numbers,))
            torch.testing.assert_close(own, expected)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("how", ["product", "quotient", "scaled", "few"])
def test_integers_made_of_the_input_need_no_conversion(how):
    runs = [
        lambda m, x, convert=convert: (
            lambda h, k: m["last"](MIXED[how](h, convert(h, k)[..., None]).sum(1))
        )(m["p"](x).relu(), (x.sum(-1) > 0).long())
        for convert in (lambda h, k: k, lambda h, k: k.to(h.dtype))
    ]
    alike(runs, X, more=True, **positive())


STEPS = {
    "0": [
        lambda a, b: a * (b > 0),
        lambda a, b: a * torch.heaviside(b, torch.tensor(0.0, dtype=b.dtype)),
        lambda a, b: a * torch.heaviside(b, torch.zeros_like(b)),
        lambda a, b: torch.where(b > 0, a, 0),
    ],
    "1": [
        lambda a, b: a * (b >= 0),
        lambda a, b: a * torch.heaviside(b, torch.ones((), dtype=b.dtype)),
        lambda a, b: a - a * torch.heaviside(-b, torch.zeros((), dtype=b.dtype)),
    ],
    "ReLU": [
        lambda a, b: a.relu(),
        lambda a, b: a * torch.heaviside(a, torch.tensor(0.0, dtype=b.dtype)),
        lambda a, b: a * torch.heaviside(a, torch.tensor(0.5, dtype=b.dtype)),
    ],
}


@pytest.mark.parametrize("at_zero", STEPS)
def test_a_step_is_a_comparison(at_zero):
    runs = [lambda m, x, f=f: m["last"](f(m["p"](x), m["q"](x))) for f in STEPS[at_zero]]
    parts = modules(q=nn.Linear(6, 8, bias=False))
    nn.init.zeros_(parts["q"].weight[:2])  # so that b is 0
    for layer in (parts["p"], parts["last"]):  # PatternNet and z⁺ need positive outputs
        nn.init.constant_(layer.bias, 3.0)
    nn.init.uniform_(parts["last"].weight)
    alike(runs, normal(40, 6, dtype=torch.float64), more=True, **parts)


@pytest.mark.parametrize("at_zero", [0.0, 0.3, 1.0])
def test_a_step_has_no_slope(at_zero):
    parts, x = modules(q=nn.Linear(6, 8)), normal(5, 6, dtype=torch.float64)
    value = torch.tensor(at_zero, dtype=torch.float64)
    model = Function(
        lambda m, x: m["last"](m["p"](x) * torch.heaviside(m["q"](x), value)), **parts
    ).double()
    open_gates = (model.layers["q"](x) > 0).double().detach()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(
        model.layers["last"](model.layers["p"](x) * open_gates)[:, 1].sum(), x
    )
    found = GuidedBackprop(model.eval()).attribute(x.detach(), 1)
    torch.testing.assert_close(found, slope)
    assert check(model, x.detach()).ok  # of MIP-IN
