"""LRP and Deep Taylor against Captum, zennit and second derivations, and what conserves."""

import copy
import gc
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import invariance
import pytest
import torch
from captum.attr import LRP as CaptumsLRP  # noqa: N811  # to tell it from ours
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, GammaRule
from captum.attr._utils.lrp_rules import EpsilonRule as CaptumsEpsilon
from small import Function, SmallResNet, normal, varied
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import VGG, make_layers

from captum_mipin import check
from captum_mipin.errors import CaptureError, InputError, UnsupportedOperationError
from captum_mipin.methods import (
    LRP,
    AlphaBeta,
    DeepTaylor,
    Epsilon,
    ExcitationBackprop,
    Flat,
    Gamma,
    LayerPropagation,
    WSquare,
    ZBox,
    ZPlus,
)  # fmt: skip
from captum_mipin.methods import (
    layers as weights,
)
from captum_mipin.methods.lrp.rules import LayerRule, quotient


def _vgg():
    model = VGG(make_layers([6, "M", 8, "M"], batch_norm=True), num_classes=3)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 3))
    return model


NETWORKS = {
    "VGG": (_vgg, 16),
    "ResNet": (lambda: SmallResNet(Bottleneck), 32),
    "DenseNet": (lambda: models.DenseNet(4, (2, 1), 6, num_classes=3), 32),
    "MobileNet": (lambda: models.MobileNetV2(3, 0.5, [[1, 16, 1, 1], [6, 16, 2, 2]]), 32),
    "SqueezeNet": (
        lambda: nn.Sequential(
            models.squeezenet1_1(num_classes=3).features[:6], nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(128, 3)
        ),
        32,
    ),
}  # fmt: skip
RULES = (Epsilon(1e-9), Epsilon(0), Gamma(0.3), ZPlus())
TARGET = [0, 1, 2]


def _images(size, count=3):
    return normal(count, 3, size, size, dtype=torch.float64)


@cache
def _network(name, zero_biases=False, eps=None):
    """One of these and images for it; not to be changed."""
    make, size = NETWORKS[name]
    return varied(make(), 3, size, size, zero_biases=zero_biases, eps=eps), _images(size)


def _outputs(model, x, target=TARGET):
    return model(x).detach()[range(len(x)), target]


# ------------------------------------------------------------------------------------ conservation


@pytest.mark.parametrize("name", NETWORKS)
def test_what_conserves_conserves_without_biases(name):
    model, x = _network(name, zero_biases=True)
    output = _outputs(model, x)
    rules = {
        "VGG": (*RULES, AlphaBeta(2, 1)),
        "ResNet": (*RULES, AlphaBeta(2, 1)),
        "MobileNet": RULES[:3],
    }.get(name, RULES)
    for rule, bias in [
        *((rule, "take") for rule in rules),
        (rules[1], "none"),
        (rules[-1], "none"),
    ]:
        found, delta = LRP(model, rule=rule, bias=bias).attribute(
            x, TARGET, return_convergence_delta=True
        )
        torch.testing.assert_close(found.flatten(1).sum(1), output, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(delta, output - found.flatten(1).sum(1))
    methods = [
        LRP(model, rule=Epsilon(0), input_rule=first) for first in (Flat(), WSquare(), ZBox(-9, 9))
    ]
    if (
        name != "MobileNet"
    ):  # some of its outputs below 0, which no ReLU follows, have no positive inputs
        methods += [DeepTaylor(model), DeepTaylor(model, low=-9, high=9)]
    for method in methods:
        torch.testing.assert_close(
            method.attribute(x, TARGET).flatten(1).sum(1), output, rtol=1e-6, atol=1e-9
        )


def test_biases_without_their_share_take_nothing():
    model, x = _network("VGG")
    dense = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))
    dense, rows = varied(dense, 6), normal(3, 6, dtype=torch.float64)
    for method in (
        LRP(dense, rule=Epsilon(0), bias="none"),
        LRP(dense, rule=Gamma(), bias="none"),
        DeepTaylor(dense),
    ):
        found, delta = method.attribute(rows, TARGET, return_convergence_delta=True)
        torch.testing.assert_close(found.sum(1), _outputs(dense, rows), rtol=1e-6, atol=1e-9)
        assert delta.abs().max() < 1e-9
    kept = LRP(model, rule=ZPlus())
    found, delta = kept.attribute(x, TARGET, return_convergence_delta=True)
    torch.testing.assert_close(delta, _outputs(model, x) - found.flatten(1).sum(1))
    assert delta.abs().max() > 1e-3
    taking = [
        row.path
        for row in check(model, x, method=kept).caveats
        if "its bias takes relevance" in row.caveat
    ]
    assert taking == ["features.0", "features.4", "classifier.0", "classifier.3"]
    losing = "loses the relevance of outputs without contributions of one of the two signs"
    report = check(model, x, method=DeepTaylor)  # active neurons may be so by their bias alone
    assert [(row.path, row.caveat) for row in report.caveats] == [
        (path, losing) for path in ("features.4", "classifier.0", "classifier.3")
    ]
    report = check(model, x, method=DeepTaylor(model, bias="positive"))
    assert [row.path for row in report.caveats if losing in row.caveat] == ["classifier.3"]


