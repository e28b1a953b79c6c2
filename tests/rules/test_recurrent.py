"""Recurrent layers, as torch.export writes them out."""

import re

import pytest
import torch
from rule_checks import behaves
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import LRP, InverseNetwork, MIPINAttribution, check
from captum_mipin.methods import PatternNet, Patterns


class Recurrent(nn.Module):
    def __init__(self, kind, first=True, **options):
        super().__init__()
        self.first = first
        self.layer = kind(4, 3, batch_first=first, **options)
        ways = 1 + options.get("bidirectional", False)
        self.last = nn.Linear(ways * options.get("proj_size", 3), 2)

    def forward(self, x):
        y, _ = self.layer(x if self.first else x.transpose(0, 1))
        return self.last(y[:, -1] if self.first else y[-1])


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param((nn.LSTM, True, {}), marks=pytest.mark.full),
        (nn.LSTM, False, {}),
        (nn.LSTM, True, {"num_layers": 2, "bidirectional": True}),
        (nn.GRU, True, {}),
        pytest.param((nn.GRU, False, {"bidirectional": True}), marks=pytest.mark.full),
        pytest.param((nn.RNN, True, {}), marks=pytest.mark.full),
        (nn.RNN, True, {"nonlinearity": "relu"}),
    ],
    ids=str,
)
def test_recurrent_networks(layer, recwarn):
    torch.manual_seed(0)
    kind, first, options = layer
    behaves(
        Recurrent(kind, first, **options).double().eval(),
        torch.randn(40, 4, 4, dtype=torch.float64),
    )
    assert not recwarn.list


def cell(layer, gates, h, c, weight, bias):
    """Return the state after one step, written out; c is that of an LSTM alone."""
    if isinstance(layer, nn.LSTM):
        i, f, g, o = (F.linear(h, weight, bias) + gates).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if isinstance(layer, nn.GRU):
        r, z, n = F.linear(h, weight, bias).chunk(3, -1)
        x_r, x_z, x_n = gates.chunk(3, -1)
        n = torch.tanh(x_n + torch.sigmoid(r + x_r) * n)
        return (h - n) * torch.sigmoid(z + x_z) + n, c
    h = F.linear(h, weight, bias) + gates
    return torch.relu(h) if layer.nonlinearity == "relu" else torch.tanh(h), c


