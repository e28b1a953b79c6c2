"""Recurrent layers, as torch.export writes them out."""

import pytest
import torch
from rule_checks import behaves
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork


class Recurrent(nn.Module):
    def __init__(self, kind, first=True, **options):
        super().__init__()
        self.first = first
        self.layer = kind(4, 3, batch_first=first, **options)
        self.last = nn.Linear(6 if options.get("bidirectional") else 3, 2)

    def forward(self, x):
        y, _ = self.layer(x if self.first else x.transpose(0, 1))
        return self.last(y[:, -1] if self.first else y[-1])


@pytest.mark.parametrize(
    "layer",
    [
        (nn.LSTM, True, {}),
        (nn.LSTM, False, {}),
        (nn.LSTM, True, {"num_layers": 2, "bidirectional": True}),
        (nn.GRU, True, {}),
        (nn.GRU, False, {"bidirectional": True}),
        (nn.RNN, True, {}),
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


def test_lstm_equals_its_steps_written_out():
    class Steps(nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.whole = whole

        def forward(self, x):
            layer = self.whole.layer
            inputs = F.linear(x.transpose(0, 1), layer.weight_ih_l0, layer.bias_ih_l0)
            h = c = x.new_zeros(1, x.shape[0], 3)
            outputs = []
            for step in inputs.split(1):
                i, f, g, o = (F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0) + step).chunk(4, 2)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outputs.append(h)
            return self.whole.last(torch.cat(outputs).transpose(0, 1)[:, -1])

    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM).double().eval(), torch.randn(40, 4, 4, dtype=torch.float64)
    whole, steps = (
        InverseNetwork(m).fit(x, targets=1, progress=False).source_signal(x[:5], target=1)
        for m in (model, Steps(model).eval())
    )
    torch.testing.assert_close(whole, steps, rtol=1e-8, atol=1e-8)


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
