"""Small fitted networks, shared captures, and a watch over everything that must stay as it was."""

import copy
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from shared_graphs import SharedGraphs
from torch import Tensor, nn

from captum_mipin import InverseNetwork, MIPINAttribution
from captum_mipin.graph import capture as capture_module

hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")  # the same examples each time


def pytest_collection_finish() -> None:
    """Keep what imports and collection have made out of all garbage collections to come.

    Graphs are many small objects, so that by default a twentieth of the time goes into collections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


class Fitted(NamedTuple):
    """A network, its inverse, and data like that it was fitted to."""

    model: nn.Module
    inverse: InverseNetwork
    x: Tensor

    @property
    def mipin(self) -> MIPINAttribution:
        return MIPINAttribution(self.model, self.inverse)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the global state is what some tests watch
    torch.manual_seed(0)


def _mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def _cnn() -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Dropout(), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    with torch.no_grad():
        model(torch.randn(32, 3, 8, 8))  # batch statistics other than 0 and 1
    return model.eval()


@pytest.fixture
def make_mlp() -> Callable[[], nn.Module]:
    """Return a function that builds the same network of one hidden layer at each call."""
    return _mlp


@pytest.fixture(scope="session")
def mlp() -> Fitted:
    """Return a network fitted for all three classes; tests must not change it."""
    model = _mlp()
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(3))
    return Fitted(model, InverseNetwork(model).fit(x, progress=False), x)


@pytest.fixture(scope="session")
def cnn() -> Fitted:
    """Return a network fitted for all three classes; tests must not change it."""
    model = _cnn()
    x = torch.rand(96, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return Fitted(model, InverseNetwork(model).fit(x, progress=False), x)


@pytest.fixture
def own_mlp(mlp: Fitted) -> Fitted:
    """Return a copy of ``mlp`` that a test may change."""
    model, inverse = copy.deepcopy((mlp.model, mlp.inverse))
    return Fitted(model, inverse, mlp.x.clone())


@pytest.fixture
def own_cnn(cnn: Fitted) -> Fitted:
    """Return a copy of ``cnn`` that a test may change."""
    model, inverse = copy.deepcopy((cnn.model, cnn.inverse))
    return Fitted(model, inverse, cnn.x.clone())


def _bits(tensor: Tensor | None) -> bytes | None:
    return (
        None
        if tensor is None
        else tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )


def _state(t: Tensor) -> tuple[Any, ...]:
    version = None if t.is_inference() else t._version
    return (
        _bits(t),
        None if t.grad is None else (id(t.grad), _bits(t.grad)),
        version,
        bool(t._backward_hooks),
    )


def _traces(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return all places where an explanation could leave a trace: model, inputs and process."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "weights": {
            name: (id(t), t.dtype, t.shape, t.requires_grad, t.is_leaf, *_state(t))
            for name, t in named
        },
        "state_dict": {name: _bits(t) for name, t in model.state_dict().items()},
        "modules": {
            path: (id(module), module.training, sorted(vars(module)))
            for path, module in model.named_modules(remove_duplicate=False)
        },
        "hooks": {
            (path, name): list(value)
            for path, module in model.named_modules(remove_duplicate=False)
            for name, value in vars(module).items()
            if "hooks" in name and hasattr(value, "__len__")
        },
        "inputs": [(t.requires_grad, t.stride(), *_state(t)) for t in tensors],
        "generators": (_bits(torch.get_rng_state()), str(np.random.get_state()), random.getstate()),  # noqa: NPY002  # as above
        "modes": (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        ),
    }  # fmt: skip


@contextmanager
def _untouched(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    before = _traces(model, tensors)
    try:
        yield
    finally:
        after = _traces(model, tensors)
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"changed: {changed}"


@pytest.fixture
def untouched() -> Callable[..., AbstractContextManager[None]]:
    """Return a context that checks that model, tensors and generators stay as they were.

    It checks after an exception as well.
    """
    return _untouched


@contextmanager
def _survives(fitted: Fitted) -> Iterator[None]:
    def results() -> tuple[Any, ...]:
        found = fitted.mipin.attribute(fitted.x[:5], [0, 1, 2, 0, 1], return_convergence_delta=True)
        return *map(_bits, found), fitted.inverse.targets, fitted.inverse.report

    before = results()
    try:
        yield
    finally:
        assert results() == before, "what was fitted before has changed"


@pytest.fixture
def survives() -> Callable[[Fitted], AbstractContextManager[None]]:
    """Return a context that checks that an inverse fitted earlier keeps the same bits.

    It checks after an exception as well.
    """
    return _survives


@pytest.fixture(scope="session", autouse=True)
def shared_graphs() -> Iterator[SharedGraphs]:
    """Let all tests share the graphs of networks that are spelled alike, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        shared = SharedGraphs(capture_module.trace)
        patch.setattr(capture_module, "trace", shared)
        yield shared


@pytest.fixture(scope="module", autouse=True)
def unwritten(shared_graphs: SharedGraphs) -> Iterator[None]:
    """Check after each module that no shared graph was written to."""
    yield
    shared_graphs.check_unwritten()


@pytest.fixture(autouse=True)
def captured_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, shared_graphs: SharedGraphs
) -> None:
    """Capture each spelling of a network once, but anew in tests marked ``captured_anew``."""
    if request.node.get_closest_marker("captured_anew"):
        monkeypatch.setattr(capture_module, "trace", shared_graphs.trace)
