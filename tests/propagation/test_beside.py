"""Further arguments with a row for each example: what mixes their rows is refused by name.

A map of one example that moves with the rows of another one would be wrong without a word. What
reads the rows apart, or an argument that all examples share, has the maps of single examples.
"""

import pytest
import torch
from designs import aside
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import IBA, LRP, InputIBA, InverseNetwork, NeighbourInverse, check, methods
from captum_mipin.errors import FitError, UnsupportedOperationError
from captum_mipin.methods.gradients import Gradient

MAPS = (
    Gradient,
    methods.GuidedBackprop,
    methods.Deconvnet,
    LRP,
    methods.DeepTaylor,
    methods.ExcitationBackprop,
)
DATA = {"unpack": lambda batch: batch, "progress": False}

#: Features (batch, 4) and a further argument (batch, 4) with positive values → features.
MIXED = {
    "sum": lambda m, h, z: h * z.sum(),
    "row of a sum": lambda m, h, z: h * z.sum(0)[0],
    "dot": lambda m, h, z: h * torch.dot(z[:, 0], z[:, 1]),
    "matrix of products": lambda m, h, z: h * (z.T @ z).sum(),
    "product": lambda m, h, z: h * z.prod(0)[:1],
    "mean": lambda m, h, z: h * z.mean(),
    "norm": lambda m, h, z: h * z.norm(),
    "largest": lambda m, h, z: h * z.amax(),
    "divisor": lambda m, h, z: h / z.std(),
    "median": lambda m, h, z: h * z.median(),
    "sum by einsum": lambda m, h, z: h * torch.einsum("nc->c", z),
    "behind a layer": lambda m, h, z: h * m["beside"](z).sum(0),
    "first row": lambda m, h, z: h * z[0],
    "turned": lambda m, h, z: h * z.T.sum(1),
    "count of a mask": lambda m, h, z: h * (z > 0.7).sum(),
    "share of a mask": lambda m, h, z: h * (z > 0.7) / (z > 0.7).sum(),
    "number": lambda m, h, z: h * z.sum().item(),
    "batch norm": lambda m, h, z: h * F.batch_norm(z, None, None, training=True),
    "row of a batch norm": lambda m, h, z: h * F.batch_norm(z, None, None, training=True)[0],
    "module without statistics": lambda m, h, z: h * m["norm"](z),
    "batch norm by hand": lambda m, h, z: h * ((z - z.mean(0)) / z.std(0)),
    "centred": lambda m, h, z: h + (z - z.mean(0, keepdim=True)),
    "weights of examples": lambda m, h, z: h * z.softmax(0),
    "sums up to the example": lambda m, h, z: h * z.cumsum(0),
    "turned around": lambda m, h, z: h * z.flip(0),
    "cosines of examples": lambda m, h, z: h * (z @ z.T).sum(1, keepdim=True),
    "logarithms": lambda m, h, z: h * z.log_softmax(0),
    "variance": lambda m, h, z: h * torch.var_mean(z, 0)[0],
}


def _parts(**more):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return {
        "first": nn.Linear(3, 4), "last": nn.Linear(4, 2), "beside": nn.Linear(4, 4), "norm": norm,
        **more,
    }  # fmt: skip


def _network(step, **more):
    def run(m, x, *further):
        return m["last"](step(m, m["first"](x).relu(), *further))

    return Function(run, **_parts(**more)).double().eval()


def _positive(*shape):
    return normal(*shape, seed=3, dtype=torch.float64).abs() + 0.1


X, Z = normal(5, 3, dtype=torch.float64), _positive(5, 4)


#: Those that every method refuses in a test by default, and the other ones with ``-m full``.
BY_ALL = "sum", "row of a sum", "batch norm", "weights of examples", "module without statistics"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, MAPS if name in BY_ALL else (LRP,)) for name in MIXED),
        *(pytest.param(n, MAPS, marks=pytest.mark.full) for n in MIXED if n not in BY_ALL),
    ],
)
def test_what_mixes_the_rows_of_a_further_argument_is_refused_by_every_method(name, kinds):
    """Formerly such an argument was taken as shared by all examples, or its norm passed."""
    model = _network(MIXED[name])
    calls = [lambda m=m: m(model).attribute(X, 1, Z) for m in kinds]
    calls.append(lambda: InverseNetwork(model).fit([(X, Z)], 1, **DATA))
    more = [
        lambda: methods.SmoothGrad(model, samples=2).attribute(X, 1, Z),
        lambda: methods.Patterns(model).fit([(X, Z)], **DATA),
        lambda: methods.LayerPropagation(LRP(model), "layers.last").attribute(X, 1, Z),
        lambda: NeighbourInverse(model, layer="layers.last").fit([(X, Z)], **DATA),
    ]
    for call in (*calls, *more) if kinds is MAPS else calls:
        with pytest.raises(UnsupportedOperationError, match=r"aten\.\w+.*whole batch"):
            call()
    for method in (None, *kinds):
        assert "refused" in [row.status for row in check(model, X, Z, method=method).rows]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_the_count_of_a_mask_is_refused_for_masks_of_every_dtype(dtype):
    model, mask = _network(lambda m, h, k: h * k.sum()), (Z > 0.7).to(dtype)
    for method in MAPS:
        with pytest.raises(
            UnsupportedOperationError, match=r"aten\.sum.* whole batch of a further"
        ):
            method(model).attribute(X, 1, mask)
    with pytest.raises(UnsupportedOperationError, match=r"aten\.sum.* whole batch of a further"):
        InverseNetwork(model).fit([(X, mask)], 1, **DATA)


