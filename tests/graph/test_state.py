"""What a model's forward and hooks write: it holds after each call what it held before."""

import importlib
import os
import threading
import weakref
from collections import OrderedDict, deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import Function
from torch import Tensor, nn

from captum_mipin import InverseNetwork, MIPINAttribution, check
from captum_mipin.errors import CaptureError
from captum_mipin.graph import state as state_module
from captum_mipin.graph.kept import Kept
from captum_mipin.graph.state import State
from captum_mipin.methods import GuidedBackprop

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
GLOBAL: dict[str, Any] = {}
LAST = None


class Recorder:
    """Records activations, and cannot be copied or pickled."""

    seen: Any = None

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lock = weakref.ref(model), threading.Lock()
        self.values: Any = deque(maxlen=2)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")

    def hook(self, module: nn.Module, args: Any, y: Tensor, name: str = "") -> None:
        self.values.append(y)
        type(self).seen = y


class Net(nn.Module):
    """A network that may keep its features."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.body, self.act, self.head = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)
        self.feat: Any = [] if kind == "list" else None
        self.box = SimpleNamespace(last=None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.body(x))
        if self.kind == "attribute":
            self.feat = h
        elif self.kind == "list":
            self.feat.append(h)
        elif self.kind == "object":
            self.box.last = h
        elif self.kind == "new":
            self.news = {"h": (h,)}
        elif self.kind == "class":
            Net.shared = h
        elif self.kind == "global":
            GLOBAL["h"] = h
        elif self.kind == "refuses":
            self.feat = (h, self)
        return self.head(h)

    def __deepcopy__(self, memo: Any) -> Any:
        if self.kind == "refuses":
            raise RuntimeError("cannot be copied")
        new = Net(self.kind)
        new.load_state_dict(self.state_dict())
        return new


def _dictionary(model: Any) -> Any:
    kept: dict[str, Tensor] = {}
    model.act.register_forward_hook(lambda module, args, y: kept.__setitem__("act", y))
    return kept.copy


def _list_on_the_model(model: Any) -> Any:
    model.acts = []
    model.act.register_forward_hook(lambda module, args, y: model.acts.append(y))
    return lambda: list(model.acts)


def _module_attribute(model: Any) -> Any:
    model.act.register_forward_hook(lambda module, args, y: setattr(module, "last", y))
    return lambda: model.act.last


def _variable(model: Any) -> Any:
    last, calls = None, 0

    def hook(module: nn.Module, args: Any) -> None:
        nonlocal last, calls
        last, calls = args[0], calls + 1

    model.head.register_forward_pre_hook(hook)
    return lambda: (last, calls)


def _global(model: Any) -> Any:
    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        global LAST
        LAST = y

    model.body.register_forward_hook(hook)
    return lambda: LAST


def _extractor(model: Any) -> Any:
    recorder = Recorder(model)
    model.act.register_forward_hook(partial(recorder.hook, name="act"))
    model.recorder = recorder
    return lambda: (list(recorder.values), Recorder.seen)


def _every_module(model: Any) -> Any:
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        if isinstance(module, nn.Linear):
            kept.append(y)

    handle = nn.modules.module.register_module_forward_hook(hook)
    weakref.finalize(model, handle.remove)
    return lambda: list(kept)


KEEPERS = {
    "attribute": lambda m: lambda: m.feat,
    "list": lambda m: lambda: list(m.feat),
    "object": lambda m: lambda: m.box.last,
    "new": lambda m: lambda: m.news["h"],
    "class": lambda m: lambda: Net.shared,  # type: ignore[attr-defined]
    "global": lambda m: lambda: GLOBAL["h"],
    "refuses": lambda m: lambda: m.feat,
    "a dictionary": _dictionary,
    "a list on the model": _list_on_the_model,
    "an attribute of a module": _module_attribute,
    "a variable": _variable,
    "a global variable": _global,
    "an extractor": _extractor,
    "a hook of every module": _every_module,
}


def _same(old: Any, new: Any) -> bool:
    """Whether two structures contain the same objects."""
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    return old is new


@pytest.mark.captured_anew
@pytest.mark.parametrize("kind", KEEPERS)
def test_what_a_model_or_its_hooks_keep_is_left_as_it_was(kind: str) -> None:
    plain, model = Net().eval(), Net(kind).eval()
    keeps = KEEPERS[kind](model)
    model(X[:3])
    before = keeps()
    assert check(model, X[:2]).ok and _same(before, keeps())
    guided = GuidedBackprop(model).attribute(X[:3], target=1)
    assert _same(before, keeps())
    assert torch.equal(guided, GuidedBackprop(plain).attribute(X[:3], target=1))
    model(X[:3])  # and the user's own next call records as ever
    assert not _same(before, keeps())


@pytest.mark.captured_anew
def test_a_fit_leaves_what_hooks_keep() -> None:
    plain, model = Net().eval(), Net("attribute").eval()
    keeps = _dictionary(model)
    model(X[:3])
    before = keeps(), model.feat
    maps = []
    for one in (plain, model):
        inverse = InverseNetwork(one).fit(X, targets=1, progress=False)
        maps.append(MIPINAttribution(one, inverse).attribute(X[:3], target=1))
    assert _same(before, (keeps(), model.feat))
    assert torch.equal(*maps)


class Remembers(nn.Module):
    """Adds what it kept of the call before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 3)
        self.last: Any = None
        self.all: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.kind == "attribute":
            y = y if self.last is None else y + self.last.mean()
            self.last = y
        elif self.kind == "list":
            self.all.append(y)
            y = sum(self.all, start=torch.zeros(3))
        elif self.kind == "running":
            self.last = torch.ones(3) if self.last is None else self.last * 0.5
            y = y * self.last
        elif self.kind == "global":
            y = y + GLOBAL.get("y", 0)
            GLOBAL["y"] = y
        return y


