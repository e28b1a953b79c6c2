"""Networks spelled alike share a capture, others do not, and a written graph is noticed."""

from functools import partial

import pytest
import torch
from shared_graphs import SharedGraphs, spelling
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin.graph import capture as capture_module
from captum_mipin.graph.capture import capture


def network(**options):
    return nn.Sequential(nn.Conv2d(1, 2, 3, **options), nn.ReLU(), nn.Flatten()).eval()


def named(function):
    return Function(lambda m, x: function(m["layer"](x)), layer=nn.Linear(3, 3)).eval()


def test_values_of_weights_are_no_part_of_a_spelling():
    one, other = network(), network()
    assert not torch.equal(one[0].weight, other[0].weight)
    assert spelling(one) == spelling(other) is not None


def test_whatever_changes_the_graph_is_part_of_a_spelling():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    untied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    tied[1].weight = tied[0].weight
    models = [
        network(), network(padding=1), network(bias=False), network().double(), network().train(),
        tied, untied, named(torch.relu), named(F.relu), named(partial(F.elu, alpha=2.0)),
        named(partial(F.elu, alpha=3.0)),
    ]  # fmt: skip
    spellings = [spelling(model) for model in models]
    assert None not in spellings
    assert len(set(spellings)) == len(models)


def test_what_may_be_anything_has_no_spelling():
    hooked, holds = network(), network()
    hooked.register_forward_hook(lambda module, inputs, value: value * 2)
    holds[1].factor = torch.ones(3)
    for model in (hooked, holds, named(nn.ReLU()), named(torch.ones(3).mul)):
        assert spelling(model) is None


@pytest.mark.captured_anew
def test_a_graph_is_captured_once_and_written_to_never(monkeypatch):
    shared = SharedGraphs(capture_module.trace)
    monkeypatch.setattr(capture_module, "trace", shared)
    x = (torch.rand(2, 1, 5, 5),)
    graph = capture(network(), x)
    assert capture(network(), x) is graph
    assert capture(network(), (torch.rand(2, 1, 6, 6),)) is not graph
    shared.check_unwritten()
    assert capture(network(), x) is graph
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    node.meta["mark"] = 1
    with pytest.raises(AssertionError, match="were written to"):
        shared.check_unwritten()
