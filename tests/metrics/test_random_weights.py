"""Randomised networks: which layers, in what order, of what copy; a fit kept or made anew."""

import copy
from functools import partial

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency
from small import normal
from torch import nn

from captum_mipin import InverseNetwork, MIPINAttribution
from captum_mipin.errors import InputError, ModelChangedError
from captum_mipin.metrics import randomization


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Backwards(nn.Module):
    """Registered from the top down, run from the bottom up; one layer only lends its weight."""

    def __init__(self):
        super().__init__()
        self.top, self.middle, self.bottom = nn.Linear(5, 3), nn.Linear(5, 5), nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x):
        h = torch.relu(self.bottom(x))
        h = torch.relu(nn.functional.linear(h, self.middle.weight) * self.scale)
        return self.top(h)


def seen(model, x, order="cascading", init="normal", **options):
    """The weights of each random network that the method is made for."""
    states = []

    def refit(changed):
        states.append({name: p.detach().clone() for name, p in changed.named_parameters()})
        return Saliency(changed)

    result = randomization(Saliency(model), x, 0, refit=refit, order=order, init=init, **options)
    return states, result


def differing(state, model):
    return {name for name, p in model.named_parameters() if not torch.equal(state[name], p)}


def test_layers_cascade_from_the_output_down_as_they_ran():
    torch.manual_seed(1)
    model, x = Backwards().eval(), normal(4, 6)
    states, result = seen(model, x)
    layers = result.settings["layers"]
    # the root, with the parameter of its own and what is used through it, ends last
    assert layers == ["middle", "(model)", "top", "bottom"] or layers == [
        "(model)",
        "middle",
        "top",
        "bottom",
    ]
    assert layers.index("top") < layers.index("bottom")
    for i, state in enumerate(states):
        expected = {
            name
            for name, _ in model.named_parameters()
            if (name.rpartition(".")[0] or "(model)") in layers[: i + 1]
        }
        assert differing(state, model) == expected


def test_layers_one_at_a_time_and_by_name(cnn):
    states, result = seen(cnn.model, cnn.x[:3], order="independent")
    assert result.settings["layers"] == ["6", "0"]  # the batch norm's are constant: nothing to draw
    assert [differing(state, cnn.model) for state in states] == [
        {"6.weight", "6.bias"},
        {"0.weight", "0.bias"},
    ]
    states, result = seen(cnn.model, cnn.x[:3], layers=["0", cnn.model[6]])
    assert result.settings["layers"] == ["0", "6"]
    assert differing(states[0], cnn.model) == {"0.weight", "0.bias"}
    states, _ = seen(cnn.model, cnn.x[:3], layers=[""])
    assert differing(states[0], cnn.model) == {"0.weight", "0.bias", "6.weight", "6.bias"}


def test_weights_are_drawn_as_said(cnn):
    weight = cnn.model[6].weight.detach()
    (state,), _ = seen(cnn.model, cnn.x[:3], layers=["6"], init="permuted")
    assert torch.equal(state["6.weight"].flatten().sort().values, weight.flatten().sort().values)
    big = nn.Sequential(nn.Linear(300, 300)).eval()
    with torch.no_grad():
        big[0].weight.add_(1)
    (state,), _ = seen(big, normal(2, 300))
    found, weight = state["0.weight"], big[0].weight.detach()
    assert float(found.mean()) == pytest.approx(float(weight.mean()), abs=1e-3)
    assert float(found.std()) == pytest.approx(float(weight.std()), rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([found.flatten(), weight.flatten()]))[0, 1])) < 0.02
    (state,), result = seen(
        cnn.model, cnn.x[:3], layers=["6"], init=lambda p, generator: torch.zeros_like(p)
    )
    assert not state["6.weight"].any()
    assert result.settings["init"] == "<lambda>"


def test_shared_weights_are_randomised_once():
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    states, result = seen(model, normal(3, 4))
    assert result.settings["layers"] == ["2", "0"]
    assert differing(states[0], model) == {"0.weight", "2.bias"}
    assert torch.equal(states[0]["0.weight"], states[1]["0.weight"])


def test_maps_that_do_not_ask_the_network_stay_the_same(cnn):
    x = cnn.x[:4]
    result = randomization(
        lambda a, t: a, x, 0, model=cnn.model, refit=lambda model: lambda a, t: a
    )
    assert result.values.tolist() == pytest.approx([1] * 4)
    assert [part.mean for part in result.parts.values()] == pytest.approx([1, 1])
    assert result.curves.shape == (4, 2)
    flipped = randomization(
        lambda a, t: a, x, 0, model=cnn.model, refit=lambda model: lambda a, t: -a
    )
    assert flipped.mean == pytest.approx(-1)
    assert [part.mean for part in flipped.parts.values()] == pytest.approx([1, 1])


def test_random_maps_are_not_alike(cnn):
    x = torch.rand(60, 3, 8, 8)
    random = generator(1)
    result = randomization(
        torch.randn(x.shape, generator=random), x, 0, model=cnn.model, layers=["6"],
        refit=lambda model: lambda a, t: torch.randn(a.shape, generator=random),
    )  # fmt: skip
    assert abs(result.mean) < 4 * result.standard_error
    assert result.standard_error == pytest.approx(1 / (192 * 60) ** 0.5, rel=0.4)
    assert result.parts["SSIM"].mean < 0.3


def test_constant_maps_are_counted(cnn):
    def made(model):
        return lambda a, t: torch.where(torch.arange(len(a)).view(-1, 1, 1, 1) == 1, 0, a)

    result = randomization(lambda a, t: a, cnn.x[:3], 0, model=cnn.model, refit=made)
    assert result.unscored == {"constant": (1,)}
    assert result.parts["SSIM"].n == 3