@pytest.mark.captured_anew
@pytest.mark.parametrize(
    ("kind", "name"),
    {"attribute": "last", "list": "a list", "running": "last", "global": "y"}.items(),
)
@pytest.mark.parametrize("called", [False, True])
def test_a_result_that_depends_on_the_call_before_is_refused(
    kind: str, name: str, called: bool
) -> None:
    GLOBAL.clear()
    model = Remembers(kind).eval()
    if called:
        with torch.no_grad():
            model(X[:1])
    before = (model.last, list(model.all), dict(GLOBAL))
    with pytest.raises(CaptureError, match=rf"writes a tensor to '.*{name}.* its next call reads"):
        check(model, X[:3])
    assert _same(before, (model.last, list(model.all), dict(GLOBAL)))


@pytest.mark.captured_anew
def test_hooks_of_backward_passes_do_not_disturb_a_capture() -> None:
    model = Net().eval()
    model.act.register_full_backward_hook(lambda module, gradients, back: None)
    assert check(model, X[:2]).ok
    assert len(model.act._backward_hooks) == 1


@pytest.mark.captured_anew
def test_a_capture_that_fails_leaves_what_hooks_keep() -> None:
    model = Net().eval()
    keeps = _dictionary(model)
    model.head.register_forward_hook(lambda module, args, y: y if y.sum() > 0 else -y)
    model(X[:3])
    before = keeps()
    with pytest.raises(CaptureError):
        check(model, X[:2])
    assert _same(before, keeps())


class Holder:
    """Refers to a module, and cannot be copied by ``copy.deepcopy``."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.lock = module, threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


class Indirect(nn.Module):
    """Reaches its layers through other objects; only the layers themselves are registered."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.way: Any = {
            "object": lambda: Holder(self.layer),
            "namespace": lambda: SimpleNamespace(of=self.layer),
            "method": lambda: self.layer.forward,
            "partial": lambda: partial(nn.Module.__call__, self.layer),
            "key": lambda: {self.layer: 2},
            "pair": lambda: (self.layer, None),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.way, dict):
            return self.head(self.layer(x) * self.way[self.layer])
        way = self.way[0] if isinstance(self.way, tuple) else self.way
        return self.head(getattr(way, "of", way)(x))


@pytest.mark.captured_anew
@pytest.mark.parametrize("kind", ["object", "namespace", "method", "partial", "key", "pair"])
def test_modules_are_reached_through_other_objects(kind: str) -> None:
    model = Indirect(kind).eval()
    x = X[:3].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(GuidedBackprop(model).attribute(X[:3], target=1), expected)
    model.layer.weight.data.mul_(2)  # the graph reads the layer's own weight
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(GuidedBackprop(model).attribute(X[:3], target=1), expected)


