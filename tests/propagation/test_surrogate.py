from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Function
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from captum_mipin import InverseNetwork, LayerMIPINAttribution, check
from captum_mipin.errors import CaptureError, UnsupportedOperationError
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import capture
from captum_mipin.propagation import surrogate as propagation
from captum_mipin.propagation.runtime import Run, step
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.rules import MIPIN


def dense(*sizes):
    return nn.Linear(*sizes, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surrogate_of(model, *inputs):
    graph = capture(model.eval(), inputs)
    return graph, Surrogate(graph, MIPIN)


def forward(model, *inputs):
    graph, surrogate = surrogate_of(model, *inputs)
    return surrogate(Run(surrogate.steps), graph.values(model, inputs, ()))


def residual():
    torch.manual_seed(0)
    return Function(
        lambda m, x: m["c"](F.relu(m["b"](h := F.relu(m["a"](x))) + h)),
        a=dense(6, 6),
        b=dense(6, 6),
        c=dense(6, 3),
    ).eval()


def test_forward_values_are_the_models_bits():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Dropout(),
        nn.ConvTranspose2d(4, 4, 2, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(forward(model, x), model(x))


class Operations(TorchDispatchMode):
    """Which operations run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[str(operation).split(".")[1]] += 1
        return operation(*args, **(kwargs or {}))


def gated(m, x):
    h = F.relu(m["n"](m["a"](x)))
    y = F.silu(m["n"](m["b"](h)) + m["c"](h) + h)
    return m["d"]((y * y.flip(1).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("forks", ["joint", "sum"])
def test_each_operation_runs_once_and_steps_in_sequence_are_steps(forks, monkeypatch):
    """Before, between and behind forks, and where a value is its own gate."""
    torch.manual_seed(0)
    conv = partial(nn.Conv2d, 4, 4, 3, padding=1, dtype=torch.float64)
    model = Function(
        gated, a=conv(), b=conv(), c=conv(), d=dense(4, 3), n=nn.BatchNorm2d(4, dtype=torch.float64)
    ).eval()
    x, found = normal(3, 4, 5, 5), []
    inverse = InverseNetwork(model, forks=forks).fit(
        normal(40, 4, 5, 5, seed=1), targets=0, progress=False
    )
    for in_sequences in (propagation._in_sequences, lambda graph: graph):
        monkeypatch.setattr(propagation, "_in_sequences", in_sequences)
        surrogate = Surrogate(graph := capture(model, (x,)), MIPIN, joint=forks == "joint")
        with Operations() as ours:
            surrogate(Run(surrogate.steps), graph.values(model, (x,), ()))
        with Operations() as theirs, torch.no_grad():
            model(x)
        same = ("convolution", "relu", "silu", "sigmoid", "addmm")
        assert (
            [ours.count[name] for name in same]
            == [theirs.count[name] for name in same]
            == [3, 1, 1, 1, 1]
        )
        inverse._surrogates.graphs = Graphs()
        found.append(inverse.explain((x,), 0, biases=(False, True)).signals)
        assert ("sequence" in surrogate._module.code) == (len(found) == 1)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_what_is_used_elsewhere_too_ends_a_sequence():
    """Steps used by the output, twice, or not for their signal; named arguments stay named."""
    graph = fx.Graph()
    run, x = graph.placeholder("run"), graph.placeholder("x")
    a = graph.call_function(step, (run, "a", x), {"by": 1})
    b = graph.call_function(step, (run, "b", a), {"by": 2})  # goes to the output as well
    c = graph.call_function(step, (run, "c", b, x))
    d = graph.call_function(step, (run, "d", c, c))  # takes c twice
    e = graph.call_function(step, (run, "e", x, d))  # takes d as something else
    graph.output((e, b))
    found = propagation._in_sequences(graph)
    calls = [
        (node.target.__name__, node.args[1:], dict(node.kwargs))
        for node in found.nodes
        if node.op == "call_function"
    ]
    assert [(name, str(args), named) for name, args, named in calls] == [
        ("sequence", "(x, ('a', (), {'by': 1}), ('b', (), {'by': 2}))", {}),
        ("step", "('c', sequence, x)", {}),
        ("step", "('d', step_2, step_2)", {}),
        ("step", "('e', x, step_3)", {}),
    ]


def test_code_shows_every_step():
    _, surrogate = surrogate_of(residual(), normal(2, 6))
    for key in surrogate.steps:
        assert repr(key) in surrogate.code


def test_steps_are_named_by_module_and_fitted_from_the_output_down():
    _, surrogate = surrogate_of(residual(), normal(2, 6))
    assert surrogate.learned == (
        "layers.c/linear",
        "(model)/relu/fork",
        "layers.a/linear",
    )  # b is learned with the fork
    captured = capture(residual(), (normal(2, 6),))
    assert Surrogate(captured, MIPIN, joint=False).learned == (
        "layers.c/linear",
        "layers.b/linear",
        "layers.a/linear",
    )


def test_a_layer_used_twice_has_two_steps():
    model = Function(lambda m, x: m["a"](F.relu(m["a"](x))), a=dense(4, 4))
    assert surrogate_of(model, normal(2, 4))[1].learned == ("layers.a/linear#2", "layers.a/linear")


@pytest.mark.parametrize(
    "double", [lambda x: x + x.flip(1), lambda x: torch.cat([x, x], 1)], ids=["add", "cat"]
)
def test_a_tensor_used_twice_by_one_operation_forks(double):
    model = Function(
        lambda m, x: m["b"](double(F.relu(m["a"](x)))),
        a=dense(4, 4),
        b=dense(double(normal(1, 4)).shape[1], 2),
    )
    _, surrogate = surrogate_of(model, normal(2, 4))
    assert surrogate.learned == ("layers.b/linear", "(model)/relu/fork", "layers.a/linear")


def test_twice_a_tensor_is_no_fork():
    model = Function(lambda m, x: m["b"]((h := m["a"](x)) + h), a=dense(4, 4), b=dense(4, 2))
    assert surrogate_of(model, normal(2, 4))[1].learned == ("layers.b/linear", "layers.a/linear")


def test_an_input_with_lost_scale_is_calibrated_and_one_with_kept_scale_is_not():
    scaled = Function(lambda m, x: m["a"]((x - 0.3) / 7), a=dense(4, 2))
    plain = Function(lambda m, x: m["a"](x.view(x.shape[0], 4)), a=dense(4, 2))
    assert surrogate_of(scaled, normal(2, 4))[1].learned == (
        "layers.a/linear",
        "input inputs_0/input/fork",
    )
    assert surrogate_of(plain, normal(2, 2, 2))[1].learned == ("layers.a/linear",)
    x = normal(100, 4)
    found = (
        InverseNetwork(scaled.eval(), ridge=0).fit(x, 1, progress=False).source_signal(x, target=1)
    )
    inner = InverseNetwork(nn.Sequential(scaled.layers["a"]).eval(), ridge=0).fit(
        (x - 0.3) / 7, 1, progress=False
    )
    torch.testing.assert_close(found, inner.source_signal((x - 0.3) / 7, target=1) * 7 + 0.3)


def test_each_of_two_inputs_that_are_added_is_reconstructed():
    """Not the sum for each: the source signal of x is on the scale of x, whatever y's is."""
    model = Function(lambda m, x, y: m["a"](x + y), a=dense(4, 2)).eval()
    x, y = normal(400, 4), 0.01 * normal(400, 4, seed=1)
    s, t = InverseNetwork(model).fit((x, y), 0, progress=False).source_signal((x, y), target=0)
    assert float(t.std() / y.std()) < 1
    assert float((x - s).square().sum()) < float((x - x.mean(0)).square().sum())
    assert float((y - t).square().sum()) <= 1.001 * float((y - y.mean(0)).square().sum())


REFUSED = {
    "softmax": (lambda m, x: m["a"](F.softmax(x, 1)), "aten.softmax.int"),
    "power": (lambda m, x: m["a"](x ** m["b"](x)), "aten.pow.Tensor_Tensor"),
    "ratio": (lambda m, x: m["a"](1 / x), "reciprocal|depends on the input"),
    "mean over the batch": (
        lambda m, x: m["a"](x - x.mean(0, keepdim=True)),
        "expected one dimension that contains the batch",
    ),
    "sum over all": (lambda m, x: m["a"](x).sum(1) / x.abs().sum(), "no rule|sum"),
    "flipped batch": (lambda m, x: m["a"](x.flip(0)), "along the batch"),
    "part of the batch": (
        lambda m, x: m["a"](x[:1].expand(x.shape[0], 4)),
        "expected one dimension that contains the batch",
    ),
    "batch as channels": (
        lambda m, x: m["a"](F.avg_pool1d(x.t().unsqueeze(0), 1).squeeze(0).t()),
        "computes along the batch",
    ),
    "softmax over the batch": (
        lambda m, x: m["a"](x * F.softmax(x, 0)),
        "computes along the batch",
    ),
    "attention over the batch": (
        lambda m, x: m["a"](F.scaled_dot_product_attention(x[None], x[None], x[None])[0]),
        "computes along the batch",
    ),
    "folded otherwise": (
        lambda m, x: m["a"](x[:, None].expand(x.shape[0], 4, 4).reshape(-1, 4).view(4, -1, 4)[0]),
        "computes along the batch",
    ),
    "examples against examples": (
        lambda m, x: (m["a"](x) + m["a"](x).unsqueeze(1)).sum(1),
        "expected one dimension that contains the batch",
    ),
    "own mask as a term": (lambda m, x: m["a"](x + (x > 0)), "turns the input into torch.bool"),
    "hidden coupling": (
        lambda m, x: m["a"](x * (x > 0).to(x.dtype).mean(0)),
        "expected one dimension that contains the batch",
    ),
    "batch size": (lambda m, x: m["a"](x) / x.shape[0], "size of the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    function, reason = REFUSED[name]
    model = Function(function, a=dense(4, 4), b=dense(4, 4)).eval()
    x = normal(3, 4)
    with pytest.raises(
        (UnsupportedOperationError, CaptureError), match=f"(?s)no signal can be sent back.*{reason}"
    ):
        InverseNetwork(model).fit(x, 0, progress=False)


def test_a_branch_on_the_batch_size_is_refused():
    model = Function(
        lambda m, x: m["a"](x) * 2 if x.shape[0] > 8 else m["a"](x), a=dense(4, 4)
    ).eval()
    with pytest.raises(CaptureError, match="batch size must be free"):
        InverseNetwork(model).fit(normal(30, 4), 0, progress=False)


def test_a_branch_on_batch_sizes_beyond_all_use_is_none():
    """So does torch choose another kernel for batch normalisation on GPUs."""
    model = Function(
        lambda m, x: m["a"](x) * 2 if x.shape[0] > 65535 else m["a"](x), a=dense(4, 4)
    ).eval()
    x = normal(30, 4)
    inverse = InverseNetwork(model).fit(x, 0, progress=False)
    assert torch.equal(inverse.source_signal(x[:3], 0), inverse.source_signal(x, 0)[:3])


def test_steps_keep_their_names_wherever_the_signal_stops():
    """A start between two calls of one layer must not rename the steps above it."""
    torch.manual_seed(0)
    relu, behind = nn.ReLU(), nn.ReLU()
    model = Function(
        lambda m, x: m["c"](behind(m["b"](h := m["r"](m["a"](F.relu(m["a"](x)))) + 0) + h)),
        a=dense(4, 4),
        b=dense(4, 4),
        c=dense(4, 2),
        r=relu,
    ).eval()
    graph = capture(model, (normal(2, 4),))
    whole = Surrogate(graph, MIPIN).learned
    start = next(node.name for node in graph.graph.nodes if node.name.startswith("add"))
    part = Surrogate(graph, MIPIN, (start,)).learned
    assert part == whole[: len(part)]
    assert len(part) == 2
    assert len(whole) == 4


def test_a_layer_whose_signal_lost_its_scale_is_refused_unless_it_is_fitted_there():
    torch.manual_seed(0)
    model = Function(
        lambda m, x: m["b"](10 * m["r"](m["a"](x))), a=dense(4, 4), r=nn.ReLU(), b=dense(4, 2)
    ).eval()
    x = normal(300, 4)
    whole = InverseNetwork(model).fit(x, 0, progress=False)
    with pytest.raises(CaptureError, match=r"known only up to a factor.*layer="):
        LayerMIPINAttribution(model, whole, model.layers["r"]).attribute(x, 0)
    part = InverseNetwork(model, layer=model.layers["r"]).fit(x, 0, progress=False)
    features = model.layers["r"](model.layers["a"](x)).detach()
    signal = LayerMIPINAttribution(model, part).source_signal(x, 0)
    assert float((features - signal).square().sum()) < float(
        (features - features.mean(0)).square().sum()
    )


def test_what_is_refused_names_operation_path_and_way_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Softmax(1)), nn.Linear(4, 2)).eval()
    with pytest.raises(
        UnsupportedOperationError,
        match=r"(?s)aten\.softmax\.int in 1\.0: no rule.*layer=.*check\(model",
    ) as caught:
        InverseNetwork(model).fit(torch.randn(4, 4), 0, progress=False)
    assert isinstance(caught.value, NotImplementedError)
    inverse = InverseNetwork(model, layer=model[1]).fit(
        torch.randn(9, 4), 0, progress=False
    )  # the way out
    assert inverse.targets == [0]


def test_check_marks_every_operation():
    model = Function(
        lambda m, x: m["b"](F.softmax(F.relu(m["a"](x)).view(x.shape[0], 4), 1)),
        a=dense(4, 4),
        b=dense(4, 2),
    ).eval()
    report = check(model, normal(1, 4))
    assert [row.status for row in report.rows] == [
        "supported",
        "supported",
        "passes",
        "refused",
        "supported",
    ]
    assert not report.ok
    assert report.refused[0].operation == "aten.softmax.int"
    assert check(model, normal(1, 4), layer=model.layers["b"]).ok


def test_output_that_does_not_depend_on_the_input_is_refused():
    model = Function(lambda m, x, y: m["a"](y), a=dense(4, 2)).eval()
    with pytest.raises(CaptureError, match="does not depend on inputs_0"):
        InverseNetwork(model).fit((normal(5, 4), normal(5, 4)), 0, progress=False)


@st.composite
def programs(draw):
    """Random networks: each line takes earlier values and makes a new one."""
    lines = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(
            st.sampled_from(["dense", "relu", "add", "sub", "scale", "shift", "cat", "view"])
        )
        lines.append((kind, draw(st.integers(0, 99)), draw(st.integers(0, 99))))
    return lines


@settings(deadline=None, max_examples=12)
@given(programs(), st.integers(0, 3))
def test_random_graphs_keep_values_and_identities(lines, seed):
    """Values are the model's; S − A is free of the logit; neither mixing nor order matters."""
    torch.manual_seed(seed)
    layers = {str(i): dense(4, 4) for i in range(len(lines))} | {
        "pair": dense(8, 4),
        "out": dense(4, 3),
    }

    def program(m, x):
        values = [x]
        for number, (kind, i, j) in enumerate(lines):
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            made = {
                "dense": lambda a, b, n=number: m[str(n)](a),
                "relu": lambda a, b: F.relu(a),
                "add": lambda a, b: a + b,
                "sub": lambda a, b: a - 0.5 * b,
                "scale": lambda a, b: 3 * a,
                "shift": lambda a, b: a - 1,
                "cat": lambda a, b: m["pair"](torch.cat([a, b], 1)),
                "view": lambda a, b: a.view(-1, 2, 2).permute(0, 2, 1).flatten(1),
            }[kind](a, b)
            values.append(made)
        return m["out"](values[-1])

    model, x = Function(program, **layers).eval(), normal(40, 4, seed=seed)
    with torch.no_grad():
        if (model(x).std(0) < 1e-9).any():
            return
        torch.testing.assert_close(forward(model, x), model(x))
    inverse = InverseNetwork(model, ridge=1e-2).fit(x, progress=False)
    mixed = torch.arange(6) % 3
    found = inverse.explain((x[:6],), mixed, biases=(False, True))
    (a,), (s,) = found.signals
    assert torch.isfinite(a).all()
    for i in range(6):
        alone = inverse.explain((x[i : i + 1],), int(mixed[i]), biases=(False, True))
        torch.testing.assert_close(alone.signals[0][0][0], a[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.signals[1][0][0], s[i], rtol=1e-9, atol=1e-9)
    shuffled = InverseNetwork(model, ridge=1e-2).fit(x.flip(0), progress=False, batch_size=7)
    torch.testing.assert_close(shuffled.source_signal(x[:6], target=mixed), s, rtol=1e-7, atol=1e-7)