def test_what_a_rule_loses_is_told():
    first, last = nn.Linear(2, 1), nn.Linear(1, 1, bias=False)
    model, x = (
        nn.Sequential(first, nn.ReLU(), last).double().eval(),
        torch.ones(1, 2, dtype=torch.float64),
    )
    for p, value in ((first.weight, -1.0), (first.bias, 3.0), (last.weight, 2.0)):
        nn.init.constant_(p, value)
    for method, lost, told in (
        (LRP(model, rule=ZPlus(), bias="none"), 2, ["loses the relevance of outputs without"]),
        (LRP(model, rule=ZPlus()), 2, ["bias takes"]),
        (LRP(model, rule=Epsilon(0.5), bias="none"), 0.72, ["ε = 0.5 takes", "ε = 0.5 takes"]),
        (LRP(model, rule=Epsilon(0), bias="none"), 0, []),
    ):
        _, delta = method.attribute(x, 0, return_convergence_delta=True)
        caveats = [row.caveat for row in check(model, x, method=method).caveats]
        assert float(delta) == pytest.approx(lost), caveats
        assert all(text in caveat for text, caveat in zip(told, caveats, strict=False)), caveats
        assert bool(caveats) == bool(told)


# -------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name != "MobileNet"]
)  # its ReLU6 is not piecewise through 0
def test_lrp_0_is_input_times_gradient(name):
    model, x = _network(name)
    probe = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(probe)[range(3), TARGET].sum(), probe)
    found = LRP(model, rule=Epsilon(0)).attribute(x, TARGET)
    torch.testing.assert_close(found, x * gradient, rtol=1e-6, atol=1e-6 * float(found.abs().max()))


# --------------------------------------------------------------------------------- other libraries


def _plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(), nn.Conv2d(8, 9, 2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), Columns(),
        nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3),
    ).double().eval()  # fmt: skip


class Columns(nn.Dropout):
    """Flattening, as something that Captum's LRP lets pass."""

    def forward(self, x):
        return x.flatten(1)


CAPTUMS = {
    "ε": (lambda: CaptumsEpsilon(1e-4), Epsilon(1e-4), "take"),
    "γ": (lambda: GammaRule(0.25), Gamma(0.25, 1e-9), "take"),
    "α1β0": (lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True), ZPlus(1e-9), "none"),
}


