"""All objects that explain a model share its graphs, and none of them gets a stale graph."""

import copy
import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet, resnet18

from captum_mipin import InverseNetwork, MIPINAttribution, check
from captum_mipin.graph import capture as capture_module
from captum_mipin.graph.leaves import leaves
from captum_mipin.graph.state import State
from captum_mipin.methods import LRP, GuidedBackprop, LayerPropagation, PatternNet, Patterns

pytestmark = [
    pytest.mark.captured_anew,
    pytest.mark.filterwarnings("ignore:(Input Tensor|Setting)"),  # of Captum
]

X = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) + 0.5
FACTOR = 1.5
LOGGER = logging.getLogger("captum_mipin_tests.sharing")
LOGGER.parent = logging.Logger("above", logging.ERROR)
FLAG = ContextVar("FLAG", default=1.5)
LIBRARY = ModuleType("a_library")
LIBRARY.inner = ModuleType("a_library.inner")  # type: ignore[attr-defined]


def scale(x: Tensor) -> Tensor:
    return x * 1.5


LIBRARY.inner.scale = scale  # type: ignore[attr-defined]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return a list with one entry for each capture."""
    captures, trace = list[int](), capture_module.trace

    def counted(*args: Any, **named: Any) -> Any:
        captures.append(1)
        return trace(*args, **named)

    monkeypatch.setattr(capture_module, "trace", counted)
    yield captures


def gradient(model: nn.Module, x: Tensor = X) -> Tensor:
    """Return the gradient of output 1, by autograd on the model itself."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        (result,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    return result


def explained(model: nn.Module, x: Tensor = X) -> Tensor:
    """Return the same gradient by a fresh object; no gate lies on the path."""
    result: Tensor = GuidedBackprop(model).attribute(x, target=1)
    return result


class Slots:
    """A plain object without a dictionary."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.5


class Settings:
    """A plain object, and a class with settings."""

    factor = 1.5

    @property
    def doubled(self) -> float:
        return self.factor * 2


