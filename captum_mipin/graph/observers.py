"""Forward hooks that only observe, such as those that log a mean: a capture leaves them out.

torch.export cannot follow a hook that reads values, as ``float(y.mean())``. It is left out if it
cannot change the model's output: it returns None or the output itself, changes no tensor that it is
handed, draws no random numbers, and writes to nothing that the model's code can read.
"""

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from captum_mipin.graph.acting import Function, collects, is_branch, read
from captum_mipin.graph.everywhere import give_back, original, replace_here, tables_of_all
from captum_mipin.graph.kept import Kept, equal, version_of
from captum_mipin.graph.modules import named_tensors
from captum_mipin.graph.plain import ATOMS
from captum_mipin.graph.state import State
from captum_mipin.graph.writes import Saved

_TABLES = ("_forward_hooks", "_forward_pre_hooks")


class Hook(NamedTuple):
    """A forward hook.

    Attributes:
        table: The hooks of its module, or of every module, by key.
        key: Its key.
        call: The hook itself.
        place: The path and the class of its module, for error messages.
        before: Whether it is a pre-hook.
    """

    table: dict[int, Any]
    key: int
    call: Any
    place: str
    before: bool

    def __str__(self) -> str:
        function: Any = self.call
        while isinstance(function, partial):
            function = function.func
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        return f"the forward hook {name.rpartition('<locals>.')[2]!r} of {self.place}"

    @property
    def of_all(self) -> bool:
        """Return True for a hook of every module."""
        return any(self.table is table for table in tables_of_all())

    def replace(self, call: Any) -> None:
        """Put another function in its place; for a hook of every module, in this thread alone."""
        if self.of_all:
            replace_here(self.table, self.key, call)
        else:
            self.table[self.key] = call

    def put_back(self) -> None:
        """Put the hook itself in its place again."""
        if self.of_all:
            give_back(self.table, self.key)
        else:
            self.table[self.key] = self.call

    def leave_out(self) -> None:
        """Take the hook away; a hook of every module, from this thread alone."""
        self.replace(_nothing)


def _nothing(*handed: Any) -> None:
    """Stand for a hook that is left out."""


def hooks_of(model: nn.Module) -> list[Hook]:
    """Return the forward hooks and pre-hooks of a model's modules, and those of every module."""
    own = [
        (vars(module)[name], f"{path or 'the model'!r} ({type(module).__name__})", name)
        for path, module in model.named_modules()
        for name in _TABLES
    ]
    of_all = [
        (table, "every module", name) for table, name in zip(tables_of_all(), _TABLES, strict=True)
    ]
    return [
        Hook(table, key, original(call), place, name == _TABLES[1])
        for table, place, name in [*own, *of_all]
        for key, call in list(table.items())
    ]


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Take all forward hooks from the modules of a model, and give them back after the block."""
    tables = [vars(module)[name] for module in model.modules() for name in _TABLES]
    before = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.update(entries)


def _state_without_hooks(model: nn.Module) -> State:
    """Return the state that the code of a model can reach, without that of its hooks."""
    with _without_hooks(model):
        return State(model, hooks=False)


def may_read(model: nn.Module, name: str) -> bool:
    """Return True if the code of a model, without its hooks, may read a tensor of this name."""
    return _state_without_hooks(model).may_read(name.rpartition(".")[2])


def without_hooks(model: nn.Module) -> Kept:
    """Return what the code of a model can reach, without that of its hooks."""
    return Kept(model, _state_without_hooks(model).may_read)


class Watch:
    """A block of calls of a model, which shows what the model's hooks do.

    Args:
        model: A copy of the user's model.
        hooks: Its hooks.
        saved: Its weights and other tensors, which are saved before writes.

    Attributes:
        reasons: Key of a hook that may change the model's output → what it does.
    """

    def __init__(self, model: nn.Module, hooks: list[Hook], saved: Saved) -> None:
        self._model, self._hooks, self._saved = model, hooks, saved
        self.reasons: dict[int, str] = {}
        self._state = _state_without_hooks(model)

    def __enter__(self) -> "Watch":
        for hook in self._hooks:
            hook.replace(partial(self._call, hook))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.put_back()

    def _call(self, hook: Hook, module: nn.Module, *handed: Any) -> Any:
        """Run a hook and note what it does besides observing."""
        kept = Kept(self._model, self._state.may_read)
        leaves, form = pytree.tree_flatten(handed)
        copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        before, random = self._readable(kept), torch.random.get_rng_state()
        altered, versions = self._saved.altered(), list(map(version_of, leaves))
        result = hook.call(module, *handed)
        present, now = pytree.tree_flatten(handed)
        written = _first_difference(before, self._readable(kept))
        if result is not None and not _is_unchanged(hook, handed, result):
            reason = "returns a value"
        elif (
            now != form
            or not all(map(_same, present, copies))
            or versions != list(map(version_of, present))
        ):
            reason = "may change what it is handed"
        elif written is not None:
            reason = f"writes to {str(written)!r}, which the model's code may read"
        elif memory := self._written(altered):
            reason = f"writes to {memory!r}, which the model's code may read"
        elif not torch.equal(random, torch.random.get_rng_state()):
            reason = "draws random numbers"
        elif _may_act(hook.call, len(handed), result is not None):
            reason = "may act on the model for some values only, by its code"
        else:
            return None
        self.reasons.setdefault(hook.key, reason)
        return result

    def _written(self, before: dict[str, bytes]) -> str | None:
        """Return the name of a weight whose memory a hook has changed, None if there is none."""
        now, named = self._saved.altered(), dict(named_tensors(self._model))
        written = sorted(name for name, memory in now.items() if memory != before.get(name))
        reads = self._state.may_read
        return next((n for n in written if n in named and reads(n.rpartition(".")[2])), None)

    def _readable(self, kept: Kept) -> list[list[tuple[Any, Any, Any]]]:
        """Return all places that the model's code may read, each with its present entries."""
        tensors = [(path, x, version_of(x)) for path, x in named_tensors(self._model)]
        reads = self._state.may_read
        tensors = [one for one in tensors if reads(one[0].rpartition(".")[2])]
        return [tensors, *kept.contents()]