@pytest.mark.parametrize("name", CAPTUMS)
def test_equals_captum_where_that_is_right(name):
    make, rule, bias = CAPTUMS[name]
    model, x = _plain(), _images(16).abs()  # Captum does not split the inputs of a rule by sign
    if name != "ε":
        model[8] = nn.ReLU().eval()
        if name == "γ":  # nor does it scale biases
            for module in model:
                if getattr(module, "bias", None) is not None:
                    module.bias.data.zero_()
    theirs = copy.deepcopy(model)
    theirs[10].rule = CaptumsEpsilon(1e-12)
    for module in theirs:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.rule = (
                make() if name != "γ" or module is not theirs[13] else CaptumsEpsilon(1e-9)
            )
    expected = invariance.captum(CaptumsLRP, theirs, x, TARGET)
    composite = (
        [("13", Epsilon(1e-9))] if name == "γ" else []
    )  # of negative outputs it knows nothing either
    found = LRP(model, rule=rule, bias=bias, composite=composite).attribute(x, TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def _zennits(model, x, rule, first=None):
    core, rules, types = (
        pytest.importorskip(f"zennit.{name}", reason="independent rules to compare with")
        for name in ("core", "rules", "types")
    )
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite, SpecialFirstLayerMapComposite
    from zennit.layer import Sum
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    assert core
    tiny = 1e-30
    layers = [(types.Convolution, rule), (types.Linear, rule)]
    others = [
        (types.Activation, rules.Pass()),
        (types.AvgPool, rules.Norm(tiny)),
        (Sum, rules.Norm(tiny)),
        (types.BatchNorm, rules.Pass()),
    ]
    canonizers = [ResNetCanonizer() if isinstance(model, SmallResNet) else VGGCanonizer()]
    composite = LayerMapComposite(layers + others, canonizers)
    if first is not None:
        composite = SpecialFirstLayerMapComposite(
            layers + others, [(types.Convolution, first)], canonizers
        )
    start = torch.zeros(3, 3, dtype=x.dtype)
    start[range(3), TARGET] = _outputs(model, x)
    with Gradient(model=copy.deepcopy(model), composite=composite) as attributor:
        return attributor(x.clone(), start)[1]


@pytest.mark.parametrize("name", ["VGG", "ResNet"])
def test_equals_zennit(name):
    rules = pytest.importorskip("zennit.rules", reason="independent rules to compare with")
    model, x = _network(name, eps=0.0)  # zennit leaves the ε of a batch norm that it merges
    tiny = 1e-30
    cases = [
        (LRP(model), rules.Epsilon(1e-6), None),
        (LRP(model, rule=Epsilon(0.1), bias="none"), rules.Epsilon(0.1, zero_params="bias"), None),
        (LRP(model, rule=ZPlus(1e-6)), rules.ZPlus(1e-6), None),
        (LRP(model, rule=ZPlus(1e-6), bias="none"), rules.ZPlus(1e-6, zero_params="bias"), None),
        (LRP(model, rule=AlphaBeta(2, 1, 1e-6)), rules.AlphaBeta(2, 1, 1e-6), None),
        (LRP(model, rule=Gamma(0.4, 1e-6)), rules.Gamma(0.4, 1e-6), None),
        (LRP(model, rule=ZPlus(1e-6), input_rule=Flat()), rules.ZPlus(1e-6), rules.Flat(tiny)),
        (
            LRP(model, rule=ZPlus(1e-6), input_rule=WSquare()),
            rules.ZPlus(1e-6),
            rules.WSquare(tiny, zero_params="bias"),
        ),
        (
            LRP(model, input_rule=ZBox(-9, 9, 1e-6)),
            rules.Epsilon(1e-6),
            rules.ZBox(-9.0, 9.0, 1e-6),
        ),
        (
            DeepTaylor(model, low=-9, high=9),
            rules.ZPlus(tiny, zero_params="bias"),
            rules.ZBox(-9.0, 9.0, tiny),
        ),
    ]
    for method, rule, first in cases:
        expected = _zennits(model, x, rule, first)
        found = method.attribute(x, TARGET)
        torch.testing.assert_close(
            found,
            expected,
            rtol=1e-6,
            atol=1e-6 * float(expected.abs().max()),
            msg=str(method.rule),
        )


@pytest.mark.parametrize("rule", [Flat(), WSquare()])
def test_rules_of_inputs_in_every_layer_equal_zennits(rule):
    rules = pytest.importorskip("zennit.rules", reason="independent rules to compare with")
    model, x = _network("VGG", eps=0.0)
    theirs = (
        rules.Flat(1e-30) if isinstance(rule, Flat) else rules.WSquare(1e-30, zero_params="bias")
    )
    torch.testing.assert_close(
        LRP(model, rule=rule).attribute(x, TARGET),
        _zennits(model, x, theirs),
        rtol=1e-6,
        atol=1e-12,
    )


# ------------------------------------------------------------------------------ second derivations


def _matrix(operation, x):
    """J of a linear operation without constants on one example: (outputs, inputs)."""
    zero = torch.zeros_like(x)
    return torch.func.jacfwd(lambda t: operation(t).flatten())(zero).reshape(-1, x.numel())


LAYERS = {
    "dense": (nn.Linear(7, 5), (7,)),
    "tokens": (nn.Linear(3, 4), (5, 3)),
    "conv1d, same": (nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2), (4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)), (3, 6, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), (4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 4, 3)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
}
NORMED = ("dense", "conv2d", "transposed 1d", "depthwise")


