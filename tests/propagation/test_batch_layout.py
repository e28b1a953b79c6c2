"""Examples of a batch stay apart, or the model is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_checks import alike, behaves
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, MIPINError, check
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.capture import capture
from captum_mipin.graph.layout import Layout
from captum_mipin.methods import LRP, GuidedBackprop
from captum_mipin.propagation.batch_layout import _counts


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(0, 2), st.data())
@settings(deadline=None, max_examples=40)
def test_parts_of_a_layout_are_the_examples(outer, inner, count, dim, data):
    shape = [2, 3]
    shape.insert(dim, count)
    base = torch.arange(count).view([count if i == dim else 1 for i in range(3)]).expand(shape)
    folded = torch.stack([torch.stack([base] * inner, dim + 1)] * outer, dim).flatten(dim, dim + 2)
    layout = Layout(dim, outer, inner)
    cut = data.draw(st.integers(1, count - 1))
    parts = [layout.part(folded, slice(0, cut)), layout.part(folded, slice(cut, count))]
    assert parts[0].max() == cut - 1
    assert parts[1].min() == cut
    assert torch.equal(layout.join(parts), folded)


class Mixing(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)
        self.t, self.u, self.r = nn.Linear(3, 4), nn.Linear(4, 2), nn.ReLU()

    def forward(self, x):
        return self.run(self, x)


MIXING = {
    "maximum in a gate": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid(m.b(x) - m.b(x).max(0, keepdim=True).values)
    ),
    "sort in a gate": lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(torch.sort(m.b(x), 0).values)),
    "cummax in a gate": lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(m.b(x).cummax(0).values)),
    "parts of the batch in a gate": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid(torch.cat(m.t(x.view(-1, 2, 3)).reshape(-1, 4).chunk(2, 0), 1))
    ),
    "shifted": lambda m, x: m.o(F.pad(m.r(m.a(x)), (0, 0, 1, -1))),
    "shifted in a gate": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid(F.pad(m.b(x), (0, 0, 1, -1)))
    ),
    "shifted flat": lambda m, x: m.o(F.pad(m.r(m.a(x)).reshape(-1), (8, -8)).reshape(-1, 8)),
    "size as a float": lambda m, x: m.o(m.r(m.a(x)) * (1 / x.shape[0])),
    "root of the size": lambda m, x: m.o(m.r(m.a(x)) * x.shape[0] ** 0.5),
    "filled with the size": lambda m, x: m.o(m.r(m.a(x)) * x.new_full((1,), x.shape[0])),
    "sum of ones": lambda m, x: m.o(m.r(m.a(x)) * torch.ones_like(m.a(x)).sum(0)),
    "position": lambda m, x: m.o(m.r(m.a(x)) * torch.arange(x.shape[0])[:, None].double()),
    "counted": lambda m, x: m.o(m.r(m.a(x)) + torch.ones_like(m.a(x)).cumsum(0)),
    "ones times batch": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid((x.new_ones(x.shape[0], 1, x.shape[0]) @ m.b(x)).squeeze(1))
    ),
    "linear over the batch": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid(F.linear(x.new_ones(x.shape[0], x.shape[0]), m.b(x).t()))
    ),
    "dropout in attention": lambda m, x: m.o(
        F.scaled_dot_product_attention(
            *(h.view(-1, 2, 4) for h in (m.b(x), m.b(x), m.a(x))), dropout_p=0.3
        ).flatten(1)
    ),
    "noise": lambda m, x: m.o(m.r(m.a(x)) * torch.randn(x.shape[0], 8, dtype=x.dtype)),
    "folded output": lambda m, x: m.u(m.r(m.t(x.view(-1, 3)))),
    "unfolded output": lambda m, x: m.u(m.r(m.t(x.view(-1, 2, 3)))).reshape(-1, 2),
    "flat output": lambda m, x: m.o(m.r(m.a(x))).flatten(),
}


@pytest.mark.parametrize("name", MIXING)
def test_examples_that_depend_on_each_other_are_refused(name):
    torch.manual_seed(0)
    model = Mixing(MIXING[name]).double().eval()
    with pytest.raises(MIPINError, match=r"batch|no rule covers|random"):
        InverseNetwork(model).fit(
            torch.randn(24, 6, dtype=torch.float64), targets=[0, 1], progress=False
        )


@pytest.mark.parametrize(
    ("name", "operation", "reason"),
    [
        ("maximum in a gate", "aten.max.dim", "one dimension that contains the batch"),
        ("sort in a gate", "aten.sort.default", "computes along the batch"),
        ("parts of the batch in a gate", "aten.chunk.default", "computes along the batch"),
        ("shifted", "aten.pad.default", "computes along the batch"),
        ("shifted in a gate", "aten.pad.default", "computes along the batch"),
        ("shifted flat", "aten.pad.default", "computes along the batch"),
        ("size as a float", "aten.mul.Tensor", "uses the size of the batch, or a number computed"),
        ("root of the size", "aten.mul.Tensor", "uses the size of the batch, or a number computed"),
        (
            "dropout in attention",
            "aten.scaled_dot_product_attention.default",
            "it is random",
        ),
    ],
)
def test_check_names_what_mixes_examples(name, operation, reason):
    torch.manual_seed(0)
    refused = check(
        Mixing(MIXING[name]).double().eval(), torch.randn(4, 6, dtype=torch.float64)
    ).refused
    assert (operation, True) in [(row.operation, reason in row.note) for row in refused]


def reordering(h):
    return h[:, 0].argsort(0)


#: Functions of h (batch, 8) that return h in another order, or changed by other examples.
REORDERED = {
    "sort": lambda h: h.sort(0)[0],
    "cumsum": lambda h: h.cumsum(0),
    "cummax": lambda h: h.cummax(0)[0],
    "index": lambda h: h[reordering(h)],
    "index_select": lambda h: h.index_select(0, reordering(h)),
    "gather": lambda h: h.gather(0, h.argsort(0)),
    "index_fill": lambda h: h.index_fill(0, torch.tensor([0]), 0.0),
    "scatter": lambda h: h.scatter(0, h.argsort(0), h),
    "tril": lambda h: h.tril(),
    "slice_scatter": lambda h: h.slice_scatter(h[:1], 0, 0, 1),
    "index_put": lambda h: h.index_put([reordering(h)], h),
    "select_scatter": lambda h: h.select_scatter(torch.zeros(8).to(h), 0, 0),
    "unfold": lambda h: h.t().unfold(1, 1, 1).squeeze(2).t(),
    "diagonal_scatter": lambda h: h.diagonal_scatter(torch.zeros(1).to(h), 7),
}


@pytest.fixture(scope="module")
def reordered():
    """The operations that check refuses, in the sum of all functions of REORDERED."""
    model = Mixing(lambda m, x: m.o(sum(run(m.a(x)) for run in REORDERED.values()))).double()
    rows = check(model.eval(), torch.randn(4, 6, dtype=torch.float64)).refused
    return {row.operation.split(".")[1] for row in rows if "along the batch" in row.note}


@pytest.mark.parametrize("name", REORDERED)
def test_operations_along_the_batch_are_refused(name, reordered):
    assert name in reordered


def test_each_example_may_choose_its_own_entry():
    """o[arange(n), y] is o.gather(1, y), in each spelling."""
    torch.manual_seed(0)
    x, model = torch.randn(30, 6, dtype=torch.float64), Mixing(None).double().eval()
    results = []
    for run in (
        lambda m, x: m.o(
            m.a(x).reshape(-1, 4, 2)[torch.arange(x.shape[0]), x[:, :4].argmax(1)].repeat(1, 4)
        ),
        lambda m, x: m.o(
            m.a(x)
            .reshape(-1, 4, 2)
            .gather(1, x[:, :4].argmax(1)[:, None, None].expand(-1, 1, 2))
            .squeeze(1)
            .repeat(1, 4)
        ),
    ):
        model.run = run
        results.append(behaves(model, x).source_signal(x[:5], target=1))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(m.b(x)).flip(0)),
        lambda m, x: m.o(m.r(m.a(x)) + m.b(x).cumsum(0)),
        lambda m, x: m.o(m.r(m.a(x.flip(0)))),
    ],
)
def test_what_mixes_beside_or_before_the_layer_is_refused(run):
    torch.manual_seed(0)
    model = Mixing(run).double().eval()
    with pytest.raises(MIPINError, match="batch"):
        InverseNetwork(model, layer=model.r).fit(
            torch.randn(24, 6, dtype=torch.float64), targets=[0, 1], progress=False
        )


def test_what_reads_the_batch_is_refused_also_where_batches_begin_with_one_example():
    torch.manual_seed(0)
    model = Mixing(MIXING["sum of ones"]).double().eval()
    with pytest.raises(UnsupportedOperationError, match="the other examples"):
        InverseNetwork(model).fit(
            list(torch.randn(24, 6, dtype=torch.float64).split(1)), targets=0, progress=False
        )


SPELLED = {
    "batch last": (
        lambda m, x: m.o((m.a(x).t() + m.r(m.a(x).t())).t()),
        lambda m, x: m.o(m.a(x) + m.r(m.a(x))),
    ),
    "folded": (
        lambda m, x: (lambda h: m.o((h + m.r(h)).flatten(1)))(m.t(x.view(-1, 2, 3))),
        lambda m, x: (lambda h: m.o((h + m.r(h)).reshape(-1, 8)))(
            m.t(x.view(-1, 2, 3)).reshape(-1, 4)
        ),
    ),
    "matmul": (
        lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(x @ m.b.weight.t())),
        lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(F.linear(x, m.b.weight))),
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_spelling_of_shapes_does_not_matter(name):
    torch.manual_seed(0)
    x, model = torch.randn(30, 6, dtype=torch.float64), Mixing(None).double().eval()
    found = []
    for run in SPELLED[name]:
        model.run = run
        found.append(behaves(model, x).source_signal(x[:5], target=1))
    torch.testing.assert_close(found[0], found[1])


def attention(stacked):
    """Return self-attention whose three heads lie behind each other in the batch, or beside it."""

    def run(m, x):
        q, k, v = (m[name](x) for name in "qkv")
        if stacked:
            q, k, v = (torch.cat(h.split(2, -1), 0) for h in (q, k, v))
            h = torch.bmm(torch.softmax(q @ k.mT, -1), v)
            h = torch.cat(h.split(x.shape[0], 0), 2)
        else:
            q, k, v = (h.unflatten(-1, (3, 2)).transpose(1, 2) for h in (q, k, v))
            h = (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)
        return m["last"](h.flatten(1).relu())

    torch.manual_seed(0)
    layers = {name: nn.Linear(4, 6) for name in "qkv"}
    return Function(run, **layers, last=nn.Linear(30, 2)).double().eval()


def test_heads_behind_each_other_in_the_batch_are_as_heads_in_a_dimension():
    x = normal(60, 5, 4, dtype=torch.float64)
    one, other = attention(True), attention(False)
    torch.testing.assert_close(one(x), other(x))
    for method in (LRP, GuidedBackprop):
        torch.testing.assert_close(method(one).attribute(x, 1), method(other).attribute(x, 1))
    torch.testing.assert_close(
        InverseNetwork(one).fit(x, 1, batch_size=7, progress=False).source_signal(x[:9], 1),
        InverseNetwork(other).fit(x, 1, progress=False).source_signal(x[:9], 1),
    )


def test_a_stack_of_batches_that_is_cut_between_its_examples_is_refused():
    def run(m, x):
        h = torch.cat((m["a"](x), m["b"](x)), 0)
        return m["last"](torch.cat(h.reshape(x.shape[0], 2, 6).chunk(2, 1), 2).flatten(1).relu())

    torch.manual_seed(0)
    layers = {name: nn.Linear(4, 6) for name in "ab"}
    model = Function(run, **layers, last=nn.Linear(12, 2)).eval()
    assert any("depend on each other" in row.note for row in check(model, normal(6, 4)).refused)


def test_copies_of_an_example_for_each_of_its_windows_stay_with_it():
    torch.manual_seed(0)
    spellings = (
        lambda g: g[:, None].expand(-1, 2, -1, -1).reshape(-1, 1, 8),
        lambda g: g.repeat_interleave(2, 0),
        lambda g: g.repeat_interleave(2, dim=-3),
    )

    def run(m, x, copies):
        windows = m["first"](x).reshape(-1, 2, 8)
        whole = copies(m["whole"](x.mean(1, keepdim=True)).relu())
        return m["last"]((windows + whole).relu().reshape(-1, 4, 8).mean(1))

    layers = {"first": nn.Linear(5, 8), "whole": nn.Linear(5, 8), "last": nn.Linear(8, 3)}
    x = torch.randn(60, 4, 5, dtype=torch.float64)
    alike(x, *(lambda m, x, f=f: run(m, x, f) for f in spellings), **layers)
    model = Function(lambda m, x: run(m, x, spellings[1]), **layers).double().eval()
    for method in (LRP, GuidedBackprop):
        many = method(model).attribute(x[:3], target=1)
        torch.testing.assert_close(method(model).attribute(x[2:3], target=1)[0], many[2])


def test_copies_of_the_whole_batch_behind_each_other_mix_it_with_its_windows():
    model = Function(
        lambda m, x: m["last"](
            (x.reshape(-1, 2, 5) + x.mean(1, keepdim=True).repeat(2, 1, 1)).reshape(-1, 20)
        ),
        last=nn.Linear(20, 2),
    ).eval()
    with pytest.raises(UnsupportedOperationError, match=r"different orders|depend on each other"):
        InverseNetwork(model).fit(torch.randn(60, 4, 5), 0, progress=False)


@torch.library.custom_op("tests_of_layouts::experts", mutates_args=())
def experts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@experts.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


def test_an_operation_without_a_rule_may_follow_one_that_mixes_examples():
    """As in mixtures of experts, which sort the tokens of all examples by their expert."""

    def run(m, x):
        tokens = x.flatten(0, 1)
        ordered = tokens[tokens[:, 0].argsort()]
        return m["last"](experts(ordered, m["own"].weight).reshape(-1, 4, 5).mean(1))

    model = Function(run, own=nn.Linear(5, 5), last=nn.Linear(5, 2)).eval()
    with pytest.raises(UnsupportedOperationError, match=r"aten\.index.*depend on each other"):
        GuidedBackprop(model).attribute(torch.rand(3, 4, 5), 0)


def test_an_index_behind_a_whole_slice_counts_the_examples():
    """As transformers choose the padding mask of each example."""
    aten = torch.ops.aten
    model = Function(lambda m, h: h[torch.arange(h.shape[0])].softmax(1)).eval()
    graph = copy.deepcopy(capture(model, (normal(4, 3),)).graph)
    (rows,) = graph.find_nodes(op="call_function", target=aten.arange.default)
    for stop, whole in ((2**63 - 1, True), (1, False)):
        part = graph.call_function(aten.slice.Tensor, (rows, 0, 0, stop))
        column = graph.call_function(aten.unsqueeze.default, (part, 1))
        assert _counts(column, Layout(0)) == whole
