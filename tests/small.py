"""Small networks and data that several test modules build."""

import torch
from torch import nn
from torchvision.models.resnet import ResNet


class Function(nn.Module):
    """A network given as a function of its modules and its inputs."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        self.layers = nn.ModuleDict(layers)

    def forward(self, *inputs):
        return self.run(self.layers, *inputs)


def left_half():
    """A network of images (3, 8, 8) that reads their left half alone."""
    torch.manual_seed(0)
    return Function(
        lambda m, x: m["last"](m["first"](x)[..., :4].flatten(1)),
        first=nn.Conv2d(3, 4, 1),
        last=nn.Linear(128, 3),
    ).eval()


class Weighted(nn.Module):
    """A network of inputs times a further argument, which may be a tensor in a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, scale):
        scale = scale["scale"] if isinstance(scale, dict) else scale
        return self.last(self.first(x * scale).relu())


class Wants(nn.Module):
    """A network of two inputs that takes a per-example tensor, a shared tensor and a number."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(3, 5)
        self.relu = nn.ReLU()
        self.last = nn.Linear(5, 2)

    def forward(self, a, b, scale=None, shared=None, k=1.0):
        h = self.relu(self.first(a) + self.second(b))
        if scale is not None:
            h = h * scale
        if shared is not None:
            h = h * shared
        return self.last(h * k)


class Scaled(nn.Module):
    """A network of one input and one further argument."""

    def __init__(self, features=4):
        super().__init__()
        self.first, self.last = nn.Linear(features, 5), nn.Linear(5, 2)

    def forward(self, x, scale=1.0):
        return self.last(torch.relu(self.first(x * scale)))


def text_classifier():
    """Return a network for tokens below 20: an embedding, an LSTM, two classes."""
    torch.manual_seed(0)
    return Function(
        lambda m, x: m["last"](m["lstm"](m["words"](x))[0][:, -1]),
        words=nn.Embedding(20, 6),
        lstm=nn.LSTM(6, 7, batch_first=True),
        last=nn.Linear(7, 2),
    ).eval()


def normal(*shape, seed=0, dtype=torch.float32):
    """Return values of a normal distribution, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class SmallResNet(ResNet):
    """Torchvision's ResNet with two stages of one block each.

    It keeps the original width, so that each neuron has positive contributions.
    """

    def __init__(self, block):
        super().__init__(block, [1, 1, 0, 0], num_classes=3)
        self.fc = nn.Linear(self.inplanes, 3)

    def _make_layer(self, block, planes, blocks, *others, **named):
        return (
            super()._make_layer(block, planes, blocks, *others, **named)
            if blocks
            else nn.Identity()
        )


def varied(model, *shape, zero_biases=False, eps=None):
    """Return ``model`` in float64 with batch norms that do something.

    They get random parameters and the statistics of noise of this shape.

    Args:
        model: The network.
        shape: The shape of an input, without the batch.
        zero_biases: Whether every bias is 0, and so the shifts and running means of batch norms.
        eps: The ε of batch norms; None to keep theirs.
    """
    torch.manual_seed(5)
    model = model.double().train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        nn.init.uniform_(m.weight, 0.5, 1.5)
        nn.init.normal_(m.bias, 0, 0.3)
        m.momentum = None
    with torch.no_grad():
        model(normal(16, *shape, seed=6, dtype=torch.float64))
        for name, p in model.named_parameters():
            if name.endswith("bias") and (zero_biases or (p.ndim == 1 and not p.any())):
                p.zero_() if zero_biases else p.normal_(0, 0.1)
        for m in norms:
            m.eps = m.eps if eps is None else eps
            if zero_biases:
                m.running_mean.zero_()
    return model.eval()


def attributed_in_every_way(method, x, target=1):
    """Return the attribution of x, and check that every way to ask for it gives the same bits."""
    one = method.attribute(x, target)
    assert torch.equal(one, method.attribute(x, target=target)), "the same bits when called twice"
    (in_tuple,) = method.attribute((x,), target)
    assert torch.equal(in_tuple, one)
    with torch.no_grad():
        assert torch.equal(method.attribute(x, target), one)
    with torch.inference_mode():
        assert torch.equal(method.attribute(x.clone(), target), one)
    leaf = x.clone().requires_grad_()
    assert torch.equal(method.attribute(leaf, target), one)
    assert leaf.grad is None
    return one
