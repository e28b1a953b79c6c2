"""Sums over a dimension, by whatever operations: the way they are written changes no map."""

import pytest
import torch
from every_method import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.capture import capture
from captum_mipin.graph.nodes import operation
from captum_mipin.methods.gradients import Gradient
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.rules import table


class Weights(nn.Module):
    """Random weights of a shape, as a parameter ``w``."""

    def __init__(self, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.rand(*shape) + 0.2)


def pooled(how, act=F.relu):
    """A network of five instances that are put together by ``how(instances, modules)``."""
    return lambda m, x: m["last"](act(how(m["p"](x).relu(), m)))


def modules(last=8, **more):
    torch.manual_seed(0)
    end = nn.Linear(last, 2)
    nn.init.constant_(end.bias, 3.0)  # patterns need positive logits
    return {"p": nn.Linear(4, 8), "last": end, **more}


def operations(run, x, start=None, **layers):
    """The names of the operations of a network after the marking passes."""
    model = Function(run, **layers).double().eval()
    made = draft(capture(model, (x,)), table(), start, passes=MARKING)
    return [operation(node) for node in made.graph.nodes if node.op == "call_function"]


X = normal(60, 5, 4, dtype=torch.float64)
SUMS = {
    "sum": lambda h, m: h.sum(1),
    "slices": lambda h, m: h[:, 0] + h[:, 1] + h[:, 2] + h[:, 3] + h[:, 4],
    "another order": lambda h, m: (h[:, 4] + h[:, 1]) + (h[:, 0] + (h[:, 2] + h[:, 3])),
    "Python's sum": lambda h, m: sum(h.unbind(1)),
    "stacked again": lambda h, m: torch.stack(h.unbind(1)).sum(0),
    "stacked last": lambda h, m: torch.stack(h.unbind(1), -1).mean(-1) * 5,
    "einsum": lambda h, m: torch.einsum("bkc->bc", h),
    "cumsum": lambda h, m: h.cumsum(1)[:, -1],
    "slice of a cumsum": lambda h, m: h.cumsum(-2)[:, 4:].squeeze(1),
    "layer of ones": lambda h, m: F.linear(h.mT, h.new_ones(1, 5)).squeeze(-1),
    "ones from the left": lambda h, m: h.new_ones(5) @ h,
    "ones in the code": lambda h, m: h.mT @ torch.tensor([1.0] * 5, dtype=h.dtype),
    "split": lambda h, m: sum(t.squeeze(1) for t in h.split(1, 1)),
    "chunks kept": lambda h, m: sum(h.chunk(5, 1)).squeeze(1),
    "slices of a transposed tensor": lambda h, m: sum(h.mT[..., i] for i in range(5)),
}


def test_spelling_of_a_sum_does_not_matter():
    alike([pooled(how) for how in SUMS.values()], X, **modules())


AVERAGES = {
    "mean": lambda h, m: h.mean(1),
    "sum": lambda h, m: h.sum(1) / 5,
    "slices": lambda h, m: 0.2 * sum(h[:, i] for i in range(5)),
    "scaled slices": lambda h, m: sum(h[:, i] / 5 for i in range(5)),
    "scaled before": lambda h, m: (h / 5).sum(1),
    "einsum": lambda h, m: torch.einsum("bkc->bc", h) / 5,
    "layer": lambda h, m: F.linear(h.mT, h.new_full((1, 5), 0.2)).squeeze(-1),
    "vector": lambda h, m: torch.full((5,), 0.2, dtype=h.dtype) @ h,
    "pooling": lambda h, m: F.avg_pool1d(h.mT, 5).squeeze(-1),
}


def test_spelling_of_an_average_before_a_dense_layer_does_not_matter():
    runs = [pooled(how, act=lambda y: y) for how in AVERAGES.values()]
    alike(runs, X, **modules())