class Secretive:
    """Raises its own error for every attribute that it does not have, ``__dict__`` among them."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.captured_anew
def test_objects_whose_attributes_cannot_be_listed_are_passed_over() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    model.settings = Secretive()
    assert not check(model, X[:2]).refused


def _fetch(*_: Any, **__: Any) -> Any:
    raise AssertionError("nobody asked for these entries")


def _lazy(base: Any) -> Any:
    """Return a kind of container whose methods fetch what they are asked for."""
    names = ("__iter__", "__getitem__", "__len__", "keys", "values", "items", "update", "extend",
             "clear", "copy", "__reduce_ex__")  # fmt: skip
    return type("Lazy", (base,), dict.fromkeys(names, _fetch))


ENTRIES: dict[Any, Any] = {dict: {"a": GLOBAL}, OrderedDict: {"a": GLOBAL}, list: [GLOBAL]}


@pytest.mark.captured_anew
@pytest.mark.parametrize("base", ENTRIES)
def test_containers_are_read_and_written_without_methods_of_their_own(base: Any) -> None:
    lazy = _lazy(base)(ENTRIES[base])
    write = base.append if base is list else partial(base.__setitem__)
    model = Function(
        lambda m, x: m["last"](x) * (1 if lazy is not None else 2), last=nn.Linear(4, 3)
    )
    kept, state = Kept(model), State(model.eval())
    check(model, X[:2])
    assert state.holds()
    write(lazy, *([1.0] if base is list else ["b", 1.0]))
    assert not state.holds()
    kept.restore()
    assert base.__len__(lazy) == 1 and state.holds()
    assert next(iter(base.values(lazy) if base is not list else base.__iter__(lazy))) is GLOBAL


CHOOSES = """
from torch import nn

class Chooses(nn.Module):
    mode = "once"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def run_once(self, x):
        return self.layer(x)

    def run_twice(self, x):
        return 2 * self.layer(x)

    def forward(self, x):
        return getattr(self, "run_" + self.mode)(x)
"""


@pytest.mark.parametrize("installed", [False, True])
def test_only_code_that_may_be_edited_is_rehearsed_for_names_that_it_computes(
    installed: bool, tmp_path: Any, monkeypatch: Any
) -> None:
    name = f"chooses_{installed}".lower()
    (tmp_path / f"{name}.py").write_text(CHOOSES)
    monkeypatch.syspath_prepend(tmp_path)
    if installed:
        monkeypatch.setattr(state_module, "_INSTALLED", (f"{tmp_path}{os.sep}",))
    model = importlib.import_module(name).Chooses().eval()
    before = GuidedBackprop(model).attribute(X[:2], 1)
    assert State(model).dynamic is not installed
    model.mode = "twice"  # what the name is computed from is a part of the state
    torch.testing.assert_close(GuidedBackprop(model).attribute(X[:2], 1), 2 * before)


class Doubling(list):
    """A list that yields something else than it holds."""

    def __iter__(self) -> Any:
        return (2 * value for value in list.__iter__(self))


class DoublingDict(dict):
    """A dictionary that returns something else than it holds."""

    def items(self) -> Any:
        return [(key, 2 * value) for key, value in dict.items(self)]

    def values(self) -> Any:
        return [2 * value for value in dict.values(self)]


@pytest.mark.captured_anew
@pytest.mark.parametrize("kept", [Doubling([1.0, 2.0]), DoublingDict(a=1.0, b=2.0)])
def test_containers_that_return_other_values_than_they_hold(kept: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m["last"](x) * sum(
            m["first"].kept if isinstance(kept, list) else m["first"].kept.values()
        )

    first = nn.Identity()
    first.kept = kept
    model = Function(run, first=first, last=nn.Linear(4, 3)).eval()
    found = GuidedBackprop(model).attribute(X[:2], 1)
    torch.testing.assert_close(found, 6 * model.layers["last"].weight[1].detach().expand(2, 4))
    assert list.__len__(kept) == 2 if isinstance(kept, list) else dict.__len__(kept) == 2


class Slotted(list):
    """A list with a field."""

    __slots__ = ("scale",)


def test_annotations_are_kept_and_fields_of_containers_are_read() -> None:
    model = nn.Linear(4, 3)
    model.kinds, model.slotted = (int | None, list[int]), Slotted([1.0])  # type: ignore[assignment]
    model.slotted.scale = 1.0  # type: ignore[union-attr]
    state = State(model)
    assert state.holds()
    model.slotted.scale = 2.0  # type: ignore[union-attr]
    assert not state.holds()