def _is_unchanged(hook: Hook, handed: tuple[Any, ...], result: Any) -> bool:
    """Return True if a hook returns what the module would return, or take, without it.

    A hook whose code may return something else for other values is left to :func:`_may_act`.
    """
    if not hook.before:
        expected = handed[-1]
    else:  # torch takes one value for a tuple of one
        expected = handed if len(handed) > 1 else handed[0]
        result = result if isinstance(result, tuple) else (result,)
    leaves, form = pytree.tree_flatten(expected)
    others, now = pytree.tree_flatten(result)
    return form == now and all(map(is_, leaves, others))


def _may_act(call: Any, count: int, returns: bool) -> bool:
    """Return True if a hook's code may change what it is handed, for values that were not tried.

    A hook without branches acts in each call, or in none. One with branches may return something,
    or write in place, in some of them; so may one that writes by ``x.data`` or NumPy, since torch
    does not count such writes.

    Args:
        call: The hook.
        count: Number of its arguments behind the module; the last one is what it may return.
        returns: Whether it has returned that.
    """
    function = Function.of(call)
    if function is None:
        return True
    steps = list(dis.get_instructions(function.call.__code__))
    last = function.arguments[len(function.bound) + count :][:1]
    known, branches = read(function), any(map(is_branch, steps))
    if (branches or returns) and _returns_something(steps, last[0] if last else None):
        return True
    return known.writes and (known.branches or known.uncounted)


def _returns_something(steps: list[dis.Instruction], argument: str | None) -> bool:
    """Return True if code may return something else than None or one of its arguments."""
    stored = [step for step in steps if "STORE_FAST" in step.opname or "DELETE" in step.opname]
    if any(argument in (step.argval if isinstance(step.argval, tuple) else (step.argval,))
           for step in stored):  # fmt: skip
        argument = None
    for before, step in zip([steps[0], *steps], steps, strict=False):
        if not step.opname.startswith("RETURN"):
            continue
        from_const = before if step.opname == "RETURN_VALUE" else step  # else it is RETURN_CONST
        nothing = "CONST" in from_const.opname and from_const.argval is None
        nothing = nothing or (before.opname.startswith("CALL") and collects(steps))
        whole = before.opname.startswith("LOAD_FAST") and before.argval == argument
        alone = step.opname != "RETURN_VALUE" or not step.is_jump_target
        if not alone or not (nothing or (whole and argument is not None)):
            return True
    return False


def _first_difference(before: Any, after: Any) -> Any:
    """Return the key of the first entry that has changed; None if there is none."""
    for old, new in zip(before, after, strict=True):
        for one, other in zip_longest(old, new):
            same = one and other and one[0] == other[0] and one[2] == other[2]
            if not (same and equal(one[1], other[1])):
                return (other or one)[0]
    return None


def _same(leaf: Any, copy: Any) -> bool:
    """Return True if what a hook was handed is what it was before."""
    if isinstance(leaf, Tensor):
        equals = isinstance(copy, Tensor) and leaf.shape == copy.shape
        return equals and torch.allclose(leaf, copy, 0, 0, equal_nan=True)
    return leaf is copy and type(leaf) in ATOMS
