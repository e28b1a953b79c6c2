"""Calls of a copy of a model with real values, which show what a graph does not show."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError
from captum_mipin.graph.iterators import StandIn
from captum_mipin.graph.kept import A_TENSOR, Kept
from captum_mipin.graph.marks import module_stack
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.modules import is_quantised
from captum_mipin.graph.observers import Watch, hooks_of, may_read, without_hooks
from captum_mipin.graph.signature import per_example, plain, select
from captum_mipin.graph.twin import twin_of
from captum_mipin.graph.writes import Fields
from captum_mipin.training import settle
from captum_mipin.types import Extras, Inputs, Output

#: Number of different examples in a batch for a trial.
EXAMPLES = 3

#: Number of rows among which different ones are looked for.
_ROWS = 64


class Trial:
    """A copy of a model that returns one tensor, and whose calls change nothing.

    Args:
        model: The model.
        output: Which output, see :func:`captum_mipin.graph.signature.select`.

    Attributes:
        twin: The copy.
        hooks: The user's forward hooks on it, and those of every module.
        written: Names of the attributes and variables that calls have written tensors to.
        restores: Whether each call writes back what it has written.
        alone: The result for one example, from :meth:`run_alone`; None if the call failed.
    """

    def __init__(self, model: nn.Module, output: Output) -> None:
        self.twin, self.written = twin_of(model), list[str]()
        self.hooks = hooks_of(self.twin)
        settle(self.twin)
        self._kept, self.restores = Kept(self.twin), True
        self._saved, self._advanced = self._kept.saved(self.twin), list[StandIn]()
        self.alone: Tensor | None = None

        def finish(module: nn.Module, arguments: Any, value: Any) -> Tensor:
            # before torch compares the attributes of the model with those before the call
            if self.restores:
                self.written += self._kept.restore()
            return select(value, output)

        self.twin.register_forward_hook(finish)

    @property
    def writes(self) -> bool:
        """Return True if a call has written to anything that existed before."""
        saved = self._saved
        return self._kept.changed or bool(saved.written or saved.exchanged or saved.graded)

    def check_data(self, equal: bool = False) -> None:
        """Raise CaptureError if calls have given other values to weights by ``.data = ...``.

        Args:
            equal: Refuse other memory with the same values as well, which is another ``.data`` too.
        """
        if self.alone is None:  # the error of the model itself is the reason
            return
        names = [n for n, differs in self._saved.exchanged.items() if differs or equal]
        if names and self.hooks:  # hooks that only look may do so with what the model does not read
            names = [n for n in names if n != A_TENSOR and may_read(self.twin, n)]
        if names:
            raise CaptureError(
                f"the model assigns to the data of {', '.join(map(repr, names))} while it runs, as "
                "by .data = ..., so that an explanation would depend on earlier calls; expected a "
                "forward and hooks that change no weight and no buffer: compute the changed value "
                "as a new tensor, or assign it before the explanation"
            )

    def check_weights(self) -> None:
        """Raise CaptureError if calls have written to weights or to their gradients."""
        self.check_data(equal=True)
        weights = {name for name, _ in self.twin.named_parameters()}
        if names := sorted(weights & self._saved.written):
            raise CaptureError(
                f"the model writes to its weights {', '.join(map(repr, names))} in place while it "
                "runs, so that an explanation would depend on earlier calls; expected a forward "
                "and hooks that change no weight: compute the changed weight as a new tensor, or "
                "write to it before the explanation"
            )
        if names := sorted(weights & self._saved.graded):
            raise CaptureError(
                "the model computes the gradients of its weights "
                f"{', '.join(map(repr, names))} while it runs; expected a forward and hooks "
                "without a backward pass: adapt the weights before the explanation"
            )

    def restore(self) -> None:
        """Write back all that calls have written."""
        self.written += self._kept.restore()
        self._saved.put_back()

    def run(
        self, arguments: Any, seed: int = 0, mode: AbstractContextManager[Any] | None = None
    ) -> Tensor:
        """Return the result of a call of the copy from a fixed seed.

        Args:
            arguments: The arguments of the call.
            seed: The seed.
            mode: Context in which the copy is called; None: without gradients.
        """
        device = pytree.tree_leaves(arguments)[0].device
        devices = [device] if device.type == "cuda" else []
        arguments = pytree.tree_map_only(Tensor, torch.clone, arguments)  # a call may write to them
        with (
            plain_modes(device), torch.random.fork_rng(devices), self.isolated(),
            mode or torch.no_grad(),
        ):  # fmt: skip
            torch.manual_seed(seed)
            result: Tensor = self.twin(*arguments)
        return result

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """Keep an export from writing to weights and from advancing iterators."""
        self._saved.save_written()
        try:
            with self._kept.standing_in():
                yield
        finally:
            self._saved.put_back()

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Keep calls of the copy from writing to weights, and give it buffers of its own."""
        own = [(vars(module), module._buffers) for module in self.twin.modules()]
        try:
            for attributes, buffers in own:
                attributes["_buffers"] = {
                    name: None if buffer is None else buffer.clone()
                    for name, buffer in buffers.items()
                }
            cloned = [Fields.of(*named) for named in self.twin.named_buffers()]
            with self._saved.watched(), self._kept.standing_in() as stand_ins:
                try:
                    yield
                finally:
                    self._advanced += [one for one in stand_ins if one.advanced]
                    self._saved.note(cloned)
        finally:
            for attributes, buffers in own:
                attributes["_buffers"] = buffers
            if self.restores:
                self.restore()

    def dequantise(self, arguments: Any) -> None:
        """Replace quantised weights of the copy by the floating weights that they stand for.

        Raises:
            CaptureError: The result for ``arguments`` changes, because the model does not only keep
                its weights in a quantised form, but also computes in it.
        """
        weights = [
            (module, name, weight)
            for module in self.twin.modules()
            for name, weight in module._parameters.items()
            if weight is not None and is_quantised(weight)
        ]
        if not weights:
            return
        expected = self.run(arguments)
        for module, name, weight in weights:
            module._parameters[name] = nn.Parameter(weight.dequantize(), requires_grad=False)
        if not close(self.run(arguments), expected):
            kind = type(weights[0][2]).__name__
            raise CaptureError(
                f"the model has weights of the type {kind}, and computes something else with them "
                "than with the floating weights that they stand for: its activations are quantised "
                "as well. Expected weights alone to be quantised: explain the model from before "
                "the quantisation"
            )

    def run_alone(self, arguments: Any) -> None:
        """Set ``alone``, the result for one example."""
        with suppress(Exception):  # of any type: the export fails as well, and tells the reason
            self.alone = self.run(arguments)

    @contextmanager
    def free_lengths(self) -> Iterator[None]:
        """Let ``len(x)`` of a tensor be ``x.shape[0]``, whose size an export keeps free.

        Python's own ``len`` makes a number of it. Other threads get the same lengths.
        """
        for scope in self._kept.counting:
            scope["len"] = _length
        try:
            yield
        finally:
            for scope in self._kept.counting:
                if scope.get("len") is _length:
                    del scope["len"]

    @property
    def counts_lengths(self) -> bool:
        """Return True for models whose code calls ``len``."""
        return bool(self._kept.counting)

    @property
    def is_recurrent(self) -> bool:
        """Return True for models with recurrent layers, whose states may have the size len(x)."""
        return any(isinstance(module, _RECURRENT) for module in self.twin.modules())

    def runs_recurrent(self, graph: fx.Graph) -> bool:
        """Return True if a recurrent layer ran while a graph of the model was traced."""
        paths = {path for node in graph.nodes for path, _ in module_stack(node).values()}
        modules = dict(self.twin.named_modules())
        return any(isinstance(modules.get(path), _RECURRENT) for path in paths)

    def check_iterators(self) -> None:
        """Raise CaptureError if calls advance an iterator that the model's own code can reach.

        Those of hooks that number their calls may advance, if copies can stand for them.
        """
        fixed = [StandIn("a field of a tuple or function", one) for one in self._kept.fixed]
        if not (self._advanced or fixed):
            return
        own = without_hooks(self.twin)
        for one in [*self._advanced, *fixed]:
            if not one.copied or own.holds(one.iterator):
                raise one.refusal()

    def check_repeats(self, arguments: Any) -> None:
        """Raise CaptureError if further calls with one example and the same seed differ.

        A graph contains numbers from outside torch as constants, and does not show their changes.
        There are two calls, because numbers may come in turn, and the export has taken one.
        """
        if self.alone is None:
            return
        try:
            same = all(close(self.alone, self.run(arguments)) for _ in range(2))
        except Exception:  # of any type: the export fails as well, and tells the reason
            return
        if not same:
            raise CaptureError(
                "two calls of the model with the same arguments give different results, though "
                "torch draws the same random numbers: the model uses others, such as those of "
                "random or NumPy; expected a forward whose result depends on its arguments alone: "
                "pass the numbers as an argument, or draw none in evaluation mode"
            )

    def check_forgets(self, arguments: Any) -> None:
        """Raise CaptureError if a call of the model changes the results of later calls."""
        others = pytree.tree_map_only(Tensor, lambda x: _variants(x)[1], arguments)
        try:
            expected = self.run(arguments)
            self.restores = False
            self.run(others)
            same = torch.equal(expected, self.run(arguments))
        except Exception:  # of any type: the second call fails, the first one did not
            same = False
        finally:
            self.restores = True
            self.restore()
        if not same:
            names = ", ".join(map(repr, dict.fromkeys(self.written)))
            raise CaptureError(
                f"the model writes a tensor to {names} while it runs, and its next call reads that "
                "tensor, so that an explanation would depend on earlier calls; expected a forward "
                "whose result depends on its arguments alone: pass the tensor as an argument, or "
                "clear it at the beginning of forward"
            )

    def leave_out_observers(self, arguments: Any) -> dict[str, str]:
        """Remove the hooks that cannot change the results of the copy.

        Returns:
            The name of each other hook → what it does.
        """
        others = pytree.tree_map_only(Tensor, lambda x: _variants(x)[1], arguments)
        self.restores = False
        try:
            with Watch(self.twin, self.hooks, self._saved) as watch:
                self.run(arguments)
                self.run(others)
        except Exception:  # of any type: the model is the user's
            return {str(hook): "fails" for hook in self.hooks}
        finally:
            self.restores = True
            self.restore()
        for hook in self.hooks:
            if hook.key not in watch.reasons:
                hook.leave_out()
        return {
            str(hook): watch.reasons[hook.key] for hook in self.hooks if hook.key in watch.reasons
        }

    def mixes(self, examples: list[Any], results: list[Tensor], size: int, further: bool) -> bool:
        """Return True if the results for a batch differ from those for each example alone.

        A model that takes no batch of this size does not mix examples. If it takes further
        arguments, it may fail because a tensor has a meaning for the whole batch.

        Args:
            examples: Batches of one example each.
            results: The result for each of them.
            size: Number of examples in the batch; the examples follow each other in turn.
            further: Whether further arguments have one row per example.
        """
        try:
            found = self.run(joined(examples, size))
        except Exception:  # of any type: the model does not take such a batch
            return further
        return not close(found, joined(results, size))


