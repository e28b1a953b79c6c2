"""Two small transformers for images of 32 x 32: a plain ViT, and one with a convolutional stem.

Pre-norm blocks with scaled dot-product attention and GELU. The compact one follows Hassani et al.,
"Escaping the Big Data Paradigm with Compact Transformers", 2021: convolutions with pooling in
place of patches, and a weighted mean over tokens in place of a class token.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, tokens, width), as ``x`` is."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, tokens, width), as ``x`` is."""
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class Transformer(nn.Module):
    """Tokens from a stem, positions, blocks, and a dense layer on a class token or on a mean.

    Args:
        stem: From images (N, 3, 32, 32) to features (N, width, 8, 8).
        depth: Number of blocks.
        width: Size of a token.
        heads: Heads of each attention.
        class_token: True for the logits of a class token, False for those of a weighted mean.
    """

    def __init__(
        self, stem: nn.Module, depth: int, *, width: int, heads: int, class_token: bool
    ) -> None:
        super().__init__()
        self.stem = stem
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.pool = None if class_token else nn.Linear(width, 1)
        self.head = nn.Linear(width, 10)

    def tokens(self, x: Tensor) -> Tensor:
        """Return the tokens (N, 64, width) of images, with their positions."""
        embedded: Tensor = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        return embedded

    def classify(self, tokens: Tensor) -> Tensor:
        """Return the logits (N, 10) of any number of tokens."""
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        y = self.norm(self.blocks(tokens))
        pooled = y[:, 0] if self.pool is None else (self.pool(y).softmax(1) * y).sum(1)
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, 10) of images (N, 3, 32, 32) in [0, 1]."""
        return self.classify(self.tokens(x))


def vit() -> Transformer:
    """Build a plain ViT: patches of 4 x 4, 6 blocks of width 96, 3 heads, a class token."""
    return Transformer(nn.Conv2d(3, 96, 4, 4), 6, width=96, heads=3, class_token=True)


def cct() -> Transformer:
    """Build a compact convolutional transformer: two convolutions with pools, then 4 blocks."""
    stem = nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(48, 96, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    )  # fmt: skip
    return Transformer(stem, 4, width=96, heads=3, class_token=False)


def dropped(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return the tokens without a random ``share`` of each example's."""
    count, width = round(tokens.shape[1] * (1 - share)), tokens.shape[2]
    kept = torch.rand(tokens.shape[:2], generator=generator).argsort(1)[:, :count]
    return tokens.gather(1, kept[:, :, None].expand(-1, -1, width))


def tiled(model: Transformer, n: int) -> Transformer:
    """Return a copy of ``model`` for mosaics of n x n images; each has the positions of one."""
    copy = deepcopy(model)
    grid = copy.positions.detach().unflatten(1, (8, 8))
    copy.positions = nn.Parameter(grid.repeat(1, n, n, 1).flatten(1, 2))
    return copy