WEIGHTED = {
    "layer": lambda h, a: F.linear(h.mT, a[None]).squeeze(-1),
    "sum of products": lambda h, a: (a[:, None] * h).sum(1),
    "kept dimension": lambda h, a: (h * a[:, None]).sum(1, keepdim=True).squeeze(1),
    "average of products": lambda h, a: (5 * a[:, None] * h).mean(1),
    "transposed": lambda h, a: (h.mT * a).sum(-1),
    "einsum": lambda h, a: torch.einsum("k,bkc->bc", a, h),
    "slices": lambda h, a: sum(a[i] * h[:, i] for i in range(5)),
    "another order": lambda h, a: (
        (h[:, 4] * a[4] + h[:, 0] * a[0]) + h[:, 2] * a[2] + (h[:, 3] * a[3] + a[1] * h[:, 1])
    ),
    "h.mT @ a": lambda h, a: h.mT @ a,
    "a @ h": lambda h, a: a @ h,
    "a[None] @ h": lambda h, a: (a[None] @ h).squeeze(1),
    "stacked again": lambda h, a: torch.stack(h.unbind(1), -1) @ a,
    "stacked and multiplied": lambda h, a: (torch.stack(h.unbind(1)) * a[:, None, None]).sum(0),
    "tensordot": lambda h, a: torch.tensordot(h, a, ([1], [0])),
}


def test_spelling_of_a_sum_with_constant_weights_does_not_matter():
    runs = [pooled(lambda h, m, how=how: how(h, m["w"].w)) for how in WEIGHTED.values()]
    alike(runs, X, **modules(w=Weights(5)))


def test_numbers_are_weights_as_well():
    numbers = [0.1, 0.4, 0.2, 0.2, 0.3]
    hows = [
        lambda h, m: F.linear(h.mT, torch.tensor([numbers], dtype=h.dtype)).squeeze(-1),
        lambda h, m: sum(c * h[:, i] for i, c in enumerate(numbers)),
        lambda h, m: h.mT @ torch.tensor(numbers, dtype=h.dtype),
    ]
    alike([pooled(how) for how in hows], X, **modules())


def test_masks_and_weights_of_other_dtypes():
    mask = torch.tensor([True, False, True, True, False])
    masked = [
        lambda h, m: F.linear(h.mT, (~m["a"].w.isnan() & mask).to(h.dtype)[None]).squeeze(-1),
        lambda h, m: (h * (~m["a"].w.isnan() & mask)[:, None]).sum(1),
        lambda h, m: torch.einsum("bkc,k->bc", h, (~m["a"].w.isnan() & mask).to(h.dtype)),
    ]
    alike([pooled(how) for how in masked], X, **modules(a=Weights(5)))

    layers = {name: layer.float() for name, layer in modules(a=Weights(5)).items()}
    hows = [lambda h, m: sum(m["a"].w.double()[i] * h[:, i] for i in range(5)),
            lambda h, m: (m["a"].w[:, None] * h).sum(1)]  # fmt: skip
    outputs = []
    for how in hows:
        model = Function(pooled(how), **layers).eval()
        fitted = InverseNetwork(model).fit(X.float(), 1, progress=False)
        outputs.append(fitted.source_signal(X[:5].float(), 1))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3 * float(outputs[0].abs().max()))


def test_a_sum_over_the_batch_is_refused_as_before():
    run = pooled(lambda h, m: h[:, 0] * (h * m["a"].w[:, None]).sum((0, 1)))
    model = Function(run, **modules(a=Weights(5))).double().eval()
    assert not check(model, X).ok


DENSE = {
    "layer": lambda h, w: F.linear(h, w),
    "product": lambda h, w: (h[:, :, None] * w).sum(3),
    "transposed product": lambda h, w: (h[..., None] * w.mT).sum(2),
    "matrix": lambda h, w: h @ w.mT,
    "matrix from the left": lambda h, w: (w @ h.mT).mT,
    "einsum": lambda h, w: torch.einsum("bkc,oc->bko", h, w),
    "a vector each": lambda h, w: torch.stack([h @ row for row in w], -1),
}


def test_spelling_of_a_dense_layer_does_not_matter():
    runs = [pooled(lambda h, m, how=how: how(h, m["w"].w).flatten(1)) for how in DENSE.values()]
    alike(runs, X, **modules(15, w=Weights(3, 8)))


BINARY = {
    "layer": lambda h, w: F.linear(h, w[None]),
    "product": lambda h, w: (h * w).sum(1, keepdim=True),
    "vector": lambda h, w: (h @ w)[:, None],
    "mv": lambda h, w: torch.mv(h, w).unsqueeze(1),
}


def test_spelling_of_a_layer_of_one_output_does_not_matter():
    def run(how):
        return lambda m, x: F.pad(how(m["p"](x).relu(), m["w"].w), (1, 0))

    runs, x = [run(how) for how in BINARY.values()], normal(60, 4, dtype=torch.float64)
    alike(runs, x, p=nn.Linear(4, 8), w=Weights(8))