@pytest.mark.parametrize(
    ("name", "normed"),
    [(name, normed) for name in LAYERS for normed in (False, True) if not normed or name in NORMED],
)
def test_every_rule_through_its_jacobian(name, normed):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    x = normal(1, *shape, dtype=torch.float64)
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 1]
    norm = norm(layer(x).shape[1]).double() if normed else nn.Identity()
    if normed:
        for t in (norm.weight, norm.bias, norm.running_mean):
            t.data.normal_()
        norm.running_var.uniform_(0.5, 2)

    class Whole(nn.Module):
        """All entries of a layer's output are outputs of the model."""

        def __init__(self):
            super().__init__()
            self.layer, self.norm = layer, norm

        def forward(self, x):
            return self.norm(self.layer(x)).flatten(1)

    model = Whole().eval()
    y, b = model(x).detach()[0], model(torch.zeros_like(x)).detach()[0]
    w = _matrix(lambda t: model(t) - b, x)
    v, target = x.flatten(), 3
    pattern = (
        _matrix(lambda t: Whole()._modules["layer"](t) - layer(torch.zeros_like(x)), x) != 0
    ).double()
    z = w[target] * v
    up, down, positive = z.clamp(min=0), z.clamp(max=0), y[target] > 0
    low, high = -4.0, 5.0
    boxed = z - low * w[target].clamp(min=0) - high * w[target].clamp(max=0)
    agreeing = z.clamp(min=0) if positive else z.clamp(max=0)
    agreeing_bias = b[target].clamp(min=0) if positive else b[target].clamp(max=0)
    expected = {
        Epsilon(0.1): z / (y[target] + 0.1 * (1 if y[target] >= 0 else -1)),
        Gamma(0.5): (z + 0.5 * agreeing)
        / ((z + 0.5 * agreeing).sum() + b[target] + 0.5 * agreeing_bias),
        AlphaBeta(3, 2): (3 * up / (up.sum() + b[target].clamp(min=0))).nan_to_num(0)
        - (2 * down / (down.sum() + b[target].clamp(max=0))).nan_to_num(0),
        ZPlus(): up / (up.sum() + b[target].clamp(min=0)),
        WSquare(): w[target] ** 2 / (w[target] ** 2).sum(),
        Flat(): pattern[target] / pattern[target].sum(),
        ZBox(low, high): boxed / boxed.sum(),
    }
    for rule, shares in expected.items():
        found = LRP(model, rule=rule).attribute(x, target)
        torch.testing.assert_close(
            found.flatten(), y[target] * shares.nan_to_num(0), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_sums_share_by_contribution(shift):
    def run(m, x):
        h = m["a"](x)
        return m["last"](torch.sub(h, m["b"](x), alpha=2) + shift)

    a, b, last = (nn.Linear(4, 3, bias=False) for _ in range(3))
    last = nn.Linear(3, 2, bias=False)
    model = Function(run, a=a, b=b, last=last).double().eval()
    x = normal(5, 4, dtype=torch.float64)
    h, g = a(x), -2 * b(x)
    r = (h + g + shift) * last.weight[1]  # at the sum, by LRP-0
    for bias, z in (("take", h + g + shift), ("none", h + g)):
        if bias == "none":
            logit = last((h + g) + shift)[:, 1]
            assert logit.shape == (5,)
        first = r * h / z @ torch.zeros(3, 4, dtype=x.dtype) + x * ((r * h / z / h) @ a.weight)
        second = x * ((r * g / z / (g / -2)) @ b.weight)
        found = LRP(model, rule=Epsilon(0), bias=bias).attribute(x, 1)
        torch.testing.assert_close(found, (first + second).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [Epsilon(0), Gamma()])
def test_operations_right_at_the_input_share_it_out(rule):
    def run(m, x):
        return m["last"](F.avg_pool1d(((2 * x - 3) / 2 + m["b"](x) - x).unsqueeze(1), 2).flatten(1))

    model = Function(run, b=nn.Linear(4, 4), last=nn.Linear(2, 3)).double().eval()
    x = normal(5, 4, dtype=torch.float64)
    probe = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(probe)[:, 1].sum(), probe)
    found = LRP(model, rule=rule).attribute(x, 1)
    assert isinstance(rule, Gamma) or torch.allclose(found, x * gradient)
    found, delta = LRP(model, rule=rule, bias="none").attribute(x, 1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-9
    assert found.any()


def test_gates_attention_and_norms_hand_all_on():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate, self.norm = (
                nn.Linear(6, 8, bias=False),
                nn.Linear(6, 8),
                nn.LayerNorm(8),
            )
            self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
            self.last = nn.Linear(8, 3, bias=False)

        def forward(self, x):
            h = F.silu(self.first(x)) * torch.sigmoid(self.gate(x))
            h = self.norm(F.gelu(h))
            return self.last((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))

    model, x = Net().double().eval(), normal(4, 5, 6, dtype=torch.float64)
    for rule in (Epsilon(0), Gamma(0.25)):
        found, delta = LRP(model, rule=rule).attribute(x, 1, return_convergence_delta=True)
        assert delta.abs().max() < 1e-9 * found.abs().sum()
    outside = {
        row.operation for row in check(model, x, method=LRP).caveats if "outside" in row.caveat
    }
    assert {
        "aten.mul.Tensor",
        "aten.layer_norm.default",
        "aten.scaled_dot_product_attention.default",
    } <= outside


def test_factors_of_a_dense_layer_and_gated_halves():
    def run(m, x):
        weight = m["a"].weight
        return m["last"](F.glu(torch.addmm(m["a"].bias, x, weight.t(), beta=0.5, alpha=3), 1))

    model = Function(run, a=nn.Linear(4, 6), last=nn.Linear(3, 2, bias=False)).double().eval()
    x, (w, b), v = (
        normal(5, 4, dtype=torch.float64),
        map(Tensor.detach, model.layers["a"].parameters()),
        model.layers["last"].weight,
    )
    h = 0.5 * b + 3 * x @ w.T
    r = (h[:, :3] * h[:, 3:].sigmoid() * v[1]).detach()
    expected = 3 * x * ((r / h[:, :3]) @ w[:3])
    torch.testing.assert_close(LRP(model, rule=Epsilon(0)).attribute(x, 1), expected)


def test_what_overflows_is_refused():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).eval()
    for p in model.parameters():
        nn.init.constant_(p, 1e30)
    with pytest.raises(InputError, match="overflows"):
        LRP(model).attribute(torch.ones(2, 1), 0)


