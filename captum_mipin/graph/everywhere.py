"""Hooks that torch runs for every module: one thread may leave them out, others run them."""

from collections.abc import Callable
from threading import RLock, get_ident
from typing import Any

from torch.nn.modules import module as hooks_of_all

_LOCK = RLock()


class _Replaced:
    """Stands for a hook of every module.

    Attributes:
        hook: The hook, which most threads run.
        calls: Thread → what it runs instead.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        self.calls: dict[int, Callable[..., Any]] = {}

    def __call__(self, *handed: Any) -> Any:
        return self.calls.get(get_ident(), self.hook)(*handed)


def tables_of_all() -> tuple[dict[int, Any], dict[int, Any]]:
    """Return torch's own tables: the forward hooks and the pre-hooks of every module, by key."""
    return hooks_of_all._global_forward_hooks, hooks_of_all._global_forward_pre_hooks


def original(call: Any) -> Any:
    """Return the user's hook, also where something else stands for it."""
    return call.hook if isinstance(call, _Replaced) else call


def replace_here(table: dict[int, Any], key: int, call: Callable[..., Any]) -> None:
    """Let this thread run ``call`` in the place of a hook, until :func:`give_back`."""
    with _LOCK:
        if key in table:  # else the user has removed it
            if not isinstance(table[key], _Replaced):
                table[key] = _Replaced(table[key])
            table[key].calls[get_ident()] = call


def give_back(table: dict[int, Any], key: int) -> None:
    """Let this thread run a hook again, see :func:`replace_here`."""
    with _LOCK:
        stand_in = table.get(key)
        if isinstance(stand_in, _Replaced):
            stand_in.calls.pop(get_ident(), None)
            if not stand_in.calls:
                table[key] = stand_in.hook
