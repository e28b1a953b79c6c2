"""A fit keeps what memory allows: less memory costs time, and changes nothing but rounding."""

import pytest
import torch
from small import normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, LayerMIPINAttribution
from captum_mipin.graph.capture import capture
from captum_mipin.inverse.trace import Trace
from captum_mipin.propagation.runtime import Run
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import solve
from captum_mipin.rules import MIPIN


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Counted:
    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def passes_of(inverse, batches, memory):
    """Fit with so much memory; how often the data was gone through."""
    data = Counted(batches)
    inverse.fit(data, [0, 2], memory=memory, progress=False)
    return data.passes


@pytest.mark.parametrize("solver", ["exact", "sgd"])
def test_memory_changes_the_passes_over_the_data_and_nothing_else(solver, monkeypatch):
    drop, groups = Trace.drop, []
    monkeypatch.setattr(
        Trace, "drop", lambda self, targets: (groups.append(len(targets)), drop(self, targets))
    )
    torch.manual_seed(0)
    model = Residual().double().eval()
    batches = list(normal(30, 2, 6, 6, dtype=torch.float64).split(12))
    whole, part = (InverseNetwork(model, solver=solver, epochs=2) for _ in range(2))
    once = passes_of(whole, batches, 2 << 30)
    assert once == 2  # for the shape of the first batch, then for all
    assert set(groups) == {2}
    found = set()
    for power in range(56, 80):  # from a pass for each layer to all in memory
        groups.clear()
        passes = passes_of(part, batches, int(2 ** (power / 4)))
        found.add((passes, min(groups, default=0)))
        for target in (0, 2):
            close(part.source_signal(batches[0], target), whole.source_signal(batches[0], target))
        assert {str(row)[:60] for row in part.report.layers} == {
            str(row)[:60] for row in whole.report.layers
        }
    assert (once, 2) in found
    assert (once, 1) in found, "everything is kept, and one class comes down after the other"
    if solver == "exact":
        each_layer = max(passes for passes, _ in found)
        assert each_layer > once + 4
        assert any(once < passes < each_layer and kept for passes, kept in found), (
            "a pass for several layers"
        )


def test_what_all_classes_have_passed_is_let_go():
    torch.manual_seed(0)
    model, x = Residual().double().eval(), normal(12, 2, 6, 6, dtype=torch.float64)
    inverses = InverseNetwork(model).fit(x, [0, 2], progress=False)._state.fitted.inverses
    graph = capture(model, (x,))
    surrogate = Surrogate(graph, MIPIN)
    run = Run(surrogate.steps, fitting=surrogate.learned)
    trace = Trace(run, surrogate(run, graph.values(model, (x,), ())))
    targets = [(0,), (2,)]
    for number, key in enumerate(surrogate.learned):
        for target in targets:
            trace.signals(key, target, inverses[target])
        trace.forget(targets)
        assert len(trace._seen) == len(surrogate.learned) - number


def wide(dtype=torch.float64):
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 3))
        .to(dtype)
        .eval()
    )


@pytest.mark.parametrize("memory", [0, 5000, 4 << 30])
def test_wide_layers_are_inverted_row_by_row_and_the_inverse_is_the_same(
    memory, monkeypatch, tmp_path
):
    model, x = wide(), normal(12, 50, dtype=torch.float64)
    inverse = InverseNetwork(model).fit(x, [0, 2], batch_size=5, memory=memory, progress=False)
    first, second = (inverse._state.fitted.inverses[target]["0/linear"] for target in ((0,), (2,)))
    assert first.rows.shape == (12, 50)
    assert first.rows is second.rows, "classes share them"
    monkeypatch.setattr("captum_mipin.inverse.fit.Fit._regressed_rows", lambda *arguments: 1 << 20)
    primal = InverseNetwork(model).fit(x, [0, 2], batch_size=5, progress=False)
    assert primal._state.fitted.inverses[(0,)]["0/linear"].rows is None
    for target in (0, 2):
        for local in (True, False):
            close(
                inverse.source_signal(x, target, local=local),
                primal.source_signal(x, target, local=local),
            )
        close(inverse.class_attribution(target), primal.class_attribution(target))
    for one, other in zip(
        sorted(inverse.report.layers, key=str), sorted(primal.report.layers, key=str), strict=True
    ):
        assert one.explained_variance == pytest.approx(other.explained_variance, abs=1e-9)
        assert (one.dead, one.rows, one.signals) == (other.dead, other.rows, other.signals)
    inverse.save(tmp_path / "inverse")
    loaded = InverseNetwork.load(tmp_path / "inverse", model)
    for target in (0, 2):
        assert torch.equal(loaded.source_signal(x, target), inverse.source_signal(x, target))
    first, second = (loaded._state.fitted.inverses[target]["0/linear"] for target in ((0,), (2,)))
    assert first.rows is second.rows
    loaded.to("cpu")
    monkeypatch.undo()
    more = inverse.fit(x, 1, batch_size=5, memory=memory, progress=False)._state.fitted.inverses
    assert more[(1,)]["0/linear"].rows is more[(2,)]["0/linear"].rows, (
        "of the same data, also from one fit to the next"
    )


