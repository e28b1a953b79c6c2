"""Networks that use autocast in their forward are explained as the same networks without it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_mipin.methods import (
    LRP,
    DeepTaylor,
    ExcitationBackprop,
    GuidedBackprop,
    PatternAttribution,
    PatternNet,
    Patterns,
)

X = torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Runs its body in bfloat16 if ``mixed``."""

    def __init__(self, kind: str, mixed: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mixed = mixed
        dense = nn.Flatten(), nn.Linear(72, 48), nn.BatchNorm1d(48), nn.ReLU()
        self.body = {
            "folded": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
            "first": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU()),
            "last": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)),
            "dense": lambda: nn.Sequential(*dense),
            "transposed": lambda: nn.Sequential(
                nn.MaxPool2d(3), nn.ConvTranspose2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
            ),
        }[kind]()
        self.head = nn.Linear(48, 3)
        for module in self.body:
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, 0, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed):
            h = self.body(x)
        h = h.float().flatten(1)
        y: Tensor = self.head(h[:, :48] if h.shape[1] > 48 else h)
        return y


def _patterns(method: Any) -> Any:
    return lambda model: method(model, Patterns(model, estimator="linear").fit(X, progress=False))


METHODS = {
    "LRP": LRP,
    "Deep Taylor": DeepTaylor,
    "excitation": ExcitationBackprop,
    "guided": GuidedBackprop,
    "PatternNet": _patterns(PatternNet),
    "PatternAttribution": _patterns(PatternAttribution),
}


@pytest.mark.parametrize("kind", ["folded", "first", "last", "dense", "transposed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_norm_under_autocast(kind: str, method: str) -> None:
    maps = [
        METHODS[method](Net(kind, mixed).eval()).attribute(X[:8], target=1)
        for mixed in (True, False)
    ]
    assert [a.dtype for a in maps] == [torch.float32] * 2
    assert bool(maps[1].any())
    # bfloat16 has 8 bits: each operation has a relative error of up to 1/256. In a few examples a
    # ReLU is off in one of the two networks alone, so the median is compared.
    difference = (maps[0] - maps[1]).flatten(1).norm(dim=1) / maps[1].flatten(1).norm(dim=1)
    assert difference.median() < 0.02