@pytest.mark.parametrize("kind", ["bare", "tunnel", "partial", "layer", "mip-in"])
def test_a_method_goes_with_its_model(own_cnn, kind, untouched):
    """On the copy the same as a method made for a network that is as random."""
    model, x = own_cnn.model, own_cnn.x[:3]
    own_cnn.inverse.changed = "ignore"
    method = {
        "bare": InputXGradient(model),
        "tunnel": NoiseTunnel(InputXGradient(model)),
        "partial": partial(IntegratedGradients(model).attribute, n_steps=4),
        "layer": LayerGradCam(model, model[3]),
        "mip-in": own_cnn.mipin,
    }[kind]
    with untouched(model, x):
        if kind == "tunnel":
            method = partial(method.attribute, nt_samples=1, stdevs=0.0)
            before = torch.get_rng_state()  # Captum's tunnel draws from the global generator
        result = randomization(method, x, [0, 1, 2], generator=generator(4), batch_size=2)
        if kind == "tunnel":
            torch.set_rng_state(before)
    assert result.n == 3
    assert (result.curves[:, -1].abs() < 0.999).all()
    if kind == "layer":
        assert result.settings["maps"] == "1x4x4"


def test_works_in_inference_mode(cnn):
    expected = randomization(InputXGradient(cnn.model), cnn.x[:3], 1)
    with torch.inference_mode():
        assert torch.equal(
            randomization(InputXGradient(cnn.model), cnn.x[:3].clone(), 1).curves, expected.curves
        )


def test_a_kept_method_equals_one_made_anew_where_nothing_was_fitted(cnn):
    kept, anew = (
        randomization(InputXGradient(cnn.model), cnn.x[:3], 1, refit=refit, generator=generator(2))
        for refit in (None, InputXGradient)
    )
    assert torch.equal(kept.curves, anew.curves)
    assert (kept.settings["fit"], anew.settings["fit"]) == ("kept", "made anew")


def test_both_questions_to_mip_in(own_mlp):
    model, inverse, x = own_mlp
    with pytest.raises(ModelChangedError, match="changed='ignore'"):
        randomization(own_mlp.mipin, x[:5], 1)
    inverse.changed = "ignore"

    def refit(changed):
        assert changed is not model
        return MIPINAttribution(
            changed, InverseNetwork(changed).fit(x, targets=[1], progress=False)
        )

    kept, anew = (
        randomization(own_mlp.mipin, x[:5], 1, refit=made, generator=generator(3))
        for made in (None, refit)
    )
    assert kept.n == anew.n == 5
    assert not torch.equal(kept.curves, anew.curves)
    # by hand: with the last layer random and the inverse kept, only the start of the inverse
    # differs: maps of the same order, up to the sign
    assert kept.curves[:, 0].abs().tolist() == pytest.approx([1] * 5)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        random = generator(3)
        for p in (changed[2].weight, changed[2].bias):
            noise = torch.randn(p.shape, generator=random, dtype=torch.float64)
            p.copy_(p.double().mean() + p.double().std(correction=0) * noise)
    expected = refit(changed).attribute(x[:5], target=1)
    from scipy.stats import spearmanr

    for one, other, value in zip(
        expected, own_mlp.mipin.attribute(x[:5], target=1), anew.curves[:, 0], strict=True
    ):
        assert float(value) == pytest.approx(spearmanr(one, other).statistic)


def test_an_inverse_refuses_changed_weights_unless_told(own_mlp):
    model, inverse, x = own_mlp
    with torch.no_grad():
        model[2].weight.mul_(2)
        model[2].bias.mul_(2)
    with pytest.raises(ModelChangedError, match="changed='ignore'"):
        inverse.source_signal(x[:3], target=0)
    inverse.changed = "ignore"
    twice = MIPINAttribution(model, inverse).attribute(x[:3], target=0)
    with pytest.raises(ModelChangedError):  # fits of two networks are never mixed
        inverse.fit(x, targets=[0], progress=False)
    with torch.no_grad():
        model[2].weight.div_(2)
        model[2].bias.div_(2)
    torch.testing.assert_close(
        twice, 2 * MIPINAttribution(model, inverse).attribute(x[:3], target=0)
    )
    with pytest.raises(InputError, match="changed='never'"):
        InverseNetwork(model, changed="never")


def test_what_cannot_be_randomised_is_refused(cnn):
    x = cnn.x[:2]
    for bad, message in (
        (lambda: randomization(x, x, 0, model=cnn.model), "pass refit="),
        (lambda: randomization(lambda a, t: a, x, 0), "pass model="),
        (
            lambda: randomization(Saliency(lambda a: cnn.model(a)), x, 0),
            "expected a torch.nn.Module",
        ),
        (
            lambda: randomization(Saliency(cnn.model), x, 0, model=cnn.model[:2].eval()),
            "pass refit=",
        ),
        (lambda: randomization(Saliency(cnn.model), x, 0, order="downwards"), "order='downwards'"),
        (lambda: randomization(Saliency(cnn.model), x, 0, init="xavier"), "init='xavier'"),
        (
            lambda: randomization(Saliency(cnn.model), x, 0, layers=["head"]),
            "expected modules of the model or their names",
        ),
        (
            lambda: randomization(Saliency(cnn.model), x, 0, layers=[nn.Linear(1, 1)]),
            "expected modules of the model or their names",
        ),
        (lambda: randomization(Saliency(cnn.model), x, 0, layers=["1"]), "nothing to make random"),
        (
            lambda: randomization(Saliency(nn.Sequential(nn.Flatten()).eval()), x, 0),
            "nothing to make random",
        ),
    ):
        with pytest.raises(InputError, match=message):
            bad()
