"""PatternNet and PatternAttribution: closed forms, Haufe's example, second derivations, files."""

import copy
import pickle
from functools import cache

import pytest
import torch
from captum.attr import NoiseTunnel
from small import Function, SmallResNet, normal, varied
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.models.resnet import BasicBlock

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import (
    FitError,
    InputError,
    InverseFileError,
    ModelChangedError,
    NotFittedError,
    UnsupportedOperationError,
)
from captum_mipin.methods import LayerPropagation, PatternAttribution, PatternNet, Patterns
from captum_mipin.storage import files

ESTIMATORS = pytest.mark.parametrize("estimator", ["linear", "positive"])


def _centre(model, x):
    """Shift the last bias, so that each class has logits of both signs."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.bias -= model(x).mean(0)


def _expected(x, w, b, estimator):
    """The definition, neuron by neuron; x (rows, inputs), w (neurons, inputs)."""
    patterns = []
    for j in range(len(w)):
        y = x @ w[j]
        of = (y + b[j] > 0) if estimator == "positive" else torch.ones_like(y, dtype=torch.bool)
        above = (x[of] * y[of, None]).mean(0) - x[of].mean(0) * y.mean()
        patterns.append(above / (w[j] @ above))
    return torch.stack(patterns)


def _mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))


@cache
def _varied():
    """Not to be changed."""
    return varied(_mlp(), 6)


@ESTIMATORS
def test_patterns_of_dense_layers_are_their_definition(estimator):
    model, x = _varied(), normal(80, 6, seed=3, dtype=torch.float64) + 0.5
    patterns = Patterns(model, estimator=estimator).fit(x, batch_size=17, progress=False)
    g = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).detach()
    w = model[0].weight.detach() * g[:, None]
    b = model[1](model[0](torch.zeros_like(x)))[0].detach()
    torch.testing.assert_close(patterns["0/linear"], _expected(x, w, b, estimator))
    h = model[:3](x).detach()
    torch.testing.assert_close(
        patterns["3/linear"],
        _expected(h, model[3].weight.detach(), model[3].bias.detach(), estimator),
    )
    if estimator == "linear":
        y = x @ w.T
        cov = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
        torch.testing.assert_close(patterns["0/linear"], (cov / y.var(0, correction=0)).T)
    torch.testing.assert_close((patterns["0/linear"] * w).sum(1), torch.ones(9, dtype=w.dtype))


def test_haufes_example():
    random = torch.Generator().manual_seed(0)
    signal, distractor = (
        torch.randn(20_000, generator=random, dtype=torch.float64) for _ in range(2)
    )
    x = signal[:, None] * torch.tensor([1.0, 0.0]) + distractor[:, None] * torch.tensor([1.0, 1.0])
    model = nn.Linear(2, 1, bias=False).double().eval()
    model.weight.data = torch.tensor(
        [[1.0, -1.0]], dtype=torch.float64
    )  # reads the signal by cancelling the distractor
    patterns = Patterns(model, estimator="linear").fit(x, progress=False)
    torch.testing.assert_close(
        patterns["(model)/linear"], torch.tensor([[1.0, 0.0]]).double(), rtol=0, atol=0.03
    )
    net, attribution = PatternNet(model, patterns), PatternAttribution(model, patterns)
    torch.testing.assert_close(
        net.attribute(x[:5], 0), signal[:5, None] * patterns["(model)/linear"]
    )
    torch.testing.assert_close(
        attribution.attribute(x[:5], 0), net.attribute(x[:5], 0) * model.weight.detach()
    )


CONVOLUTIONS = {
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2), (4, 9)),
    "conv2d": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
        (3, 6, 7),
    ),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
        (4, 4, 3),
    ),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
}


@ESTIMATORS
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patterns_of_convolutions_by_what_each_weight_multiplies(estimator, name):
    make, shape = CONVOLUTIONS[name]
    layer = make().double()
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten()).eval()
    x = normal(30, *shape, dtype=torch.float64) + 0.3
    patterns = Patterns(model, estimator=estimator).fit(x, batch_size=11, progress=False)
    (found,) = patterns.fitted().patterns.values()
    w = layer.weight.detach()
    linear = (
        layer(x).detach()
        if layer.bias is None
        else (layer(x) - layer.bias.view(-1, *(1,) * (len(shape) - 1))).detach()
    )
    active = (
        layer(x).detach() > 0
        if estimator == "positive"
        else torch.ones_like(linear, dtype=torch.bool)
    )
    above = torch.zeros_like(w)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    outputs = torch.zeros_like(w, dtype=torch.long)
    bias, layer.bias = layer.bias, None
    weight = layer.weight
    for index in torch.cartesian_prod(*map(torch.arange, w.shape)).tolist():
        one = torch.zeros_like(w)
        one[tuple(index)] = 1
        layer.weight = nn.Parameter(one)
        rows = layer(x).detach()  # what this weight multiplies, at each place of its output
        group = index[0] // (w.shape[0] // layer.groups)
        j = group * w.shape[1] + index[1] if transposed else index[0]
        of, y = active[:, j], linear[:, j]
        mean = y.mean()
        above[tuple(index)] = (rows[:, j][of] * y[of]).mean() - rows[:, j][of].mean() * mean
        outputs[tuple(index)] = j
    layer.weight, layer.bias = weight, bias
    below = torch.zeros(outputs.max() + 1, dtype=w.dtype).index_add_(
        0, outputs.flatten(), (w * above).flatten()
    )
    torch.testing.assert_close(found, above / below[outputs])


@cache
def _network(make):
    return varied(make(), 3, 32, 32)


@ESTIMATORS
def test_sums_have_a_pattern_a_channel_and_averages_are_even(estimator):
    def run(m, x):
        h = F.relu(m["a"](x))
        return m["last"](F.adaptive_avg_pool2d(torch.sub(h, m["b"](h), alpha=0.5), 1).flatten(1))

    model = (
        Function(run, a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(3, 3, 1), last=nn.Linear(3, 2))
        .double()
        .eval()
    )
    x = normal(40, 2, 3, 3, dtype=torch.float64)
    _centre(model, x)
    patterns = Patterns(model, estimator=estimator).fit(x, progress=False)
    h = F.relu(model.layers["a"](x)).detach()
    g = model.layers["b"](h).detach()
    rows = torch.stack([h, g], -1).movedim(1, -2).flatten(0, -3)  # (rows, channels, terms)
    weights = torch.tensor([1.0, -0.5], dtype=x.dtype)
    a = torch.cat(
        [_expected(rows[:, c], weights[None], torch.zeros(1), estimator) for c in range(3)]
    )
    torch.testing.assert_close(patterns["(model)/sub"], a)
    torch.testing.assert_close((a * weights).sum(1), torch.ones(3, dtype=x.dtype))
    y, last = model(x[:4])[:, :1].detach(), patterns["layers.last/linear"]
    pooled = y * last[0]
    s = pooled[:, :, None, None].expand(4, 3, 3, 3)
    kernel = patterns["layers.b/conv2d"]
    at_h = s * a[:, 0].view(1, -1, 1, 1) + F.conv_transpose2d(s * a[:, 1].view(1, -1, 1, 1), kernel)
    expected = F.conv_transpose2d(at_h * (h[:4] > 0), patterns["layers.a/conv2d"])
    torch.testing.assert_close(PatternNet(model, patterns).attribute(x[:4], 0), expected)
    r = (pooled * model.layers["last"].weight[0])[:, :, None, None].expand(4, 3, 3, 3) / 9
    r = r.detach()
    kernel = kernel * model.layers["b"].weight.detach()
    at_h = r * a[:, 0].view(1, -1, 1, 1) + F.conv_transpose2d(
        -0.5 * r * a[:, 1].view(1, -1, 1, 1), kernel
    )
    expected = F.conv_transpose2d(
        at_h * (h[:4] > 0), patterns["layers.a/conv2d"] * model.layers["a"].weight.detach()
    )
    torch.testing.assert_close(PatternAttribution(model, patterns).attribute(x[:4], 0), expected)


NETWORKS = (
    lambda: SmallResNet(BasicBlock), lambda: models.DenseNet(4, (1, 1), 6, num_classes=3),
    lambda: models.MobileNetV2(3, 0.25, [[2, 8, 2, 2]]),
)  # fmt: skip


@ESTIMATORS
@pytest.mark.parametrize("make", NETWORKS)
def test_live_neurons_read_their_own_signal(make, estimator):
    model, x = _network(make), normal(12, 3, 32, 32, dtype=torch.float64)
    [m for m in model.modules() if isinstance(m, nn.Linear)][-1].bias.data.fill_(
        1
    )  # most are active at times
    patterns = Patterns(model, estimator=estimator).fit(x, batch_size=6, progress=False)
    rows = {row.layer: row for row in patterns.report.layers}
    assert any("add" in key for key in rows) or not isinstance(model, SmallResNet)
    modules = dict(model.named_modules())
    checked = 0
    for key, pattern in patterns.fitted().patterns.items():
        module = modules[key.rpartition("/")[0]]
        if isinstance(module, nn.Linear):
            live = (pattern * module.weight).flatten(1).sum(1)
            alive = pattern.flatten(1).any(1)
            torch.testing.assert_close(live, alive.to(live))
            assert int((~alive).sum()) == rows[key].dead < len(alive)
            checked += 1
    assert checked
    for method in (PatternNet(model, patterns), PatternAttribution(model, patterns)):
        found = method.attribute(x[:3], [0, 1, 2])
        assert torch.isfinite(found).all()
        assert found.any()
        torch.testing.assert_close(method.attribute(x[1:2], 1), found[1:2])
        at = LayerPropagation(
            method, model.layer2 if isinstance(model, SmallResNet) else model.features
        ).attribute(x[:3], 0)
        assert at.any()
    assert check(model, x, method=PatternNet(model, patterns)).ok


def test_dead_neurons_have_no_pattern():
    model = varied(_mlp(), 6)
    model[1].bias.data[4] = -100
    model[1].weight.data[2] = 0
    patterns = Patterns(model).fit(normal(50, 6, dtype=torch.float64), progress=False)
    assert not patterns["0/linear"][4].any()
    assert patterns.report.layers[0].dead == 2
    assert (
        not Patterns(model, estimator="linear")
        .fit(normal(50, 6, dtype=torch.float64), progress=False)["0/linear"][2]
        .any()
    )
    assert "0/linear    50        9     2" in str(patterns.report)


def test_every_kind_of_data_in_any_chunks_gives_the_same():
    model, x = _varied(), normal(40, 6, seed=4, dtype=torch.float64)
    whole = Patterns(model).fit(x, progress=False)["0/linear"]
    labels = torch.zeros(40)
    for data, options in (
        (x.flip(0), {"batch_size": 7}), (TensorDataset(x, labels), {}),
        (DataLoader(TensorDataset(x, labels), 9), {}),
        ([x[:3], x[3:]], {}), ([{"image": x}], {"unpack": lambda batch: (batch["image"], None)}),
        (iter([x]), {}),
    ):  # fmt: skip
        torch.testing.assert_close(
            Patterns(model).fit(data, progress=False, **options)["0/linear"], whole
        )


def test_files_and_state(tmp_path, untouched):
    model, x = varied(_mlp(), 6), normal(40, 6, dtype=torch.float64)
    with untouched(model, x):
        patterns = Patterns(model, estimator="linear").fit(x, progress=False)
        found = PatternAttribution(model, patterns).attribute(x, 1)
    path = tmp_path / "patterns.safetensors"
    patterns.save(path)
    loaded = Patterns.load(path, model)
    assert loaded.estimator == "linear"
    assert loaded.report == patterns.report
    for other in (loaded, copy.deepcopy((model, patterns))[1]):
        assert torch.equal(PatternAttribution(other.model, other).attribute(x, 1), found)
    method = PatternAttribution(model, patterns)
    again = pickle.loads(pickle.dumps(method))
    assert torch.equal(again.attribute(x, 1), found)
    with pytest.raises(InverseFileError):
        InverseNetwork.load(path, model)
    InverseNetwork(model).fit(x, 0, progress=False).save(path)
    with pytest.raises(InverseFileError, match="does not contain patterns"):
        Patterns.load(path, model)
    patterns.save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InverseFileError):
        Patterns.load(path, model)
    patterns.save(path)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    for call in (lambda: method.attribute(x, 1), lambda: Patterns.load(path, model)):
        with pytest.raises(ModelChangedError):
            call()


def test_bad_input(untouched):
    model, x = _varied(), normal(40, 6, dtype=torch.float64)
    patterns = Patterns(model)
    with pytest.raises(NotFittedError):
        PatternNet(model, patterns).attribute(x, 0)
    for data in ([], x[:1], x * torch.nan, [x, x[:, :5]]):
        with pytest.raises(FitError), untouched(model, x):
            patterns.fit(data, progress=False)
    patterns.fit(x, progress=False)
    before = patterns["0/linear"]
    with pytest.raises(FitError):
        patterns.fit([x, x * torch.inf], progress=False)
    assert patterns["0/linear"] is before
    with pytest.raises(InputError, match="another model object"):
        PatternNet(copy.deepcopy(model), patterns)
    with pytest.raises(InputError, match="estimator"):
        Patterns(model, estimator="negative")
    with pytest.raises(InputError, match="expected Patterns"):
        PatternAttribution(model, None)
    with pytest.raises(NotFittedError, match="'1/linear'"):
        patterns["1/linear"]
    normed = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double().eval()
    own = Patterns(normed).fit(x, progress=False)
    assert PatternAttribution(normed, own).attribute(x, 0).any()
    mixed = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1), nn.Linear(4, 2)).double().eval()
    with pytest.raises(UnsupportedOperationError, match=r"aten\.softmax"):
        Patterns(mixed).fit(x, progress=False)


def test_each_factor_of_a_product_gets_half_the_signal_by_hand():
    """Patterns of a ⊙ b are 1 / 2b and 1 / 2a; for attributions each factor gets half."""
    torch.manual_seed(0)
    a, b = (normal(40, 3, seed=seed, dtype=torch.float64).abs() for seed in (1, 2))
    model = Function(lambda m, a, b: m["last"](a.relu() * b.relu()), last=nn.Linear(3, 2))
    patterns = Patterns(model.double().eval(), estimator="linear").fit((a, b), progress=False)
    y, p = model(a, b).detach()[:, :1], patterns["layers.last/linear"][0]
    w = model.layers["last"].weight[0].detach()
    s = PatternNet(model, patterns).attribute((a, b), 0)
    r = PatternAttribution(model, patterns).attribute((a, b), 0)
    for at, other in enumerate((b, a)):
        torch.testing.assert_close(s[at], y * p / (2 * other))
        torch.testing.assert_close(r[at], y * p * w / 2)


NORMS = {
    "layer": lambda: nn.LayerNorm((4, 3, 3)),
    "layer, plain": lambda: nn.LayerNorm((3, 3), elementwise_affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance, kept": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "RMS": lambda: nn.RMSNorm((3, 3)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_the_sample_are_scales(name):
    if name == "instance, kept" and torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 writes to the statistics of InstanceNorm also in evaluation mode")
    norm = NORMS[name]()
    for p in norm.parameters():
        nn.init.normal_(p, 0, 2)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Flatten(), nn.Linear(36, 2)).double().eval()
    x = normal(30, 2, 3, 3, dtype=torch.float64)
    if name == "instance, kept":
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    patterns = Patterns(model).fit(x, progress=False)
    h = model[0](x[:4]).detach()
    mean = {
        "layer": h.mean((1, 2, 3), keepdim=True), "RMS": 0,
        "group": h.unflatten(1, (2, 2)).mean((2, 3, 4)).repeat_interleave(2, 1)[:, :, None, None],
    }.get(name, h.mean((2, 3), keepdim=True))  # fmt: skip
    mean = norm.running_mean.view(1, 4, 1, 1) if name == "instance, kept" else mean
    shift = getattr(norm, "bias", None)
    shift = torch.zeros(()) if shift is None else shift.detach()
    scale = (norm(h).detach() - (shift.view(-1, 1, 1) if shift.ndim == 1 else shift)) / (h - mean)
    at_norm = (model(x[:4])[:, 1:] * patterns["3/linear"][1]).detach().view_as(h)
    expected = F.conv_transpose2d(at_norm / scale, patterns["0/conv2d"])
    method = PatternNet(model, patterns)
    torch.testing.assert_close(method.attribute(x[:4], 1), expected)
    assert [row.caveat for row in check(model, x, method=method).caveats] == [
        "outside of the definition"
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.ConvNeXt(
            [models.convnext.CNBlockConfig(8, 8, 1), models.convnext.CNBlockConfig(8, None, 1)],
            num_classes=3,
        ),
        lambda: models.VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3),
    ],
)
def test_networks_with_norms_of_the_sample(make):
    torch.manual_seed(0)
    model, x = make().double().eval(), normal(12, 3, 16, 16, dtype=torch.float64)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, 0, 0.3)
    _centre(model, x)
    patterns = Patterns(model).fit(x, progress=False)
    for method in (PatternNet(model, patterns), PatternAttribution(model, patterns)):
        found = method.attribute(x[:3], [0, 1, 2])
        assert torch.isfinite(found).all()
        assert found.any()
        torch.testing.assert_close(method.attribute(x[1:2], 1), found[1:2])


def test_with_captums_noise_tunnel_and_a_delta():
    model, x = varied(_mlp(), 6).float(), normal(40, 6)
    patterns = Patterns(model).fit(x, progress=False)
    attribution = PatternAttribution(model, patterns)
    found, delta = attribution.attribute(x, 1, return_convergence_delta=True)
    torch.testing.assert_close(delta, model(x)[:, 1].detach() - found.sum(1))
    for method in (attribution, PatternNet(model, patterns)):
        assert NoiseTunnel(method).attribute(x, nt_samples=2, target=1).shape == x.shape


def test_recurrent_networks_have_patterns_step_by_step():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.layer(x)[0][:, -1])

    model, x = Recurrent().double().eval(), normal(30, 5, 3, dtype=torch.float64)
    patterns = Patterns(model).fit(x, batch_size=8, progress=False)
    for method in (PatternNet(model, patterns), PatternAttribution(model, patterns)):
        found = method.attribute(x[:4], [0, 1, 1, 0])
        assert found.any()
        torch.testing.assert_close(method.attribute(x[2:3], 1), found[2:3])


def test_channels_of_a_sum_are_where_the_operations_beside_it_have_them():
    """As in ConvNeXt: blocks compute with channels last, and are added with channels first."""

    def run(m, x):
        h = m["a"](x)
        return m["last"]((h + m["b"](h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3)))

    model = (
        Function(run, a=nn.Conv2d(2, 3, 1), b=nn.Linear(3, 3), last=nn.Linear(3, 2)).double().eval()
    )
    x = normal(20, 2, 4, 5, dtype=torch.float64)
    patterns = Patterns(model, estimator="linear").fit(x, progress=False)
    assert patterns["(model)/add"].shape == (3, 2)
    assert PatternAttribution(model, patterns).attribute(x[..., :4], 0).any()  # of another size


def test_a_layer_beside_others_gets_its_part_of_a_sum():
    def run(m, x):
        h = F.relu(m["a"](x))
        return m["last"](h + m["b"](h))

    model = (
        Function(run, a=nn.Linear(5, 7), b=nn.Linear(7, 7), last=nn.Linear(7, 3)).double().eval()
    )
    x = normal(40, 5, dtype=torch.float64)
    patterns = Patterns(model).fit(x, progress=False)
    found = LayerPropagation(PatternNet(model, patterns), model.layers["b"]).attribute(x, 1)
    s = model(x)[:, 1:2].detach() * patterns["layers.last/linear"][1]
    torch.testing.assert_close(found, s * patterns["(model)/add"][:, 1])


def test_silu_is_the_same_however_it_is_written():
    model, other = (
        Function(lambda m, x, f=f: m["last"](f(m["a"](x))), a=nn.Linear(5, 7), last=nn.Linear(7, 3))
        .double()
        .eval()
        for f in (F.silu, lambda h: h * torch.sigmoid(h))
    )
    other.load_state_dict(model.state_dict())
    x = normal(40, 5, dtype=torch.float64)
    for method in (PatternNet, PatternAttribution):
        found = [
            method(m, Patterns(m).fit(x, progress=False)).attribute(x, 0) for m in (model, other)
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("shift", "factor"),
    [
        (lambda h: 1 - h, -1),
        (lambda h: torch.ones(7).double() - h, -1),
        (lambda h: torch.add(torch.ones(7).double(), h, alpha=2), 2),
        (lambda h: torch.rsub(h, 3, alpha=-2), 2),
        (lambda h: h - 1e6, 1),
    ],
)
def test_differences_from_constants_are_scales(shift, factor):
    model = Function(
        lambda m, x: m["last"](shift(m["a"](x).relu())), a=nn.Linear(5, 7), last=nn.Linear(7, 3)
    )
    model = model.double().eval()
    x = normal(40, 5, dtype=torch.float64)
    _centre(model, x)
    patterns = Patterns(model).fit(x, progress=False)
    last = patterns["layers.last/linear"]
    s = model(x)[:, :1].detach() * last[0]
    mask, a = model.layers["a"](x).detach() > 0, patterns["layers.a/linear"]
    torch.testing.assert_close(PatternNet(model, patterns).attribute(x, 0), (s / factor * mask) @ a)
    r = s * model.layers["last"].weight[0].detach() * mask
    found = PatternAttribution(model, patterns).attribute(x, 0)
    torch.testing.assert_close(found, r @ (a * model.layers["a"].weight.detach()))


def test_tokens_have_patterns_from_their_embedding_on():
    model = (
        nn.Sequential(
            nn.Embedding(9, 6), nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2)
        )
        .double()
        .eval()
    )
    tokens = torch.randint(0, 9, (40, 5))
    patterns = Patterns(model, layer=model[0]).fit(tokens, progress=False)
    assert [fit.layer for fit in patterns.report.layers] == ["2/linear", "4/linear"]
    found = LayerPropagation(PatternNet(model, patterns), model[0]).attribute(tokens[:4], 1)
    same = model[2:].eval()
    expected = PatternNet(same, Patterns(same).fit(model[:2](tokens).detach(), progress=False))
    torch.testing.assert_close(
        found.flatten(1), expected.attribute(model[:2](tokens[:4]).detach(), 1)
    )
    with pytest.raises(FitError, match="integers carry no signal"):
        Patterns(model).fit(tokens, progress=False)


def test_batch_norms_of_their_own_and_sums_over_places_by_hand():
    norm, last = nn.BatchNorm1d(3), nn.Linear(3, 2)
    model = varied(nn.Sequential(norm, Summed(), last), 3, 4)
    x = normal(20, 3, 4, dtype=torch.float64)
    patterns = Patterns(model, estimator="linear").fit(x, progress=False)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    s = model(x)[:, 1:2].detach() * patterns["2/linear"][1]
    found = PatternNet(model, patterns).attribute(x, 1)
    r = s * last.weight[1].detach() / 4
    torch.testing.assert_close(
        PatternAttribution(model, patterns).attribute(x, 1), r.unsqueeze(2).expand_as(x)
    )
    at_sum = LayerPropagation(PatternNet(model, patterns), norm).attribute(x, 1)
    torch.testing.assert_close(found, at_sum / scale[:, None])


class Summed(nn.Module):
    def forward(self, x):
        return x.sum(2)


def test_a_file_whose_content_lacks_something_is_told_as_such(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    path = tmp_path / "patterns"
    Patterns(model).fit(torch.randn(20, 4), progress=False).save(path)
    tensors, content = files.load(path)
    for missing in ("fingerprint", "estimator", "output", "layers"):
        files.save(
            path, tensors, {name: value for name, value in content.items() if name != missing}
        )
        with pytest.raises(
            InverseFileError, match=rf"is not that of patterns \(KeyError\('{missing}'\)\)"
        ):
            Patterns.load(path, model)


def _never_positive(head):
    """Return a network whose class 0 has a logit that is never positive, and its images."""
    torch.manual_seed(0)
    if head == "dense":
        layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    else:
        layers = [nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *layers).double().eval()
    x, last = normal(24, 3, 9, 9, dtype=torch.float64), model[4 if head == "dense" else 2]
    with torch.no_grad():
        last.bias -= model(x).mean(0)
        last.bias[0] = -50.0
    return model, x


@pytest.mark.parametrize("head", ["dense", "convolution"])
def test_a_class_whose_logit_was_never_positive_is_an_error(head):
    model, x = _never_positive(head)
    positive = Patterns(model).fit(x, progress=False)
    linear = Patterns(model, estimator="linear").fit(x, progress=False)
    for method in (PatternNet, PatternAttribution):
        with pytest.raises(
            NotFittedError,
            match=r"no pattern was fitted for class 0, an output of .*never positive.*linear",
        ):
            method(model, positive).attribute(x[:3], [1, 0, 2])
        assert method(model, positive).attribute(x[:3], 1).any()
        assert method(model, linear).attribute(x[:3], 0).any()  # the way out


@pytest.mark.parametrize(
    "last", [nn.ReLU, nn.ReLU6, lambda: nn.Sequential(nn.ReLU(), nn.Flatten())]
)
@pytest.mark.parametrize("head", ["dense", "convolution"])
def test_a_class_that_a_final_relu_makes_0_is_an_error(head, last, tmp_path):
    """Formerly its map was 0, and only the column "dead" of the report told it."""
    model, x = _never_positive(head)
    model = nn.Sequential(*model, last()).eval()
    positive = Patterns(model).fit(x, progress=False)
    positive.save(tmp_path / "patterns")
    for patterns in (positive, Patterns.load(tmp_path / "patterns", model)):
        for method in (PatternNet, PatternAttribution):
            with pytest.raises(
                NotFittedError, match="for class 0, because its output is always 0, as behind a Re"
            ):
                method(model, patterns).attribute(x[:3], [1, 0, 2])
            shown = method(model, patterns).attribute(x, 1)
            assert torch.equal(shown.flatten(1).any(1), model(x)[:, 1] > 0)


def test_a_class_that_reads_nothing_has_a_map_of_zeros():
    model, x = _never_positive("dense")
    with torch.no_grad():
        model[4].weight[0] = 0
    found = PatternAttribution(model, Patterns(model).fit(x, progress=False))
    assert not found.attribute(x[:3], 0).any()