# ----------------------------------------------------------------------------------- what it costs


class _Counted(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "forward", "back"),
    [
        (lambda m: LRP(m, rule=Epsilon()), 3, 3),
        (lambda m: LRP(m, rule=ZPlus()), 3 + 4, 4),  # the first layer has inputs of both signs
        (lambda m: LRP(m, rule=Gamma()), 3 + 3, 4),
        (DeepTaylor, 3 + 3, 3),
        (ExcitationBackprop, 3 + 3, 3),
    ],
)
def test_no_convolution_more_than_the_rule_needs(make, forward, back):
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(5, 3, 4),
        nn.Flatten(),
    ]
    model, x = nn.Sequential(*layers).double().eval(), _images(8)
    model[4].weight.data.abs_()  # so that the output is above 0
    model[4].bias.data.fill_(1)
    method = make(model)
    method.attribute(x, TARGET)
    with _Counted() as counted:
        method.attribute(x, TARGET)
    assert (counted.seen["convolution"], counted.seen["convolution_backward"]) == (forward, back)


@pytest.mark.parametrize("rule", [Epsilon(), Gamma(), ZPlus(), ZBox(-9, 9)])
def test_weights_made_in_parts_are_the_same(rule, monkeypatch):
    model, x = (
        varied(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), 6),
        normal(3, 6, dtype=torch.float64),
    )
    expected = LRP(model, rule=rule).attribute(x, TARGET)
    monkeypatch.setattr(weights, "_ENTRIES", 13)  # one or two rows
    torch.testing.assert_close(LRP(model, rule=rule).attribute(x, TARGET), expected)


@pytest.mark.parametrize("rule", [Epsilon(), Gamma(), ZPlus()])
def test_nothing_is_kept_after_an_explanation(rule):
    model, x = _network("ResNet")
    lrp = LRP(model, rule=rule)
    lrp.attribute(x, TARGET)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, Tensor) for each in gc.get_objects())
        lrp.attribute(x, TARGET)
        assert sum(isinstance(each, Tensor) for each in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_denominator_of_minus_0_counts_as_0():
    r, z = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, -0.0, 1.5, -1.5])
    assert quotient(r, z, 0.5).tolist() == [2, 2, 0.5, -0.5]
    assert quotient(r, 2 * z).tolist() == pytest.approx([0, 0, 1 / 3, -1 / 3])


def test_an_epsilon_too_small_for_the_dtype_is_none():
    r, z = torch.tensor([0.0, 1.0, 1.0]).half(), torch.tensor([0.0, 0.0, 2.0]).half()
    assert quotient(r, z, 1e-9).tolist() == [0, 0, 0.5]
    assert quotient(r, z / 4, 0.5).tolist() == [0, 2, 1]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).half().eval()
    assert LRP(model).attribute(torch.zeros(2, 3).half(), 0).tolist() == [[0.0] * 3] * 2


# ----------------------------------------------------------------------------------------- options


def test_composites_by_type_name_and_function():
    model, x = _network("VGG")
    found = LRP(
        model, rule=Epsilon(0.1), composite=[("features.0", Flat()), (nn.Conv2d, Gamma(0.2))]
    ).attribute(x, 0)
    same = LRP(
        model,
        rule=Gamma(0.2),
        input_rule=Flat(),
        composite=[(lambda path, m: path.startswith("class"), Epsilon(0.1))],
    )
    torch.testing.assert_close(same.attribute(x, 0), found)
    assert not torch.allclose(LRP(model, rule=Epsilon(0.1)).attribute(x, 0), found)
    assert [row.note for row in check(model, x, method=same).rows if "conv" in row.operation] == [
        "flat",
        "LRP-γ, γ = 0.2",
    ]
    functional = Function(
        lambda m, x: F.linear(F.conv2d(x, m["conv"].weight).flatten(1), m["last"].weight),
        conv=nn.Conv2d(3, 2, 16), last=nn.Linear(2, 3),
    ).double().eval()  # fmt: skip
    notes = [
        row.note
        for row in check(
            functional, x, method=LRP(functional, composite=[(nn.Conv2d, ZPlus())])
        ).rows
    ]
    assert notes == ["z⁺", "adjoint", "LRP-ε, ε = 1e-06"]


