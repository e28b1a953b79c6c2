"""A small network of every family of torchvision, from the check to the file."""

import pytest
import torch
from designs import aside
from torch import nn
from torchvision import models
from torchvision.models.googlenet import Inception
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, check
from captum_mipin.inverse.explain import Request


def headed(channels, *blocks):
    """Blocks between a stem and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4),
    )


def narrow(make):
    """A network of torchvision with a sixteenth of its channels."""

    def fewer(count):
        return count if count in (3, 4) else max(count // 16, 1)  # colours and classes stay

    with torch.device("meta"):
        model = make(num_classes=4)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            geometry = module.kernel_size, module.stride, module.padding
            module = nn.Conv2d(fewer(module.in_channels), fewer(module.out_channels), *geometry)
        elif isinstance(module, nn.BatchNorm2d):
            module = nn.BatchNorm2d(fewer(module.num_features))
        elif isinstance(module, nn.Linear):
            module = nn.Linear(fewer(module.in_features), fewer(module.out_features))
        model.set_submodule(path, module) if path else None
    return model


def inception(channels, *blocks):
    """Blocks of Inception v3 with a sixteenth of their channels."""

    def fewer(channels, out, **options):
        return BasicConv2d(channels // 16, out // 16, **options)

    stem = [nn.Conv2d(3, channels // 16, 3, 2), nn.ReLU()]
    return nn.Sequential(
        *stem,
        *(block(*arguments, conv_block=fewer) for block, *arguments in blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(2048 // 16, 4),
    )


class Sequence(nn.Module):
    """A recurrent classifier."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embed, self.layer = (
            nn.Sequential(nn.Linear(3, 5), nn.ReLU()),
            kind(5, 4, batch_first=True, **options),
        )
        self.last = nn.Linear(8 if options.get("bidirectional") else 4, 4)

    def forward(self, x):
        return self.last(self.layer(self.embed(x.transpose(1, 2)))[0][:, -1])


def conv1d():
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, 2),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(6, 8, 3, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def swin(**options):
    return models.SwinTransformer([4, 4], 8, [2, 1], [2, 2], [2, 2], num_classes=4, **options)


#: Family → a small network of it, a module to explain it at, and the size of its inputs where it is
#: not 32 × 32.
NETWORKS = {
    "AlexNet": (lambda: narrow(models.alexnet), "features.5", (64, 64)),
    "VGG": (lambda: narrow(models.vgg11), "features"),
    "VGG with batch norm": (lambda: narrow(models.vgg11_bn), "features"),
    "ResNet": (
        lambda: headed(
            8, models.resnet.BasicBlock(8, 8), nn.MaxPool2d(3, 2, 1), models.resnet.BasicBlock(8, 8)
        ),
        "1",
    ),
    "ResNeXt": (lambda: headed(8, models.resnet.Bottleneck(8, 2, groups=2, base_width=128)), "1"),
    "Wide ResNet": (
        lambda: headed(8, nn.ReLU(), models.resnet.Bottleneck(8, 2, base_width=128)),
        "1",
    ),
    "DenseNet": (lambda: models.DenseNet(8, (2, 2), 8, num_classes=4), "features.pool0"),
    "SqueezeNet": (
        lambda: headed(12, models.squeezenet.Fire(8, 4, 6, 6), nn.MaxPool2d(3, 2, ceil_mode=True)),
        "1",
    ),
    "GoogLeNet": (lambda: headed(88, Inception(8, 24, 4, 24, 4, 24, 16)), "1"),
    "Inception v3": (
        lambda: inception(
            192,
            (InceptionA, 192, 32),
            (InceptionB, 256),
            (InceptionC, 736, 128),
            (InceptionD, 768),
            (InceptionE, 1280),
        ),
        "1",
    ),
    "MobileNet v2": (
        lambda: headed(
            8, *(models.mobilenetv2.InvertedResidual(8, 8, stride, 6) for stride in (1, 2))
        ),
        "2",
    ),
    "MobileNet v3": (
        lambda: models.MobileNetV3(
            [
                models.mobilenetv3.InvertedResidualConfig(16, 3, 16, 8, True, "RE", 2, 1, 1),
                models.mobilenetv3.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1),
            ],
            32,
            num_classes=4,
        ),
        "features.2",
    ),
    "MNASNet": (lambda: headed(8, *models.mnasnet._stack(8, 8, 3, 2, 3, 2, 0.1)), "2"),
    "EfficientNet": (
        lambda: models.EfficientNet(
            [models.efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2, 1, 1)], dropout=0.1, num_classes=4
        ),
        "features.1",
    ),
    "EfficientNet v2": (
        lambda: models.EfficientNet(
            [
                models.efficientnet.FusedMBConvConfig(2, 3, 2, 8, 8, 2),
                models.efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
                models.efficientnet.MBConvConfig(4, 3, 1, 8, 8, 1),
            ],
            dropout=0.1,
            last_channel=16,
            num_classes=4,
        ),
        "features.2",
    ),
    "ShuffleNet": (
        lambda: models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 64], num_classes=4),
        "stage2",
    ),
    "RegNet": (
        lambda: models.RegNet(
            models.regnet.BlockParams([1, 1], [8, 16], [8, 8], [2, 2], [1, 1], se_ratio=0.25),
            num_classes=4,
        ),
        "trunk_output.block1",
    ),
    "ConvNeXt": (
        lambda: models.ConvNeXt(
            [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)],
            num_classes=4,
            layer_scale=0.1,
        ),
        "features.0",
    ),
    "ViT": (
        lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4),
        "encoder.layers.encoder_layer_0",
    ),
    "Swin": (swin, "features.1"),
    "Swin v2": (
        lambda: swin(
            block=models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=models.swin_transformer.PatchMergingV2,
        ),
        "features.1",
    ),
    "MaxViT": (lambda: models.MaxVit((32, 32), 8, 4, [8], [1], 4, 0.1, num_classes=4), "stem"),
    "convolutions in one dimension": (conv1d, "5", (32,)),
    "LSTM": (lambda: Sequence(nn.LSTM), "embed", (4,)),
    "GRU, both ways": (lambda: Sequence(nn.GRU, bidirectional=True), "embed", (4,)),
}