def _images(step):
    torch.manual_seed(0)
    return Function(
        lambda m, x, z: m["last"](m["second"](step(m["first"](x).relu(), z)).relu().mean((2, 3))),
        first=nn.Conv2d(1, 4, 3),
        second=nn.Conv2d(4, 4, 3),
        last=nn.Linear(4, 2),
    ).eval()


AT_LAYERS = {
    "SmoothGrad": lambda m, x, z: methods.SmoothGrad(m, samples=2).attribute(x, 1, z),
    "Grad-CAM": lambda m, x, z: methods.GradCAM(m, "layers.second").attribute(x, 1, z),
    "LRP": lambda m, x, z: methods.LayerPropagation(LRP(m), "layers.second").attribute(x, 1, z),
    "MIP-IN": lambda m, x, z: InverseNetwork(m, layer="layers.second").fit([(x, z)], **DATA),
    "IBA": lambda m, x, z: IBA(m, "layers.second").estimate([(x, z)], **DATA),
    "InputIBA": lambda m, x, z: InputIBA(m, "layers.second").estimate([(x, z)], **DATA),
}


@pytest.mark.parametrize("method", AT_LAYERS)
def test_so_it_is_before_a_layer(method):
    x, z = normal(6, 1, 8, 8), _positive(6, 4).float()
    steps = (
        lambda h, z: h * z.sum(),
        lambda h, z: h * F.batch_norm(z, None, None, training=True)[:, :, None, None],
        # here joined examples are separated again, and the further argument is mixed all the same
        lambda h, z: sum(torch.cat([h, h.flip(-1)]).chunk(2)) * z.sum(),
    )
    for step in steps:
        with pytest.raises(UnsupportedOperationError, match=r"aten\.\w+.*whole batch of a further"):
            AT_LAYERS[method](_images(step), x, z)


def test_a_refusal_names_the_operation_its_module_and_the_ways_out():
    model = _network(lambda m, h, z: h * m["pool"](z), pool=Function(lambda m, z: z.amax()))
    with pytest.raises(
        UnsupportedOperationError,
        match=r"aten\.mul\.Tensor in the model itself: it uses what aten\.amax\.default in "
        r"layers\.pool computes from the whole batch .*depend on the other examples; compute along "
        r"its other dimensions, or if all examples share this argument, pass a batch of another",
    ):
        LRP(model).attribute(X, 1, Z)


@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 5, 6), (4, 4, 4), (1, 1, 10)])
@pytest.mark.parametrize("name", ["sum", "row of a sum", "largest"])
def test_a_fit_on_batches_of_several_sizes_names_the_operation(name, sizes):
    """Formerly its error was the signature of the call, as a tuple."""
    x, z = normal(12, 3, dtype=torch.float64), _positive(12, 4)
    data = list(zip(x.split(list(sizes)), z.split(list(sizes)), strict=True))
    with pytest.raises(
        UnsupportedOperationError, match=r"aten\.mul\.Tensor in the model itself(.|\n)*another size"
    ):
        InverseNetwork(_network(MIXED[name])).fit(data, 1, **DATA)


def test_a_fit_on_other_further_arguments_names_their_shapes():
    model, weights = _network(lambda m, h, z: h @ z), _positive(4, 4)
    data = [(X, weights), (X, weights.float())]
    with pytest.raises(
        FitError,
        match=r"batch 1 has inputs and further arguments \(3,\) torch\.float64, \(4, 4\) "
        r"torch\.float32, expected \(3,\) torch\.float64, \(4, 4\) torch\.float64 as in the first "
        "batch: pass the same kinds in all batches",
    ):
        InverseNetwork(model).fit(data, 1, **DATA)


def _branching(step):
    """Return a network that torch.export cannot follow."""

    def run(m, x, z):
        h = m["first"](x)
        return m["last"](step(h if h.flatten()[0] > 1e9 else h.relu(), z))

    return Function(run, **_parts()).double().eval()


