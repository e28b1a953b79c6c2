"""Completeness by hand, against the benchmark, and its control."""

import re

import pytest
import torch
from small import normal

from captum_mipin import InverseNetwork, LayerMIPINAttribution
from captum_mipin.errors import InputError
from captum_mipin.metrics import completeness


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Scaled:
    """A source signal S = A + B that keeps a share of x; outputs are the inputs themselves."""

    def __init__(self, share, bias=0.0):
        self.share, self.bias = share, bias

    def attribute(self, inputs, target=None):
        return self.share * inputs

    def source_signal(self, inputs, target=None):
        return self.share * inputs + self.bias


def test_apc_by_hand():
    x = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, -10.0], [5.0, 0.0]])
    result = completeness(Scaled(0.5, 2.0), x, [0, 0, 1, 1], model=lambda x: x)
    # Φ(S) = 3, 4, −3; losses −1/2, 0, (−10 + 3)/10; the last output is 0
    assert result.values[:3].tolist() == pytest.approx([50, 0, 70])
    assert result.parts["positive APC"].values[:3].tolist() == pytest.approx([0, 0, 0])
    assert result.unscored == {"zero output": (3,)}
    assert result.mean == pytest.approx((25 + 70) / 2)
    assert completeness(
        Scaled(0.5, 2.0), x, [0, 0, 1, 1], model=lambda x: x, average="samples"
    ).mean == pytest.approx(40)


@pytest.mark.parametrize("layer", [0, 3])
def test_an_inverse_that_stops_at_a_layer_is_refused(cnn, layer):
    model, x = cnn.model, cnn.x
    inverse = InverseNetwork(model, layer=model[layer]).fit(x, progress=False)
    shape = tuple(model[: layer + 1](x[:1]).shape[1:])
    message = (
        f"the source signal has shape {shape} per example, expected the shape of the model's "
        "input, (3, 8, 8), because completeness applies the model to the source signal. The "
        "inverse stops at a layer: pass a method whose inverse reaches the input"
    )
    for control in (True, False):
        with pytest.raises(InputError, match=re.escape(message)):
            completeness(LayerMIPINAttribution(model, inverse), x[:5], 0, control=control)


def test_perfect_and_empty_signals():
    x = normal(9, 4).abs() + 1
    perfect, nothing = (
        completeness(Scaled(share), x, 1, model=lambda x: x) for share in (1.0, 0.0)
    )
    assert perfect.mean == perfect.parts["positive APC"].mean == 0
    assert (
        nothing.mean
        == nothing.parts["positive APC"].mean
        == nothing.parts["shuffled output"].mean
        == 100
    )


def test_the_control_is_another_examples_output():
    """With S = A = x, the control's signal of example i has the output of another example j."""
    x = normal(7, 3) + 4
    targets = [0, 1, 2, 0, 1, 2, 0]
    result = completeness(Scaled(1.0), x, targets, model=lambda x: x, generator=generator(3))
    own = torch.stack([x[i, t] for i, t in enumerate(targets)]).double()
    for i, t in enumerate(targets):
        possible = [100 * abs(own[i] - x[j, t]) / abs(own[i]) for j in range(7) if j != i]
        assert (
            min(abs(float(p) - float(result.parts["shuffled output"].values[i])) for p in possible)
            < 1e-4
        )
    again, other = (
        completeness(Scaled(1.0), x, targets, model=lambda x: x, generator=generator(s))
        for s in (3, 4)
    )
    assert torch.equal(
        again.parts["shuffled output"].values, result.parts["shuffled output"].values
    )
    assert not torch.equal(
        other.parts["shuffled output"].values, result.parts["shuffled output"].values
    )


def test_a_single_example_has_no_other():
    result = completeness(Scaled(1.0), torch.ones(1, 3), 0, model=lambda x: x)
    assert (result.mean, result.parts["shuffled output"].n) == (0, 0)


def test_control_of_mip_in_is_the_inverse_restarted(mlp):
    """The control rests on this: A is proportional to the logit, the rest independent of it."""
    x = mlp.x[:6]
    result = completeness(mlp.mipin, x, 1, batch_size=4)
    found = mlp.inverse.explain((x,), 1, biases=(False, True))
    (a,), (s,) = found.signals
    with torch.no_grad():
        logits, after = mlp.model(x)[:, 1], mlp.model(s)[:, 1]
        torch.testing.assert_close(
            result.values,
            (100 * (logits - after).abs() / logits.abs()).double(),
            rtol=1e-4,
            atol=1e-4,
        )
        possible = torch.stack(
            [mlp.model(s + a * (logits[j] / logits - 1)[:, None])[:, 1] for j in range(6)]
        )
    errors = (100 * (logits - possible).abs() / logits.abs()).double()
    near = (errors - result.parts["shuffled output"].values).abs() < 1e-3
    assert (near & ~torch.eye(6, dtype=torch.bool)).any(0).all()


def test_completeness_agrees_with_the_benchmark(monkeypatch, mlp):
    import completeness as benchmark
    from data import Images

    labels = torch.arange(len(mlp.x)) % 3
    images = Images("made up", mlp.x, labels, mlp.x, labels, ("a", "b", "c"))
    expected = benchmark.apc(
        mlp.model, images, lambda x, label: mlp.inverse.source_signal(x, target=label)
    )
    result = completeness(mlp.mipin, mlp.x, labels, control=False)
    assert result.mean == pytest.approx(expected["APC %"], rel=1e-5)
    assert result.parts["positive APC"].mean == pytest.approx(expected["positive APC %"], rel=1e-5)


def test_completeness_of_several_inputs():
    class Both:
        def source_signal(self, inputs, target=None):
            return tuple(x / 2 for x in inputs)

    result = completeness(
        Both(), (torch.ones(3, 2), torch.ones(3, 2)), 0, model=lambda a, b: a + b, control=False
    )
    assert result.mean == 50