def test_weights_per_channel_and_over_two_dimensions():
    channels = [lambda h, m: torch.einsum("kc,bkc->bc", m["w"].w, h),
                lambda h, m: (h * m["w"].w).sum(1)]  # fmt: skip
    alike([pooled(how) for how in channels], X, **modules(w=Weights(5, 8)))
    both = [lambda h, m: F.linear(h.flatten(1), m["w"].w.flatten(1)),
            lambda h, m: (h[:, None] * m["w"].w).sum((2, 3)),
            lambda h, m: torch.einsum("bkc,okc->bo", h, m["w"].w)]  # fmt: skip
    alike([pooled(how) for how in both], X, **modules(3, w=Weights(3, 5, 8)))


STACKED = {
    "+": lambda a, b, w: w[0] * a + w[1] * b,
    "vector": lambda a, b, w: torch.stack([a, b], -1) @ w,
    "einsum": lambda a, b, w: torch.einsum("kbc,k->bc", torch.stack([a, b]), w),
    "layer": lambda a, b, w: F.linear(torch.stack([a, b], -1), w[None]).squeeze(-1),
    "tensordot": lambda a, b, w: torch.tensordot(w, torch.stack([a, b]), 1),
    "sum of products": lambda a, b, w: (torch.stack([a, b]) * w[:, None, None]).sum(0),
}
PLAIN = {
    "+": lambda a, b, w: a + b,
    "einsum": lambda a, b, w: torch.einsum("kbc->bc", torch.stack([a, b])),
    "ones": lambda a, b, w: torch.stack([a, b], -1) @ a.new_ones(2),
}


@pytest.mark.parametrize("spellings", [STACKED, PLAIN], ids=["weighted", "plain"])
def test_a_sum_over_stacked_tensors_is_the_sum_of_these(spellings):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "last": nn.Linear(6, 2), "w": Weights(2)}

    def run(how):
        def forward(m, x):
            h = m["a"](x).relu()
            return m["last"](how(m["b"](h), h, m["w"].w).relu())

        return forward

    alike([run(how) for how in spellings.values()], normal(60, 4, dtype=torch.float64), **layers)


INDEX = [0, 3, 3, 1, 0]
INDEXED = {
    "index": lambda h, m: h[:, INDEX].flatten(1),
    "stack": lambda h, m: torch.stack([h[:, i] for i in INDEX], 1).flatten(1),
    "last": lambda h, m: torch.stack([h[:, i] for i in INDEX], -1).mT.flatten(1),
    "cat": lambda h, m: torch.cat([h[:, i : i + 1] for i in INDEX], 1).flatten(1),
    "cat of vectors": lambda h, m: torch.cat([h[:, i] for i in INDEX], 1),
}
WHOLE = {
    "tensor": lambda h, m: h.flatten(1),
    "stack": lambda h, m: torch.stack(h.unbind(1), 1).flatten(1),
    "chunks": lambda h, m: torch.cat(h.chunk(2, 1), 1).flatten(1),
    "vectors": lambda h, m: torch.cat([h[:, i] for i in range(5)], -1),
}
MIDDLE = {
    "slice": lambda h, m: h[:, 1:4].sum(1).repeat(1, 5),
    "sum": lambda h, m: (h[:, 1] + h[:, 2] + h[:, 3]).repeat(1, 5),
    "stack": lambda h, m: torch.stack([h[:, 3], h[:, 1], h[:, 2]]).sum(0).repeat(1, 5),
}


@pytest.mark.parametrize("spellings", [INDEXED, WHOLE, MIDDLE], ids=["index", "whole", "middle"])
def test_slices_that_are_put_together_are_an_index(spellings):
    alike([pooled(how) for how in spellings.values()], X, **modules(40))


def instances(how):
    def weights(h, m):
        return m["a"](h).softmax(1)

    return pooled(lambda h, m: how(weights(h, m), h))


LOOPS = {
    "sum": lambda a, h: (a * h).sum(1),
    "loop": lambda a, h: sum(a[:, i] * h[:, i] for i in range(5)),
    "loop with others": lambda a, h: sum(h.mT[..., i] * a[:, i] for i in range(5)),
    "stack": lambda a, h: torch.stack([a[:, i] * h[:, i] for i in range(5)]).sum(0),
    "scaled inside": lambda a, h: (a * h / 5).sum(1) * 5,
    "scaled weights": lambda a, h: (a * 0.5 * h).sum(1) / 0.5,
}