@dataclass
class Changeable(LayerRule):
    """A rule that has no hash."""

    label = "changeable"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": Epsilon}, "is not a rule of layers"),
        ({"composite": [(3, ZPlus())]}, "pass a type of modules"),
        ({"composite": [("0", "z+")]}, "is not a rule of layers"),
        ({"bias": "zero"}, "bias='zero' is not one of 'take', 'none'"),
        (
            {"input_rule": Changeable()},
            "has no hash .*unhashable.*expected a hashable rule.*frozen dataclass",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        LRP(_plain(), **options)


def test_bad_rules():
    bounds = torch.zeros(3, 1, 1), torch.ones(2, 1, 1)
    for make in (
        lambda: Epsilon(-1), lambda: Gamma(float("nan")), lambda: AlphaBeta(2, 2),
        lambda: ZBox(1, 0), lambda: Epsilon("0.1"),
        lambda: ZBox(*bounds),
    ):  # fmt: skip
        with pytest.raises(InputError):
            make()
    with pytest.raises(
        InputError, match=r"bounds of z\^B do not broadcast against the inputs of 0/conv2d"
    ):
        DeepTaylor(_plain(), low=-9, high=9 * bounds[1]).attribute(_images(16), 0)
    for options in (
        {"low": 0}, {"preset": "x"}, {"preset": "innvestigate", "bias": "full"}, {"bias": "take"},
        {"last": ZPlus},
        {"last": Changeable()},
    ):  # fmt: skip
        with pytest.raises(InputError):
            DeepTaylor(_plain(), **options)
    with pytest.raises(InputError, match=r"'nothing.\*' matches no layer"):
        LRP(_plain(), composite=[("nothing.*", ZPlus())]).attribute(_images(16), 0)
    with pytest.raises(
        InputError, match="z^B at 0/conv2d is for inputs between low and high".replace("^", r"\^")
    ):
        DeepTaylor(_plain(), low=0, high=1).attribute(_images(16), 0)


def test_what_lrp_has_no_rule_for_is_refused():
    model = Function(
        lambda m, x: m["b"](m["a"](x).softmax(1)), a=nn.Linear(4, 3), b=nn.Linear(3, 3)
    ).eval()
    with pytest.raises(
        UnsupportedOperationError,
        match="no rule covers it; .*LayerPropagation".replace(" .*", r"[\s\S]*"),
    ):
        LRP(model).attribute(normal(2, 4), 0)


@pytest.mark.parametrize("make", [LRP, DeepTaylor, ExcitationBackprop])
def test_a_dense_layer_of_one_output_without_its_dimension_is_refused(make):
    model = Function(lambda m, x: F.linear(m["a"](x), m["a"].weight[0]), a=nn.Linear(4, 4)).eval()
    with pytest.raises(
        UnsupportedOperationError,
        match=r"aten\.linear\.default in the model itself: no rule covers it",
    ):
        make(model).attribute(normal(2, 4))


def test_contract_and_layers(untouched):
    model, x = varied(SmallResNet(Bottleneck), 3, 32, 32).float(), _images(32).float()
    lrp = LRP(model, rule=ZPlus(), bias="none", input_rule=WSquare())
    with untouched(model, x), torch.no_grad():
        found = lrp.attribute((x,), target=TARGET)
    assert torch.equal(found[0], lrp.attribute(x, TARGET))
    torch.testing.assert_close(found[0][1:2], lrp.attribute(x[1:2], TARGET[1]))
    assert torch.equal(pickle.loads(pickle.dumps(lrp)).attribute(x, TARGET), found[0])
    assert lrp.has_convergence_delta()
    assert lrp.multiplies_by_inputs
    output = _outputs(model, x)
    for layer in (
        model.layer1,
        model.layer2[0].bn1,
        model.layer2[0].conv1,
        model.layer2[0].downsample[0],
        model.maxpool,
    ):
        at = LayerPropagation(lrp, layer).attribute(x, TARGET)
        whole = layer in (model.layer1, model.maxpool)
        if whole:
            torch.testing.assert_close(at.flatten(1).sum(1), output, rtol=1e-4, atol=1e-5)
        assert at.any()


def test_a_layer_beside_others_gets_its_share_alone():
    def run(m, x):
        h = F.relu(m["a"](x))
        return m["last"]((h + m["b"](h)) * torch.sigmoid(m["gate"](h)))

    model = Function(
        run,
        a=nn.Linear(5, 7),
        b=nn.Linear(7, 7),
        gate=nn.Linear(7, 7),
        last=nn.Linear(7, 3, bias=False),
    )
    model, x = model.double().eval(), normal(6, 5, dtype=torch.float64)
    h = F.relu(model.layers["a"](x)).detach()
    g, gate = model.layers["b"](h).detach(), model.layers["gate"](h).sigmoid().detach()
    r = (h + g) * gate * model.layers["last"].weight[1].detach()  # at the sum
    for bias in ("take", "none"):
        found = LayerPropagation(
            LRP(model, rule=Epsilon(0), bias=bias), model.layers["b"]
        ).attribute(x, 1)
        torch.testing.assert_close(found, r * g / (h + g))
    with pytest.raises(CaptureError, match=r"uses layers\.gate/linear only for gates"):
        LayerPropagation(LRP(model), model.layers["gate"]).attribute(x, 1)


@pytest.mark.parametrize("first", [nn.Linear(4, 5), nn.BatchNorm1d(4)])
def test_two_batch_norms_in_a_row_both_count(first):
    norm = nn.BatchNorm1d(first(torch.zeros(2, 4)).shape[1])
    later = copy.deepcopy(norm)
    model = varied(nn.Sequential(first, norm, later, nn.ReLU(), nn.Linear(len(norm.weight), 3)), 4)
    x = normal(3, 4, dtype=torch.float64)
    found, delta = LRP(model, rule=Epsilon(0)).attribute(x, TARGET, return_convergence_delta=True)
    torch.testing.assert_close(found.sum(1) + delta, _outputs(model, x))
    probe = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(probe)[range(3), TARGET].sum(), probe)
    torch.testing.assert_close(found, x * gradient)


