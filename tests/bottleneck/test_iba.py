"""IBA: the method against an independent loop, Captum's contract, and what cannot work."""

import copy
import pickle
import threading

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from small import Function, attributed_in_every_way, left_half, normal, text_classifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from captum_mipin import IBA, InverseNetwork, MIPINError, errors
from captum_mipin.bottleneck import Bottleneck
from captum_mipin.graph.cache import Graphs

SHORT = Bottleneck(steps=3, copies=4)


def network(dtype=torch.float32):
    torch.manual_seed(5)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 5, 3, padding=1, stride=2),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(80, 3),
        )
        .to(dtype)
        .eval()
    )


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def iba(model, x):
    return IBA(model, model[1], SHORT).estimate(x, progress=False)


@pytest.fixture
def own(model, x):
    """A copy that a test may change."""
    model = copy.deepcopy(model)
    return IBA(model, model[1], SHORT).estimate(x, progress=False)


# ---------------------------------------------------------------------- the method


def published(model, layer, data, x, target, beta=10.0, steps=10, copies=10):
    """Run the published loop for one sample, with a hook; only the noise is drawn as ours is."""
    kept = []
    handle = layer.register_forward_hook(
        lambda module, inputs, output: kept.append(output.detach())
    )
    model(data), model(x[None])
    handle.remove()
    mean, std = kept[0].mean(0), kept[0].std(0).clamp(min=0.01)
    active = ((kept[0] != 0).double().mean(0) > 0.01).to(x.dtype)
    features = kept[1]
    at = torch.arange(5, dtype=x.dtype) - 2
    kernel = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(features.shape[1], 1, 5, 5)
    alpha = torch.full_like(features, 5.0, requires_grad=True)
    adam = torch.optim.Adam([alpha], lr=1.0)
    generator = torch.Generator().manual_seed(0)

    def squeeze():
        passed = F.conv2d(
            F.pad(alpha.sigmoid(), (2, 2, 2, 2), mode="reflect"), kernel, groups=features.shape[1]
        )
        r = (features - mean) / std
        told = (
            -0.5 * (1 + ((1 - passed) ** 2).log() - (1 - passed) ** 2 - (passed * r) ** 2) * active
        )
        return passed, told

    for _ in range(steps):
        passed, told = squeeze()
        noise = mean + std * torch.randn(copies, *features.shape[1:], generator=generator).to(
            x.dtype
        )
        masked = (passed * features + (1 - passed) * noise) * active
        handle = layer.register_forward_hook(lambda module, inputs, output, masked=masked: masked)
        logits = model(x[None].expand(copies, -1, -1, -1))
        handle.remove()
        adam.zero_grad()
        (-logits.log_softmax(1)[:, target].mean() + beta * told.mean()).backward()
        adam.step()
    # as in the released code, these are the bits of the last forward pass, before the last step
    return (told / torch.log(torch.tensor(2.0, dtype=x.dtype))).detach()[0]


def test_a_batch_is_the_published_loop_one_by_one():
    model, data = network(torch.float64), normal(40, 3, 8, 8, seed=6, dtype=torch.float64)
    targets = [0, 2, 1, 2]
    iba = IBA(model, model[1]).estimate(data, progress=False)
    found = iba.attribute(data[:4], targets, at="layer")
    reference = copy.deepcopy(model)
    expected = torch.stack(
        [
            published(reference, reference[1], data, x, t)
            for x, t in zip(data, targets, strict=False)
        ]
    )
    assert expected.max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_defaults_are_the_published_ones(model):
    assert IBA(model, model[1]).settings == Bottleneck(10.0, 10, 1.0, 10, 1.0, 5.0, None)
    assert (IBA(model, model[1]).min_std, IBA(model, model[1]).active) == (0.01, 0.01)


def test_float32_finds_what_float64_does(iba, x):
    model = network(torch.float64)
    double = IBA(model, model[1], SHORT).estimate(x.double(), progress=False)
    torch.testing.assert_close(
        iba.attribute(x[:4], 1).double(), double.attribute(x[:4].double(), 1), rtol=1e-3, atol=1e-5
    )


