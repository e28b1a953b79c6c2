"""Calls that show if a model computes each example alone, and the same in each call.

Calls of the model are for models that cannot be captured, and for those whose graph is in doubt. A
graph is called where it is the same for the model and for another meaning of its arguments.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError
from captum_mipin.graph.exporting import FixedBatchError
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import is_random, is_size, operation, place
from captum_mipin.graph.rows import check_rows, loses_rows
from captum_mipin.graph.signature import per_example
from captum_mipin.graph.trials import EXAMPLES, Trial, close, examples_like, joined
from captum_mipin.types import Extras, Inputs

if TYPE_CHECKING:
    from captum_mipin.graph.capture import CapturedGraph

#: Batches of the examples 0, 1 and 2: each example is there with others, and alone.
_BATCHES: tuple[tuple[int, ...], ...] = ((0, 1, 2), (0, 2, 2), (1, 1, 2), (0,), (1,), (2,))
#: Batches of the same examples, in other places.
_TURNED: tuple[tuple[int, ...], ...] = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
#: Operations whose results are the same at all places of a batch, if their arguments are.
_UNIFORM = frozenset(
    {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
     "zeros_like", "ones_like", "full_like", "empty_like", "expand", "linear", "mul", "add",
     "sigmoid", "tanh"}
)  # fmt: skip


#: Arguments of a call: inputs, further arguments, and whether examples share these.
Call = tuple[Inputs, Extras, bool]


@dataclass(frozen=True)
class Fault:
    """What a model does besides computing each example alone.

    Attributes:
        kind: "random", or "mixing" for a result that depends on the other examples.
        path: Path of the first module whose result shows it; "" for the model itself.
    """

    kind: Literal["random", "mixing"]
    path: str


def fault(
    trial: Trial, inputs: Inputs, extras: Extras, meanings: Sequence[bool] = (False, True)
) -> Fault | None:
    """Return what a model does besides computing each example alone; None if it does nothing else.

    Args:
        trial: The model; calls that it does not take show nothing.
        inputs: Tensors (batch, ...). The examples of the calls are like the first one of these.
        extras: Further arguments of ``forward``.
        meanings: Whether examples share these; with several meanings, a model that does nothing
            else with one of them does nothing.

    Examples:
        >>> import torch
        >>> norm = nn.BatchNorm1d(3, track_running_stats=False)
        >>> model = nn.Sequential(nn.Linear(2, 3), norm).eval()
        >>> fault(Trial(model, None), (torch.randn(4, 2),), ())
        Fault(kind='mixing', path='1')
    """
    found: list[Fault | None] = []
    for shared in meanings if extras else (False,):
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
            found.append(_fault(trial, examples, known))
    return None if None in found else next(iter(found), None)


def check_one(
    trial: Trial,
    call: Call,
    run: Callable[[Inputs, Extras], Tensor],
) -> None:
    """Raise FixedBatchError if a model computes something else for a batch of one example.

    If it computes the same, two calls of the model do not differ either: all that is no operation
    on tensors, such as a number of NumPy, is a constant of the graph.

    Args:
        trial: The model.
        call: Inputs, further arguments, and whether examples share these.
        run: Function that runs the graph for such a call: inputs and further arguments → output.
    """
    count, example, expected = len(call[0]), examples_like(*call)[0], trial.alone
    if expected is None:  # the model takes no single example
        return
    try:
        device = expected.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # as for trial.run
            found = run(example[:count], example[count:])
    except Exception:  # of any type: the graph takes no single example
        trial.check_repeats(example)
        return
    if found.numel() != expected.numel() or not close(found, expected.reshape(found.shape)):
        raise FixedBatchError(
            "the model computes something else for a batch of one example; expected the same "
            "operations for all batch sizes: remove conditions on x.shape[0]"
        )


def check_alone(trial: Trial, call: Call, captured: "CapturedGraph") -> None:
    """Raise CaptureError if a captured graph takes a shared argument, or places, for examples.

    An argument as long as the batch is shared if the model mixes the examples with one row for each
    of them, and does not with all of it: a table of classes, the matrix of a graph. See
    :mod:`captum_mipin.graph.rows` for numbers computed from all rows, which leave this open.

    Args:
        trial: The model.
        call: Inputs, further arguments, and whether examples share these.
        captured: The graph for such a call.
    """
    inputs, extras, _ = call
    graph = captured.graph
    examples, own = examples_like(*call), any(per_example(*call)[len(inputs) :])
    placed = _placed(graph)
    if not (own or placed) or any(map(is_random, graph.nodes)):
        return
    interpreter = fx.Interpreter(fx.GraphModule(nn.Module(), graph), garbage_collect_values=False)

    def moves(batches: Sequence[tuple[int, ...]]) -> bool:
        found = []
        for rows in batches:
            batch = joined([examples[i] for i in rows], EXAMPLES)
            known = captured.values(trial.twin, batch[: len(inputs)], batch[len(inputs) :])
            given = [known.get(n.name) for n in graph.find_nodes(op="placeholder")]
            with torch.no_grad():
                found.append((rows, interpreter.run(*given)[0]))
        return _mixed(found)

    mixed = own
    with suppress(Exception):  # of any type: the graph does not take so few rows
        mixed = own and moves(_BATCHES[:EXAMPLES])
    if mixed and _is_shared(trial, call, captured) and fault(trial, inputs, extras) is None:
        raise CaptureError(
            "each example would depend on the rows of other examples in a further argument; "
            "expected an argument that all examples share, since the model then computes "
            "each example alone: pass a batch of another size"
        )
    try:
        turned = bool(placed) and moves(_TURNED)
    except Exception:  # of any type: the graph does not take such a batch
        return
    differ = [node for node in placed if _differs(interpreter.env[node], value_of(node))]
    if turned and differ:
        raise CaptureError(
            f"the result for an example depends on its place in the batch, by {differ[0].target} "
            f"in {place(differ[0]).path or 'the model itself'}; expected the same result at each "
            "place: compute positions along other dimensions than that of the batch"
        )


def check_shared(trial: Trial, call: Call, captured: "CapturedGraph") -> None:
    """Raise LostRowsError if arguments that a graph shares may have one row for each example.

    Args:
        trial: The model.
        call: Inputs, further arguments, and whether examples share these.
        captured: The graph for such a call.
    """
    inputs, extras, shared = call
    if shared and _as_long_as_the_batch(captured, call) and not takes_all_rows(trial, call):
        check_length(captured, inputs, extras, captured.weights(trial.twin))


def check_length(
    captured: "CapturedGraph", inputs: Inputs, extras: Extras, weights: Mapping[str, Any]
) -> None:
    """Raise LostRowsError if a graph shares arguments as long as a batch, and loses their rows.

    Args:
        captured: The graph for calls in which examples share the further arguments.
        inputs: Tensors (batch, ...).
        extras: Further arguments.
        weights: Name of a placeholder → its value, for parameters and buffers, as far as known.
    """
    further = _as_long_as_the_batch(captured, (inputs, extras, True))
    leaves = zip(captured.arguments, pytree.tree_leaves((inputs, extras)), strict=True)
    given = {name: leaf for name, leaf in leaves if name and name not in captured.inputs}
    longer = {name: torch.cat([leaf, leaf[:1]]) for name, leaf in further.items()}
    check_rows(captured.graph, captured.inputs, {**weights, **given}, longer)


def _is_shared(trial: Trial, call: Call, captured: "CapturedGraph") -> bool:
    """Return True if the further arguments of a graph with a row for each example are shared."""
    further = list(_as_long_as_the_batch(captured, call))
    lost = loses_rows(captured.graph, captured.inputs, further)
    return lost is None or takes_all_rows(trial, call)


def takes_all_rows(trial: Trial, call: Call) -> bool:
    """Return True if one example has all rows of the further arguments.

    So it does in a batch of one, and if the model takes one example with all rows but looks for
    others if there is one row: the edges (2, edges) of a graph, means and deviations (2, features).
    """
    inputs, extras, _ = call
    if len(inputs[0]) == 1:
        return True
    one, every = (examples_like(inputs, extras, shared)[0] for shared in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as of the deviation of one row
        return _lacks_rows(trial, one) and bool(_results(trial, [every], 1))


def _lacks_rows(trial: Trial, example: Any) -> bool:
    """Return True if a model fails for an example as for want of rows, not as for their values."""
    try:
        trial.run(example)
    except ValueError as error:  # others are of norms, which want several rows for their statistics
        return "unpack" in str(error)
    except (IndexError, RuntimeError) as error:
        return not isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
    except Exception:  # of any type: the model decides what it refuses
        return False
    return False


def _as_long_as_the_batch(captured: "CapturedGraph", call: Call) -> dict[str, Tensor]:
    """Return the further arguments as long as the batch, by the names of their placeholders."""
    inputs, extras, _ = call
    leaves = zip(
        captured.arguments, pytree.tree_leaves((inputs, extras)),
        per_example(inputs, extras, shared=False), strict=True,
    )  # fmt: skip
    named = {name: leaf for name, leaf, own in leaves if own and name is not None}
    return {name: leaf for name, leaf in named.items() if name not in captured.inputs}


def _placed(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that have the size of the batch, but are not computed from its examples."""
    depends, found = set[fx.Node](), list[fx.Node]()
    for node in graph.nodes:
        value = value_of(node)
        sized = isinstance(value, Tensor) and not all(isinstance(n, int) for n in value.shape)
        filled = is_size(node) or operation(node).startswith("new_")
        filled = filled or operation(node).endswith("_like")
        if node.op == "placeholder":
            own = sized
        else:
            own = not filled and not depends.isdisjoint(node.all_input_nodes)
        if own:
            depends.add(node)
        elif sized:
            found.append(node)
    return found if any(operation(node) not in _UNIFORM for node in found) else []


def _differs(value: Tensor, traced: Tensor) -> bool:
    """Return True if a value differs between the places of a batch."""
    dims = [dim for dim, size in enumerate(traced.shape) if not isinstance(size, int)]
    return any(not torch.equal(value, value.narrow(dim, 0, 1).expand_as(value)) for dim in dims)


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
