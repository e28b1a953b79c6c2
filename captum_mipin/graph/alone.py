"""Calls that show if a model computes each example alone, and the same in each call.

They are for models that cannot be captured, and for those whose graph is in doubt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from captum_mipin.graph.trials import EXAMPLES, Trial, close, examples_like, joined
from captum_mipin.types import Extras, Inputs

#: Batches of the examples 0, 1 and 2: each example is there with others, and alone.
_BATCHES: tuple[tuple[int, ...], ...] = ((0, 1, 2), (0, 2, 2), (1, 1, 2), (0,), (1,), (2,))


@dataclass(frozen=True)
class Fault:
    """What a model does besides computing each example alone.

    Attributes:
        kind: "random", or "mixing" for a result that depends on the other examples.
        path: Path of the first module whose result shows it; "" for the model itself.
    """

    kind: Literal["random", "mixing"]
    path: str


def fault(trial: Trial, inputs: Inputs, extras: Extras) -> Fault | None:
    """Return what a model does besides computing each example alone; None if it does nothing else.

    Args:
        trial: The model; calls that it does not take show nothing.
        inputs: Tensors (batch, ...). The examples of the calls are like the first one of these.
        extras: Further arguments of ``forward``.

    Examples:
        >>> import torch
        >>> norm = nn.BatchNorm1d(3, track_running_stats=False)
        >>> model = nn.Sequential(nn.Linear(2, 3), norm).eval()
        >>> fault(Trial(model, None), (torch.randn(4, 2),), ())
        Fault(kind='mixing', path='1')
    """
    for shared in (False, True) if extras else (False,):
        examples = examples_like(inputs, extras, shared)
        calls = [
            (rows, _results(trial, [examples[i] for i in rows], len(rows))) for rows in _BATCHES
        ]
        if not any(results for rows, results in calls if len(rows) == EXAMPLES):
            size = len(inputs[0])  # the model may take batches of this size alone
            cycles = [
                tuple(rows[i % EXAMPLES] for i in range(size)) for rows in _BATCHES[:EXAMPLES]
            ]
            calls = [(rows, _results(trial, [examples[i] for i in rows], size)) for rows in cycles]
        known = [(rows, results) for rows, results in calls if results]
        if known:
            return _fault(trial, examples, known)
    return None


def _fault(
    trial: Trial,
    examples: Sequence[Any],
    calls: Sequence[tuple[tuple[int, ...], dict[str, Tensor]]],
) -> Fault | None:
    """Return what calls with different batches, and a call with another seed, show."""
    rows, first = calls[0]
    again = _results(trial, [examples[i] for i in rows], len(rows), seed=1)
    changed = [path for path in first if path in again and not close(again[path], first[path])]
    if "" in changed:
        return Fault("random", changed[0])
    paths = dict.fromkeys(path for _, results in calls for path in results)
    mixed = [path for path in paths if _mixed([(rows, r[path]) for rows, r in calls if path in r])]
    return Fault("mixing", mixed[0]) if "" in mixed else None


def _mixed(values: Sequence[tuple[tuple[int, ...], Tensor]]) -> bool:
    """Return True if the part of a value that belongs to one example differs between batches."""
    parts: dict[int, Tensor] = {}
    for rows, value in values:
        if value.ndim == 0 or len(value) % len(rows):
            continue  # no row per example
        for i, part in zip(rows, value.chunk(len(rows)), strict=True):
            if not close(part, parts.setdefault(i, part)):
                return True
    return False


def _results(trial: Trial, examples: list[Any], size: int, seed: int = 0) -> dict[str, Tensor]:
    """Return the result of each module in a call, inner ones first; nothing if the call fails."""
    results: dict[str, Tensor] = {}

    def note(path: str, module: nn.Module, arguments: Any, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, Tensor):
            results.setdefault(path, value)

    modules = [(path, module) for path, module in trial.twin.named_modules() if path]
    handles = [module.register_forward_hook(partial(note, path)) for path, module in modules]
    try:
        results[""] = trial.run(joined(examples, size), seed)
    except Exception:  # of any type: the model does not take such a batch
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return results