def test_the_map_sums_to_the_total(iba, x):
    bits, total = iba.attribute(x[:5], 1, return_information=True)
    layer = iba.attribute(x[:5], 1, at="layer")
    torch.testing.assert_close(layer.flatten(1).sum(1), total)
    for size in (8, 11):  # no interpolation, one where sizes do not divide each other
        wide = Function(lambda m, x: m["net"](F.adaptive_avg_pool2d(x, 8)), net=iba.model).eval()
        other = IBA(wide, wide.layers["net"][1], SHORT).estimate(x, progress=False)
        bits, total = other.attribute(F.interpolate(x[:5], size=size), 1, return_information=True)
        assert bits.shape == (5, 3, size, size)
        torch.testing.assert_close(bits.flatten(1).sum(1), total)
        assert (bits >= 0).all()
        assert (total > 0).all()


def test_the_input_map_is_the_layer_map_where_they_have_the_same_positions(iba, x):
    layer = iba.attribute(x[:2], 1, at="layer")
    torch.testing.assert_close(iba.attribute(x[:2], 1, per_position=True), layer.sum(1))
    torch.testing.assert_close(
        iba.attribute(x[:2], 1), (layer.sum(1, keepdim=True) / 3).expand(-1, 3, -1, -1)
    )


def test_the_map_of_a_coarser_layer_is_interpolated(model, x):
    iba = IBA(model, model[4], SHORT).estimate(x, progress=False)
    coarse = iba.attribute(x[:2], 1, at="layer", per_position=True)
    assert coarse.shape == (2, 4, 4)
    expected = F.interpolate(
        coarse[:, None] / 4, size=(8, 8), mode="bilinear", align_corners=False
    )[:, 0]
    torch.testing.assert_close(iba.attribute(x[:2], 1, per_position=True), expected)


def test_more_beta_less_information(x):
    model = network()
    with torch.no_grad():
        model[7].weight *= 30  # decided, as a trained network is
    totals = []
    for beta in (1.0, 10.0, 100.0):
        iba = IBA(model, model[1], Bottleneck(beta, steps=30)).estimate(x, progress=False)
        totals.append(iba.attribute(x[:4], [0, 1, 2, 0], return_information=True)[1])
    assert (totals[0] > totals[1]).all()
    assert (totals[1] > totals[2]).all()


def test_features_that_nothing_reads_tell_nothing(x):
    """The logit reads the left half alone, so the right half is all noise in the end."""
    model = left_half()
    iba = IBA(model, model.layers["first"], Bottleneck(beta=0.5, steps=40, sigma=0)).estimate(
        x, progress=False
    )
    bits = iba.attribute(x[:6], [0, 1, 2, 0, 1, 2], per_position=True).sum(1)
    assert (bits[:, 4:].sum(1) < 0.02 * bits[:, :4].sum(1)).all()


# ---------------------------------------------------------------------- where


def residual():
    torch.manual_seed(3)
    return Function(
        lambda m, x: m["last"](
            (m["a"](x).relu() + x * m["gate"](x.mean((2, 3)))[:, :, None, None]).flatten(1)
        ),
        a=nn.Conv2d(3, 3, 3, padding=1),
        gate=nn.Linear(3, 3),
        last=nn.Linear(192, 3),
    ).eval()


def test_what_goes_round_the_layer_goes_with_each_copy(x):
    """A branch beside the layer sees the example; by hand it is an argument of what follows."""
    model = residual()
    iba = IBA(model, model.layers["a"], SHORT).estimate(x, progress=False)
    found = iba.explain((x[:3],), [0, 1, 2])
    alone = [iba.explain((x[i : i + 1],), i) for i in range(3)]
    torch.testing.assert_close(
        found.information, torch.cat([part.information for part in alone]), rtol=1e-4, atol=1e-6
    )
    features = model.layers["a"](x[:3])
    passed = torch.full_like(features, 5.0).sigmoid()
    mean, std = model.layers["a"](x).mean(0), model.layers["a"](x).std(0)
    noise = torch.randn(4, 1, *features.shape[1:], generator=torch.Generator().manual_seed(0))
    masked = passed * features + (1 - passed) * (mean + std * noise)
    beside = x[:3] * model.layers["gate"](x[:3].mean((2, 3)))[:, :, None, None]
    logits = model.layers["last"]((masked.relu() + beside).flatten(2))
    expected = -torch.stack([logits[:, i].log_softmax(1)[:, i].mean() for i in range(3)])
    torch.testing.assert_close(found.cross_entropy[0], expected.detach(), rtol=1e-5, atol=1e-5)


