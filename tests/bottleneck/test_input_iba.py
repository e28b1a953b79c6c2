"""InputIBA: its three stages, Captum's contract, and what cannot work."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from captum.attr import NoiseTunnel
from small import Function, attributed_in_every_way, left_half, normal, text_classifier
from torch import nn
from torch.nn import functional as F

from captum_mipin import IBA, InputIBA
from captum_mipin.bottleneck import Adversary, Bottleneck, ThreeStages, base, samples
from captum_mipin.bottleneck.adversary import Critic, adversarial_mask
from captum_mipin.bottleneck.gaussian import Noise, optimise
from captum_mipin.bottleneck.input_iba import INPUT_IBA_SETTINGS
from captum_mipin.bottleneck.maps import at_input
from captum_mipin.errors import (
    CaptureError,
    InputError,
    InverseFileError,
    ModelChangedError,
    NotFittedError,
    TargetRangeError,
)

SHORT = ThreeStages(
    Bottleneck(beta=20, sigma=0, steps=3, copies=4),
    Adversary(samples=8, groups=2, epochs=2, batch=4, critic_steps=2, width=0.5),
    Bottleneck(beta=20, steps=4, copies=3),
)
SHORT_TEXT = replace(
    SHORT,
    prior=replace(SHORT.prior, noise="position"),
    input=Bottleneck(steps=4, copies=3, sigma=0),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 3),
    ).eval()


@pytest.fixture(scope="module")
def iba(model, x):
    return InputIBA(model, model[4], SHORT).estimate(x, progress=False)


@pytest.fixture(scope="module")
def text():
    model = text_classifier()
    tokens = torch.randint(20, (30, 9))
    options = {"channels": -1, "input_channels": -1, "across": (1,)}
    iba = InputIBA(
        model, model.layers["lstm"], SHORT_TEXT, input_layer=model.layers["words"], **options
    )
    return iba.estimate(tokens, progress=False), model, tokens


# ---------------------------------------------------------------------- the stages


def test_the_defaults_are_the_published_ones():
    images, text = INPUT_IBA_SETTINGS["images"], INPUT_IBA_SETTINGS["text"]
    assert images.feature == Bottleneck(20, 10, 1.0, 10, 0.0, 5.0)
    assert images.input == Bottleneck(20, 60, 1.0, 10, 1.0, 5.0)
    assert images.prior == Adversary(
        200, 10, 20, 32, 5e-5, 0.01, 5, 0.003, 0.1, 0.05, "channel", "capacity", 1.0, None
    )
    assert text.feature == Bottleneck(15, 10, 1.0, 10, 0.0, 5.0)
    assert text.input == Bottleneck(30, 30, 0.5, 10, 0.0, 5.0)
    assert text.prior == replace(images.prior, mask_rate=0.03, noise="position")


def test_the_first_stage_is_iba_at_the_layer(iba, model, x):
    alone = IBA(model, model[4], SHORT.feature).estimate(x, progress=False)
    found, expected = (
        iba.explain(x[:3], [0, 1, 2]).feature,
        alone.explain(x[:3], [0, 1, 2], extras=None),
    )
    assert torch.equal(found.information, expected.information)
    assert torch.equal(found.losses, expected.losses)


def test_the_third_stage_is_a_bottleneck_at_the_input_beyond_the_prior(iba, model, x):
    """By hand: standard noise, the prior as found, cross entropy of the whole model."""
    found = iba.explain((x[:3],), [0, 1, 2])
    one = torch.ones(())

    def cross_entropy(z):
        logits = model(z.flatten(0, 1)).unflatten(0, (3, 3))
        return torch.stack([-logits[:, i].log_softmax(1)[:, i].mean() for i in range(3)])

    noise = Noise(torch.zeros(()), one, one)
    expected = optimise(
        x[:3], noise, cross_entropy, SHORT.input, positions=(2, 3), prior=found.prior
    )
    torch.testing.assert_close(found.input.alpha, expected.alpha, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.input.information, expected.information, rtol=1e-3, atol=1e-5)


def test_the_prior_starts_as_the_bits_of_the_layer(model, x):
    how = replace(SHORT, prior=replace(SHORT.prior, epochs=0))
    found = InputIBA(model, model[4], how).estimate(x, progress=False).explain((x[:3],), 1)
    bits = at_input(found.feature.information, (x[:3],), 1, 1)
    torch.testing.assert_close(found.prior, bits.sigmoid().unsqueeze(1).expand(-1, 3, -1, -1))
    assert found.critic.shape == found.generator.shape == (0, 3)


@pytest.mark.parametrize("maps", [True, False])
def test_the_adversarial_mask_lets_through_what_the_bottleneck_does(maps):
    """The features are the input itself, half of them real and half noise."""
    shape = (1, 2, 8, 8) if maps else (1, 16, 4)
    x = 3 * normal(*shape, seed=1)
    weight = torch.zeros(shape)
    weight[:, :, :4] = 1 if maps else 0
    weight[:, :8] += 0 if maps else 1
    how = Adversary(
        samples=64,
        groups=1,
        epochs=80,
        batch=32,
        critic_rate=3e-3,
        clip=0.3,
        critic_steps=2,
        mask_rate=0.02,
    )
    passed, critic, generator = adversarial_mask(
        x,
        x,
        weight,
        torch.zeros(shape),
        lambda z: z,
        settings=how,
        draw=torch.Generator().manual_seed(0),
        channels=1 if maps else -1,
        input_channels=1 if maps else -1,
    )
    real, other = passed[weight == 1], passed[weight == 0]
    assert float(real.mean() - other.mean()) > 0.1
    assert torch.isfinite(critic).all()
    assert (~generator.isnan()).tolist() == [True, False] * 80


def test_the_game_by_another_hand():
    """The same draws, with backward() and plain loops in place of ours."""
    x, features, weight = (
        normal(1, 2, 8, 8),
        normal(1, 3, 4, 4, seed=1),
        normal(1, 3, 4, 4, seed=2).abs(),
    )
    kernel = normal(3, 2, 3, 3, seed=3)
    how = Adversary(
        samples=6, groups=2, epochs=2, batch=4, critic_rate=1e-2, clip=0.05, critic_steps=2
    )

    def above(z):
        return F.conv2d(z, kernel, stride=2, padding=1)

    passed, losses, _ = adversarial_mask(
        x,
        features,
        weight,
        torch.full_like(x, 0.3),
        above,
        settings=how,
        draw=torch.Generator().manual_seed(7),
    )
    draw = torch.Generator().manual_seed(7)
    levels = torch.rand(2, 2, 1, 1, 1, 1, generator=draw)
    noise = torch.randn(2, 3, 3, 4, 4, generator=draw)
    real = torch.cat(
        [
            weight * features + (1 - weight) * (n * 5 * s + (4 * m - 2))
            for m, s, n in zip(*levels, noise, strict=True)
        ]
    )
    critic = Critic(features, 1, 1.0, draw)
    alpha, mean, std = (
        nn.Parameter(t)
        for t in (torch.full_like(x, 0.3), torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
    )
    first = torch.optim.RMSprop(critic.parameters(), lr=1e-2)
    second = torch.optim.RMSprop(
        [{"params": alpha, "lr": 0.003}, {"params": mean, "lr": 0.1}, {"params": std, "lr": 0.05}]
    )
    expected = []
    for _ in range(2):
        order = torch.randperm(6, generator=draw)
        for i, some in enumerate((order[:4], order[4:])):
            z = torch.randn(len(some), 2, 8, 8, generator=draw)
            fake = above(alpha.sigmoid() * x + (1 - alpha.sigmoid()) * (std * z + mean))
            first.zero_grad()
            loss = -critic(real[some]).mean() + critic(fake.detach()).mean()
            loss.backward()
            first.step()
            with torch.no_grad():
                for parameter in critic.parameters():
                    parameter.clamp_(-0.05, 0.05)
            expected.append(loss.item())
            if i == 0:
                second.zero_grad()
                (-critic(fake).mean()).backward()
                second.step()
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(passed, alpha.detach().sigmoid(), rtol=1e-4, atol=1e-5)
    assert (passed - torch.tensor(0.3).sigmoid()).abs().max() > 1e-4


def test_the_critic_starts_as_torch_would_and_draws_from_its_generator(untouched):
    for shape, channels in (
        ((1, 6, 9, 9), 1),
        ((1, 9, 9, 6), -1),
        ((1, 12, 6), -1),
        ((1, 6, 12), 1),
    ):
        features = normal(*shape)
        with untouched(nn.Module(), features):
            critic, same = (
                Critic(features, channels, 1.0, torch.Generator().manual_seed(1)) for _ in range(2)
            )
        assert critic(normal(5, *shape[1:])).shape == (5, 1)
        assert all(
            torch.equal(a, b) for a, b in zip(critic.parameters(), same.parameters(), strict=True)
        )
        for module in critic.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = module.weight[0].numel() ** -0.5
                assert 0.8 * bound < float(module.weight.detach().abs().max()) <= bound


def test_pixels_that_nothing_reads_are_masked(x):
    model = left_half()
    with torch.no_grad():
        model.layers["last"].weight *= 5
    how = replace(
        SHORT, input=Bottleneck(beta=0.5, steps=60, sigma=0), feature=Bottleneck(beta=1, sigma=0)
    )
    iba = InputIBA(model, model.layers["first"], how).estimate(x, progress=False)
    passed = iba.attribute(x[:4], [0, 1, 2, 0], per_position=True)
    assert passed.shape == (4, 8, 8)
    assert (passed[..., 4:].mean((1, 2)) < 0.5 * passed[..., :4].mean((1, 2))).all()
    bits = iba.attribute(x[:4], [0, 1, 2, 0], kind="information")
    assert (bits[..., 4:].sum((1, 2, 3)) < 0.2 * bits[..., :4].sum((1, 2, 3))).all()


def test_losses_bars_and_stopping(iba, model, x, capsys):
    found = iba.explain((x[:3],), 1, progress=True)
    shown = capsys.readouterr().err
    assert all(
        f"{stage}: 100%" in shown
        for stage in ("feature bottleneck", "adversarial prior", "input bottleneck")
    )
    assert found.feature.losses.shape == (3, 3)
    assert found.critic.shape == found.generator.shape == (4, 3)
    assert found.input.losses.shape == (4, 3)
    assert torch.isfinite(found.critic).all()
    assert (~found.generator.isnan())[:, 0].tolist() == [True, False, True, False]
    iba.attribute(x[:1], 1)
    assert capsys.readouterr().err == ""
    settled = ThreeStages(
        Bottleneck(steps=12, tolerance=1e9),
        replace(SHORT.prior, epochs=12, tolerance=1e9),
        Bottleneck(steps=12, tolerance=1e9),
    )
    found = InputIBA(model, model[4], settled).estimate(x, progress=False).explain((x[:2],), 1)
    assert (~found.feature.losses.isnan()).sum(0).tolist() == [6, 6]
    assert (~found.critic.isnan()).sum(0).tolist() == [12, 12]
    assert (~found.input.losses.isnan()).sum(0).tolist() == [6, 6]


# ---------------------------------------------------------------------- Captum's contract


def test_captums_contract(iba, model, x, untouched):
    with untouched(model, x):
        one = attributed_in_every_way(iba, x[:3])
    assert all(p.grad is None for p in model.parameters())
    assert (one.shape, one.dtype) == (x[:3].shape, x.dtype)
    assert one.is_contiguous()
    assert not one.requires_grad
    assert ((one >= 0) & (one <= 1)).all()
    assert iba.get_name() == "InputIBA"
    assert hasattr(InputIBA.attribute, "__wrapped__")
    with pytest.raises(NotImplementedError):
        iba.attribute_future()


def test_each_sample_has_no_part_in_others(iba, x):
    together = iba.explain((x[:4],), [0, 2, 1, 2])
    for other in (
        [iba.explain((x[i : i + 1],), t) for i, t in enumerate([0, 2, 1, 2])],
        [iba.explain((x[:4],), [0, 2, 1, 2], internal_batch_size=3)],
    ):
        for name in ("prior", "input", "critic"):
            parts = [getattr(found, name) for found in other]
            if name == "input":
                torch.testing.assert_close(
                    together.input.alpha, torch.cat([p.alpha for p in parts]), rtol=1e-3, atol=1e-3
                )
            else:
                expected = torch.cat(parts, 1 if name == "critic" else 0)
                torch.testing.assert_close(getattr(together, name), expected, rtol=1e-3, atol=1e-5)


def test_information_and_its_total(iba, x):
    bits, total = iba.attribute(x[:3], 1, kind="information", return_information=True)
    assert bits.shape == x[:3].shape
    torch.testing.assert_close(bits.flatten(1).sum(1), total)
    assert (bits >= 0).all()
    assert (total > 0).all()
    torch.testing.assert_close(
        iba.attribute(x[:3], 1, kind="information", per_position=True), bits.sum(1)
    )
    torch.testing.assert_close(
        iba.attribute(x[:3], 1, per_position=True), iba.attribute(x[:3], 1).mean(1)
    )


def test_the_generator_makes_all_draws(iba, x):
    one, same, other = (
        iba.attribute(x[:2], 1, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_float64(model, x):
    double = copy.deepcopy(model).double()
    iba = InputIBA(double, double[4], SHORT).estimate(x.double(), progress=False)
    found = iba.attribute(x[:2].double(), 1)
    assert found.dtype == torch.float64
    single = InputIBA(model, model[4], SHORT).estimate(x, progress=False).attribute(x[:2], 1)
    torch.testing.assert_close(found.float(), single, rtol=1e-2, atol=1e-3)


def test_copies_pickles_and_noise_tunnels(iba, x):
    expected = iba.attribute(x[:2], 1)
    for other in (copy.deepcopy(iba), pickle.loads(pickle.dumps(iba))):
        assert torch.equal(other.attribute(x[:2], 1), expected)
    assert NoiseTunnel(iba).attribute(x[:1], nt_samples=2, stdevs=0.1, target=1).shape == (
        1,
        3,
        8,
        8,
    )


def test_tokens_get_one_value_each(text, untouched):
    iba, model, tokens = text
    with untouched(model, tokens):
        passed, total = iba.attribute(tokens[:4], [0, 1, 1, 0], return_information=True)
        bits = iba.attribute(tokens[:4], [0, 1, 1, 0], kind="information")
    assert passed.shape == bits.shape == (4, 9)
    assert passed.dtype == torch.float32
    torch.testing.assert_close(bits.sum(1), total)
    assert iba.attribute(torch.randint(20, (2, 12)), 1).shape == (2, 12)
    alone = torch.cat([iba.attribute(tokens[i : i + 1], t) for i, t in enumerate([0, 1, 1, 0])])
    torch.testing.assert_close(alone, passed, rtol=1e-3, atol=1e-4)


def test_embedded_sequences_are_explained_as_their_tokens_are(text):
    """The same network from its embedding on, whose inputs are sequences of vectors."""
    iba, model, tokens = text
    upper = Function(
        lambda m, x: m["last"](m["lstm"](x)[0][:, -1]),
        **{k: model.layers[k] for k in ("lstm", "last")},
    ).eval()
    embedded = model.layers["words"](tokens).detach()
    options = {"channels": -1, "input_channels": -1, "across": (1,)}
    other = InputIBA(upper, upper.layers["lstm"], SHORT_TEXT, **options).estimate(
        embedded, progress=False
    )
    found = other.attribute(embedded[:3], 1)
    assert found.shape == (3, 9, 6)
    torch.testing.assert_close(found.mean(2), iba.attribute(tokens[:3], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.attribute(embedded[:3], 1, per_position=True), found.mean(2))


def test_a_branch_beside_layer_and_input(x):
    """The second input goes round both bottlenecks."""
    torch.manual_seed(0)
    model = Function(
        lambda m, x, s: m["last"](
            (m["first"](x) * s[:, None, None, None] + x.mean(1, keepdim=True)).flatten(1)
        ),
        first=nn.Conv2d(3, 2, 1),
        last=nn.Linear(128, 3),
    ).eval()
    scale = torch.linspace(0.1, 2, 40)
    iba = InputIBA(model, model.layers["first"], SHORT)
    iba.estimate([(x, scale)], unpack=lambda batch: batch, progress=False)
    found = iba.attribute(x[:3], 1, scale[:3])
    for i in range(3):
        torch.testing.assert_close(
            iba.attribute(x[i : i + 1], 1, scale[i : i + 1])[0], found[i], rtol=1e-3, atol=1e-4
        )


def test_saved_and_loaded(iba, model, x, text, tmp_path):
    iba.save(tmp_path / "file")
    loaded = InputIBA.load(tmp_path / "file", model)
    assert loaded.settings == iba.settings
    assert torch.equal(loaded.attribute(x[:2], 1), iba.attribute(x[:2], 1))
    with pytest.raises(
        InverseFileError, match=r"does not contain IBA: load it with the class that saved it"
    ):
        IBA.load(tmp_path / "file", model)
    IBA(model, model[4]).estimate(x, progress=False).save(tmp_path / "file")
    with pytest.raises(
        InverseFileError, match=r"does not contain InputIBA: load it with the class that saved it"
    ):
        InputIBA.load(tmp_path / "file", model)
    words, network, tokens = text
    words.save(tmp_path / "file")
    assert torch.equal(
        InputIBA.load(tmp_path / "file", network).attribute(tokens[:2], 1),
        words.attribute(tokens[:2], 1),
    )
    with pytest.raises(ModelChangedError):
        InputIBA.load(tmp_path / "file", model)


# ---------------------------------------------------------------------- what cannot work


def test_nothing_estimated_yet(model, x):
    with pytest.raises(NotFittedError, match="no statistics yet"):
        InputIBA(model, model[4]).attribute(x[:1], 0)


def test_inputs_that_cannot_be_masked(iba, text, x):
    _, model, tokens = text
    plain = InputIBA(
        model, model.layers["lstm"], SHORT_TEXT, channels=-1, input_channels=-1
    ).estimate(tokens, progress=False)
    with pytest.raises(
        InputError,
        match=r"inputs of dtype torch.int64 cannot be masked .*: pass input_layer=, such as",
    ):
        plain.attribute(tokens[:2], 1)
    with pytest.raises(TargetRangeError):
        iba.attribute(x[:2], 3)
    with pytest.raises(InputError, match="contains NaN or Inf"):
        iba.attribute(x[:2] / 0, 0)
    with pytest.raises(InputError, match="kind='both' is not one of"):
        iba.attribute(x[:2], 0, kind="both")


def test_an_input_layer_of_another_model(model, tmp_path):
    with pytest.raises(InputError, match="a Linear, expected a module of the Sequential"):
        InputIBA(model, model[4], SHORT, input_layer=nn.Linear(2, 2))
    with pytest.raises(NotFittedError):
        InputIBA(model, model[4], SHORT).save(tmp_path / "file")


def test_each_stage_is_grouped_by_what_it_masks(model, monkeypatch):
    """Small features, large inputs: otherwise one group would hold any number of inputs."""
    wide = nn.Sequential(nn.AvgPool2d(5), *model).eval()
    data = normal(6, 3, 40, 40)
    iba = InputIBA(wide, wide[5], SHORT).estimate(data, progress=False)
    expected, sizes, once = iba.attribute(data[:5], 1), [], base.optimise

    def optimise(x, *arguments, **options):
        sizes.append(len(x))
        return once(x, *arguments, **options)

    monkeypatch.setattr(base, "optimise", optimise)
    monkeypatch.setattr(samples, "CPU_VALUES", 2 * 3 * 3 * 40 * 40)
    torch.testing.assert_close(iba.attribute(data[:5], 1), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [5, 2, 2, 1]


def test_channels_that_are_not_said(model):
    with pytest.raises(
        InputError, match="which dimension of the input holds its channels: pass that"
    ):
        InputIBA(model, model[4], SHORT, channels=-1)


def test_an_input_layer_that_is_not_there_is_told_when_features_are_estimated(model, x):
    iba = InputIBA(model, model[4], SHORT, input_layer="embedding").estimate
    with pytest.raises(
        CaptureError,
        match="tensor 'embedding' is missing in the graph of this Sequential, expected a module",
    ):
        iba(x, progress=False)


def test_an_input_layer_behind_the_layer(model, x):
    iba = InputIBA(model, model[1], SHORT, input_layer=model[4]).estimate(x, progress=False)
    with pytest.raises(CaptureError, match="does not depend on tensor"):
        iba.attribute(x[:1], 0)


def test_features_without_a_critic(mlp, x):
    iba = InputIBA(mlp.model, mlp.model[1], SHORT).estimate(mlp.x, progress=False)
    with pytest.raises(
        InputError,
        match=r"shape \(8,\), but the prior is defined only for maps of at least 4 x 4 and",
    ):
        iba.attribute(mlp.x[:1], 0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.Flatten(), nn.Linear(16, 3)).eval()
    with pytest.raises(InputError, match="maps of at least 4 x 4"):
        InputIBA(model, model[0], SHORT).estimate(x, progress=False).attribute(x[:1], 0)


def test_a_prior_that_overflows_names_the_sample(x):
    """Sample 1's own features are fine, but not those of noise in its place."""
    torch.manual_seed(0)
    model = Function(
        lambda m, x, s: m["last"](
            m["first"](x * s[:, None, None, None]).clamp(max=1e30).square().flatten(1).tanh()
        ),
        first=nn.Conv2d(3, 4, 1, bias=False),
        last=nn.Linear(256, 3),
    ).eval()
    iba = InputIBA(model, "square", replace(SHORT, feature=Bottleneck(steps=0, sigma=0, start=-5)))
    iba.estimate([(x, torch.ones(40))], unpack=lambda batch: batch, progress=False)
    with pytest.raises(
        InputError, match=r"adversarial prior's loss of sample 1 is NaN or Inf at iteration 0"
    ):
        iba.attribute(torch.zeros(3, 3, 8, 8), 0, torch.tensor([1.0, 1e25, 1.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 7}, "samples=7 must be a multiple of groups=10"),
        ({"epochs": -1}, "epochs=-1 must be a whole number of at least 0"),
        ({"epochs": 2.0}, "epochs=2.0 must be a whole number"),
        ({"batch": 1}, "batch=1 must be a whole number of at least 2"),
        (
            {"samples": 10, "batch": 3},
            "samples=10 with batch=3 leaves a last batch of one feature, over which the critic",
        ),
        ({"clip": 0}, "clip=0 must be a finite number above 0"),
        ({"width": float("inf")}, "width=inf must be a finite number above 0"),
        ({"noise": "pixel"}, "noise='pixel' is not one of 'channel', 'position'"),
        ({"bottleneck": "bits"}, "bottleneck='bits' is not one of"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Adversary(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [("best", "settings='best' is not one of"), (Bottleneck(), "expected Three")],
)
def test_settings_of_another_kind(model, settings, message):
    with pytest.raises(InputError, match=message):
        InputIBA(model, model[4], settings)


def test_the_mask_in_place_of_the_capacity(model, x):
    prior = replace(SHORT.prior, epochs=10, critic_rate=0.01, clip=0.5)
    how, capacity = (
        replace(SHORT, prior=replace(prior, bottleneck="passed")),
        replace(SHORT, prior=prior),
    )
    found, other = (
        InputIBA(model, model[4], h).estimate(x, progress=False).explain((x[:2],), 1)
        for h in (how, capacity)
    )
    assert torch.equal(found.feature.information, other.feature.information)
    assert not torch.equal(found.prior, other.prior)
