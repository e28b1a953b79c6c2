"""The networks of the paper's tables 3 to 5, two small transformers, and how they are trained here.

The paper gives the layers and says that dropout was used. Optimiser, learning rate, epochs,
augmentation and the place of the dropout are our choice, see :func:`train`. The transformers'
weights come with the repository (``weights/``, float16), since their training takes an hour:

    python benchmarks/networks.py vit-cifar10 cct-cifar10 --data FOLDER --keep
"""

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compact_transformers import Transformer, cct, dropped, vit
from data import Images, load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

logger = logging.getLogger("networks")


class Network(nn.Module):
    """Convolutions, then dense layers.

    The flattening between them is a function, since Captum's LRP does not know ``nn.Flatten``.
    """

    def __init__(self, features: nn.Sequential | None, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        if self.features is not None:
            x = self.features(x)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def mlp(inputs: int = 784, width: int = 512, classes: int = 10, dropout: float = 0.2) -> Network:
    """Build table 3: 784-512-512-10, ReLU, with dropout for training."""
    classifier = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, classes),
    )  # fmt: skip
    return Network(None, classifier)


def cnn_mnist() -> Network:
    """Build table 4: conv 16 (5x5), conv 64 (3x3), max pool 2, dense 7744-512-10."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(),
        nn.Conv2d(16, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
    )  # fmt: skip
    return Network(features, _head(7744, 512))


def cnn_cifar() -> Network:
    """Build table 5: conv 32, conv 64, pool, conv 64 (all 3x3), pool, dense 2304-512-10."""
    features = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
    )  # fmt: skip
    return Network(features, _head(2304, 512))


def cnn_digits() -> Network:
    """Build a small network of the same kind for the 8 x 8 digits of the demo."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
    )  # fmt: skip
    return Network(features, _head(288, 128))


def _head(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 10))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        build: Makes the network.
        data: Name of its data set.
        epochs: Passes over the data.
        decay: L2 weight decay.
        augment: Whether images are mirrored and shifted.
        dropped: Share of a transformer's tokens that the first two thirds of the epochs leave out,
            each time others: half the time an epoch. None for other networks.
        teacher: Name of a network whose probabilities of each image make half of its label, the
            mean over the image and its mirror image. None for labels alone.
    """

    build: Callable[[], nn.Module]
    data: str
    epochs: int
    decay: float = 0.0
    augment: bool = False
    dropped: float | None = None
    teacher: str | None = None


RECIPES = {
    "cnn-digits": Recipe(cnn_digits, "digits", 60),
    "mlp-mnist": Recipe(mlp, "mnist", 8, decay=3e-4),
    "cnn-mnist": Recipe(cnn_mnist, "mnist", 4),
    "cnn-fashion-mnist": Recipe(cnn_mnist, "fashion-mnist", 6),
    "cnn-cifar10": Recipe(cnn_cifar, "cifar10", 16, decay=1e-3, augment=True),
    "vit-cifar10": Recipe(
        vit, "cifar10", 48, decay=0.05, augment=True, dropped=0.5, teacher="cct-cifar10"
    ),
    "cct-cifar10": Recipe(cct, "cifar10", 30, decay=0.05, augment=True, dropped=0.5),
}


def _batches(
    x: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for index in torch.randperm(len(x), generator=generator).split(size):
        yield x[index], labels[index]


def _softened(labels: Tensor, x: Tensor, teacher: nn.Module) -> Tensor:
    """Return (y + p) / 2, y one-hot labels and p the teacher's probabilities of ``x``."""
    with torch.no_grad():
        p = [teacher(torch.cat([a, a.flip(-1)])).softmax(1).chunk(2) for a in x.split(250)]
    probabilities = torch.cat([(plain + mirrored) / 2 for plain, mirrored in p])
    return (F.one_hot(labels, probabilities.shape[1]) + probabilities) / 2


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift all by up to two pixels, one shift a batch."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    row, column = torch.randint(0, 5, (2,), generator=generator).tolist()
    height, width = x.shape[-2:]
    return F.pad(x, (2, 2, 2, 2))[..., row : row + height, column : column + width]


def _tokens(model: Transformer, x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return a transformer's tokens of images, each moved by itself, without a share of them."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    rows, columns = torch.randint(0, 9, (2, len(x), 1), generator=generator) + torch.arange(32)
    example = torch.arange(len(x))[:, None, None]
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    x = padded[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    return dropped(model.tokens(x), share, generator)


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of the images ``x`` that ``model`` classifies rightly."""
    with torch.no_grad():
        hits = sum(
            int((model(a).argmax(1) == b).sum())
            for a, b in zip(x.split(500), labels.split(500), strict=True)
        )
    return hits / len(x)


def train(name: str, images: Images, seed: int = 0, epochs: int | None = None) -> nn.Module:
    """Train the network ``name``.

    Adam, one-cycle rate with maximum 1e-3 (2e-3 for CIFAR-10), batches of 128. Transformers:
    AdamW, and one shift of up to four pixels an image. The ViT learns from the compact
    transformer too: half of a label is what that one says (Touvron et al., "Training
    data-efficient image transformers & distillation through attention", 2021, with soft labels).
    """
    recipe, size = RECIPES[name], 128
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, epochs = recipe.build(), epochs or recipe.epochs
    labels = images.train_labels
    if recipe.teacher is not None:
        labels = _softened(labels, images.train, trained(recipe.teacher, images))
    steps = epochs * -(-len(images.train) // size)
    method = torch.optim.Adam if recipe.dropped is None else torch.optim.AdamW
    optimiser = method(model.parameters(), weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3 if recipe.augment else 1e-3, total_steps=steps
    )
    with tqdm(total=steps, desc=f"train {name}", unit="batch") as progress:
        for epoch in range(epochs):
            for x, y in _batches(images.train, labels, size, generator):
                if recipe.dropped is not None and isinstance(model, Transformer):
                    share = recipe.dropped if 3 * epoch < 2 * epochs else 0.0
                    logits = model.classify(_tokens(model, x, share, generator))
                else:
                    logits = model(_augment(x, generator) if recipe.augment else x)
                loss = F.cross_entropy(logits, y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                progress.update()
    return model.eval()


def trained(name: str, images: Images, seed: int = 0, cache: str | Path = ".cache/networks") -> Any:
    """Return the network ``name``: from ``weights/``, or trained and kept in ``cache``."""
    path = Path(__file__).parent / "weights" / f"{name}-{seed}.safetensors"
    path = path if path.exists() else Path(cache) / path.name
    if not path.exists():
        model = train(name, images, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), str(path))
    model = RECIPES[name].build().eval()
    model.load_state_dict(load_file(str(path)))
    logger.info("%s: test accuracy %.4f", name, accuracy(model, images.test, images.test_labels))
    return model


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Train the paper's small networks.")
    parser.add_argument("names", nargs="+", choices=RECIPES)
    parser.add_argument(
        "--data",
        help="folder with mnist.npz or the CIFAR-10 sheets; default: download with torchvision",
    )
    parser.add_argument("--keep", action="store_true", help="train anew, and write weights/")
    arguments = parser.parse_args()
    for network in arguments.names:
        data = load(RECIPES[network].data, arguments.data)
        if arguments.keep:
            state = train(network, data, 0).half().state_dict()
            save_file(state, str(Path(__file__).parent / "weights" / f"{network}-0.safetensors"))
        trained(network, data)
