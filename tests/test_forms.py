"""Other sizes, wrapped models, several outputs, half precision, integer inputs."""

import copy
import dataclasses
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from captum.attr import NoiseTunnel
from designs import aside
from oracle import Oracle, from_torch, regress
from small import Function, normal
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.squeezenet import Fire

from captum_mipin import (
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    MIPINError,
    check,
    errors,
)
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.signature import Signature
from captum_mipin.inverse.explain import Request
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.rules import table


def ids(*shape, seed=0, words=12):
    return torch.randint(words, shape, generator=torch.Generator().manual_seed(seed))


def fitted(model, x, **options):
    return InverseNetwork(model.eval(), **options).fit(x, progress=False)


# ------------------------------------------------------------------------------------- other sizes


class PooledDense:
    """For the oracle: a dense layer on averages, inverted at each place the logit came from."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return x.mean((2, 3)) @ self.weight.T + self.bias

    def fit(self, x, s, ridge, scale):
        return regress(self.rows(x), self.rows(self.placed(x, s, local=True)), ridge, scale)

    def back(self, s, x, y, *, inverse, biases, local):
        weight, bias = inverse
        found = self.rows(self.placed(x, s, local)) @ weight.T + (bias if biases else 0)
        return np.moveaxis(found.reshape(len(x), *x.shape[2:], -1), -1, 1)

    def placed(self, x, s, local):
        """S ⊙ the share of each place in the logit."""
        evidence = np.einsum("nchw,oc->nohw", x, self.weight) + self.bias[:, None, None]
        sign = np.sign(evidence.mean((2, 3), keepdims=True))
        origin = np.maximum(sign * evidence, 0) if local else np.ones_like(evidence)
        return s[:, :, None, None] * origin / origin.mean((2, 3), keepdims=True)

    def rows(self, x):
        return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def pooled(head):
    """A convolutional network with a global average, spelled in one of many ways."""
    torch.manual_seed(0)
    parts = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.ReLU()
    )
    return (
        Function(lambda m, x: m["last"](head(m["body"](x))), body=parts, last=nn.Linear(4, 3))
        .double()
        .eval()
    )


HEADS = {
    "adaptive": lambda h: F.adaptive_avg_pool2d(h, 1).flatten(1),
    "mean": lambda h: h.mean((2, 3)),
    "view": lambda h: h.view(h.shape[0], 4, -1).mean(-1),
    "window of the whole": lambda h: F.avg_pool2d(h, h.shape[2:]).flatten(1),
    "rows, then columns": lambda h: (
        F.avg_pool2d(F.avg_pool2d(h, (h.shape[2], 1)), (1, h.shape[3])).squeeze(3).squeeze(2)
    ),
}


@pytest.mark.parametrize(
    ("head", "loaded"), [*((head, False) for head in HEADS), ("window of the whole", True)]
)
def test_another_size_equals_the_oracle_with_the_inverses_of_the_size_fitted(
    head, loaded, tmp_path
):
    model, x = pooled(HEADS[head]), normal(40, 2, 8, 8, dtype=torch.float64)
    inverse = fitted(model, x)
    if loaded:
        inverse.save(tmp_path / "file")
        inverse = InverseNetwork.load(tmp_path / "file", model)
    last = PooledDense(*(p.detach().numpy() for p in model.layers["last"].parameters()))
    oracle = Oracle([*from_torch(model.layers["body"]), last]).fit(x.numpy(), 1)
    for size in ((11, 9), (6, 16)) if head == "mean" else ((11, 9),):
        some = normal(3, 2, *size, seed=1, dtype=torch.float64)
        for local in (True, False):
            for biases in (True, False):
                found = inverse.explain((some,), 1, biases=(biases,), local=local).signals[0][0]
                expected = torch.from_numpy(
                    oracle.signals(some.numpy(), 1, biases=biases, local=local)[0]
                )
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def vgg():
    model = models.VGG(models.vgg.make_layers([4, "M", 6, "M"]), num_classes=3)
    model.classifier = nn.Sequential(
        nn.Linear(6 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3)
    )
    return model


def resnet():
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    model.conv1, model.bn1 = nn.Conv2d(3, 64, 3, 2, bias=False), nn.BatchNorm2d(64)
    model.layer2, model.layer3, model.layer4 = (nn.Identity() for _ in range(3))
    model.layer1 = nn.Sequential(nn.Conv2d(64, 6, 1), _block(6, 6, 1), _block(6, 8, 2))
    model.fc = nn.Linear(8, 3)
    return model


def _block(before, after, stride):
    sample = (
        nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))
        if stride > 1
        else None
    )
    return models.resnet.BasicBlock(before, after, stride, sample)


def mobilenet():
    model = models.MobileNetV2(3, 0.25, [[1, 8, 1, 1], [2, 8, 2, 2]])
    model.features[-1] = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU6())
    model.classifier[1] = nn.Linear(8, 3)
    return model


def squeezenet():
    model = models.squeezenet1_1(num_classes=3)
    model.features = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(6, 3, 4, 4)
    )
    model.classifier[1] = nn.Conv2d(8, 3, 1)
    nn.init.ones_(model.classifier[1].bias)  # its logits pass a ReLU
    return model


def efficientnet():
    block = models.efficientnet.MBConvConfig(2, 3, 2, 4, 8, 1, 1.0, 1.0)
    return models.EfficientNet([block], 0.0, num_classes=3, last_channel=12)


def convnext():
    setting = [models.convnext.CNBlockConfig(4, 6, 1), models.convnext.CNBlockConfig(6, None, 1)]
    return models.ConvNeXt(setting, num_classes=3)


ARCHITECTURES = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "vgg": vgg,
    "squeezenet": squeezenet,
    "densenet": lambda: models.DenseNet(4, (2, 2), 6, num_classes=3),
    "convnext": convnext,
    "efficientnet": efficientnet,
}


@pytest.mark.parametrize("name", aside(ARCHITECTURES, "vgg", "densenet", "efficientnet"))
def test_architectures_explain_other_sizes(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().double()
    model(normal(16, 3, 32, 32, dtype=torch.float64))  # batch statistics other than 0 and 1
    inverse = InverseNetwork(model.eval()).fit(
        normal(8, 3, 32, 32, dtype=torch.float64), [0, 2], progress=False
    )
    y, mixed = normal(4, 3, 48, 40, seed=1, dtype=torch.float64), [0, 2, 2, 0]
    found = inverse.explain((y,), mixed, biases=(False, True))
    there, at = (
        InverseNetwork(model),
        Signature.of((y,), ()),
    )  # a network captured at that size, with the same inverses
    there._state = dataclasses.replace(
        inverse._state,
        origin=dataclasses.replace(
            inverse._state.origin,
            signature=at,
            structure=structure(inverse._surrogates.graphs.get(at), table()),
        ),
    )
    expected = there.explain((y,), mixed, biases=(False, True))
    for (one,), (two,) in zip(found.signals, expected.signals, strict=True):
        assert torch.equal(one, two)
        assert one.shape == y.shape
        assert torch.isfinite(one).all()
    with torch.no_grad():
        torch.testing.assert_close(found.output, model(y)[range(4), mixed])
    units = inverse._back(
        inverse._state,
        Request(inputs=(y,), target=mixed, biases=(False, True), unit=True),
    )
    (a,), (s,) = found.signals
    (a1,), (s1,) = units.signals
    scale = float(s.abs().max())
    torch.testing.assert_close(a, a1 * found.output.view(-1, 1, 1, 1), rtol=1e-6, atol=1e-9 * scale)
    torch.testing.assert_close(
        s - a, s1 - a1, rtol=1e-6, atol=1e-9 * scale
    )  # the path of the biases knows no logit


def test_a_dense_layer_of_another_width_is_named_with_the_way_out(untouched):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    inverse = fitted(model, normal(30, 1, 8, 8))
    y = normal(2, 1, 9, 9)
    message = (
        r"(?s)Sequential cannot run on inputs \(2, 1, 9, 9\).*F\.linear.*"
        r"in module '3' \(Linear\).*"
        r"was fitted on \(1, 8, 8\) torch\.float32 per example\. Resize the inputs to this shape.*"
        r"nn\.AdaptiveAvgPool2d"
    )
    for call in (inverse.source_signal, MIPINAttribution(model, inverse).attribute):
        with pytest.raises(errors.CaptureError, match=message), untouched(model, y):
            call(y, 0)
    assert torch.isfinite(inverse.source_signal(normal(2, 1, 8, 8), 0)).all()


def spread(m, h):
    """Hands each pixel the channels' averages, so that the signal of all pixels is added up."""
    return (h + m["mix"](h.mean((2, 3), keepdim=True))).mean((2, 3))


