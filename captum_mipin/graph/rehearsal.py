"""Calls of a copy of a model that record its operations, and the state that it writes to."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from captum_mipin.graph.exporting import free_batch
from captum_mipin.graph.modules import tensor_bytes
from captum_mipin.graph.state import Path, State
from captum_mipin.graph.trials import Trial, examples_like
from captum_mipin.graph.turns import TURNS
from captum_mipin.types import Extras, Inputs, Output


class Rehearsal(NamedTuple):
    """What a call of a model does.

    Attributes:
        operations: One line per operation, with its settings and the origin of each argument, and
            one line where a module is entered or left.
        written: The places of the model's state that the call has written to.
    """

    operations: list[str]
    written: set[Path]


def rehearse(
    model: nn.Module, call: tuple[Inputs, Extras, bool], output: Output, state: State, one: bool
) -> Rehearsal | None:
    """Return what a call of a model does, None if the call fails.

    Everything that the call writes to is restored.

    Args:
        model: The model.
        call: Inputs, further arguments, and whether examples share these.
        output: Which output, see :func:`captum_mipin.graph.signature.select`.
        state: The present state of the model.
        one: Whether the model is called with one example, instead of a batch.
    """
    arguments = examples_like(*call)[0] if one else free_batch(*call)[0]
    try:
        trial = Trial(model, output)
        record = _Record(trial.twin)
        before = State(trial.twin)
        trial.restores = False
        try:
            with TURNS.explaining():
                result = trial.run(arguments, mode=record)
            written = _changes(state, model) | _changes(before, trial.twin)
        finally:
            trial.restore()
        return Rehearsal([*record.lines, record.name(result)], written)
    except Exception:  # of any type: the model decides
        return None


def _changes(before: State, model: nn.Module) -> set[Path]:
    return set() if before.holds() else before.changes(State(model))


class _Record(TorchDispatchMode):
    """A context that records each operation on tensors.

    Args:
        model: The model that is called.

    Attributes:
        lines: See :attr:`Rehearsal.operations`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # so that no id is used again
        for path, module in model.named_modules():
            module.register_forward_pre_hook(self._line(f"enter {path}"), prepend=True)
            module.register_forward_hook(self._line(f"leave {path}"))
        model.register_forward_pre_hook(self._begin, prepend=True)

    def _begin(self, model: nn.Module, arguments: Any) -> None:
        """Give names to weights and arguments when the call begins."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._add(tensor, f"weight {name}")
        for index, leaf in enumerate(pytree.tree_leaves(arguments)):
            self._add(leaf, f"argument {index}")

    def _line(self, text: str) -> Any:
        return lambda *_: self.lines.append(text)

    def _add(self, leaf: Any, name: str) -> None:
        if isinstance(leaf, Tensor) and id(leaf) not in self._names:
            self._names[id(leaf)] = name
            self._kept.append(leaf)

    def name(self, value: Any) -> str:
        """Return where a tensor comes from, and any other value as text."""
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.name, value))}]"
        if not isinstance(value, Tensor):
            return f"{type(value).__name__} {value!r}"
        if id(value) not in self._names:  # neither a weight, nor computed in this call
            content = hashlib.sha256(tensor_bytes(value)).hexdigest()
            self._add(value, f"constant {value.shape} {value.dtype} {content}")
        return self._names[id(value)]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and record it."""
        named = [args, *(kwargs or {}).items()]
        self.lines.append(f"{function} {torch.is_grad_enabled()} {self.name(named)}")
        result = function(*args, **(kwargs or {}))
        for index, leaf in enumerate(pytree.tree_leaves(result)):
            self._add(leaf, f"result {len(self.lines)} {index}")
        return result
