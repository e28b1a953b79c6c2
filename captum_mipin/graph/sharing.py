"""The graphs of a model that all objects share which explain the model.

A graph is kept as long as its model. It is used again if the model's state is the same as when it
was captured, see :mod:`captum_mipin.graph.state`. What the model itself writes while it runs, such
as a counter or recorded features, may differ: then the model is called once to see if it still runs
the same operations. So is a model whose code computes names, such as ``getattr(self, "run_" + a)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import RLock
from typing import Any
from weakref import ref

import torch
from torch import nn

from captum_mipin.graph.rehearsal import Rehearsal, rehearse
from captum_mipin.graph.signature import Signature
from captum_mipin.graph.state import Path, State
from captum_mipin.types import Extras, Inputs, Output

#: Largest number of graphs of one model; each is for other inputs, outputs or states.
_GRAPHS = 16

#: Attributes that Captum's LRP and DeepLift write to modules.
_CAPTUMS = ("activations", "activation", "rule", "input", "output", "input_ref", "output_ref")


@dataclass
class _Entry:
    """A graph, and what it was captured for.

    Attributes:
        key: Signature of the call, which output, and the settings of torch.
        detached: See :func:`captum_mipin.graph.capture.capture`; None if the graph is the same for
            both values.
        state: The last state of the model for which the graph was found to be valid.
        graph: The graph.
        rehearsal: What a call of the model does; None if it failed, or if no call was needed.
    """

    key: Any
    detached: bool | None
    state: State
    graph: Any
    rehearsal: Rehearsal | None


class _Model:
    """The graphs of one model."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._state: State | None = None
        self.lock = RLock()

    def state(self, model: nn.Module) -> State:
        """Return the present state of the model."""
        if self._state is None or not self._state.holds():
            self._state = State(model)
        return self._state

    def find(
        self, key: Any, detached: bool, state: State, call: Callable[[bool], Rehearsal | None]
    ) -> Any:
        """Return a graph that is valid in the present state, None if there is none.

        Args:
            key: See :class:`_Entry`.
            detached: See :class:`_Entry`.
            state: The present state.
            call: Function that returns what a call of the model does.
        """
        for entry in reversed(self._entries.copy()):
            fits = entry.key == key and entry.detached in (None, detached)
            if fits and _holds(entry, state, call):
                entry.state = state
                self._entries.remove(entry)
                self._entries.append(entry)
                return entry.graph
        return None

    def may_differ(self, key: Any, state: State) -> bool:
        """Return True if what Captum writes to modules has called for another graph.

        Args:
            key: See :class:`_Entry`.
            state: The present state.
        """
        again = any(entry.key == key for entry in self._entries)
        return again and any(map(state.may_read, _CAPTUMS))

    def add(self, entry: _Entry) -> None:
        """Keep a graph, and drop the one that was not used for the longest time."""
        self._entries = [*self._entries, entry][-_GRAPHS:]


#: ``id`` of a model that is in use → a reference to it, and its graphs.
_MODELS: dict[int, tuple[Any, _Model]] = {}
_LOCK = RLock()


def share(
    model: nn.Module,
    call: tuple[Inputs, Extras, bool],
    output: Output,
    detached: bool,
    make: Callable[[], Any],
) -> Any:
    """Return the graph of a model for a call; ``make`` captures it if there is none yet.

    Args:
        model: The model.
        call: Inputs, further arguments, and whether examples share these.
        output: See :func:`captum_mipin.graph.capture.capture`.
        detached: See :func:`captum_mipin.graph.capture.capture`.
        make: Function that captures the graph.
    """
    graphs = _graphs_of(model)
    with graphs.lock:
        # behind the lock: an export of another thread changes some of torch's settings for a while
        key = Signature.of(*call), repr(output), _modes()
        try:
            state = graphs.state(model)
        except Exception:  # of any type: an object may define how it is read
            return make()

        @cache
        def rehearsed(one: bool) -> Rehearsal | None:
            return rehearse(model, call, output, state, one)

        graph = graphs.find(key, detached, state, rehearsed)
        if graph is None:
            graph = make()
            writes = graph.writes or state.dynamic or graphs.may_differ(key, state)
            rehearsal = rehearsed(graph.single) if writes else None
            chosen = detached if graph.switches else None
            graphs.add(_Entry(key, chosen, state, graph, rehearsal))
        return graph


def _graphs_of(model: nn.Module) -> _Model:
    with _LOCK:
        known = _MODELS.get(id(model))
        if known is None or known[0]() is not model:
            number = id(model)
            known = ref(model, lambda _: _MODELS.pop(number, None)), _Model()
            _MODELS[number] = known
        return known[1]


def _modes() -> tuple[Any, ...]:
    """Return the settings of torch on which a graph depends, or that a model may read."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._len_torch_function_stack(),
    )


def _holds(entry: _Entry, state: State, call: Callable[[bool], Rehearsal | None]) -> bool:
    """Return True if a graph is valid in the present state of its model."""
    if entry.state is state and not state.dynamic:
        return True
    changes = [path for path in entry.state.changes(state) if _matters(path, state)]
    if not changes and not state.dynamic:
        return True
    then, now = entry.rehearsal, call(entry.graph.single) if entry.rehearsal else None
    if then is None or now is None or then.operations != now.operations:
        return False
    then.written.update(now.written)
    return all(_is_written(path, then.written) for path in changes)


def _captums(path: Path) -> str | None:
    """Return the name of an attribute if Captum writes it to modules, else None."""
    steps = path
    while steps[:1] == ("_modules",):
        steps = steps[2:]
    return steps[0] if steps and steps[0] in _CAPTUMS else None


def _matters(path: Path, state: State) -> bool:
    """Return False for what Captum has left on a module if the model's code cannot read it."""
    name = _captums(path)
    return name is None or state.may_read(name)


def _is_written(path: Path, written: set[Path]) -> bool:
    """Return True if calls of the model, or Captum, write to a place of the state."""
    if _captums(path):
        return True
    return any(path[:length] in written for length in range(len(path) + 1))