_RECURRENT = nn.RNNBase, nn.RNNCellBase


def _length(x: Any) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.ndim else len(x)


def examples_like(inputs: Inputs, extras: Extras, shared: bool) -> list[Any]:
    """Return different batches of one example each; the first is the first example of a call.

    Args:
        inputs: Tensors (batch, ...).
        extras: Further arguments of ``forward``.
        shared: See :func:`captum_mipin.graph.signature.per_example`.
    """
    leaves, structure = pytree.tree_flatten(plain((*inputs, *extras)))
    own = per_example(inputs, extras, shared)
    variants = [
        _rows(leaf) if one else [leaf] * EXAMPLES for leaf, one in zip(leaves, own, strict=True)
    ]
    return [pytree.tree_unflatten(list(row), structure) for row in zip(*variants, strict=True)]


def joined(examples: list[Any], size: int) -> Any:
    """Return a batch of ``size`` examples, taken from batches of one example in turn."""

    def join(*leaves: Any) -> Any:
        different = any(leaf is not leaves[0] for leaf in leaves)
        if not different or not isinstance(leaves[0], Tensor):
            return leaves[0]
        return torch.cat([leaves[index % len(leaves)] for index in range(size)])

    return pytree.tree_map(join, *examples)


def close(x: Tensor, y: Tensor) -> bool:
    """Return True if two tensors have one shape and differ by rounding errors only."""
    if x.shape != y.shape or not x.is_floating_point():
        return torch.equal(x, y)
    # |x − y| ≤ √eps · max |y|
    largest = float(y.nan_to_num(0, 0, 0).abs().max()) if y.numel() else 0.0
    return torch.allclose(x, y, 0, largest * torch.finfo(y.dtype).eps ** 0.5, equal_nan=True)


def _rows(x: Tensor) -> list[Tensor]:
    """Return the first row of ``x`` and two others; of integers, such as labels, those of ``x``."""
    first, *others = x[:_ROWS].split(1)
    if not x.is_floating_point():
        others = [row for row in others if not torch.equal(row, first)]
        if others:
            different = [row for row in others if not torch.equal(row, others[0])]
            return [first, others[0], (different or [first])[0]]
    return _variants(first)


def _variants(x: Tensor) -> list[Tensor]:
    """Return ``x`` and two other tensors that a model that takes ``x`` takes as well."""
    if x.is_floating_point():
        return [x, x / 2 + 0.25, x * 0.75 - 0.125]
    return [x, x.flip(-1), x.roll(1, -1)] if x.ndim else [x] * EXAMPLES
