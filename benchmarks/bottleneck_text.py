"""Information bottlenecks on texts.

    python benchmarks/bottleneck_text.py [--passages N]

An LSTM tells two libraries apart by passages of their documentation. Deletion: mean probability of
the target while the highest-scored words become the unknown one; insertion: the same while they
come back. See ``benchmarks/bottleneck.py`` for both.
"""

import ast
import importlib.util
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bottleneck import curves
from captum.attr import LayerGradientXActivation
from common import parser_of, show, write
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import IBA, InputIBA, InverseNetwork, LayerMIPINAttribution
from captum_mipin.bottleneck.iba import IBA_SETTINGS

PACKAGES = ("torch", "sklearn")
#: Words that give a library away.
NAMES = {"torch", "pytorch", "sklearn", "scikit", "learn", "tensor", "tensors", "scipy", "numpy"}
#: What words outside the vocabulary are, and what deleted ones become.
UNKNOWN = 0


class Reader(nn.Module):
    """An LSTM that reads sixteen words."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.lstm, self.last = (
            nn.Embedding(words, 32),
            nn.LSTM(32, 64, batch_first=True),
            nn.Linear(64, 2),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.last(self.lstm(self.words(tokens))[0][:, -1])
        return logits


def passages(package: str, length: int = 16) -> tuple[list[list[str]], list[list[str]]]:
    """Return passages of ``length`` words from the docstrings of an installed package.

    Those of four files in five are for training, those of the other files for tests.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    parts: tuple[list[list[str]], list[list[str]]] = [], []
    for file in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in file.parts or "testing" in file.parts:
            continue
        tree = ast.parse(file.read_text(errors="ignore"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [
            ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)
        ]
        words = re.findall(r"[a-z]{2,}", " ".join(texts).lower())
        words = [word for word in words if word not in NAMES]
        held_out = zlib.crc32(file.name.encode()) % 5 == 0
        parts[held_out].extend(
            words[i : i + length] for i in range(0, len(words) - length + 1, length)
        )
    return parts


@dataclass(frozen=True)
class Texts:
    """Passages and the packages that they are from.

    Attributes:
        tokens: Passages (N, words), numbers of words in the vocabulary.
        labels: Numbers of packages (N,).
        words: The words of each passage.
    """

    tokens: Tensor
    labels: Tensor
    words: list[list[str]]


def texts(drawn: torch.Generator) -> tuple[Texts, Texts, int]:
    """Return passages for training, passages for tests, and the size of the vocabulary."""
    found = [passages(package) for package in PACKAGES]
    size = [min(len(part[i]) for part in found) for i in (0, 1)]
    counts = Counter(word for part in found for passage in part[0] for word in passage)
    vocabulary = {word: i + 1 for i, (word, _) in enumerate(counts.most_common(4000))}

    def encoded(split: int) -> Texts:
        chosen = [
            (part[split][i], label) for label, part in enumerate(found)
            for i in torch.randperm(len(part[split]), generator=drawn)[: size[split]].tolist()
        ]  # fmt: skip
        chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=drawn).tolist()]
        tokens = [[vocabulary.get(word, UNKNOWN) for word in passage] for passage, _ in chosen]
        labels = torch.tensor([label for _, label in chosen])
        return Texts(torch.tensor(tokens), labels, [passage for passage, _ in chosen])

    return encoded(0), encoded(1), len(vocabulary) + 1


def train(words: int, texts: Texts, drawn: torch.Generator) -> Reader:
    """Train a reader: Adam, two epochs, a tenth of the words unknown, to learn that word."""
    torch.manual_seed(0)
    model = Reader(words)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(2):
        for index in torch.randperm(len(texts.tokens), generator=drawn).split(64):
            optimiser.zero_grad()
            known = texts.tokens[index]
            known = known.where(torch.rand(known.shape, generator=drawn) > 0.1, UNKNOWN)
            loss: Any = F.cross_entropy(model(known), texts.labels[index])
            loss.backward()
            optimiser.step()
    optimiser.zero_grad()
    return model.eval()


