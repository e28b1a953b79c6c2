"""Hooks that only look at values, and counters: they change no map, and are left as they were."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import CaptureError
from captum_mipin.graph.everywhere import give_back, replace_here
from captum_mipin.methods.gradients import Gradient

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


class Logger:
    """Keeps numbers about the values of a module."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.sum, self.last = torch.zeros((), dtype=torch.float64), 0.0

    def hook(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.seen.append(float(y.mean()))

    def array(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.seen.append(y.detach().numpy())

    def positive(self, module: nn.Module, args: Any, y: Tensor) -> None:
        if (y > 0).any():
            self.last = float(y.sum())

    def adds(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.sum += y.sum()

    def named(self, name: str, module: nn.Module, args: Any, y: Tensor) -> None:
        self.seen.append((name, float(y.std())))

    def writes(self, module: nn.Module, args: Any, y: Tensor) -> None:
        module.mean = float(y.mean())  # type: ignore[assignment]

    def before(self, module: nn.Module, args: Any) -> None:
        self.seen.append(float(args[0].mean()))

    def returning(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if isinstance(y, Tensor):
            self.seen.append(float(y.mean()))
        return y

    def returning_arguments(self, module: nn.Module, args: Any) -> Any:
        self.seen.append(args[0].detach().numpy())
        return args

    def shares(self, module: nn.Module, args: Any, y: Tensor) -> None:
        own = y.detach().numpy().copy()
        if own.max() > 0:
            own /= own.max()
        self.seen.append(own)

    def saves(self, module: nn.Module, args: Any, y: Tensor) -> None:
        for row in y.detach().numpy():
            self.seen.append(len(save({"row": row})))

    def note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            value = float(value)
        self.seen.append(value)

    def of_names(self, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        self.seen.append((len(kwargs), float(y.mean())))


class Few(Logger):
    """Keeps the first numbers alone, by name."""

    def hook(self, module: nn.Module, args: Any, y: Tensor) -> None:
        if len(self.seen) < 3:
            key = "mean"
            self.seen.append({key: float(y.mean())})


def _nan(module: nn.Module, args: Any, y: Tensor) -> None:
    if y.isnan().any():
        raise ValueError("not a number")


def _list_on_the_model(model: Any, log: Logger) -> Any:
    model.kept = log.seen
    return model.body.register_forward_hook(
        lambda module, args, y: model.kept.append(y.detach().numpy())
    )


def _lists_by_name(model: Any, log: Logger) -> Any:
    model.kept = {"body": log.seen}

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        model.kept["body"].append(float(y.mean()))

    return model.body.register_forward_hook(hook)


OBSERVERS = {
    "a mean": lambda m, log: m.body.register_forward_hook(log.hook),
    "an array": lambda m, log: m.body.register_forward_hook(log.array),
    "a condition": lambda m, log: m.body.register_forward_hook(log.positive),
    "a sum in place": lambda m, log: m.body.register_forward_hook(log.adds),
    "of the whole model": lambda m, log: m.register_forward_hook(log.hook),
    "partial": lambda m, log: m.body.register_forward_hook(partial(log.named, "body")),
    "an attribute of the module": lambda m, log: m.body.register_forward_hook(log.writes),
    "of the first calls": lambda m, log: m.body.register_forward_hook(partial(Few.hook, log)),
    "a lambda": lambda m, log: m.body.register_forward_hook(
        lambda module, args, y: log.seen.append(float(y.mean()))
    ),
    "a copy of its own": lambda m, log: m.body.register_forward_hook(log.shares),
    "another package": lambda m, log: m.body.register_forward_hook(log.saves),
    "a method with a branch": lambda m, log: m.body.register_forward_hook(
        lambda module, args, y: log.note(y.mean())
    ),
    "an array or nothing": lambda m, log: m.body.register_forward_hook(
        lambda module, args, y: log.seen.append(y.detach().numpy() if y.ndim == 2 else None)
    ),
    "a check": lambda m, log: m.head.register_forward_hook(_nan),
    "before": lambda m, log: m.head.register_forward_pre_hook(log.before),
    "names": lambda m, log: m.head.register_forward_hook(log.of_names, with_kwargs=True),
    "a list on the model": _list_on_the_model,
    "lists on the model by name": _lists_by_name,
    "returns the output": lambda m, log: m.body.register_forward_hook(log.returning),
    "returns the arguments": lambda m, log: m.head.register_forward_pre_hook(
        log.returning_arguments
    ),
}


@pytest.mark.captured_anew
@pytest.mark.parametrize("kind", OBSERVERS)
def test_a_hook_that_only_looks_changes_nothing(kind: str) -> None:
    expected = Gradient(Net()).attribute(X, 1)
    model, log = Net(), Logger()
    OBSERVERS[kind](model, log)
    _check_left_alone(model, log, expected)
    hooks = [*model._forward_hooks.values(), *model.body._forward_hooks.values()]
    hooks += [*model.head._forward_hooks.values(), *model.head._forward_pre_hooks.values()]
    assert len(hooks) == 1


def _check_left_alone(model: nn.Module, log: Logger, expected: Tensor) -> None:
    """Check that maps are as expected, and that a log is left as it was."""
    with torch.no_grad():
        model(X[:1])
    before = list(log.seen), log.last, log.sum.clone()
    torch.testing.assert_close(Gradient(model).attribute(X, 1), expected)
    inverse = InverseNetwork(model).fit([X], 1, progress=False)
    assert inverse.explain((X,), 1).signals[0][0].isfinite().all()
    assert len(log.seen) == len(before[0])
    assert log.last == before[1]
    assert torch.equal(log.sum, before[2])
    with torch.no_grad():
        model(X[:1])
    assert len(log.seen) >= len(before[0])


OF_ALL = {
    "numbers": (module_hooks.register_module_forward_hook, lambda log: log.hook),
    "arrays": (module_hooks.register_module_forward_hook, lambda log: log.array),
    "returns": (module_hooks.register_module_forward_hook, lambda log: log.returning),
    "before": (module_hooks.register_module_forward_pre_hook, lambda log: log.before),
}


@pytest.mark.captured_anew
@pytest.mark.parametrize("kind", OF_ALL)
def test_a_hook_of_every_module_that_only_looks_changes_nothing(kind: str) -> None:
    expected = Gradient(Net()).attribute(X, 1)
    model, log = Net(), Logger()
    register, hook = OF_ALL[kind]
    tables = module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks
    call = hook(log)
    with register(call):
        before = [dict(table) for table in tables]
        _check_left_alone(model, log, expected)
        assert [dict(table) for table in tables] == before
    assert len(log.seen) > 3  # each call of the model has called it for three modules


@pytest.mark.captured_anew
def test_a_hook_of_every_module_that_acts_is_refused_and_given_back() -> None:
    def scales(module: nn.Module, args: Any, y: Any) -> Any:
        return y * float(y.mean()) if isinstance(module, nn.Linear) else None

    with module_hooks.register_module_forward_hook(scales) as handle:
        with pytest.raises(CaptureError, match=r"the forward hook 'scales' of every module, which"):
            check(Net(), X)
        assert module_hooks._global_forward_hooks[handle.id] is scales


def test_other_threads_run_the_hooks_of_every_module_during_a_capture() -> None:
    log, module = Logger(), nn.Identity()
    with module_hooks.register_module_forward_hook(log.hook) as handle:
        table = module_hooks._global_forward_hooks
        replace_here(table, handle.id, lambda *handed: None)
        module(X)
        assert log.seen == []
        other = threading.Thread(target=lambda: module(2 * X))
        other.start()
        other.join()
        give_back(table, handle.id)
        module(X)
        assert table[handle.id] == log.hook
    assert log.seen == [float(2 * X.mean()), float(X.mean())]


class Reads(Net):
    """A network whose forward reads what hooks may write."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.kept = []
        h = self.body(x).relu()
        return self.head(h * self.scale) * (1.0 if not self.kept else self.kept[-1])


def returns(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * float(y.mean())


def in_place(module: nn.Module, args: Any, y: Tensor) -> None:
    y.mul_(float(y.mean()))


def behind_autograd(module: nn.Module, args: Any, y: Tensor) -> None:
    y.data.mul_(float(y.mean()))


SOMETIMES = "may act on the model for some values only, by its code"


def clips(module: nn.Module, args: Any, y: Tensor) -> Any:
    if float(y.abs().max()) > 1e6:
        return y.clamp(-5, 5)
    return None


def clips_in_place(module: nn.Module, args: Any, y: Tensor) -> None:
    if float(y.abs().max()) > 1e6:
        y.clamp_(-5, 5)


def clips_entries(module: nn.Module, args: Any, y: Tensor) -> None:
    if float(y.abs().max()) > 1e6:
        y[y > 5] = 5


def clips_or_returns(module: nn.Module, args: Any, y: Tensor) -> Any:
    float(y.mean())
    return y.clamp(-5, 5) if float(y.abs().max()) > 1e6 else y


def clips_elsewhere(module: nn.Module, args: Any, y: Tensor) -> Any:
    return clips_or_returns(module, args, y)


def clips_without_a_branch(module: nn.Module, args: Any, y: Tensor) -> None:
    float(y.mean())
    y.clamp_(-1e6, 1e6)


def clips_or_nothing(module: nn.Module, args: Any, y: Tensor) -> Any:
    return y.clamp(-5, 5) if float(y.abs().max()) > 1e6 else None


def clips_by_a_helper(module: nn.Module, args: Any, y: Tensor) -> None:
    clips_in_place(module, args, y)


def copies_or_not(module: nn.Module, args: Any, y: Tensor) -> None:
    own = y.clone() if y.numel() < 3 else y
    if float(own.abs().max()) > 1e6:
        own[0] = 5


def copies_beside(module: nn.Module, args: Any, y: Tensor) -> None:
    both = [y, y.clone()]
    if float(y.abs().max()) > 1e6:
        both[0][0] = 5


def fills_entries(module: nn.Module, args: Any, y: Tensor) -> None:
    if float(y.abs().max()) > 1e6:
        y.__setitem__(0, 5)


def weights(module: nn.Module, args: Any, y: Tensor) -> None:
    module.weight.data.mul_(min(1.0, 1e6 / float(y.abs().max())))


def random(module: nn.Module, args: Any, y: Tensor) -> None:
    float(torch.rand(()) * y.mean())


def _writers(model: Any) -> dict[str, tuple[Any, str]]:
    def scale(module: nn.Module, args: Any, y: Tensor) -> None:
        model.scale = float(y.mean())

    def keep(module: nn.Module, args: Any, y: Tensor) -> None:
        model.kept.append(float(y.mean()))

    return {
        "returns": (returns, "returns a value"),
        "in_place": (in_place, "may change what it is handed"),
        "behind_autograd": (behind_autograd, "may change what it is handed"),
        "clips": (clips, SOMETIMES),
        "clips_in_place": (clips_in_place, SOMETIMES),
        "clips_without_a_branch": (clips_without_a_branch, "may change what it is handed"),
        "clips_or_nothing": (clips_or_nothing, SOMETIMES),
        "clips_by_a_helper": (clips_by_a_helper, SOMETIMES),
        "clips_entries": (clips_entries, SOMETIMES),
        "clips_or_returns": (clips_or_returns, SOMETIMES),
        "copies_or_not": (copies_or_not, SOMETIMES),
        "copies_beside": (copies_beside, SOMETIMES),
        "fills_entries": (fills_entries, SOMETIMES),
        "clips_elsewhere": (clips_elsewhere, SOMETIMES),
        "weights": (weights, SOMETIMES),
        "random": (random, "draws random numbers"),
        "scale": (scale, "writes to 'scale', which the model's code may read"),
        "keep": (keep, "writes to 'an entry of a list', which the model's code may read"),
    }


@pytest.mark.captured_anew
@pytest.mark.parametrize("name", _writers(None))
def test_a_hook_that_may_change_the_output_is_refused_by_name(name: str) -> None:
    model = Reads()
    model.body.register_forward_hook(Logger().hook)  # is no cause
    hook, does = _writers(model)[name]
    model.body.register_forward_hook(hook)
    with pytest.raises(CaptureError) as error:
        check(model, X)
    assert f"The cause is the forward hook {name!r} of 'body' (Linear), which {does}." in str(
        error.value
    )
    assert "remove it" in str(error.value)


@pytest.mark.captured_anew
def test_a_hook_writes_to_the_model_that_its_function_encloses() -> None:
    def enclosing(model: Any) -> Any:
        def scale(module: nn.Module, args: Any, y: Tensor) -> None:
            model.scale = y.amax(1, keepdim=True)

        return scale

    model = Reads()
    model.body.register_forward_hook(enclosing(model))
    x = X[:3].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    model.scale = 1.0
    torch.testing.assert_close(Gradient(model).attribute(X[:3], 1), expected)
    assert model.scale == 1.0


class Counts(Net):
    """A network that counts its calls in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.calls += 1
        self.mean = self.mean * 0.9 + h.detach().mean() * 0.1
        return self.head(h.relu())


@pytest.mark.captured_anew
def test_a_buffer_that_nothing_reads_may_be_written_to() -> None:
    model, plain = Counts(), Net()
    model(X)
    before = model.calls.clone(), model.mean.clone()
    torch.testing.assert_close(Gradient(model).attribute(X, 1), Gradient(plain).attribute(X, 1))
    inverses = [InverseNetwork(net).fit([X], 1, progress=False) for net in (model, plain)]
    torch.testing.assert_close(*(inverse.explain((X,), 1).signals for inverse in inverses))
    assert torch.equal(model.calls, before[0])
    assert torch.equal(model.mean, before[1])


@pytest.mark.captured_anew
def test_a_buffer_that_the_output_depends_on_is_refused() -> None:
    class Uses(Counts):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.mean

    with pytest.raises(CaptureError, match="the model writes to 'mean' while it runs"):
        check(Uses(), X)


@pytest.mark.captured_anew
@pytest.mark.parametrize("reads", [False, True])
def test_a_tensor_that_is_written_to_in_place_is_named_and_keeps_its_values(reads: bool) -> None:
    class Adds(Net):
        def __init__(self) -> None:
            super().__init__()
            self.sum = torch.ones((), dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x).relu()
            self.sum += h.detach().sum()
            return self.head(h) * (self.sum if reads else 1.0)

    model = Adds()
    with pytest.raises(CaptureError, match="the model writes to its tensor 'sum' in place"):
        check(model, X)
    assert model.sum == 1