def test_any_tensor_of_the_graph_by_its_name(model, x):
    by_name = IBA(model, "relu", SHORT).estimate(x, progress=False)
    by_module = IBA(model, model[1], SHORT).estimate(x, progress=False)
    assert torch.equal(by_name.attribute(x[:2], 0), by_module.attribute(x[:2], 0))


def test_the_input_itself_by_its_name(x):
    model = network()
    with pytest.raises(
        errors.CaptureError,
        match=r"tensor 'relu_9' is missing in the graph.*or one of its tensors: (\w+), ",
    ) as caught:
        IBA(model, "relu_9").estimate(x, progress=False)
    name = str(caught.value).split("its tensors: ")[1].split(",")[0]
    bits = IBA(model, name, SHORT).estimate(x, progress=False).attribute(x[:2], 0, at="layer")
    assert bits.shape == (2, 3, 8, 8)


def test_tokens_at_their_embedding_and_at_a_recurrent_layer():
    model = text_classifier()
    tokens = torch.randint(20, (30, 9))
    for name, features in (("words", 6), ("lstm", 7)):
        how = Bottleneck(steps=3, sigma=0)
        iba = IBA(model, model.layers[name], how, channels=-1, across=(1,)).estimate(
            tokens, progress=False
        )
        bits, total = iba.attribute(tokens[:4], [0, 1, 1, 0], return_information=True)
        assert bits.shape == (4, 9)
        assert bits.dtype == torch.float32
        torch.testing.assert_close(bits.sum(1), total)
        assert iba.noise.mean.shape == (1, features)
        longer = iba.attribute(torch.randint(20, (2, 12)), 1, at="layer")
        assert longer.shape == (2, 12, features)


def test_a_dense_layer(mlp):
    iba = IBA(mlp.model, mlp.model[1], SHORT).estimate(mlp.x, progress=False)
    assert iba.attribute(mlp.x[:4], 1, at="layer").shape == (4, 8)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(
        errors.InputError,
        match=r"output of shape \(8,\).*no positions that match those of inputs of shape \(6,\)"
        r".*at='layer'",
    ):
        iba.attribute(mlp.x[:4], 1, generator=generator)
    assert torch.equal(generator.get_state(), before), "refused before anything is optimised"


