"""Forward hooks that only observe, such as those that log a mean: a capture leaves them out.

torch.export cannot follow a hook that reads values, as ``float(y.mean())``. It is left out if it
cannot change the model's output: it returns None, changes no tensor that it is handed, draws no
random numbers, and writes to nothing that the model's code can read.
"""

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from captum_mipin.graph.kept import Kept, equal, version_of
from captum_mipin.graph.modules import named_tensors
from captum_mipin.graph.plain import ATOMS
from captum_mipin.graph.state import State

_TABLES = ("_forward_hooks", "_forward_pre_hooks")


class Hook(NamedTuple):
    """A forward hook.

    Attributes:
        table: The hooks of its module, by key.
        key: Its key.
        call: The hook itself.
        place: The path and the class of its module, for error messages.
    """

    table: dict[int, Any]
    key: int
    call: Any
    place: str

    def __str__(self) -> str:
        function: Any = self.call
        while isinstance(function, partial):
            function = function.func
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        return f"the forward hook {name.rpartition('<locals>.')[2]!r} of {self.place}"


def hooks_of(model: nn.Module) -> list[Hook]:
    """Return the forward hooks and pre-hooks of all modules of a model."""
    return [
        Hook(table, key, call, f"{path or 'the model'!r} ({type(module).__name__})")
        for path, module in model.named_modules()
        for table in (vars(module)[name] for name in _TABLES)
        for key, call in table.items()
    ]


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Take all forward hooks from a model, and give them back after the block."""
    tables = [vars(module)[name] for module in model.modules() for name in _TABLES]
    before = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.update(entries)


class Watch:
    """A block of calls of a model, which shows what the model's hooks do.

    Args:
        model: A copy of the user's model.
        hooks: Its hooks.

    Attributes:
        reasons: Key of a hook that may change the model's output → what it does.
    """

    def __init__(self, model: nn.Module, hooks: list[Hook]) -> None:
        self._model, self._hooks = model, hooks
        self.reasons: dict[int, str] = {}
        with without_hooks(model):
            self._state = State(model)

    def __enter__(self) -> "Watch":
        for hook in self._hooks:
            hook.table[hook.key] = partial(self._call, hook)
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.table[hook.key] = hook.call

    def _call(self, hook: Hook, module: nn.Module, *handed: Any) -> Any:
        """Run a hook and note what it does besides observing."""
        with without_hooks(self._model):
            kept = Kept(self._model)
        leaves, form = pytree.tree_flatten(handed)
        copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        before, random = self._readable(kept), torch.random.get_rng_state()
        result = hook.call(module, *handed)
        present, now = pytree.tree_flatten(handed)
        written = _first_difference(before, self._readable(kept))
        if result is not None:
            reason = "returns a value"
        elif now != form or not all(map(_same, present, copies)):
            reason = "may change what it is handed"
        elif written is not None:
            reason = f"writes to {str(written)!r}, which the model's code may read"
        elif not torch.equal(random, torch.random.get_rng_state()):
            reason = "draws random numbers"
        elif _may_act(hook.call):
            reason = "may act on the model for some values only, by its code"
        else:
            return None
        self.reasons.setdefault(hook.key, reason)
        return result

    def _readable(self, kept: Kept) -> list[list[tuple[Any, Any, Any]]]:
        """Return all places that the model's code may read, each with its present entries."""
        tensors = [(path, x, version_of(x)) for path, x in named_tensors(self._model)]
        places = [(True, tensors), *kept.contents()]
        reads = self._state.may_read
        return [
            [one for one in entries if not named or reads(str(one[0]).rpartition(".")[2])]
            for named, entries in places
        ]


def _may_act(call: Any) -> bool:
    """Return True if a hook's code may change what it is handed, for values that were not tried.

    A hook without branches acts in each call, or in none. One with branches may return something,
    or write in place, in some of them. What is written by ``x.data`` is not counted by torch.
    """
    while isinstance(call, partial):
        call = call.func
    call = getattr(call, "__func__", call)
    code = getattr(call, "__code__", None) or getattr(type(call).__call__, "__code__", None)
    if code is None:
        return True
    steps = list(dis.get_instructions(code))
    in_place = any(name.endswith("_") and not name.endswith("__") for name in code.co_names)
    if not any("JUMP" in step.opname and "IF" in step.opname for step in steps):
        return in_place and "data" in code.co_names
    handed, line, lines = code.co_varnames[: code.co_argcount], 0, list[int]()
    for step in steps:
        starts = getattr(step, "line_number", None) or step.starts_line
        line = line if starts is None or isinstance(starts, bool) else starts
        lines.append(line)
    read = {line for step, line in zip(steps, lines, strict=True) if step.argval in handed}
    for before, step, line in zip([steps[0], *steps], steps, lines, strict=False):
        returned = before if step.opname == "RETURN_VALUE" else step
        if step.opname.startswith("RETURN") and (
            "CONST" not in returned.opname or returned.argval is not None
        ):
            return True
        augmented = step.opname == "BINARY_OP" and step.argrepr.endswith("=")
        writes = augmented or step.opname.startswith(("INPLACE", "STORE_SUBSCR"))
        if (writes and line in read) or (step.opname == "STORE_ATTR" and step.argval == "data"):
            return True
    return in_place


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
