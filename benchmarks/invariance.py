"""One residual network written in many ways, and what each method makes of it.

    python benchmarks/invariance.py

All spellings compute the same function with the same weights, so that an explanation of the
function is the same for all. The figures are ‖A − A_reference‖ / ‖A_reference‖ in float64, or the
error that a method raises. The methods are those of Captum that look at modules, MIP-IN (fitted
anew on each spelling), and the gradient, which cannot differ.
"""

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.attr import LRP, Deconvolution, DeepLift, GuidedBackprop, Saliency
from common import parser_of, show, write
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, MIPINAttribution

Layer = Callable[[Tensor], Tensor]


def _flatten(x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


@dataclass(frozen=True)
class Spelling:
    """How the network is written.

    Attributes:
        inplace: Whether its ``nn.ReLU`` modules work in place.
        reused: Whether one ``nn.ReLU`` module is called everywhere.
        relu: A function called instead of the modules.
        add: How a block adds its input.
        pool: Global average pooling.
        flatten: The step after pooling.
        dropout: Whether there is a dropout before the last layer.
        shortcut_first: Whether a block computes its shortcut before its convolutions.
    """

    inplace: bool = False
    reused: bool = False
    relu: Layer | None = None
    add: Callable[[Tensor, Tensor], Tensor] = operator.add
    pool: Layer | None = None
    flatten: Layer = _flatten
    dropout: bool = False
    shortcut_first: bool = False


def _clamp(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _add_in_place(y: Tensor, x: Tensor) -> Tensor:
    return y.add_(x)


def _swapped(y: Tensor, x: Tensor) -> Tensor:
    return x + y


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _view(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape[0], -1)


def _reshape(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


REFERENCE = "nn.ReLU"
SPELLINGS: Mapping[str, Spelling] = {
    REFERENCE: Spelling(),
    "nn.ReLU(inplace=True)": Spelling(inplace=True),
    "one nn.ReLU reused": Spelling(reused=True),
    "F.relu": Spelling(relu=F.relu),
    "torch.relu": Spelling(relu=torch.relu),
    "F.relu_": Spelling(relu=torch.relu_),
    "clamp(min=0)": Spelling(relu=_clamp),
    "y += x": Spelling(add=operator.iadd),
    "torch.add(y, x)": Spelling(add=torch.add),
    "y.add_(x)": Spelling(add=_add_in_place),
    "x + y": Spelling(add=_swapped),
    "shortcut first": Spelling(shortcut_first=True),
    "mean((2, 3))": Spelling(pool=_mean),
    "F.adaptive_avg_pool2d": Spelling(pool=partial(F.adaptive_avg_pool2d, output_size=1)),
    "view": Spelling(flatten=_view),
    "reshape": Spelling(flatten=_reshape),
    "nn.Flatten": Spelling(flatten=nn.Flatten()),
    "nn.Dropout": Spelling(dropout=True),
    "functional throughout": Spelling(
        relu=torch.relu_,
        add=_swapped,
        pool=_mean,
        flatten=_reshape,
        dropout=True,
        shortcut_first=True,
    ),
}


class Block(nn.Module):
    """Two convolutions beside the identity, or a 1 × 1 convolution where the size changes."""

    def __init__(
        self, channels: int, wider: int, spelling: Spelling, relu: Callable[[], Layer]
    ) -> None:
        super().__init__()
        stride = wider // channels
        self.conv1, self.bn1 = (
            nn.Conv2d(channels, wider, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wider),
        )
        self.conv2, self.bn2 = nn.Conv2d(wider, wider, 3, 1, 1, bias=False), nn.BatchNorm2d(wider)
        shortcut = nn.Conv2d(channels, wider, 1, stride, bias=False), nn.BatchNorm2d(wider)
        self.down = nn.Sequential(*shortcut) if stride > 1 else None
        self.relu1, self.relu2, self.spelling = relu(), relu(), spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling.shortcut_first:
            x, y = self._shortcut(x), self._convolved(x)
        else:
            y, x = self._convolved(x), self._shortcut(x)
        return self.relu2(self.spelling.add(y, x))

    def _convolved(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return y

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.down is None else self.down(x)


class Residual(nn.Module):
    """A stem, a block, a block that halves the size, a block, pooling and a linear layer."""

    def __init__(self, spelling: Spelling, classes: int = 3) -> None:
        super().__init__()
        one = nn.ReLU(spelling.inplace)

        def relu() -> Layer:
            return spelling.relu or (one if spelling.reused else nn.ReLU(spelling.inplace))

        self.conv, self.bn, self.relu = (
            nn.Conv2d(3, 4, 3, 1, 1, bias=False),
            nn.BatchNorm2d(4),
            relu(),
        )
        self.blocks = nn.Sequential(
            *(Block(n, wider, spelling, relu) for n, wider in ((4, 4), (4, 8), (8, 8)))
        )
        self.pool = spelling.pool or nn.AdaptiveAvgPool2d(1)
        self.flatten, self.dropout = spelling.flatten, nn.Dropout() if spelling.dropout else None
        self.last = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.pool(self.blocks(self.relu(self.bn(self.conv(x))))))
        result: Tensor = self.last(x if self.dropout is None else self.dropout(x))
        return result


def images(count: int) -> Tensor:
    """Return smooth random images (count, 3, 8, 8)."""
    noise = torch.randn(
        count, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return F.interpolate(noise, scale_factor=2, mode="bilinear")


def network(spelling: Spelling) -> Residual:
    """Build the network in a spelling, always with the same weights and batch statistics."""
    reference = _reference() if spelling is not SPELLINGS[REFERENCE] else None
    torch.manual_seed(0)
    model = Residual(spelling).double()
    if reference is None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        with torch.no_grad():
            for _ in range(30):
                model(images(48))
    else:
        model.load_state_dict(reference.state_dict())
    return model.eval()


def _reference() -> Residual:
    return network(SPELLINGS[REFERENCE])


def mipin(model: nn.Module, x: Tensor, target: Any) -> Tensor:
    """Return A of an inverse fitted to this spelling."""
    inverse = InverseNetwork(model).fit(images(48), progress=False)
    return MIPINAttribution(model, inverse).attribute(x, target)  # type: ignore[no-any-return]  # a tensor for a tensor


def captum(method: Callable[[nn.Module], Any], model: nn.Module, x: Tensor, target: Any) -> Tensor:
    """Return the map of a method of Captum, which may warn and leave hooks on the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Tensor = method(model).attribute(x.clone(), target=target)
    return found.detach()


METHODS: Mapping[str, Callable[[nn.Module, Tensor, Any], Tensor]] = {
    "MIP-IN": mipin,
    **{
        f"Captum's {m.__name__}": partial(captum, m)
        for m in (LRP, GuidedBackprop, Deconvolution, DeepLift, Saliency)
    },
}


def difference(found: Tensor, reference: Tensor) -> float:
    """Return ‖found − reference‖ / ‖reference‖."""
    return float((found - reference).norm() / reference.norm())


@contextmanager
def _noted(row: dict[str, Any], title: str) -> Iterator[None]:
    """Write an error into the row: it is a result too."""
    try:
        yield
    except Exception as error:
        row[title] = f"{type(error).__name__}: {error}"


def compare() -> list[dict[str, Any]]:
    """Return one row a spelling: each method's difference from the reference, or its error."""
    x, target = images(8), [0, 1, 2, 0, 1, 2, 0, 1]
    references = {name: method(_reference(), x, target) for name, method in METHODS.items()}
    rows = []
    for name, spelling in SPELLINGS.items():
        row: dict[str, Any] = {"spelling": name}
        for title, method in METHODS.items():
            with _noted(row, title):
                row[title] = difference(method(network(spelling), x, target), references[title])
        rows.append(row)
    return rows


def main() -> None:
    parser_of(__doc__).parse_args()
    rows = compare()
    write("invariance", rows, reference=REFERENCE)
    print(show(rows))


if __name__ == "__main__":
    main()