class Squares(nn.Module):
    """x → head(f(body(x))²), where f is what a test changes."""

    power: float = 2.0

    def __init__(self, f: Callable[["Squares", Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.way, self.calls = f, 0
        self.factor, self.detached, self.factors = 1.5, False, [1.0, 2.0]
        self.settings, self.slots, self.kind = Settings(), Slots(), Settings
        self.space = SimpleNamespace(deep={"list": [SimpleNamespace(factor=1.5)]})
        self.array, self.constant = torch.ones(5).numpy(), torch.tensor(1.5)
        self.local: Any = None

    def run_deep(self, h: Tensor) -> Tensor:
        return h * FACTOR

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h = h if self.way is None else self.way(self, h)
        result: Tensor = self.head(h**2)
        return result


class Tripled(Squares):
    """Another function of the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x) * 3)
        return result


def closure() -> tuple[Callable[[], float], Callable[[float], None]]:
    factor = 1.5

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return lambda: factor, change


CLOSURE = closure()


def branch(m: Squares, h: Tensor) -> Tensor:
    return h + h.detach() if m.detached else h + h


def no_grad_branch(m: Squares, h: Tensor) -> Tensor:
    with torch.set_grad_enabled(not m.detached):
        g = h * 2
    return h + g


def by_import(m: Squares, h: Tensor) -> Tensor:
    import a_library

    result: Tensor = a_library.inner.scale(h)
    return result


def imported(m: Squares, h: Tensor) -> Tensor:
    return LIBRARY.inner.scale(h)  # type: ignore[no-any-return]


def with_default(m: Squares, h: Tensor, factor: float = 1.5) -> Tensor:
    return h * factor


def halved(module: nn.Module, args: Any, y: Any) -> Any:
    return y / 2 if isinstance(module, nn.Linear) else y


def set_(owner: Any, name: str, value: Any) -> Callable[..., None]:
    return lambda m, patch: patch.setattr(owner, name, value)


ME = sys.modules[__name__]
#: Name → what the model computes, and the change of it.
CHANGES: dict[str, tuple[Any, Callable[[Squares, pytest.MonkeyPatch], Any]]] = {
    "attribute": (lambda m, h: h * m.factor, lambda m, _: setattr(m, "factor", 3.0)),
    "minus zero": (
        lambda m, h: h * (2 if str(m.factor) == "-0.0" else 3) if m.factor == 0 else h,
        lambda m, _: setattr(m, "factor", -0.0),
    ),
    "one is not true": (
        lambda m, h: h * (2 if m.factor is True else 3),
        lambda m, _: setattr(m, "factor", True),
    ),
    "field": (lambda m, h: h * m.settings.factor, lambda m, _: setattr(m.settings, "factor", 3.0)),
    "slot": (lambda m, h: h * m.slots.factor, lambda m, _: setattr(m.slots, "factor", 3.0)),
    "deep field": (
        lambda m, h: h * m.space.deep["list"][0].factor,
        lambda m, _: setattr(m.space.deep["list"][0], "factor", 3.0),
    ),
    "list": (lambda m, h: h * sum(m.factors), lambda m, _: m.factors.append(3.0)),
    "entry of a list": (
        lambda m, h: h * sum(m.factors), lambda m, _: m.factors.__setitem__(0, 3.0)
    ),
    "array": (
        lambda m, h: h * float(m.array[0]), lambda m, _: m.array.__setitem__(0, 3.0)
    ),
    "constant": (lambda m, h: h * m.constant.item(), lambda m, _: m.constant.fill_(3.0)),
    "data of a constant": (
        lambda m, h: h * m.constant.item(), lambda m, _: m.constant.data.fill_(3.0)
    ),
    "method of a computed name": (
        lambda m, h: getattr(m, "_".join(["run", "deep"]))(h), set_(ME, "FACTOR", 3.0)
    ),
    "function of a computed name": (
        lambda m, h: getattr(LIBRARY.inner, "".join(["sca", "le"]))(h),
        set_(LIBRARY.inner, "scale", lambda x: x * 3.0),  # type: ignore[attr-defined]
    ),
    "class attribute": (lambda m, h: h**m.power, set_(Squares, "power", 3.0)),
    "attribute of a class": (lambda m, h: h * m.kind.factor, set_(Settings, "factor", 3.0)),
    "property": (
        lambda m, h: h * m.settings.doubled, set_(Settings, "doubled", property(lambda s: 5.0))
    ),
    "class of an object": (
        lambda m, h: h * m.settings.doubled,
        lambda m, _: setattr(m.settings, "__class__", type("S", (), {"factor": 2, "doubled": 5})),
    ),
    "global": (lambda m, h: h * FACTOR, set_(ME, "FACTOR", 3.0)),
    "global function": (lambda m, h: scale(h), set_(ME, "scale", lambda x: x * 3)),
    "code of a function": (
        lambda m, h: scale(h), lambda m, patch: patch.setattr(scale, "__code__", halves.__code__)
    ),
    "default": (with_default, set_(with_default, "__defaults__", (3.0,))),
    "library": (imported, set_(LIBRARY.inner, "scale", lambda x: x * 3)),  # type: ignore[attr-defined]
    "local import": (by_import, set_(LIBRARY.inner, "scale", lambda x: x * 3)),  # type: ignore[attr-defined]
    "shadowed builtin": (
        lambda m, h: h * abs(-2), lambda m, p: p.setattr(ME, "abs", lambda x: 5, raising=False)
    ),
    "function of torch": (
        lambda m, h: F.dropout(h, 0.5, False), set_(F, "dropout", lambda x, *_: x * 3)
    ),
    "method of tensors": (lambda m, h: h.tanh(), set_(Tensor, "tanh", lambda x: x * 3)),
    "layer of torch": (None, set_(nn.Linear, "forward", lambda m, x: F.linear(x, m.weight * 2))),
    "function of a layer": (None, set_(F, "linear", lambda x, w, b: x @ w.T * 2 + b)),
    "context variable": (lambda m, h: h * FLAG.get(), lambda m, _: FLAG.set(3.0)),
    "thread's variable": (
        lambda m, h: h * m.local.factor, lambda m, _: setattr(m.local, "factor", 3.0)
    ),
    "event": (lambda m, h: h * (3 if m.event.is_set() else 1), lambda m, _: m.event.set()),
    "event of a process": (
        lambda m, h: h * (3 if m.process_event.is_set() else 1), lambda m, _: m.process_event.set()
    ),
    "value of a process": (
        lambda m, h: h * m.process_value.value, lambda m, _: setattr(m.process_value, "value", 3.0)
    ),
    "level of a logger": (
        lambda m, h: h * (3 if LOGGER.isEnabledFor(logging.DEBUG) else 1),
        lambda m, _: (LOGGER.setLevel(logging.DEBUG),
                      weakref.finalize(m, LOGGER.setLevel, logging.NOTSET)),
    ),
    "level of a logger above": (
        lambda m, h: h * (3 if LOGGER.getEffectiveLevel() == 35 else 1),
        lambda m, patch: patch.setattr(LOGGER.parent, "level", 35),
    ),
    "level of a logger by name": (
        lambda m, h: h * (3 if logging.getLogger("a_library.inner").level == 7 else 1),
        set_(logging.getLogger("a_library.inner"), "level", 7),
    ),
    "level of the module's logger": (
        lambda m, h: h * (3 if logging.getLogger(__name__).level == 7 else 1),
        set_(logging.getLogger(__name__), "level", 7),
    ),
    "array of objects": (
        lambda m, h: h * float(m.objects[0, 1]), lambda m, _: m.objects.__setitem__((0, 1), 3.0)
    ),
    "object in an array": (
        lambda m, h: h * m.objects[1, 0].factor,
        lambda m, _: setattr(m.objects[1, 0], "factor", 3.0),
    ),
    "number of C": (lambda m, h: h * m.number.value, lambda m, _: setattr(m.number, "value", 3.0)),
    "field of C": (
        lambda m, h: h * m.structure.factor, lambda m, _: setattr(m.structure, "factor", 3.0)
    ),
    "deterministic algorithms": (
        lambda m, h: h * (3 if torch.are_deterministic_algorithms_enabled() else 1),
        lambda m, _: (torch.use_deterministic_algorithms(True),
                      weakref.finalize(m, torch.use_deterministic_algorithms, False)),
    ),
    "flag of a backend": (
        lambda m, h: h * (3 if torch.backends.cudnn.benchmark else 1),
        lambda m, _: (setattr(torch.backends.cudnn, "benchmark", True),
                      weakref.finalize(m, setattr, torch.backends.cudnn, "benchmark", False)),
    ),
    "closure": (lambda m, h: h * CLOSURE[0](), lambda m, _: CLOSURE[1](3.0)),
    "environment": (
        lambda m, h: h * float(os.environ.get("MIPIN_TEST", "1.5")),
        lambda m, patch: patch.setenv("MIPIN_TEST", "3"),
    ),
    "name of an attribute": (
        lambda m, h: h * getattr(m, m.kind_of_factor) if "kind_of_factor" in vars(m) else h,
        lambda m, _: setattr(m, "kind_of_factor", "factor"),
    ),
    "forward of the object": (
        None, lambda m, _: setattr(m, "forward", lambda x: m.head(m.body(x) * 3))
    ),
    "forward of a part": (
        None, lambda m, _: setattr(m.head, "forward", MethodType(lambda s, x: x[:, :3] * 3, m.head))
    ),
    "forward of the class": (None, set_(Squares, "forward", lambda m, x: m.head(m.body(x) * 3))),
    "class": (None, lambda m, _: setattr(m, "__class__", Tripled)),
    "flag of detach": (branch, lambda m, _: setattr(m, "detached", True)),
    "flag of no_grad": (no_grad_branch, lambda m, _: setattr(m, "detached", True)),
    "module": (
        None, lambda m, _: setattr(m, "head", nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    ),
    "module of the same kind": (None, lambda m, _: setattr(m, "head", nn.Linear(5, 3))),
    "part": (None, lambda m, _: m.body.register_module("more", nn.Linear(2, 2))),
    "parameter": (None, lambda m, _: setattr(m.head, "weight", nn.Parameter(torch.rand(3, 5)))),
    "size of a parameter": (
        None,
        lambda m, _: (setattr(m.head, "weight", nn.Parameter(torch.rand(7, 5))),
                      setattr(m.head, "bias", None)),
    ),
    "size of its data": (
        None,
        lambda m, _: (setattr(m.head.weight, "data", torch.rand(2, 5)),
                      setattr(m.head.bias, "data", torch.rand(2))),
    ),
    "values of a parameter": (None, lambda m, _: m.head.weight.data.mul_(2)),
    "tied": (lambda m, h: h, lambda m, _: setattr(m.other, "weight", m.head.weight)),
    "hook": (None, lambda m, _: m.body.register_forward_hook(halved)),
    "hook of every module": (
        None,
        lambda m, _: weakref.finalize(
            m, nn.modules.module.register_module_forward_hook(halved).remove
        ),
    ),
    "pre-hook": (None, lambda m, _: m.head.register_forward_pre_hook(lambda s, a: (a[0] * 2,))),
    "parametrization": (
        None,
        lambda m, _: nn.utils.parametrize.register_parametrization(m.head, "weight", Doubled()),
    ),
    "partial": (
        partial(lambda k, m, h: h * k["factor"], {"factor": 1.5}),
        lambda m, _: m.way.args[0].update(factor=3.0),  # type: ignore[union-attr]
    ),
}  # fmt: skip


def halves(x: Tensor) -> Tensor:
    return x / 2


class Structure(ctypes.Structure):
    """A structure of C."""

    _fields_ = (("factor", ctypes.c_double),)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return w * 2


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_by_the_same_object_and_by_a_fresh_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way, change = CHANGES[name]
    monkeypatch.setitem(sys.modules, "a_library", LIBRARY)
    model = Squares(way).eval()
    model.event, model.process_event = threading.Event(), multiprocessing.Event()
    model.process_value = multiprocessing.Value("d", 1.5)
    model.objects = np.array([[1.5, 1.5], [Settings(), None]], dtype=object)
    model.number, model.structure = ctypes.c_double(1.5), Structure(1.5)
    if name == "thread's variable":
        model.local = threading.local()
        model.local.factor = 1.5
    if name in ("minus zero", "one is not true"):
        model.factor = 0.0 if name == "minus zero" else 1
    same = GuidedBackprop(model)
    before = same.attribute(X, target=1)
    torch.testing.assert_close(before, gradient(model))
    change(model, monkeypatch)
    model.eval()
    expected = gradient(model)
    assert torch.allclose(before, expected) == (name in ("part", "tied")), "a change has an effect"
    torch.testing.assert_close(explained(model), expected)
    torch.testing.assert_close(same.attribute(X, target=1), expected)
    monkeypatch.undo()


def test_fresh_objects_of_all_kinds_share_a_capture(traced: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(1)).eval()
    first = check(model, X)
    assert len(traced) == 1
    with pytest.warns(UserWarning, match="logits"):
        maps = [LRP(model).attribute(X, target=t) for t in (0, 0, 1)]
        inverse = InverseNetwork(model).fit(X, progress=False)
    MIPINAttribution(model, inverse).attribute(X, target=1)
    assert str(check(model, X)) == str(first)
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    assert len(traced) == 1
    with pytest.warns(UserWarning, match="its result"):
        guided = GuidedBackprop(model[2:]).attribute(X.repeat(1, 2)[:, :5], 1)
    torch.testing.assert_close(guided, gradient(model[2:], X.repeat(1, 2)[:, :5]))
    check(model, torch.rand(3, 2, 4))
    assert len(traced) == 3


def test_a_map_at_the_model_itself_is_that_of_its_own_output() -> None:
    """Methods that start from logits share a graph with those that do not, but not its output."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Softmax(1)).eval()
    with pytest.warns(UserWarning, match="logits"):
        first = LayerPropagation(LRP(model), model).attribute(X, target=1)
    assert (first[:, 1] == model[:2](X)[:, 1]).all()
    with pytest.warns(UserWarning, match="its result"):
        second = LayerPropagation(GuidedBackprop(model), model).attribute(X, target=1)
    assert torch.equal(second, torch.tensor([0.0, 1, 0]).expand(5, 3))


class Keeps(Squares):
    """Counts its calls, and keeps its features in several ways."""

    total = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        Keeps.total += 1
        self.feat, self.batch, self.space.shape = self.body(x), len(x), x.shape
        self.space.deep["last"] = self.feat
        return super().forward(x)


def test_counters_and_recordings_cost_no_capture(traced: list[int]) -> None:
    model = Keeps().eval()
    kept, acts = {}, list[Tensor]()
    model.acts = {"all": acts}
    model.body.register_forward_hook(lambda m, a, y: kept.__setitem__("body", y))
    model.body.register_forward_hook(lambda m, a, y: model.acts["all"].append(y))
    model.head.register_forward_hook(lambda m, a, y: setattr(m, "last", y))
    same = GuidedBackprop(model)
    for n in range(2, 6):
        model(X[:n])
        torch.testing.assert_close(explained(model), gradient(model))
        torch.testing.assert_close(same.attribute(X[:n], target=1), gradient(model, X[:n]))
    assert len(traced) == 1
    assert model.calls == 12 and len(acts) == 24, "explanations add nothing"


READ: dict[str, Callable[[Squares, Tensor], Tensor]] = {
    "branch": lambda m, h: h * 3 if m.calls > 3 else h,
    "detached": lambda m, h: h.detach() + h if m.calls > 3 else h * 2,
    "factor": lambda m, h: h * m.calls,
    "length": lambda m, h: h * 3 if len(m.factors) > 5 else h,
    "module": lambda m, h: h * (m.body.bias if m.calls > 3 else m.head.weight[0]),
    "key": lambda m, h: h * 3 if 4 in m.space.deep else h,
}


@pytest.mark.parametrize("name", READ)
def test_a_counter_that_is_read_gives_the_right_map_at_each_call(name: str) -> None:
    def way(m: Squares, h: Tensor) -> Tensor:
        m.calls += 1
        m.factors.append(1.0)
        m.space.deep[m.calls] = 1
        return READ[name](m, h)

    model = Squares(way).eval()
    same = GuidedBackprop(model)
    for _ in range(6):
        found, again = explained(model), same.attribute(X, target=1)
        expected = gradient(model)  # which counts
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(again, expected)


def test_what_a_model_writes_may_not_hide_a_change(traced: list[int]) -> None:
    """A dictionary that holds a recording holds a setting too."""

    def way(m: Squares, h: Tensor) -> Tensor:
        m.space.deep["last"] = h
        return h * 3 if m.space.deep.get("on") else h

    model = Squares(way).eval()
    for on in (False, True, True, False):
        model.space.deep["on"] = on
        torch.testing.assert_close(explained(model), gradient(model))
    assert len(traced) == 2


@pytest.mark.parametrize("kind", ["LRP", "DeepLift", "GuidedBackprop", "Deconvolution"])
def test_what_captum_leaves_costs_no_capture(kind: str, traced: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    before, same = LRP(model).attribute(X, target=1), LRP(model)
    for x in (X, X[:2]):
        getattr(captum.attr, kind)(model).attribute(x, target=1)
        assert torch.equal(LRP(model).attribute(X, target=1), before)
        assert torch.equal(same.attribute(X, target=1), before)
    assert len(traced) == 1


def test_what_captum_leaves_is_seen_where_a_model_reads_it(traced: list[int]) -> None:
    model = Squares(lambda m, h: h * (3 if m.body.activations else 2)).eval()
    model.body.activations = ()
    torch.testing.assert_close(explained(model), gradient(model))
    captum.attr.LRP(nn.Sequential(model.body)).attribute(X, target=1)
    assert model.body.activations
    torch.testing.assert_close(explained(model), gradient(model))
    assert len(traced) == 2


def test_toggling_costs_one_capture_a_state(traced: list[int]) -> None:
    model = Squares(branch).eval()
    for detached in (False, True, False, True):
        model.detached = detached
        torch.testing.assert_close(explained(model), gradient(model))
    assert len(traced) == 2


def test_all_methods_share_one_capture(traced: list[int]) -> None:
    model = Squares(lambda m, h: h.relu()).eval()
    InverseNetwork(model).fit(X, 1, progress=False)
    patterns = Patterns(model, estimator="linear").fit(X, progress=False)
    for method in (LRP(model), GuidedBackprop(model), PatternNet(model, patterns)):
        method.attribute(X, target=1)
    assert len(traced) == 1


def test_operators_fill_caches_of_their_own_which_cost_no_capture(traced: list[int]) -> None:
    """They do so at their first call: no other test calls these two."""
    for operator in (torch.ops.aten.rad2deg.default, torch.ops.aten.deg2rad):
        model = Squares(lambda m, h, called=operator: called(h)).eval()
        for _ in range(2):
            capture_module.capture(model, (X,))
    assert len(traced) == 2


def test_methods_that_see_where_gradients_are_off_have_a_graph_of_their_own(
    traced: list[int],
) -> None:
    model = Squares(no_grad_branch).eval()
    model.detached = True
    for method in (LRP, GuidedBackprop, LRP, GuidedBackprop):
        method(model).attribute(X, target=1)
    assert len(traced) == 2
    torch.testing.assert_close(explained(model), gradient(model))


def test_graphs_end_with_their_model() -> None:
    model = Keeps().eval()
    model.me, model.kept = [model], []
    model.body.register_forward_hook(lambda m, a, y, model=model: model.kept.append(y))
    references = [weakref.ref(model), weakref.ref(model.body.weight), weakref.ref(model.settings)]
    same = GuidedBackprop(model)
    for _ in range(2):
        model(X)
        same.attribute(X, target=1)
        explained(model)
        check(model, X)
    del model, same
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_copies_have_their_own_graphs(traced: list[int]) -> None:
    model = Squares(scaled).eval()
    same = GuidedBackprop(model)
    same.attribute(X, target=1)
    for other in (copy.deepcopy(same), pickle.loads(pickle.dumps(same))):
        other.model.head = nn.Linear(5, 3)
        torch.testing.assert_close(other.attribute(X, target=1), gradient(other.model))
    torch.testing.assert_close(same.attribute(X, target=1), gradient(model))
    assert len(traced) == 3


def scaled(m: Squares, h: Tensor) -> Tensor:
    return h * FACTOR


def test_threads_share_one_capture(traced: list[int]) -> None:
    model, results = Keeps().eval(), list[Tensor]()
    threads = [threading.Thread(target=lambda: results.append(explained(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = gradient(model)
    assert len(results) == 4 and all(torch.allclose(one, expected) for one in results)
    assert len(traced) == 1


def test_a_replaced_object_is_seen_even_at_the_same_address(traced: list[int]) -> None:
    """What is compared by identity is another object if the first one is gone."""
    model = Squares(lambda m, h: m.function(h)).eval()

    def make(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda h: h * factor

    for factor in (1.5, 3.0, 4.5):
        model.function = None
        gc.collect()
        model.function = make(factor)
        torch.testing.assert_close(explained(model), gradient(model))
    assert len(traced) == 3


def test_containers_in_a_circle_are_read_once() -> None:
    """Without that, twelve lists that contain each other would be read 12⁴⁰ times."""
    lists: list[list[Any]] = [[] for _ in range(12)]
    for one in lists:
        one += lists
    before = leaves(lists)
    assert len(before) < 200 and [*map(id, leaves(lists))] == [*map(id, before)]
    lists[7].append(1.5)
    assert leaves(lists) != before


def test_an_assert_does_not_lead_into_pytest() -> None:
    def checked(model: Any, h: Tensor) -> Tensor:
        assert h.ndim == 2
        return h

    assert not any("session" in path for path in State(Squares(checked).eval()).entries)


def test_an_object_that_cannot_be_read_is_captured_each_time(traced: list[int]) -> None:
    class Unreadable(dict[str, Any]):
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("not to be read")

    model = Squares().eval()
    model.unreadable = Unreadable()
    for _ in range(2):
        torch.testing.assert_close(explained(model), gradient(model))
    assert len(traced) == 2


class Titled(nn.Module):
    """A model whose code uses an installed package that defines none of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shown = nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Any:
        if self.shown:
            pyplot.title("a title")
        return self.layer(x)


def test_the_code_of_an_installed_package_is_read_only_if_it_defines_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = State(Titled())
    assert not any("matplotlib.axes" in part for path in state.entries for part in path)
    monkeypatch.setattr(pyplot, "title", lambda text: None)
    assert not state.holds()
    state = State(resnet18())
    monkeypatch.setattr(resnet.BasicBlock, "forward", lambda self, x: x)
    assert not state.holds()