def test_a_batch_norm_before_all_layers_hides_neither_first_nor_last():
    conv, last = nn.Conv1d(3, 4, 2), nn.Linear(12, 2)
    model = varied(nn.Sequential(nn.BatchNorm1d(3), conv, nn.ReLU(), nn.Flatten(), last), 3, 4)
    x = normal(5, 3, 4, dtype=torch.float64)
    notes = [
        row.note
        for row in check(model, x, method=DeepTaylor(model, low=-9, high=9, last=Flat())).rows
    ]
    assert notes == ["its own layer, LRP-ε", "z^B", "passed on", "adjoint", "flat"]


# ------------------------------------------------------------------------------------- Deep Taylor


def test_deep_taylor_by_hand():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    x = normal(5, 4, dtype=torch.float64).clamp(-2, 2)
    (w1, b1), (w2, b2) = ((m.weight.detach(), m.bias.detach()) for m in (model[0], model[2]))
    h = (x @ w1.T + b1).clamp(min=0)
    y = h @ w2.T + b2
    for bias, extra in (("none", 0), ("positive", b2[1].clamp(min=0)), ("full", b2[1])):
        contributions = h * w2[1].clamp(min=0)
        r = contributions / (contributions.sum(1, keepdim=True) + extra) * y[:, 1:]
        squares = w1**2 / (w1**2).sum(1, keepdim=True)
        torch.testing.assert_close(
            DeepTaylor(model, bias=bias).attribute(x, 1), r @ squares, rtol=1e-9, atol=1e-12
        )
        boxed = x.unsqueeze(1) * w1 + 2 * w1.clamp(min=0) - 2 * w1.clamp(max=0)
        expected = (r.unsqueeze(2) * boxed / boxed.sum(2, keepdim=True)).sum(1)
        torch.testing.assert_close(
            DeepTaylor(model, low=-2, high=2, bias=bias).attribute(x, 1),
            expected,
            rtol=1e-9,
            atol=1e-12,
        )
    shared = h * w2[1]
    expected = (shared / shared.sum(1, keepdim=True) * y[:, 1:]) @ squares
    torch.testing.assert_close(
        DeepTaylor(model, last=Epsilon(0)).attribute(x, 1), expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.DataWarning")
def test_the_innvestigate_preset_by_hand():
    torch.manual_seed(0)
    conv, norm, skip, last = (
        nn.Conv2d(2, 3, 1),
        nn.BatchNorm2d(3),
        nn.Conv2d(2, 3, 1),
        nn.Linear(3, 2),
    )
    model = Function(
        lambda m, x: m["last"](
            F.adaptive_avg_pool2d(F.relu(m["norm"](m["conv"](x)) + m["skip"](x)), 1).flatten(1)
        ),
        conv=conv, norm=norm, skip=skip, last=last,
    ).double()  # fmt: skip
    norm.running_mean.normal_()
    model.eval()
    x = normal(6, 2, 2, 2, dtype=torch.float64)
    last.bias.data -= model(x).detach().mean(0)
    h = F.relu(norm(conv(x)) + skip(x)).detach()
    pooled = h.mean((2, 3))
    y = last(pooled).detach()[:, 1:]
    assert (y < 0).any()
    assert (y > 0).any()
    w = last.weight.detach()[1].clamp(min=0)
    r = pooled * w / ((pooled * w).sum(1, keepdim=True) + last.bias.detach()[1]) * y.clamp(min=0)
    r = (r[:, :, None, None] / 4).expand_as(h) * (h > 0)  # the gradients of pooling and ReLU
    expected = torch.zeros_like(x)
    for layer in (conv, skip):  # each gets all
        w, b = layer.weight.detach()[:, :, 0, 0], layer.bias.detach()
        for sign in (1, -1):
            part = (x * sign).clamp(min=0) * sign
            z = torch.einsum("oi,nihw->nohw", w.clamp(min=0), x.clamp(min=0))
            z += torch.einsum("oi,nihw->nohw", w.clamp(max=0), x.clamp(max=0))
            used = w.clamp(min=0) if sign > 0 else w.clamp(max=0)
            expected += part * torch.einsum("oi,nohw->nihw", used, r / (z + b[:, None, None]))
    assert expected.any()
    method = DeepTaylor(model, preset="innvestigate")
    torch.testing.assert_close(method.attribute(x, 1), expected, rtol=1e-9, atol=1e-12)
    assert not method.attribute(x, 1)[y[:, 0] < 0].any()
    assert any("not conserved" in row.caveat for row in check(model, x, method=method).caveats)
    gated = Function(
        lambda m, x: m["a"](x) * m["b"](x).sigmoid(), a=nn.Linear(4, 3), b=nn.Linear(4, 3)
    ).eval()
    with pytest.raises(UnsupportedOperationError, match=r"aten\.mul"):
        DeepTaylor(gated, preset="innvestigate").attribute(normal(2, 4), 0)


def test_options_set_after_a_call_count():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), torch.randn(3, 4)
    lrp = LRP(model)
    lrp.attribute(x, 0)
    lrp.rule = Gamma(3.0)
    assert torch.equal(lrp.attribute(x, 0), LRP(model, rule=Gamma(3.0)).attribute(x, 0))
    lrp.input_rule = ZBox(torch.full((4,), -3.0), torch.full((4,), 3.0))
    first = lrp.attribute(x, 0)
    lrp.input_rule = ZBox(torch.full((4,), -9.0), torch.full((4,), 9.0))
    assert not torch.equal(lrp.attribute(x, 0), first)