def methods(model: Reader, known: Tensor, x: Tensor, t: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return name → one value a word of ``x``; fits and estimates take the passages ``known``."""
    options: Any = {"channels": -1, "input_channels": -1, "across": (1,)}
    both = InputIBA(model, model.lstm, "text", input_layer=model.words, **options)
    both.estimate(known, progress=False)
    how = replace(IBA_SETTINGS["published"], sigma=0)
    alone = IBA(model, model.words, how, **options).estimate(known, progress=False)
    inverse = InverseNetwork(model, layer=model.words).fit(known, progress=False)
    mipin: Any = LayerMIPINAttribution(model, inverse)
    gradients: Any = LayerGradientXActivation(model, model.words)
    random = torch.Generator().manual_seed(1)
    stages: list[Tensor] = []

    def informed() -> Tensor:
        found = both.explain((x,), t).input
        stages.append(found.information.sum(2))
        return found.alpha.sigmoid().mean(2)

    def ours(**options: bool) -> Tensor:
        found: Tensor = mipin.attribute(x, target=t, **options).sum(2)
        return found

    return {
        "random": lambda: torch.rand(x.shape, generator=random),
        "Gradient × embedding": lambda: gradients.attribute(x, t).sum(2).detach(),
        "MIP-IN, × feature": lambda: ours(multiply_by_features=True),
        "MIP-IN, × gradient": lambda: ours(multiply_by_gradients=True),
        "IBA at the embedding": lambda: alone.attribute(x, t),
        "InputIBA, mask": informed,
        "InputIBA, information": lambda: stages[0],
    }


def run(count: int) -> None:
    """Measure all methods on ``count`` passages that the network recognises."""
    drawn = torch.Generator().manual_seed(0)
    known, held_out, words = texts(drawn)
    model = train(words, known, drawn)
    with torch.no_grad():
        right = model(held_out.tokens).argmax(1) == held_out.labels
    accuracy = float(right.double().mean())
    train_count, test_count = len(known.tokens), len(held_out.tokens)
    print(f"{train_count} passages to train on, {test_count} to test on, accuracy {accuracy:.3f}")
    chosen = right.nonzero().flatten()[:count]
    x, t = held_out.tokens[chosen], held_out.labels[chosen]
    rows, maps = [], dict[str, Tensor]()
    for name, method in methods(model, known.tokens[:1000], x, t).items():
        start = time.perf_counter()
        maps[name] = method()
        taken = time.perf_counter() - start
        areas = curves(model, x, maps[name], t, seed=2, baseline=UNKNOWN)
        deleted, inserted = (float(area.mean()) for area in areas)
        row = {"method": name, "deletion": deleted, "insertion": inserted}
        rows.append(row | {"s a passage": taken / len(x)})
        print(show(rows[-1:]).splitlines()[-1], flush=True)
    write(
        "bottleneck-text", rows,
        data="passages of 16 words from the docstrings of torch and of scikit-learn, by files",
        train=train_count, test=test_count, accuracy=accuracy, passages=len(x),
        target="the label, which is predicted", network="LSTM, 32 dimensions, 64 units",
        layer="lstm, words", reduction="sum or mean over dimensions", ties="at random",
        deleted="words become the unknown one",
    )  # fmt: skip
    for i in range(min(4, count)):
        for name in ("InputIBA, mask", "MIP-IN, × feature"):
            passage = held_out.words[int(chosen[i])]
            best = [passage[k] for k in maps[name][i].argsort(descending=True)[:5]]
            print(PACKAGES[int(t[i])], name, "·", " ".join(passage), "·", best)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--passages", type=int, default=50, help="passages to explain")
    run(parser.parse_args().passages)


if __name__ == "__main__":
    main()