class Steps(nn.Module):
    """The network with its recurrent layer written as a loop over cells."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def forward(self, x):
        layer = self.whole.layer
        x = x.transpose(0, 1)
        for number in range(layer.num_layers):
            ways = [self.way(layer, x, f"_l{number}{end}") for end in ("", "_reverse")[: self.ways]]
            x = torch.cat(ways, -1)
        return self.whole.last(x.transpose(0, 1)[:, -1])

    @property
    def ways(self):
        return 1 + self.whole.layer.bidirectional

    def way(self, layer, x, end):
        one = {name.removesuffix(end): value for name, value in layer.named_parameters()}
        back = end.endswith("reverse")
        gates = F.linear(x, one["weight_ih"], one.get("bias_ih"))
        h, c = (x.new_zeros(1, x.shape[1], size) for size in (layer.proj_size or 3, 3))
        results = []
        for step in (gates.flip(0) if back else gates).split(1):
            h, c = cell(layer, step, h, c, one["weight_hh"], one.get("bias_hh"))
            h = F.linear(h, one["weight_hr"]) if layer.proj_size else h
            results.append(h)
        return torch.cat(results[::-1] if back else results)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param((nn.LSTM, True, {}), marks=pytest.mark.full),
        (nn.LSTM, False, {"bias": False, "proj_size": 2}),
        pytest.param(
            (nn.LSTM, True, {"num_layers": 2, "bidirectional": True}), marks=pytest.mark.full
        ),
        (nn.GRU, True, {"bidirectional": True}),
        pytest.param((nn.GRU, False, {"num_layers": 2, "bias": False}), marks=pytest.mark.full),
        pytest.param((nn.RNN, True, {}), marks=pytest.mark.full),
        (nn.RNN, False, {"nonlinearity": "relu", "num_layers": 2}),
    ],
    ids=str,
)
def test_layers_equal_their_steps_written_out(layer):
    torch.manual_seed(0)
    kind, first, options = layer
    model = Recurrent(kind, first, **options).double().eval()
    other, x = Steps(model).eval(), torch.randn(40, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x))
    whole, steps = (
        InverseNetwork(m).fit(x, targets=1, progress=False).source_signal(x[:5], target=1)
        for m in (model, other)
    )
    torch.testing.assert_close(whole, steps, rtol=1e-8, atol=1e-8)
    whole, steps = (LRP(m).attribute(x[:5], target=1) for m in (model, other))
    torch.testing.assert_close(whole, steps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [None, LRP])
def test_check_prints_a_step_once(method):
    model, x = Recurrent(nn.LSTM).eval(), torch.randn(2, 30, 4)
    report = check(model, x, method=method)
    _, *lines = (re.split("  +", line) for line in str(report).splitlines())
    assert len(lines) < 40 < 300 < len(report.rows)
    unfolded = []
    for line in lines:
        if line[1] == "...":
            size, times = map(int, re.findall(r"\d+", line[3]))
            unfolded += unfolded[-size:] * (times - 1)
        else:
            unfolded.append(line)
    assert unfolded == [
        [part for part in (r.path or "(model)", r.operation, r.status, r.note, r.caveat) if part]
        for r in report.rows
    ]


def test_cells_and_complements_of_gates():
    """A GRU as its papers write it, h = (1 − z) h + z n: 1 − z is a gate as z is."""
    torch.manual_seed(0)

    def two_steps(m, x):
        h = m["cell"](x[:, 1], m["cell"](x[:, 0]))
        return m["last"](h[0] if isinstance(h, tuple) else h)

    for cell in (nn.GRUCell(4, 3), nn.LSTMCell(4, 3), nn.RNNCell(4, 3)):
        model = Function(two_steps, cell=cell, last=nn.Linear(3, 2)).double().eval()
        behaves(model, torch.randn(40, 2, 4, dtype=torch.float64))

    def written(m, x):
        z = torch.sigmoid(m["z"](x))
        return m["last"]((1 - z) * m["h"](x) + z * torch.tanh(m["n"](x)))

    parts = {name: nn.Linear(4, 3) for name in "zhn"}
    behaves(
        Function(written, last=nn.Linear(3, 2), **parts).double().eval(),
        torch.randn(40, 4, dtype=torch.float64),
    )


class ZeroStates(Recurrent):
    """A recurrent network whose states are zeros of the size ``len(x)``; ``nothing`` gives none."""

    def __init__(self, kind, nothing):
        super().__init__(kind)
        self.nothing = nothing

    def forward(self, x):
        state = None if self.nothing else torch.zeros(1, len(x), 3, dtype=x.dtype)
        if state is not None and isinstance(self.layer, nn.LSTM):
            state = state, state
        return self.last(self.layer(x, state)[0][:, -1])


@pytest.mark.captured_anew
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_states_of_zeros_with_the_size_of_the_batch_are_no_states(kind):
    x, maps = torch.randn(40, 4, 4, dtype=torch.float64), []
    for nothing in (True, False):
        torch.manual_seed(0)
        model = ZeroStates(kind, nothing).double().eval()
        inverse = InverseNetwork(model).fit(x, 1, progress=False)
        patterns = Patterns(model, estimator="linear").fit(x, progress=False)
        methods = MIPINAttribution(model, inverse), PatternNet(model, patterns), LRP(model)
        maps.append([method.attribute(x[:5], target=1) for method in methods])
    for without, zeros in zip(*maps, strict=True):
        torch.testing.assert_close(zeros, without, rtol=1e-9, atol=1e-12)
    assert "len" not in globals()
