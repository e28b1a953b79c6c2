"""Small networks and data that several test modules build."""

import torch
from torch import nn


class Function(nn.Module):
    """A network given as a function of its modules and its inputs."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        self.layers = nn.ModuleDict(layers)

    def forward(self, *inputs):
        return self.run(self.layers, *inputs)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