def test_rules_of_captum_on_modules_are_told_as_a_composite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(5, 4)
    method = LRP(model.eval())
    before = method.attribute(x, 1)
    model[0].rule, model[2].rule = GammaRule(0.5), Alpha1_Beta0_Rule()
    model[4].rule = CaptumsEpsilon(1e-4)
    composite = "[('0', Gamma(0.5)), ('2', AlphaBeta(1, 0)), ('4', Epsilon(0.0001))]"
    message = f"module '0' has rule = GammaRule.*composite={re.escape(composite)}"
    for call in (method, DeepTaylor(model), LayerPropagation(LRP(model), "0")):
        with pytest.raises(InputError, match=message):
            call.attribute(x, 1)
    del model[0].rule, model[2].rule, model[4].rule
    assert torch.equal(method.attribute(x, 1), before)
    model[0].rule = "a rule of the user"
    assert torch.equal(method.attribute(x, 1), before)


@pytest.mark.parametrize(
    "chosen",
    [
        lambda o, y: o[torch.arange(o.shape[0]), y],
        lambda o, y: o.gather(1, y[:, None]).squeeze(1),
        lambda o, y: (o * F.one_hot(y, 3)).sum(1),
    ],
)
def test_a_model_that_returns_the_logit_of_a_label_is_explained_as_for_this_target(chosen):
    layers = {"first": nn.Linear(4, 6), "last": nn.Linear(6, 3)}
    logits = Function(lambda m, x: m["last"](m["first"](x).relu()), **layers).eval()
    model = Function(lambda m, x, y: chosen(m["last"](m["first"](x).relu()), y), **layers).eval()
    x, y = normal(5, 4), torch.tensor([2, 0, 1, 1, 0])
    one = LRP(model).attribute(x, additional_forward_args=y)
    torch.testing.assert_close(one, LRP(logits).attribute(x, y))