def test_models_that_cannot_be_captured_are_called_with_a_row_for_each_example():
    """Formerly calls in which all examples have all rows were enough."""
    with pytest.raises(
        UnsupportedOperationError, match=r"along the batch.* rows of a further argument; if all"
    ):
        methods.SmoothGrad(_branching(lambda h, z: h * z.sum()), samples=2).attribute(X, 1, Z)
    methods.SmoothGrad(_branching(lambda h, z: h * z), samples=2).attribute(X, 1, Z)
    pair = _branching(lambda h, z: (h - z[0]) / z[1])
    methods.SmoothGrad(pair, samples=2).attribute(X[:2], 1, Z[:2])


def test_models_without_a_free_batch_size_are_told_by_their_shared_graph():
    def loop(step):
        def run(m, x, z):
            return m["last"](step(torch.stack([m["first"](row) for row in x]).relu(), z))

        return Function(run, **_parts()).double().eval()

    for method in (methods.GuidedBackprop, LRP):
        with pytest.raises(
            UnsupportedOperationError, match=r"aten\.mul\.Tensor in the model itself"
        ):
            method(loop(lambda h, z: h * z.sum())).attribute(X, 1, Z)
        kept = method(loop(lambda h, z: h * z))
        alone = [kept.attribute(X[i : i + 1], 1, Z[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(kept.attribute(X, 1, Z), torch.cat(alone))


TOKENS, MASK = normal(5, 6, 3, dtype=torch.float64), _positive(5, 6) > 0.7
ROWS, SQUARE = _positive(5, 4), (MASK[:, None, :] & MASK[:, :, None])[:, None]
PAIRS = _positive(5, 6, 4)
LENGTHS, LABELS = torch.tensor([3, 6, 2, 4, 5]), torch.tensor([3, 0, 2, 1, 3])

#: Features (batch, 6, 4) and a further argument with a row for each example → features.
APART = {
    "padding": (MASK, lambda m, h, k: h * k[..., None] / (1 + k.sum(1))[:, None, None]),
    "some of a mask": (MASK, lambda m, h, k: h * k.any(1)[:, None, None]),
    "positions in a mask": (MASK, lambda m, h, k: h * k.long().cumsum(1)[..., None]),
    "lengths": (LENGTHS, lambda m, h, n: h * (torch.arange(6) < n[:, None])[..., None]),
    "attention": (
        SQUARE | torch.eye(6, dtype=torch.bool),
        lambda m, h, k: F.scaled_dot_product_attention(*[h[:, None]] * 3, attn_mask=k)[:, 0]),
    "batch second": (PAIRS, lambda m, h, z: h * z.transpose(0, 1).sum(0)[:, None]),
    "norm with the batch second": (
        PAIRS, lambda m, h, z: h * (z.transpose(0, 1) / z.transpose(0, 1).std(0)).transpose(0, 1)),
    "deviation": (ROWS, lambda m, h, z: h * (z / z.std(1, keepdim=True))[:, None]),
    "layer norm": (ROWS, lambda m, h, z: h + F.layer_norm(z, (4,))[:, None]),
    "instance norm": (PAIRS, lambda m, h, z: h + F.instance_norm(z.mT).mT),
    "batch norm with statistics": (ROWS, lambda m, h, z: h + m["kept"](z)[:, None]),
    "products of a row": (PAIRS, lambda m, h, z: h @ (z.mT @ z)),
    "products by einsum": (PAIRS, lambda m, h, z: h @ torch.einsum("ntc,ntd->ncd", z, z)),
    "norm": (ROWS, lambda m, h, z: h * z.norm(dim=1)[:, None, None]),
    "dot": (ROWS, lambda m, h, z: h * torch.linalg.vecdot(z, z)[:, None, None]),
    "all of a row": (PAIRS, lambda m, h, z: h * z.flatten(1).amax(1)[:, None, None]),
    "layer": (ROWS, lambda m, h, z: h * m["beside"](z).sigmoid()[:, None]),
    "labels": (LABELS, lambda m, h, y: h + h.gather(1, y[:, None, None].expand(-1, 1, 4))),
    "entries": (LABELS, lambda m, h, y: h + h[torch.arange(len(h)), y][:, None]),
    "table of the model": (LABELS, lambda m, h, y: h + m["table"](y)[:, None]),
    "inverse": (_positive(5, 4, 4) + 3 * torch.eye(4), lambda m, h, z: h @ torch.linalg.inv(z)),
    "recurrent": (PAIRS, lambda m, h, z: h + m["gru"](z)[0]),
}  # fmt: skip


def _of_tokens(step):
    def run(m, x, *further):
        h = step(m, m["first"](x).relu(), *further)
        return m["last"]((h * torch.arange(1, 1 + h.shape[1])[:, None]).relu().mean(1))

    more = {
        "kept": nn.BatchNorm1d(4), "table": nn.Embedding(4, 4),
        "gru": nn.GRU(4, 4, batch_first=True),
    }  # fmt: skip
    return Function(run, **_parts(**more)).double().eval()


@pytest.mark.parametrize(
    "name",
    aside(
        APART, "some of a mask", "positions in a mask", "batch second", "products by einsum", "dot",
        "all of a row", "layer", "entries", "recurrent",
    ),
)  # fmt: skip
def test_what_reads_the_rows_apart_has_the_maps_of_single_examples(name):
    further, step = APART[name]
    model = _of_tokens(step)
    for method in (Gradient, methods.GuidedBackprop, LRP):
        together = method(model).attribute(TOKENS, 1, further)
        alone = [
            method(model).attribute(TOKENS[i : i + 1], 1, further[i : i + 1]) for i in range(5)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["padding", "norm with the batch second", "layer norm"])
def test_so_has_mip_in(name):
    further, step = APART[name]
    inverse = InverseNetwork(_of_tokens(step)).fit([(TOKENS, further)], 1, **DATA)
    alone = [inverse.source_signal(TOKENS[i : i + 1], 1, further[i : i + 1]) for i in range(5)]
    together = inverse.source_signal(TOKENS, 1, further)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-12)


NODES = normal(5, 5, 3, dtype=torch.float64)
GRAPH = (_positive(5, 5) > 0.7).double() + torch.eye(5, dtype=torch.float64)
EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 4, 4]])
#: Examples, an argument that all share, as long as the batch or not, and the step.
SHARED = {
    "graph": (NODES, GRAPH, lambda m, h, a: a @ h),
    "graph with degrees": (
        NODES, GRAPH, lambda m, h, a: (a * a.sum(0).rsqrt()[:, None] * a.sum(1).rsqrt()) @ h),
    "edges of two graphs": (
        NODES[:2], EDGES, lambda m, h, e: h.index_add(1, e[1], h[:, e[0]])),
    "unpacked edges": (
        NODES[:2], EDGES, lambda m, h, e: (lambda a, b: h.index_add(1, b, h[:, a]))(*e)),
    "edges below each other": (
        NODES, EDGES.T[[0, 1, 2, 3, 0]], lambda m, h, e: h.index_add(1, e[:, 1], h[:, e[:, 0]])),
    "positions": (NODES, ROWS, lambda m, h, p: h + p - p.mean(0)),
    "weights of places": (NODES, ROWS[:, 0], lambda m, h, w: h * w.softmax(0)[:, None]),
    "means and deviations": (TOKENS[:2], ROWS[:2], lambda m, h, s: (h - s[0]) / s[1]),
    "keys": (TOKENS, ROWS, lambda m, h, k: h + F.scaled_dot_product_attention(
        h, *[k.expand(len(h), 5, 4)] * 2)),
    "classes": (TOKENS, ROWS, lambda m, h, t: F.linear(h, t / t.norm(dim=1)[:, None])[..., :4]),
    "sum of places": (TOKENS, _positive(7, 4), lambda m, h, z: h * z.sum(0)),
    "norm of places": (TOKENS, _positive(7, 4), lambda m, h, z: h + F.batch_norm(
        z, None, None, training=True)[0]),
    "scale": (TOKENS, torch.tensor(2.0), lambda m, h, s: h * s.sum()),
    "scale of one": (TOKENS[:1], torch.tensor([2.0]), lambda m, h, s: h * s[0]),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    aside(SHARED, "graph with degrees", "unpacked edges", "edges below each other", "scale of one"),
)
def test_what_all_examples_share_has_the_maps_of_larger_batches(name):
    x, further, step = SHARED[name]
    larger = torch.cat([x, x[:1] + 1])
    for method in (Gradient, methods.GuidedBackprop):
        expected = method(_of_tokens(step)).attribute(larger, 1, further)[:-1]
        found = method(_of_tokens(step)).attribute(x, 1, further)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [methods.GuidedBackprop, LRP])
def test_a_call_with_a_batch_of_another_size_tells_that_an_argument_is_shared(method):
    def model():
        return _of_tokens(lambda m, h, z: h * z.sum(0))

    with pytest.raises(UnsupportedOperationError, match=r"pass a batch of another size"):
        method(model()).attribute(TOKENS, 1, ROWS)
    told = method(model())
    expected = told.attribute(TOKENS[:4], 1, ROWS)
    torch.testing.assert_close(told.attribute(TOKENS, 1, ROWS)[:4], expected)


def test_a_table_in_which_entries_are_looked_up_is_shared():
    step = lambda m, h, t: h + t[h.mean(1).argmax(1)][:, None]  # noqa: E731
    expected = Gradient(_of_tokens(step)).attribute(TOKENS[:4], 1, ROWS)
    found = Gradient(_of_tokens(step)).attribute(TOKENS, 1, ROWS)
    torch.testing.assert_close(found[:4], expected)
