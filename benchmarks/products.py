"""How much of the signal each factor of a product gets, where neither is a gate.

    python benchmarks/products.py --data FOLDER [--seeds N]

Trains small networks on MNIST whose blocks multiply two branches, y = f(W1 h) ⊙ (W2 h): with f the
identity (bilinear), ReLU6 (as in StarNet) and GELU (as in gated MLPs). Then fits MIP-IN with the
signal S of the product sent

- both: S ⊙ b to a and S ⊙ a to b;
- halves: half of that;
- value: S ⊙ f(a) to W2 h only, as if f(a) were a gate;
- activated: S ⊙ b to f(a) only.

Measured on test images: APC (equation 10) of the label's class, the error of S against the image,
and mosaics of 2 x 2 digits (the share of positive attribution in the right cell; chance is 0.25).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import parser_of, show, write
from data import load
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, MIPINAttribution, register_rule
from captum_mipin.metrics import completeness, grid_pointing_game, mosaics
from captum_mipin.rules import Options, Recorded, unregister_rule

#: Name → weights of the signals that go to the factors a and b of y = a ⊙ b.
CHOICES = {"both": (1.0, 1.0), "halves": (0.5, 0.5), "value": (0.0, 1.0), "activated": (1.0, 0.0)}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "ReLU6": F.relu6,
    "GELU": F.gelu,
}


@torch.library.custom_op("benchmark::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a ⊙ b."""
    return a * b


product.register_fake(lambda a, b: torch.empty_like(a))
product.register_autograd(
    lambda context, s: (s * context.saved_tensors[1], s * context.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def split(weights: tuple[float, float], options: Options, operation: Any, x: Any) -> Any:
    """Run a ⊙ b and send back the weighted signals."""
    a, b = x
    return operation(x), lambda s: (weights[0] * s * b, weights[1] * s * a)


class Block(nn.Module):
    """A residual block with a product, as in StarNet without its second depthwise convolution."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.first, self.second = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, 2 * width, 1)
        self.last = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the projected product of two branches."""
        h = self.spread(x)
        y: Tensor = self.last(product(ACTIVATIONS[self.activation](self.first(h)), self.second(h)))
        return x + y


def network(activation: str, width: int = 16) -> nn.Module:
    """Return an untrained network for images (N, 1, 28, 28)."""

    def stem(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, 2, 1)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), Block(outputs, activation)]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)]
    return nn.Sequential(*stem(1, width), *stem(width, 2 * width), *head)


def train(activation: str, images: Any, seed: int, epochs: int) -> nn.Module:
    """Return a network trained on ``images``."""
    torch.manual_seed(seed)
    model = network(activation)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    steps = epochs * (len(images.train) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images.train)).split(128)[: len(images.train) // 128]:
            loss = F.cross_entropy(model(images.train[index]), images.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(model: nn.Module, images: Any, examples: int) -> dict[str, float]:
    """Return the figures of one network under the registered rule."""
    inverse = InverseNetwork(model).fit(images.train[:examples], progress=False)
    x, labels = images.test[:500], images.test_labels[:500]
    s = inverse.source_signal(x, labels)
    method = MIPINAttribution(model, inverse)
    apc = completeness(method, x, labels)
    found = mosaics(
        model, images.test[500:3000], images.test_labels[500:3000], count=150, confidence=0.9
    )
    cells = grid_pointing_game(method, found)
    error = float((s - x).square().sum() / (x - images.train.mean(0)).square().sum())
    return {
        "APC %": round(100 * float(apc.mean), 2),
        "error of S": round(error, 4),
        "mosaics": round(float(cells.mean), 4),
    }


def main() -> None:
    """Write ``results/products.json`` and print its table."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", default=None)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--train", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--fit", type=int, default=1000)
    options = parser.parse_args()
    images = load("mnist", options.data)
    rows = []
    some = replace(
        images,
        train=images.train[: options.train],
        train_labels=images.train_labels[: options.train],
    )
    for activation in ACTIVATIONS:
        for seed in range(options.seeds):
            model = train(activation, some, seed, options.epochs)
            with torch.no_grad():
                right = model(some.test[:2000]).argmax(1) == some.test_labels[:2000]
            for choice, weights in CHOICES.items():
                rule = Recorded(
                    run=partial(split, weights),
                    note=choice,
                    several=True,
                    carriers=lambda node: (0, 1),
                    restores=False,
                )
                register_rule("benchmark::product", rule)
                row = {
                    "f": activation,
                    "seed": seed,
                    "accuracy %": round(100 * float(right.float().mean()), 1),
                    "signal": choice,
                    **measure(model, some, options.fit),
                }
                unregister_rule("benchmark::product")
                rows.append(row)
                print(row, flush=True)
    write("products", rows, train=options.train, epochs=options.epochs, fit=options.fit)
    print(show(rows))


if __name__ == "__main__":
    main()