def test_a_loop_over_instances_is_a_weighted_sum():
    alike([instances(how) for how in LOOPS.values()], X, **modules(a=nn.Linear(8, 1)))


def test_terms_that_are_no_slices_stay_terms():
    runs = [
        lambda h, m: h.sum(1) + m["a"](h[:, 0]),
        lambda h, m: h[:, 0] + m["a"](h[:, 0]) + h[:, 1] + (h[:, 2] + h[:, 3]) + h[:, 4],
        lambda h, m: h[:, 0] + h[:, 1] - (-m["a"](h[:, 0]) - h[:, 2]) + h[:, 3] + h[:, 4],
    ]
    alike([pooled(how) for how in runs[:2]], X, **modules(a=nn.Linear(8, 8)))
    layers = modules(a=nn.Linear(8, 8))
    outputs = [Function(pooled(how), **layers).double()(X) for how in runs]
    for how, output in zip(runs, outputs, strict=True):
        fitted = InverseNetwork(Function(pooled(how), **layers).double().eval())
        result = fitted.fit(X, 1, progress=False).explain((X,), 1, biases=(True,))
        torch.testing.assert_close(result.output, output[:, 1])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda h, m: h[:, 1] - h[:, 0], ["sub"]),
        (lambda h, m: h[:, 0] + h[:, 0] + m["p"].bias, ["add", "add"]),
        (lambda h, m: h[:, 0] * m["p"].bias - h[:, 1] * m["p"].bias, ["sub"]),
        (lambda h, m: h[:, 0] + 2 * h[:, 0], ["add"]),
    ],
    ids=["difference", "one slice twice", "weights per channel", "one slice"],
)
def test_other_sums_of_slices_are_left(how, expected):
    names = operations(pooled(how), X, **modules())
    assert [name for name in names if name in ("add", "sub", "sum", "linear")][1:-1] == expected


def test_weights_that_may_change_do_not_decide_the_form():
    layers = modules()
    layers["p"].register_buffer("even", torch.full((1, 5), 0.2))
    names = operations(pooled(lambda h, m: F.linear(h.mT, m["p"].even).squeeze(-1)), X, **layers)
    assert names.count("linear") == 3
    assert "sum" not in names


def test_an_explained_tensor_stays_as_it_is():
    class Entries(nn.Module):
        def forward(self, h):
            return h[:, 0], h[:, 1]

    class Product(nn.Module):
        def forward(self, h, w):
            return h * w

    layers = modules(w=Weights(5, 1), times=Product(), entries=Entries())

    def run(m, x):
        h = m["p"](x).relu()
        return m["last"](m["times"](h, m["w"].w).sum(1) + sum(m["entries"](h)))

    model = Function(run, **layers).double().eval()
    for layer in (model.layers["times"], model.layers["entries"]):
        fitted = InverseNetwork(model, layer=layer).fit(X, 1, progress=False)
        (signals,) = fitted.explain((X[:5],), 1, biases=(True,), layer=layer).signals
        assert all(signal.any() and torch.isfinite(signal).all() for signal in signals)


def test_a_layer_may_have_weights_like_its_input():
    layers = modules()
    run = pooled(lambda h, m: (F.linear(h, h.new_ones(8, 8).tril()) + h).amax(1))
    model = Function(run, **layers).double().eval()
    result = InverseNetwork(model).fit(X, 1, progress=False).explain((X,), 1, biases=(True,))
    torch.testing.assert_close(result.output, model(X)[:, 1])


def test_a_mean_of_a_product_with_a_number_that_is_an_argument():
    def network(factor):
        torch.manual_seed(0)
        return Function(
            lambda m, x, z: m["last"]((m["first"](x).relu() * factor(z)).mean(1)),
            first=nn.Linear(4, 4), last=nn.Linear(4, 2),
        ).double().eval()  # fmt: skip

    x, z, model = normal(3, 5, 4, dtype=torch.float64), torch.tensor(2.0), network(torch.numel)
    wanted = x.clone().requires_grad_()
    model(wanted, z)[:, 1].sum().backward()
    torch.testing.assert_close(Gradient(model).attribute(x, 1, z), wanted.grad)
    with pytest.raises(UnsupportedOperationError, match=r"aten\.mul\.Tensor in the model itself"):
        Gradient(network(torch.Tensor.item)).attribute(x, 1, z)