REFUSED = {
    "sum by size": (
        lambda m, h: h.sum((2, 3)) / (h.shape[2] * h.shape[3]),
        r"aten\.div\.Tensor in the model itself",
    ),
    "broadcast": (spread, r"aten\.add\.Tensor in the model itself"),
    "expand": (
        lambda m, h: m["twin"](h.mean((2, 3), keepdim=True).expand(-1, -1, *h.shape[2:])).mean(
            (2, 3)
        ),
        r"aten\.expand\.default in the model itself",
    ),
    "another branch": (
        lambda m, h: (F.relu(h) if h.shape[2] > 8 else h).mean((2, 3)),
        r"aten\.relu\.default in the model itself|aten\.mean\.dim in the model itself",
    ),
    "attention": (
        lambda m, h: F.scaled_dot_product_attention(*[h.flatten(2).mT] * 3)[:, 0],
        r"aten\.scaled_dot_product_attention\.default in the model itself",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_scales_the_signal_with_the_size_is_refused_by_name(name):
    torch.manual_seed(0)
    run, where = REFUSED[name]
    model = Function(
        lambda m, x: m["last"](run(m, m["first"](x))),
        first=nn.Conv2d(2, 4, 3),
        mix=nn.Conv2d(4, 4, 1),
        twin=nn.Conv2d(4, 4, 1),
        last=nn.Linear(4, 3),
    )
    inverse = fitted(model, normal(30, 2, 8, 8))
    assert torch.isfinite(inverse.source_signal(normal(2, 2, 8, 8), 0)).all()
    with pytest.raises(
        errors.CaptureError, match=rf"(?s)first at ({where})\..*was fitted on \(2, 8, 8\)"
    ):
        inverse.source_signal(normal(2, 2, 14, 14), 0)
    assert torch.isfinite(inverse.source_signal(normal(2, 2, 8, 8), 0)).all()


def test_channels_that_follow_from_the_size_are_refused():
    """A scale is learned for each of the 12 columns: for the graph these are the channels."""
    model = Function(lambda m, x: m["last"]((2 * x).unsqueeze(1).mean(2)), last=nn.Linear(1, 2))
    inverse = fitted(model, normal(30, 12) + 1)
    with pytest.raises(
        errors.InputError,
        match=r"the inverse of input .*/fork does not fit signals of shape \(2, 15\)",
    ):
        inverse.source_signal(normal(2, 15), 0)


def test_a_longer_sequence_is_refused_by_recurrent_layers_and_taken_by_a_mean():
    torch.manual_seed(0)
    recurrent = Function(
        lambda m, x: m["last"](m["rnn"](x)[0][:, -1]),
        rnn=nn.RNN(3, 4, batch_first=True),
        last=nn.Linear(4, 2),
    )
    inverse = fitted(recurrent, normal(30, 2, 3))
    with pytest.raises(errors.CaptureError, match=r"first at \S+ in layers\.rnn"):
        inverse.source_signal(normal(2, 3, 3), 0)
    tokenwise = Function(
        lambda m, x: m["last"](m["first"](x).relu().mean(1)),
        first=nn.Linear(3, 4),
        last=nn.Linear(4, 2),
    )
    assert fitted(tokenwise, normal(30, 5, 3)).source_signal(normal(2, 6, 3), 0).shape == (2, 6, 3)


def test_another_model_is_noticed_at_another_size_too(tmp_path):
    def model(window):
        return pooled(lambda h: F.avg_pool2d(h, window).mean((2, 3)))

    x, y = (normal(30, 2, n, n, dtype=torch.float64) for n in (12, 16))
    fitted(model(2), x).save(tmp_path / "file")
    assert torch.isfinite(
        InverseNetwork.load(tmp_path / "file", model(2)).source_signal(y[:2], 0)
    ).all()
    for size in (x, y):
        with pytest.raises(errors.ModelChangedError, match="operations differ from those of"):
            InverseNetwork.load(tmp_path / "file", model(3)).source_signal(size[:2], 0)


def test_sizes_do_not_mix_in_one_fit():
    model = pooled(HEADS["mean"])
    x, y = normal(10, 2, 8, 8, dtype=torch.float64), normal(10, 2, 9, 9, dtype=torch.float64)
    with pytest.raises(
        errors.FitError, match=r"batch 1 has inputs of shape and dtype \[\(\(2, 9, 9\)"
    ):
        fitted(model, [x, y])
    inverse = fitted(model, x)
    with pytest.raises(
        errors.InputError, match=r"the data has inputs .* expected .* as in earlier fits"
    ):
        inverse.fit(y, 0, progress=False)


@pytest.mark.parametrize("shared", [False, True])
def test_at_another_size_further_tensors_are_per_example_or_shared_as_they_were_at_the_fit(shared):
    torch.manual_seed(0)
    model = Function(
        lambda m, x, scale: m["last"](m["body"](x).mean((2, 3)) * scale),
        body=nn.Conv2d(2, 4, 3),
        last=nn.Linear(4, 3),
    )
    x, scale = normal(30, 2, 8, 8), torch.rand(4) if shared else torch.rand(30, 1)
    data = [(x[:20], scale if shared else scale[:20]), (x[20:], scale if shared else scale[20:])]
    torch.manual_seed(0)
    inverse = InverseNetwork(model.eval()).fit(data, unpack=lambda batch: batch, progress=False)
    y, some = (
        normal(4, 2, 9, 9),
        torch.rand(4) if shared else torch.rand(4, 1),
    )  # as long as the batch in either case
    found = inverse.source_signal(y, [0, 2, 1, 0], some)
    for i, target in enumerate([0, 2, 1, 0]):
        alone = inverse.source_signal(y[i : i + 1], target, some if shared else some[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone)


@pytest.mark.parametrize("window", [2, 3])
def test_a_loaded_inverse_with_further_arguments_takes_another_size_of_the_same_model_alone(
    window, tmp_path
):
    def make(window):
        torch.manual_seed(0)
        return Function(
            lambda m, x, scale: m["last"](
                F.avg_pool2d(m["body"](x), window)[:, :, : x.shape[2] // 4].mean((2, 3)) * scale
            ),
            body=nn.Conv2d(2, 4, 3),
            last=nn.Linear(4, 3),
        ).eval()

    x, scale = normal(30, 2, 12, 12), torch.rand(30, 1)
    data = [(x[:20], scale[:20]), (x[20:], scale[20:])]
    InverseNetwork(make(2)).fit(data, 0, unpack=lambda batch: batch, progress=False).save(
        tmp_path / "file"
    )
    loaded = InverseNetwork.load(tmp_path / "file", make(window))
    if window == 2:
        assert loaded.source_signal(normal(3, 2, 16, 16), 0, scale[:3]).shape == (3, 2, 16, 16)
    else:
        with pytest.raises(errors.ModelChangedError, match="operations differ from those of"):
            loaded.source_signal(normal(3, 2, 16, 16), 0, scale[:3])


# ---------------------------------------------------------------------------------- wrapped models


def never(*arguments, **named):
    raise AssertionError("nothing is to be compiled")


WRAPPED = {
    "parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend=never),
    "both": lambda model: torch.compile(nn.DataParallel(model), backend=never),
    "both, the other way": lambda model: nn.DataParallel(torch.compile(model, backend=never)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_models_are_those_they_wrap(how, mlp, tmp_path, untouched):
    wrapped, x = WRAPPED[how](mlp.model), mlp.x[:4]
    assert unwrapped(wrapped) is mlp.model
    assert unwrapped(mlp.model) is mlp.model
    with untouched(mlp.model, mlp.x):
        inverse = InverseNetwork(wrapped).fit(mlp.x, progress=False)
    inverse.save(tmp_path / "wrapped")
    mlp.inverse.save(tmp_path / "bare")
    loaded = [
        InverseNetwork.load(tmp_path / name, model)
        for name, model in (("wrapped", mlp.model), ("bare", wrapped))
    ]
    assert all(other.model is mlp.model for other in (inverse, *loaded))
    expected = mlp.mipin.attribute(x, [0, 1, 2, 0], return_convergence_delta=True)
    for other in (inverse, mlp.inverse, *(loaded if how == "both" else ())):
        for model in (wrapped, mlp.model):
            mipin = MIPINAttribution(model, other)
            found = mipin.attribute(x, [0, 1, 2, 0], return_convergence_delta=True)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            s = mipin.source_signal(x, 1)
            assert torch.equal(
                mipin.compute_convergence_delta(s, x, 1),
                mlp.mipin.compute_convergence_delta(s, x, 1),
            )
    assert check(wrapped, x) == check(mlp.model, x)
    layer = LayerMIPINAttribution(wrapped, inverse, mlp.model[1])
    assert torch.equal(
        layer.attribute(x, 0),
        LayerMIPINAttribution(mlp.model, mlp.inverse, mlp.model[1]).attribute(x, 0),
    )
    assert torch.isfinite(
        NoiseTunnel(MIPINAttribution(wrapped, inverse)).attribute(x, nt_samples=2, target=0)
    ).all()


def test_the_module_of_a_distributed_model_is_taken(mlp):
    distributed = object.__new__(
        nn.parallel.DistributedDataParallel
    )  # to make one takes a group of processes
    nn.Module.__init__(distributed)
    distributed.module = mlp.model
    assert unwrapped(distributed) is mlp.model


def test_a_wrapped_model_is_watched_and_must_not_train(own_mlp):
    wrapped = nn.DataParallel(own_mlp.model.append(nn.Dropout()).eval())
    inverse = InverseNetwork(wrapped).fit(own_mlp.x, progress=False)
    wrapped.train()
    with pytest.raises(errors.TrainingModeError, match=r"model\.eval\(\)"):
        inverse.source_signal(own_mlp.x[:2], 0)
    wrapped.eval()
    with torch.no_grad():
        wrapped.module[0].bias += 1
    with pytest.raises(errors.ModelChangedError, match="weights have changed"):
        inverse.source_signal(own_mlp.x[:2], 0)
    with pytest.raises(errors.InputError, match="made for another model object"):
        MIPINAttribution(nn.DataParallel(copy.deepcopy(own_mlp.model)), inverse)


@pytest.mark.parametrize("how", ["parallel", "both"])
def test_a_wrapped_part_of_a_model(how, mlp):
    part = WRAPPED[how](mlp.model[:2])
    model = nn.Sequential(part, mlp.model[2]).eval()
    inverse = InverseNetwork(model).fit(mlp.x, progress=False)
    assert torch.equal(inverse.source_signal(mlp.x[:3], 1), mlp.inverse.source_signal(mlp.x[:3], 1))
    expected = LayerMIPINAttribution(mlp.model, mlp.inverse, mlp.model[1]).attribute(mlp.x[:3], 1)
    for layer in (part, unwrapped(part)):
        assert torch.equal(
            LayerMIPINAttribution(model, inverse, layer).attribute(mlp.x[:3], 1), expected
        )
        there = InverseNetwork(model, layer=layer).fit(mlp.x, progress=False)
        assert torch.equal(LayerMIPINAttribution(model, there).attribute(mlp.x[:3], 1), expected)


# --------------------------------------------------------------------------------- several outputs

Pair = namedtuple("Pair", ["logits", "aux"])


@dataclasses.dataclass
class Outputs:
    logits: torch.Tensor
    aux: torch.Tensor
    states: object = None


class Headed(nn.Module):
    """A body with two heads, and a way to return both."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.last, self.aux = (
            nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
            nn.Linear(8, 3),
            nn.Linear(8, 2),
        )
        self.form = form

    def forward(self, x):
        h = self.body(x)
        return self.form(self.last(h), self.aux(h))


FORMS = {
    "tuple": (lambda a, b: (a, b), 0, -1),
    "list": (lambda a, b: [a, b], 0, 1),
    "dictionary": (lambda a, b: OrderedDict(logits=a, aux=b), "logits", "aux"),
    "integer keys": (lambda a, b: {4: a, 9: b}, 4, 9),
    "named tuple": (Pair, "logits", 1),
    "dataclass": (Outputs, "logits", "aux"),
    "nested": (lambda a, b: {"heads": (a, [b, None])}, ("heads", 0), ("heads", 1, 0)),
}


@pytest.fixture(scope="module")
def alone():
    """Either head as the only output."""
    singles = [Headed(form).eval() for form in (lambda a, b: a, lambda a, b: b)]
    return [MIPINAttribution(single, fitted(single, normal(60, 6))) for single in singles]


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("name", FORMS)
def test_one_of_several_outputs(name, head, alone, tmp_path, untouched):
    form, output, plain = FORMS[name][0], FORMS[name][1 + head], alone[head]
    model, x = Headed(form).eval(), normal(60, 6)
    with untouched(model, x):
        inverse = fitted(model, x, output=output)
    inverse.save(tmp_path / "file")
    loaded = InverseNetwork.load(tmp_path / "file", model)
    assert loaded.output == output
    loaded._surrogates = inverse._surrogates
    mipin = MIPINAttribution(model, loaded)
    found = mipin.attribute(x[:4], [0, 1, 1, 0], return_convergence_delta=True)
    expected = plain.attribute(x[:4], [0, 1, 1, 0], return_convergence_delta=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    s = mipin.source_signal(x[:4], 1)
    assert torch.equal(
        mipin.compute_convergence_delta(s, x[:4], 1), plain.compute_convergence_delta(s, x[:4], 1)
    )


def test_check_looks_at_the_chosen_output(alone):
    model, x = Headed(lambda a, b: (a, b.exp())).eval(), normal(3, 6)
    assert check(model, x, output=0).ok
    assert [row.operation for row in check(model, x, output=1).refused] == ["aten.exp.default"]


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        (
            "tuple",
            None,
            r"returns a tuple, expected one tensor\. Choose one by output=, out of 0, 1, or w",
        ),
        (
            "dictionary",
            None,
            r"returns an OrderedDict, expected one tensor\. "
            r"Choose one by output=, out of 'logits', 'aux', or w",
        ),
        (
            "named tuple",
            None,
            r"returns a Pair, expected one tensor\. "
            r"Choose one by output=, out of 'logits', 'aux', or w",
        ),
        (
            "dataclass",
            None,
            r"returns an Outputs, expected .* out of 'logits', 'aux', 'states', or w",
        ),
        (
            "dataclass",
            "states",
            r"has for output='states' None, expected one tensor\. Wrap",
        ),
        (
            "nested",
            "heads",
            r"has for output='heads' a tuple, .* out of \('heads', 0\), \('heads', 1\), or wrap",
        ),
        (
            "nested",
            ("heads", 2),
            r"output=\('heads', 2\) does not fit: its output 'heads' is a tuple, "
            r"expected one of \('heads', 0\)",
        ),
        (
            "tuple",
            "logits",
            r"output='logits' does not fit: what the model returns is a tuple, "
            r"expected one of 0, 1",
        ),
        (
            "tuple",
            2,
            r"output=2 does not fit: what the model returns is a tuple, expected one of 0, 1",
        ),
        (
            "tuple",
            (0, 0),
            r"output=\(0, 0\) does not fit: its output 0 is a Tensor, expected output=0$",
        ),
    ],
)
def test_outputs_that_are_not_there_are_refused_with_those_that_are(
    name, output, message, untouched
):
    model, x = Headed(FORMS[name][0]).eval(), normal(20, 6)
    for call in (
        lambda: InverseNetwork(model, output=output).fit(x, progress=False),
        lambda: check(model, x, output=output),
    ):
        with pytest.raises(errors.CaptureError, match=message), untouched(model, x):
            call()


def test_the_output_of_a_model_with_one_is_refused(mlp):
    with pytest.raises(
        errors.CaptureError,
        match=r"output=0 does not fit: what the model returns is a Tensor, expected output=None",
    ):
        InverseNetwork(mlp.model, output=0).fit(mlp.x, progress=False)
    for wrong in (1.5, True, ["logits"], ("a", None), b"x"):
        with pytest.raises(
            errors.InputError,
            match=r"output=.* must be an index, a key or a field's name, or a tuple of such",
        ):
            InverseNetwork(mlp.model, output=wrong)


def test_a_hook_on_the_whole_model_comes_before_the_choice():
    model, x = Headed(lambda a, b: (a, b)).eval(), normal(60, 6)
    model.register_forward_hook(lambda module, arguments, value: {"first": value[0]})
    inverse = fitted(model, x, output="first")
    single = Headed(lambda a, b: a)
    assert torch.equal(inverse.source_signal(x[:3], 1), fitted(single, x).source_signal(x[:3], 1))


def test_a_checkpoint_of_another_output_is_refused(tmp_path):
    model, x, path = Headed(lambda a, b: (a, (a, b))).eval(), normal(60, 6), tmp_path / "checkpoint"

    class Stops:
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == 4:  # the first batch, the look at the data, one layer, then this
                raise KeyboardInterrupt
            return iter(list(x.split(20)))

    with pytest.raises(KeyboardInterrupt):
        InverseNetwork(model, output=(1, 0)).fit(
            Stops(), 0, memory=0, progress=False, checkpoint=path
        )
    with pytest.raises(errors.InverseFileError, match="of another fit: its output differ"):
        InverseNetwork(model, output=0).fit(list(x.split(20)), 0, progress=False, checkpoint=path)
    resumed = InverseNetwork(model, output=(1, 0)).fit(
        list(x.split(20)), 0, memory=0, progress=False, checkpoint=path
    )
    assert torch.equal(
        resumed.source_signal(x[:3], 0),
        InverseNetwork(model, output=0)
        .fit(list(x.split(20)), 0, memory=0, progress=False)
        .source_signal(x[:3], 0),
    )


# ---------------------------------------------------------------------------------- half precision


def mean_pooled():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


HALVES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), (6,)),
    "cnn": (mean_pooled, (3, 8, 8)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision_agrees_with_the_same_network_in_float32(name, dtype, tmp_path):
    """Each of at most ten operations, forward and back, rounds values by eps / 2."""
    torch.manual_seed(0)
    make, shape = HALVES[name]
    half = make().eval().to(dtype)
    single = copy.deepcopy(half).float()
    x = normal(200, *shape).to(dtype)
    inverse, expected = fitted(half, x), fitted(single, x.float())
    assert {i.weight.dtype for i in inverse._state.fitted.inverses[(0,)].values()} == {dtype}
    inverse.save(tmp_path / "file")
    some, targets = x[:50], [0, 1, 2, 1, 0] * 10
    found = MIPINAttribution(half, InverseNetwork.load(tmp_path / "file", half))
    tolerance = 5 * torch.finfo(dtype).eps
    for bias in (False, True):
        ((s,),) = inverse.explain((some,), targets, biases=(bias,)).signals
        ((wide,),) = expected.explain((some.float(),), targets, biases=(bias,)).signals
        assert s.dtype == dtype
        assert float((s.float() - wide).norm() / wide.norm()) < tolerance
    a, delta = found.attribute(some, targets, return_convergence_delta=True)
    assert a.dtype == delta.dtype == dtype
    assert torch.equal(a, inverse.explain((some,), targets).signals[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_processor_cannot_run_in_half_precision_is_refused(dtype):
    model = (
        nn.Sequential(nn.Conv3d(1, 2, 3), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(16, 2))
        .eval()
        .to(dtype)
    )
    x = normal(10, 1, 6, 6, 6).to(dtype)
    try:
        model(x)
    except RuntimeError:
        with pytest.raises(MIPINError, match=rf"(?s){dtype}.*not implemented"):
            fitted(model, x)
    else:
        assert torch.isfinite(fitted(model, x).source_signal(x[:2], 0)).all()


# ---------------------------------------------------------------------------------- integer inputs


class Text(nn.Module):
    """An embedding, something over the tokens, and a head."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(2)
        self.kind = kind
        self.embedding = (
            nn.EmbeddingBag(12, 5) if kind == "bag" else nn.Embedding(12, 5, padding_idx=0)
        )
        if kind in ("lstm", "gru"):
            self.middle = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](5, 4, batch_first=True)
        else:
            self.middle = nn.Conv1d(5, 4, 3) if kind == "convolution" else nn.Linear(5, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.embedding(tokens)
        if self.kind in ("lstm", "gru"):
            return self.last(self.middle(h)[0][:, -1])
        if self.kind == "bag":
            return self.last(self.middle(h).relu())
        if self.kind == "convolution":
            return self.last(self.middle(h.mT).relu().mean(2))
        if self.kind == "padded":
            mask = (tokens != 0).unsqueeze(2)
            return self.last((self.middle(h).relu() * mask).sum(1) / mask.sum(1).clamp(min=1))
        return self.last(self.middle(h).relu().mean(1))


class Behind(nn.Module):
    """What of a text classifier lies behind its embedding."""

    def __init__(self, text):
        super().__init__()
        self.text = copy.deepcopy(text)
        self.text.embedding = nn.Identity()

    def forward(self, embedded):
        return self.text(embedded)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.int64) for kind in ("mean", "convolution", "lstm", "gru", "bag")]
    + [("mean", torch.int32)],
)
def test_texts_are_explained_at_their_embedding_as_embedded_values_are(
    kind, dtype, tmp_path, untouched
):
    model, tokens = Text(kind).eval(), ids(60, 3).to(dtype)
    with untouched(model, tokens):
        inverse = fitted(model, tokens, layer=model.embedding)
    inverse.save(tmp_path / "file")
    with torch.no_grad():
        embedded = model.embedding(tokens)
    behind = Behind(model).eval()
    given = fitted(behind, embedded)
    for inv in (
        (inverse, InverseNetwork.load(tmp_path / "file", model)) if kind == "mean" else (inverse,)
    ):
        layer = LayerMIPINAttribution(model, inv)
        with untouched(model, tokens):
            a, s = layer.attribute(tokens[:4], [0, 1, 2, 0]), layer.source_signal(tokens[:4], 2)
        assert a.shape == s.shape == embedded[:4].shape
        assert a.dtype == torch.float32
        for bias, target, found in ((False, [0, 1, 2, 0], a), (True, 2, s)):
            expected = given.explain((embedded[:4],), target, biases=(bias,), mask=True).signals[0][
                0
            ]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert inv.class_attribution(1).shape == (1, *embedded.shape[1:])
    if kind == "mean":
        assert check(model, tokens, layer=model.embedding).ok
        assert LayerMIPINAttribution(model, inverse, model.middle).attribute(
            tokens[:2], 0
        ).shape == (2, 3, 4)


def test_a_padded_text_sends_nothing_to_its_padding():
    model, tokens = Text("padded").eval(), ids(60, 5)
    inverse = fitted(model, tokens, layer=model.middle)
    a = LayerMIPINAttribution(model, inverse).attribute(tokens, 0)
    assert (a[tokens == 0] == 0).all()
    assert (a[tokens != 0] != 0).any()


def test_texts_of_another_length():
    model = Text("mean").eval()
    inverse = fitted(model, ids(60, 5), layer=model.embedding)
    assert LayerMIPINAttribution(model, inverse).attribute(ids(3, 8), 0).shape == (3, 8, 5)


def test_integers_are_refused_where_they_would_be_explained():
    model, tokens = Text("mean").eval(), ids(60, 5)
    message = r"input 0 has dtype torch\.int64, expected a floating dtype.*"
    message += r"layer= of InverseNetwork"
    with pytest.raises(errors.FitError, match=message):
        fitted(model, tokens)
    with pytest.raises(errors.FitError, match=r"batch 0: " + message):
        fitted(model, list(tokens.split(20)))
    with pytest.raises(errors.InputError, match=message):
        check(model, tokens)
    inverse = fitted(model, tokens, layer=model.embedding)
    for call in (
        inverse.source_signal,
        inverse.distractor,
        MIPINAttribution(model, inverse).attribute,
    ):
        with pytest.raises(
            errors.NotFittedError, match=r"stops at layer 'embedding'.*use LayerMIPINAttribution"
        ):
            call(tokens[:2], 0)
    with pytest.raises(errors.InputError, match="complex"):
        LayerMIPINAttribution(model, inverse).attribute(tokens[:2] + 0j, 0)


class Mixed(nn.Module):
    """Token ids and numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.numbers = nn.Embedding(12, 5), nn.Linear(4, 5)
        self.both, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, tokens, numbers):
        return self.last(self.both(self.embedding(tokens).mean(1) + self.numbers(numbers)).relu())


def test_integers_beside_numbers():
    model, data = Mixed().eval(), (ids(60, 5), normal(60, 4))
    some = tuple(t[:3] for t in data)
    for layer, shape in (
        (model.embedding, (3, 5, 5)),
        (model.numbers, (3, 5)),
        (model.both, (3, 6)),
    ):
        inverse = fitted(model, data, layer=layer)
        assert LayerMIPINAttribution(model, inverse).attribute(some, [0, 1, 2]).shape == shape
    with pytest.raises(
        errors.FitError, match=r"input 0 has dtype torch\.int64, expected a floating dtype"
    ):
        fitted(model, data)
    swapped = Function(lambda m, numbers, tokens: m["model"](tokens, numbers), model=model)
    with pytest.raises(
        errors.FitError, match=r"input 1 has dtype torch\.int64, expected a floating dtype"
    ):
        fitted(swapped, data[::-1])
    as_argument = InverseNetwork(
        Function(lambda m, numbers, tokens: m["model"](tokens, numbers), model=model).eval()
    )
    as_argument.fit(
        [data[::-1]], unpack=lambda batch: batch, progress=False
    )  # a further argument may be anything
    assert as_argument.source_signal(some[1], 0, some[0]).shape == (3, 4)


class Attended(nn.Module):
    """The mean of h over all places, weighted by a softmax."""

    def __init__(self):
        super().__init__()
        self.embed, self.weigh, self.head = nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x):
        h = self.embed(x).relu()
        return self.head((h * torch.softmax(self.weigh(h), 1)).sum(1))


CHANGING = {
    "weights of a softmax": (Attended(), (5, 3), (9, 3)),
    "a window that is the whole of one size": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 3)
        ),
        (2, 6, 6),
        (2, 7, 7),
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_would_go_another_way_at_another_size_is_refused_there(name):
    model, size, other = CHANGING[name]
    torch.manual_seed(0)
    inverse = fitted(model, torch.randn(60, *size))
    assert inverse.source_signal(torch.randn(3, *size), 0).isfinite().all()
    with pytest.raises(errors.CaptureError, match="operations differ from those for the inputs"):
        inverse.source_signal(torch.randn(3, *other), 0)


class Shuffled(nn.Module):
    """A channel shuffle whose groups are an attribute, before a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=4)
        self.head = nn.Linear(8, 3)
        self.groups = 2

    def forward(self, x):
        h = self.first(x).relu()
        b, c, height, width = h.shape
        h = (
            h.view(b, self.groups, c // self.groups, height, width)
            .transpose(1, 2)
            .reshape(b, c, height, width)
        )
        return self.head(self.second(h).mean((2, 3)))


def test_a_change_of_views_alone_is_a_change_of_the_model(tmp_path):
    torch.manual_seed(0)
    model, x = Shuffled(), torch.randn(40, 3, 6, 6)
    inverse = fitted(model, x)
    inverse.save(tmp_path / "file")
    model.groups = 4
    for changed in (inverse, InverseNetwork.load(tmp_path / "file", model)):
        for some in (x[:2], torch.randn(2, 3, 8, 8)):
            with pytest.raises(errors.ModelChangedError):
                changed.source_signal(some, 0)