def test_features_with_their_channels_last_under_images(x):
    """The layer's channels do not tell the input's: these have to be given, and are not guessed."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 5, 2, stride=2), nn.Linear(80, 3)
    plain = nn.Sequential(first, nn.Flatten(), last).eval()
    moved = Function(
        lambda m, x: m["last"](
            m["norm"](m["first"](x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flatten(1)
        ),
        first=first,
        norm=nn.Hardtanh(-1e9, 1e9),
        last=last,
    ).eval()
    expected = IBA(plain, first, SHORT).estimate(x, progress=False).attribute(x[:2], 1)
    how = Bottleneck(steps=3, copies=4)
    unsaid = IBA(moved, moved.layers["norm"], how, channels=-1).estimate(x, progress=False)
    assert unsaid.attribute(x[:2], 1, at="layer").shape == (2, 4, 4, 5)
    with pytest.raises(
        errors.InputError,
        match=r"which dimension of inputs of shape \(2, 3, 8, 8\) holds their channels",
    ):
        unsaid.attribute(x[:2], 1)
    said = IBA(moved, moved.layers["norm"], how, channels=-1, input_channels=1).estimate(
        x, progress=False
    )
    found = said.attribute(x[:2], 1)
    assert found.shape == expected.shape
    assert torch.equal(found[:, 0], found[:, 2]), "each channel has an equal share"
    torch.testing.assert_close(
        found.sum((1, 2, 3)), unsaid.attribute(x[:2], 1, at="layer").sum((1, 2, 3))
    )


def test_several_outputs_half_precision_and_other_defaults(model, x):
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return {"logits": self.inner(x), "input": x}

    expected = IBA(model, model[1], SHORT).estimate(x, progress=False).attribute(x[:2], 1)
    other = IBA(Dictionary().eval(), model[1], SHORT, output="logits").estimate(x, progress=False)
    assert torch.equal(other.attribute(x[:2], 1), expected)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(other.attribute(x[:2], 1), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    half = copy.deepcopy(model).bfloat16()
    found = (
        IBA(half, half[1], SHORT)
        .estimate(x.bfloat16(), progress=False)
        .attribute(x[:2].bfloat16(), 1)
    )
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02


def test_one_logit(x):
    torch.manual_seed(0)
    for last in (nn.Linear(192, 1), nn.Sequential(nn.Linear(192, 1), nn.Flatten(0))):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), last).eval()
        iba = IBA(model, model[0], SHORT).estimate(x, progress=False)
        total = iba.attribute(x[:4], return_information=True)[1]
        assert (total > 0).all()


# ---------------------------------------------------------------------- Captum's contract


def test_captums_contract(iba, model, x, untouched):
    before = torch.random.get_rng_state()
    with untouched(model, x):
        one = attributed_in_every_way(iba, x[:4])
        torch.testing.assert_close(
            iba.attribute(x[:4].contiguous(memory_format=torch.channels_last), 1), one
        )
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.shape == x[:4].shape
    assert one.dtype == x.dtype
    assert one.is_contiguous()
    assert not one.requires_grad
    assert torch.isfinite(one).all()
    assert iba.get_name() == "IBA"
    assert not iba.has_convergence_delta()
    assert hasattr(IBA.attribute, "__wrapped__")
    with pytest.raises(NotImplementedError):
        iba.attribute_future()


def test_grads_that_were_there_stay(own, x, untouched):
    own.model(x).sum().backward()
    with untouched(own.model, x):
        own.attribute(x[:2], 0)


@pytest.mark.parametrize(
    "targets",
    [[0, 2, 1, 2], torch.tensor([0, 2, 1, 2]), [-3, -1, 1, 2]],
    ids=["list", "tensor", "negative"],
)
def test_each_sample_has_its_own_target_and_no_part_in_others(iba, x, targets):
    together = iba.attribute(x[:4], targets)
    alone = torch.cat([iba.attribute(x[i : i + 1], t) for i, t in enumerate([0, 2, 1, 2])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    back = iba.attribute(x[:4].flip(0), [2, 1, 2, 0]).flip(0)
    torch.testing.assert_close(back, together, rtol=1e-4, atol=1e-6)
    few = iba.attribute(x[:4], targets, internal_batch_size=3)
    torch.testing.assert_close(few, together, rtol=1e-4, atol=1e-6)


def test_the_generator_makes_the_noise(iba, x):
    def draw(seed):
        return torch.Generator().manual_seed(seed)

    default = iba.attribute(x[:2], 1)
    one, same, other = (iba.attribute(x[:2], 1, generator=draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, default)
    used = draw(1)
    iba.attribute(x[:3], 1, generator=used, internal_batch_size=1)
    after = draw(1)
    iba.attribute(x[:2], 1, generator=after)
    assert torch.equal(used.get_state(), after.get_state()), (
        "one number is drawn, whatever the batch"
    )
    assert not torch.equal(iba.attribute(x[:2], 1, generator=after), one), (
        "another call, other noise"
    )


@pytest.mark.parametrize("shared", [False, True])
def test_further_arguments(x, shared):
    torch.manual_seed(0)
    model = Function(
        lambda m, x, s: m["last"](
            (m["first"](x) * (s if s.ndim == 0 else s[:, None, None, None])).relu().flatten(1)
        ),
        first=nn.Conv2d(3, 2, 3),
        last=nn.Linear(72, 3),
    ).eval()
    scale = torch.tensor(0.5) if shared else torch.linspace(0.1, 2, 40)
    iba = IBA(model, model.layers["first"], SHORT)
    iba.estimate([(x, scale)], unpack=lambda batch: batch, progress=False)
    found = iba.attribute(x[:3], 1, scale if shared else scale[:3])
    for i in range(3):
        alone = iba.attribute(
            x[i : i + 1], 1, additional_forward_args=scale if shared else scale[i : i + 1]
        )
        torch.testing.assert_close(alone[0], found[i], rtol=1e-4, atol=1e-6)


def test_a_shared_argument_as_long_as_the_batch():
    """The data told that it is shared."""
    torch.manual_seed(0)
    model = Function(
        lambda m, x, s: m["last"](m["first"](x * s).relu()),
        first=nn.Linear(6, 5),
        last=nn.Linear(5, 3),
    ).eval()
    x, scale = normal(40, 6), torch.linspace(0.1, 3, 6)
    iba = IBA(model, model.layers["first"], SHORT).estimate(
        [(x, scale)], unpack=lambda batch: batch, progress=False
    )
    found = iba.attribute(x[:6], 1, scale, at="layer")
    alone = [iba.attribute(x[i : i + 1], 1, scale, at="layer") for i in range(6)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_several_inputs(x):
    torch.manual_seed(0)
    model = Function(
        lambda m, a, b: m["last"](m["first"](a + b).flatten(1)),
        first=nn.Conv2d(3, 2, 3),
        last=nn.Linear(72, 3),
    ).eval()
    iba = IBA(model, model.layers["first"], SHORT).estimate((x, x.flip(0)), progress=False)
    assert iba.attribute((x[:2], x[2:4]), 0, at="layer").shape == (2, 2, 6, 6)
    with pytest.raises(errors.InputError, match="no positions that match those of inputs"):
        iba.attribute((x[:2], x[2:4]), 0)


def test_captums_tools(iba, x):
    tunnel = NoiseTunnel(iba).attribute(
        x[:2], nt_type="smoothgrad", nt_samples=3, stdevs=0.1, target=torch.tensor([1, 0])
    )
    assert tunnel.shape == (2, 3, 8, 8)
    assert torch.isfinite(
        sensitivity_max(iba.attribute, x[:2], target=1, n_perturb_samples=2)
    ).all()

    def perturb(inputs):
        noise = torch.randn_like(inputs) * 0.1
        return noise, inputs - noise

    assert torch.isfinite(
        infidelity(iba.model, perturb, x[:2], iba.attribute(x[:2], 1), target=1)
    ).all()


def test_copies_pickles_and_wrappers(iba, model, x):
    expected = iba.attribute(x[:2], 1)
    for other in (copy.deepcopy(iba), pickle.loads(pickle.dumps(iba))):
        assert torch.equal(other.attribute(x[:2], 1), expected)
    wrapped = IBA(nn.DataParallel(model), model[1], SHORT).estimate(x, progress=False)
    assert torch.equal(wrapped.attribute(x[:2], 1), expected)


def test_threads_find_the_same(own, x):
    expected = own.attribute(x[:2], 1)
    own._graphs = Graphs()
    found = [None] * 4

    def run(i):
        found[i] = own.attribute(x[:2], 1)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(part, expected) for part in found)


def test_progress_and_losses(iba, x, capsys):
    found = iba.explain((x[:3],), 1, progress=True)
    assert "feature bottleneck: 100%" in capsys.readouterr().err
    assert found.losses.shape == found.cross_entropy.shape == (3, 3)
    assert torch.isfinite(found.losses).all()
    long = IBA(iba.model, iba.layer, Bottleneck(steps=20))
    long._state = iba._state
    losses = long.explain((x[:3],), 1).losses
    assert (losses[-1] < losses[0]).all()
    iba.attribute(x[:1], 1)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- estimates and files


def test_any_kind_of_data(model, x, iba):
    labels = torch.zeros(40)
    for data in (
        x,
        (x,),
        [x[:15], x[15:]],
        TensorDataset(x, labels),
        DataLoader(TensorDataset(x, labels), 7),
        iter([x]),
    ):
        found = IBA(model, model[1]).estimate(data, progress=False).noise
        torch.testing.assert_close(found.mean, iba.noise.mean)
        torch.testing.assert_close(found.std, iba.noise.std)
    with torch.no_grad():
        features = model[:2](x.clone()).double()
    torch.testing.assert_close(iba.noise.mean, features.mean(0))
    torch.testing.assert_close(iba.noise.std, features.std(0).clamp(min=0.01))


def test_constant_and_inactive_features_are_floored_and_counted(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    with torch.no_grad():
        model[0].weight[2:] = 0
        model[0].bias[2], model[0].bias[3] = 1.0, -1.0  # a constant, and one that is never there
    iba = IBA(model, model[1], SHORT).estimate(x, progress=False)
    assert (iba.report.floored, iba.report.inactive) == (128, 64)
    assert (
        str(iba.report)
        == "256 features of 40 values each: 128 with a standard deviation below the floor, "
        "64 inactive"
    )
    bits = iba.attribute(x[:2], 1, at="layer")
    assert torch.isfinite(bits).all()
    assert (bits[:, 3] == 0).all()
    assert float(iba.noise.std[2:].max()) == 0.01


def test_saved_and_loaded(iba, model, x, tmp_path, untouched):
    iba.save(tmp_path / "file")
    with untouched(model):
        loaded = IBA.load(tmp_path / "file", model)
    assert loaded.settings == iba.settings
    assert torch.equal(loaded.attribute(x[:2], 1), iba.attribute(x[:2], 1))
    named = IBA(model, "relu", "fast", active=0.5, min_std=0.1, across=(2, 3)).estimate(
        x, progress=False
    )
    named.save(tmp_path / "file")
    loaded = IBA.load(tmp_path / "file", model)
    assert (loaded.layer, loaded.settings, loaded.across, loaded.active) == (
        "relu",
        named.settings,
        (2, 3),
        0.5,
    )
    assert torch.equal(loaded.attribute(x[:2], 1), named.attribute(x[:2], 1))


def test_files_of_other_models_and_methods(iba, model, x, mlp, tmp_path):
    iba.save(tmp_path / "file")
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(
        errors.ModelChangedError,
        match=r"was fitted to another model or to other weights than this Sequential",
    ):
        IBA.load(tmp_path / "file", other)
    with pytest.raises(errors.InverseFileError):
        InverseNetwork.load(tmp_path / "file", model)
    mlp.inverse.save(tmp_path / "inverse")
    with pytest.raises(errors.InverseFileError, match="does not contain IBA"):
        IBA.load(tmp_path / "inverse", mlp.model)
    with pytest.raises(FileNotFoundError):
        IBA.load(tmp_path / "none", model)
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[:-7])
    with pytest.raises(errors.InverseFileError):
        IBA.load(tmp_path / "file", model)


# ---------------------------------------------------------------------- what cannot work


def test_nothing_estimated_yet(model, x, tmp_path):
    fresh = IBA(model, model[1])
    for call in (
        lambda: fresh.attribute(x[:1], 0),
        lambda: fresh.report,
        lambda: fresh.noise,
        lambda: fresh.save(tmp_path / "f"),
    ):
        with pytest.raises(
            errors.NotFittedError,
            match=r"this IBA has no statistics yet: call estimate\(data\) first",
        ):
            call()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda model: model[5], "layer '5' .Dropout. has no operation in the graph"),
        (lambda model: model, "the layer is the model's output, so nothing follows"),
    ],
)
def test_a_layer_that_cannot_be_taken(model, x, layer, message, untouched):
    iba = IBA(model, layer(model))
    with pytest.raises(errors.CaptureError, match=message), untouched(model, x):
        iba.estimate(x, progress=False)


def test_a_layer_of_another_model(model):
    with pytest.raises(errors.InputError, match="a Linear, expected a module of the Sequential"):
        IBA(model, nn.Linear(2, 2))


def test_a_layer_that_is_never_reached_or_twice(x):
    first, never = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    model = Function(
        lambda m, x: m["last"](m["a"](m["a"](x)).flatten(1)),
        a=first,
        b=never,
        last=nn.Linear(192, 2),
    ).eval()
    with pytest.raises(
        errors.CaptureError,
        match=r"layer 'layers.b'.*has no operation in the graph: it is not called",
    ):
        IBA(model, never).estimate(x, progress=False)
    with pytest.raises(errors.CaptureError, match="is called 2 times"):
        IBA(model, first).estimate(x, progress=False)


def test_writes_to_slices_above_the_layer(x):
    """They equal the same network without writes."""
    first, last = nn.Conv2d(3, 4, 1), nn.Linear(256, 2)

    def written(m, x):
        h = m["first"](x).relu()
        halves = torch.zeros_like(h)
        halves[:, :2], halves[:, 2:] = 2 * h[:, :2], h[:, 2:3]
        return m["last"](halves.flatten(1))

    def joined(m, x):
        h = m["first"](x).relu()
        return m["last"](torch.cat([2 * h[:, :2], h[:, 2:3].expand(-1, 2, -1, -1)], 1).flatten(1))

    maps = []
    for run in (written, joined):
        iba = IBA(Function(run, first=first, last=last).eval(), first, settings="fast")
        iba.estimate(x, progress=False)
        maps.append(iba.attribute(x[:2], target=0, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(maps[0], maps[1])


def test_a_layer_that_shares_its_weights_with_one_that_is_called(x):
    first, never = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    never.weight = first.weight  # as the shared embedding of an encoder and a decoder
    run = lambda m, x: m["last"](m["a"](x).flatten(1))  # noqa: E731
    model = Function(run, a=first, b=never, last=nn.Linear(192, 2)).eval()
    with pytest.raises(errors.CaptureError, match=r"Name 'layers.a', with the same weights"):
        IBA(model, never).estimate(x, progress=False)


def test_a_layer_whose_output_is_thrown_away(x):
    model = Function(
        lambda m, x: (
            m["last"](x.flatten(1)) + 0 * m["a"](x.detach()).argmax(1).sum((1, 2))[:, None]
        ),
        a=nn.Conv2d(3, 3, 1),
        last=nn.Linear(192, 2),
    ).eval()
    iba = IBA(model, model.layers["a"], SHORT).estimate(x, progress=False)
    with pytest.raises(
        errors.CaptureError, match="no gradient of the model's output reaches the layer"
    ):
        iba.attribute(x[:2], 0)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda x: x[:, :2], errors.CaptureError, "Pass inputs of a shape"),
        (lambda x: x.double(), MIPINError, "float64|double|Double"),
        (lambda x: x[:0], errors.InputError, "is empty"),
        (lambda x: [x], errors.InputError, "inputs are a list"),
        (lambda x: x / 0, errors.InputError, "contains NaN or Inf"),
        (lambda x: F.interpolate(x, size=6), MIPINError, None),
    ],
)
def test_inputs_that_cannot_be_explained(iba, model, x, wrong, error, message, untouched):
    before = iba.attribute(x[:2], 1)
    with pytest.raises(error, match=message), untouched(model, x):
        iba.attribute(wrong(x[:2]), 0)
    assert torch.equal(iba.attribute(x[:2], 1), before)


def test_features_of_another_size_than_estimated(x):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    iba = IBA(model, model[0], SHORT).estimate(x, progress=False)
    with pytest.raises(
        errors.InputError,
        match=r"shape \(4, 6, 6\), but its statistics have shape \(4, 8, 8\): resize",
    ):
        iba.attribute(x[:2, :, :6, :6], 0)
    shared = IBA(model, model[0], SHORT, across=(2, 3)).estimate(x, progress=False)
    assert shared.attribute(x[:2, :, :6, :6], 0).shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (3, errors.TargetRangeError, r"target 3 is outside the model's outputs of shape \(3,\)"),
        (None, errors.TargetError, "no target was given"),
        ([0, 1], errors.TargetError, "2 targets were given for 3 examples"),
        (1.5, errors.TargetError, "expected integers"),
        ((0, 1), errors.TargetError, "has 2 indices"),
    ],
)
def test_targets_that_do_not_fit(iba, x, target, error, message):
    with pytest.raises(error, match=message):
        iba.attribute(x[:3], target)


def test_weights_changed_and_training_mode(own, x):
    own.model.append(nn.Dropout())
    for call in (lambda: own.attribute(x[:1], 0), lambda: own.estimate(x, progress=False)):
        with pytest.raises(errors.TrainingModeError, match=r"'8' \(Dropout\)"):
            call()
    own.model.eval()
    with torch.no_grad():
        own.model[7].bias[0] += 1
    with pytest.raises(
        errors.ModelChangedError,
        match="weights have changed since the features were estimated: call estimate",
    ):
        own.attribute(x[:1], 0)
    own.estimate(x, progress=False).attribute(x[:1], 0)


def test_the_same_weights_in_another_network(x, tmp_path):
    """An exchanged activation leaves the weights as they are, but changes the features."""
    model, other = network(), network()
    other[1] = nn.Tanh().eval()
    iba = IBA(model, model[4], SHORT).estimate(x, progress=False)
    iba.save(tmp_path / "file")
    expected = iba.attribute(x[:2], 1)
    with pytest.raises(
        errors.ModelChangedError,
        match="operations that the model runs have changed since the features were estimated",
    ):
        IBA.load(tmp_path / "file", other).attribute(x[:2], 1)

    def doubles(module, inputs, output):
        return output * 2

    def looks(module, inputs, output):
        return None

    handle = model[1].register_forward_hook(doubles)
    with pytest.raises(
        errors.ModelChangedError, match="operations that the model runs have changed"
    ):
        iba.attribute(x[:2], 1)
    handle.remove()
    handle = model[1].register_forward_hook(looks)
    assert torch.equal(iba.attribute(x[:2], 1), expected)
    handle.remove()


def test_a_model_that_overflows_under_noise_names_the_sample(x):
    """Sample 2 alone leaves float32's range when its features are noisy: its scale is huge."""
    model = Function(
        lambda m, x, s: m["last"]((m["first"](x) * s[:, None, None, None]).flatten(1).exp()),
        first=nn.Conv2d(3, 2, 3),
        last=nn.Linear(72, 3),
    ).eval()
    with torch.no_grad():
        model.layers["first"].bias.zero_()
    quiet, huge = torch.zeros(4, 3, 8, 8), torch.tensor([1.0, 1.0, 500.0, 1.0])
    iba = IBA(model, model.layers["first"], Bottleneck(start=-3, copies=4))
    iba.estimate([(x, torch.ones(40))], unpack=lambda batch: batch, progress=False)
    with pytest.raises(
        errors.InputError, match="loss of sample 2 or its gradient is NaN or Inf at step 0"
    ):
        iba.attribute(quiet, 0, huge, at="layer")
    with pytest.raises(
        errors.InputError, match="loss of sample 2 or its gradient is NaN or Inf at step 0"
    ):
        iba.attribute(quiet, 0, huge, at="layer", internal_batch_size=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda x: x[:1], "1 example, expected at least two"),
        (lambda x: iter(()), "yields no batch"),
        (lambda x: [x[:9], x[:9] / 0], "batch 1: input 0 contains NaN or Inf"),
        (lambda x: [x[:9], x[:9, :, :7, :7]], "batch 1 has inputs of shape"),
        (lambda x: x.tolist, "cannot fit on a builtin_function_or_method"),
    ],
)
def test_data_that_cannot_be_used_leaves_the_estimate_of_before(own, x, data, message):
    before = own.attribute(x[:2], 1)
    with pytest.raises(errors.FitError, match=message):
        own.estimate(data(x), progress=False)
    assert torch.equal(own.attribute(x[:2], 1), before)
    fresh = IBA(own.model, own.layer)
    with pytest.raises(errors.FitError, match=message):
        fresh.estimate(data(x), progress=False)
    with pytest.raises(errors.NotFittedError):
        fresh.attribute(x[:2], 1)