def test_tokens_are_rows_whatever_dimension_the_batch_has():
    """All dimensions but the features' count rows: seven tokens of five examples are 35 rows."""

    class Tokens(nn.Module):
        def __init__(self, transposed):
            super().__init__()
            self.inner, self.head, self.transposed = (
                nn.Linear(10, 40),
                nn.Linear(40 * 7, 2),
                transposed,
            )

        def forward(self, x):
            if self.transposed:
                x = x.transpose(0, 1)
            x = F.relu(self.inner(x))
            return self.head((x.transpose(0, 1) if self.transposed else x).flatten(1))

    torch.manual_seed(0)
    model = Tokens(False).double().eval()
    other = Tokens(True).double().eval()
    other.load_state_dict(model.state_dict())
    for count, by_rows in ((5, True), (6, False)):
        x = normal(count, 7, 10, dtype=torch.float64)
        one, two = (
            InverseNetwork(m).fit(x, 0, batch_size=2, progress=False) for m in (model, other)
        )
        close(one.source_signal(x, 0), two.source_signal(x, 0))
        for inverse in (one, two):
            rows = {layer.layer: layer.rows for layer in inverse.report.layers}
            assert rows["inner/linear"] == 7 * count
            solved = inverse._state.fitted.inverses[(0,)]["inner/linear"]
            assert solved.rows is None or by_rows


def test_classes_that_share_are_one_regression_on_all_pairs(tmp_path):
    """By hand: below the first step, the rows of all classes are one regression."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = normal(50, 6, dtype=torch.float64)
    inverse = InverseNetwork(model, sharing="classes").fit(x, [0, 2], progress=False)
    alone = InverseNetwork(model).fit(x, [0, 1, 2], progress=False)
    with torch.no_grad():
        hidden = F.relu(model[0](x))
    signals = torch.cat(
        [
            LayerMIPINAttribution(model, alone, model[1]).source_signal(x, target=target)
            for target in (0, 2)
        ]
    )
    assert signals[:50][hidden == 0].abs().max() == 0
    rows = Moments.zeros(1, 6, 8)
    rows.update(x.repeat(2, 1)[None], signals[None])
    expected = solve(rows)
    first, second = (inverse._state.fitted.inverses[target]["0/linear"] for target in ((0,), (2,)))
    assert first is second
    close(first.weight, expected.weight[0])
    close(first.bias, expected.bias[0])
    head = [fitted._state.fitted.inverses[(2,)]["2/linear"].weight for fitted in (inverse, alone)]
    close(*head)
    for memory in (0, 3000):
        again = InverseNetwork(model, sharing="classes").fit(
            list(x.split(9)), [0, 2], memory=memory, progress=False
        )
        close(again.source_signal(x, 2), inverse.source_signal(x, 2))
    inverse.save(tmp_path / "inverse")
    loaded = InverseNetwork.load(tmp_path / "inverse", model)
    loaded.fit(x, 1, progress=False)
    later = loaded._state.fitted.inverses[(1,)]
    assert later["0/linear"].weight is loaded._state.fitted.inverses[(2,)]["0/linear"].weight
    close(later["2/linear"].weight, alone._state.fitted.inverses[(1,)]["2/linear"].weight)
    assert {layer.target for layer in loaded.report.layers if layer.layer == "2/linear"} == {
        0,
        1,
        2,
    }
