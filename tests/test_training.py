"""Training mode is refused where it changes what a model computes, and nowhere else."""

import functools
from typing import Any

import pytest
import torch
from captum.attr import configure_interpretable_embedding_layer
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import TrainingModeError, UnsupportedOperationError
from captum_mipin.methods import LRP, LayerPropagation
from captum_mipin.training import check_evaluation


class Reads(nn.Module):
    """Reads its mode in a method that ``forward`` calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return x if self.training else -x


class Inherits(Reads):
    """Inherits the reading method."""

    def other(self) -> None:
        """Do nothing."""


class Property(nn.Module):
    """Reads its mode in a property."""

    @property
    def on(self) -> bool:
        return self.training

    def forward(self, x: Tensor) -> Tensor:
        return x if self.on else -x


def _drop(module: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, module.training)


class Helper(nn.Module):
    """Has a function read its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return _drop(self, x)


def _same(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


class Decorated(nn.Module):
    """Reads its mode in a decorated ``forward``, in a nested function, by name."""

    @_same
    def forward(self, x: Tensor) -> Tensor:
        return max([x], key=lambda value: getattr(self, "training"))  # noqa: B009 by name, on purpose


class Recurrent(nn.LSTM):
    """Drops inputs, which its base class with dropout=0 does not."""

    def forward(self, x: Tensor, states: Any = None) -> Any:
        return super().forward(F.dropout(x, 0.5, self.training), states)


class Elsewhere(nn.Module):
    """Writes its mode outside ``forward``, and names a keyword alike."""

    def train(self, mode: bool = True) -> "Elsewhere":
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=False)


def _hooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda module, x, y: _drop(module, y))
    return module


def _replaced() -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x if module.training else -x
    return module


@pytest.mark.parametrize(
    "module",
    [
        Reads(), Inherits(), Property(), Helper(), Decorated(), Recurrent(2, 2), _hooked(),
        _replaced(), nn.Dropout(), nn.Dropout2d(0.1), nn.AlphaDropout(), nn.RReLU(),
        nn.LSTM(2, 2, 2, dropout=0.1), nn.MultiheadAttention(2, 1, dropout=0.1), nn.BatchNorm2d(2),
        nn.SyncBatchNorm(2), nn.InstanceNorm1d(2, track_running_stats=True),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_a_mode_that_matters(module: nn.Module) -> None:
    name = type(module).__name__
    with pytest.raises(TrainingModeError, match=rf"in which 'part' \({name}\) may .*model\.eval"):
        check_evaluation(nn.ModuleDict({"part": module.train()}).eval().train())
    check_evaluation(nn.ModuleDict({"part": module}).eval())


@pytest.mark.parametrize(
    "module",
    [
        Elsewhere(), nn.Identity(), nn.Linear(2, 2), nn.Sequential(nn.ReLU()), nn.Embedding(2, 2),
        nn.LayerNorm(2), nn.LSTM(2, 2), nn.GRU(2, 2), nn.MultiheadAttention(2, 1),
        nn.InstanceNorm2d(2), nn.Dropout(0.0), nn.TransformerEncoderLayer(4, 2, dropout=0.0),
        nn.DataParallel(nn.Linear(2, 2)), torch.fx.symbolic_trace(nn.Linear(2, 2)),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_a_mode_that_does_not_matter(module: nn.Module) -> None:
    check_evaluation(module.train())


def test_many_modules_are_counted() -> None:
    model = nn.Sequential(*(nn.Dropout() for _ in range(7)))
    with pytest.raises(TrainingModeError, match=r"'0' \(Dropout\), .*'4' \(Dropout\) and 2 more"):
        check_evaluation(model)


def test_maps_are_those_of_evaluation_mode() -> None:
    """Dropout that drops nothing, recurrent layers and attention without dropout are explained."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.drop = nn.LSTM(4, 4, batch_first=True), nn.Dropout(0.0)
            self.norm, self.head = nn.InstanceNorm1d(2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.norm(self.drop(self.lstm(x)[0])).mean(1))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 2, 4)
    expected = LRP(model).attribute(x, 1)
    assert torch.equal(LRP(model.train()).attribute(x, 1), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:In order to make embedding layers more interpretable")
def test_layers_added_after_eval() -> None:
    """Captum's recipe for texts: eval() first, then an interpretable embedding layer."""
    torch.manual_seed(0)
    layers = nn.Embedding(9, 4), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3)
    model, tokens = nn.Sequential(*layers).eval(), torch.randint(9, (20, 3))
    expected = LayerPropagation(LRP(model), model[0]).attribute(tokens, 1)
    wrapped = configure_interpretable_embedding_layer(model, "0")
    maps = LRP(model).attribute(wrapped.indices_to_embeddings(tokens), 1)
    assert torch.allclose(maps, expected)
    model[3] = nn.Linear(12, 2)  # a new head
    assert not check(model, wrapped.indices_to_embeddings(tokens)).refused


def test_random_and_batch_dependent_operations_stay_refused() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x)  # training=True is its default

    for part in (Drops(), nn.BatchNorm1d(4, track_running_stats=False)):
        model = nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 2))
        with pytest.raises(UnsupportedOperationError):
            InverseNetwork(model).fit(torch.randn(20, 4), progress=False)