def test_examples_that_depend_on_each_other(x):
    model = Function(
        lambda m, x: m["last"](m["a"](x).relu().flip(0).flatten(1)),
        a=nn.Conv2d(3, 3, 1),
        last=nn.Linear(192, 2),
    )
    with pytest.raises(errors.UnsupportedOperationError, match=r"aten\.flip.* along the batch"):
        IBA(model.eval(), model.layers["a"]).estimate(x, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": "best"}, "settings='best' is not one of 'published', 'fast'"),
        ({"settings": 10}, "settings is an int, expected Bottleneck"),
        ({"min_std": 0}, "min_std=0 must be a finite number above 0"),
        ({"active": 1}, "active=1 must be"),
        ({"channels": 0}, "contain 0, which is the batch"),
        ({"across": (0,)}, "contain 0, which is the batch"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(errors.InputError, match=message):
        IBA(model, model[1], **options)


def test_dimensions_that_are_not_there(model, x):
    with pytest.raises(
        errors.InputError, match=r"channels=7 and across=\(\) are not all dimensions"
    ):
        IBA(model, model[1], channels=7).estimate(x, progress=False)


def test_calls_that_make_no_sense(iba, x):
    with pytest.raises(errors.InputError, match="at='here' is not one of"):
        iba.attribute(x[:1], 0, at="here")
    for size in (0, 1.5):
        with pytest.raises(
            errors.InputError,
            match=f"internal_batch_size={size} must be a whole number of at least 1",
        ):
            iba.attribute(x[:1], 0, internal_batch_size=size)


def test_a_map_too_small_for_the_smoothing(x):
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.Flatten(), nn.Linear(16, 3)).eval()
    with pytest.raises(errors.InputError, match=r"map of 2 positions cannot be smoothed.*sigma=0"):
        IBA(model, model[0], SHORT).estimate(x, progress=False).attribute(x[:1], 0)
