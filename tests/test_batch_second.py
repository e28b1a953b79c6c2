"""Networks that keep the batch in another dimension than the first, as (tokens, batch, features).

Each is compared with the same network written for (batch, tokens, features), and gradients with
those of autograd.
"""

import pytest
import torch
from small import Function, normal
from torch import nn

from captum_mipin import IBA, InverseNetwork, LayerMIPINAttribution, NeighbourInverse, check
from captum_mipin.bottleneck import InputIBA
from captum_mipin.methods import (
    LRP,
    Deconvnet,
    DeepTaylor,
    GuidedBackprop,
    LayerPropagation,
)
from captum_mipin.methods.gradients import Gradient

TOKENS = torch.randint(0, 20, (60, 5), generator=torch.Generator().manual_seed(0))
SIGNALS = normal(60, 5, 6, dtype=torch.float64)
KINDS = ("transformer", "LSTM")


def network(kind, first, words=True):
    """Return a classifier of sequences of 5, of tokens or of 6 numbers each.

    Args:
        kind: "transformer" or "LSTM".
        first: Whether the batch stays the first dimension. If False, both dimensions are swapped
            as soon as the network is entered, and swapped back before its last layer.
        words: Whether its inputs are tokens.
    """

    def run(m, x):
        h = x if first else x.transpose(0, 1)
        places = m["places"].weight if first else m["places"].weight[:, None]
        h = m["body"](m["norm"]((m["words"](h) if words else h) + places))
        h = (h[0] if kind == "LSTM" else h).relu()
        return m["last"]((h if first else h.transpose(0, 1)).mean(1))

    if kind == "transformer":
        layer = nn.TransformerEncoderLayer(6, 2, 8, activation="gelu", batch_first=first)
        body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    else:
        body = nn.LSTM(6, 6, batch_first=first)
    layers = {"words": nn.Embedding(20, 6), "places": nn.Embedding(5, 6), "norm": nn.LayerNorm(6)}
    model = Function(run, **layers, body=body, last=nn.Linear(6, 3)).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    return model


def equal(found, expected):
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * largest)


@pytest.mark.parametrize(
    ("kind", "layer"), [("transformer", "layers.words"), ("LSTM", "layers.norm")]
)
def test_layers_with_the_batch_in_the_second_dimension(kind, layer):
    second, first = network(kind, False), network(kind, True)
    equal(second(TOKENS), first(TOKENS))
    few, other = TOKENS[:7], TOKENS[3:4]
    for method in (LRP, GuidedBackprop):
        found = LayerPropagation(method(second), layer).attribute(few, 1)
        assert found.shape == (7, 5, 6)
        equal(found, LayerPropagation(method(first), layer).attribute(few, 1))
        equal(LayerPropagation(method(second), layer).attribute(other, 1), found[3:4])
    maps = []
    for model in (second, first):
        inverse = InverseNetwork(model, layer=layer).fit(TOKENS, 1, progress=False)
        mipin = LayerMIPINAttribution(model, inverse)
        maps.append((
            mipin.attribute(few, 1), mipin.source_signal(few, 1), inverse.information(1),
            LayerMIPINAttribution(model, inverse, "layers.body").attribute(few, 1),
        ))  # fmt: skip
    for found, expected in zip(*maps, strict=True):
        equal(found, expected)
    assert check(second, few, layer=layer).ok


def test_the_gradient_at_such_a_layer_is_autograds():
    model, kept = network("transformer", False), []
    hook = model.layers["norm"].register_forward_hook(lambda m, x, y: kept.append(y))
    score = model(TOKENS[:7])[:, 2].sum()
    hook.remove()
    (expected,) = torch.autograd.grad(score, kept)
    found = LayerPropagation(Gradient(model), "layers.norm").attribute(TOKENS[:7], 2)
    equal(found, expected.transpose(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_networks_that_swap_batch_and_time(kind):
    maps = []
    for first in (False, True):
        model = network(kind, first, words=False)
        inverse = InverseNetwork(model).fit(SIGNALS, 1, progress=False)
        near = NeighbourInverse(model, neighbours=20, feature="layers.norm").fit(
            SIGNALS, 1, progress=False
        )
        few = SIGNALS[:4]
        maps.append([
            *(method(model).attribute(few, 1) for method in (LRP, DeepTaylor, Deconvnet)),
            inverse.source_signal(few, 1), near.source_signal(few, 1),
        ])  # fmt: skip
    for found, expected in zip(*maps, strict=True):
        equal(found, expected)


def test_bottlenecks_at_such_a_layer():
    results = []
    for first in (False, True):
        model = network("transformer", first)
        iba = IBA(model, "layers.norm", "fast", channels=2).estimate(TOKENS, progress=False)
        draw = torch.Generator().manual_seed(0)
        found = iba.attribute(TOKENS[:3], 1, at="layer", generator=draw)
        two = InputIBA(
            model, "layers.norm", "fast", input_layer="layers.words", channels=2, input_channels=2
        ).estimate(TOKENS, progress=False)
        draw = torch.Generator().manual_seed(0)
        results.append((found, two.attribute(TOKENS[:2], 1, generator=draw)))
    for found, expected in zip(*results, strict=True):
        equal(found, expected)