@pytest.mark.parametrize(
    "name",
    aside(
        NETWORKS,
        "VGG",
        "VGG with batch norm",
        "ResNeXt",
        "Wide ResNet",
        "Inception v3",
        "MNASNet",
        "EfficientNet v2",
        "Swin v2",
        "LSTM",
        "GRU, both ways",
    ),
)
def test_networks_of_every_family(name, tmp_path):
    """Nothing is refused, A is proportional to the logit and S − A is not, examples stay apart.

    The file gives the same bits.
    """
    torch.manual_seed(0)
    make, path, size = (*NETWORKS[name], (32, 32))[:3]
    model, x, mixed = make().double(), torch.rand(16, 3, *size, dtype=torch.float64), [0, 3, 3, 0]
    with torch.no_grad():
        # heads and embeddings that begin with zeros are no test
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
        model.train()(x)  # batch statistics other than 0 and 1
    assert check(model.eval(), x).ok
    inverse = InverseNetwork(model).fit(x, targets=[0, 3], progress=False)
    mipin, few = MIPINAttribution(model, inverse), x[:4]
    a, s = mipin.attribute(few, mixed), mipin.source_signal(few, mixed)
    with torch.no_grad():
        logit = model(few)[range(4), mixed].view(-1, *(1,) * (x.ndim - 1))
    # the same pass for one unit of the logit
    request = Request(inputs=(few,), target=mixed, biases=(False, True), unit=True)
    unit = inverse._back(inverse._state, request)
    ((a_unit,), (s_unit,)) = unit.signals
    assert torch.isfinite(s).all()
    assert a.flatten(1).any(1).all()
    assert (s - a).flatten(1).any(1).all()
    close = {"rtol": 1e-9, "atol": 1e-9 * float(s.abs().max())}
    torch.testing.assert_close(a, a_unit * logit, **close)
    torch.testing.assert_close(s - a, s_unit - a_unit, **close)
    for i, target in enumerate(mixed):
        torch.testing.assert_close(mipin.source_signal(few[i : i + 1], target)[0], s[i], **close)
    maps = [inverse.class_attribution(target) for target in (0, 3)]
    assert all(m.shape == (1, *x.shape[1:]) and torch.isfinite(m).all() and m.any() for m in maps)
    layer = model.get_submodule(path)
    at = LayerMIPINAttribution(model, inverse, layer)
    features, result = [], at.attribute(few, mixed)
    handle = layer.register_forward_hook(lambda module, inputs, output: features.append(output))
    model(few)
    handle.remove()
    assert result.shape == features[0].shape
    assert result.flatten(1).any(1).all()
    assert not result[features[0] == 0].any(), "equation 9"
    (gradient,) = torch.autograd.grad(
        model(leaf := few.clone().requires_grad_())[range(4), mixed].sum(), leaf
    )
    torch.testing.assert_close(
        mipin.attribute(few, mixed, multiply_by_gradients=True), a * gradient
    )
    inverse.save(tmp_path / "file")
    loaded = InverseNetwork.load(tmp_path / "file", model)
    assert torch.equal(loaded.source_signal(few, mixed), s)
    assert torch.equal(LayerMIPINAttribution(model, loaded, layer).attribute(few, mixed), result)
