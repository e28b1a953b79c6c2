"""Base classes of the methods that consist of a table of rules.

A method supplies a :class:`Table` of rules. :class:`Propagation` captures the model, makes a
surrogate whose backward pass follows the table, and runs it once. :class:`Signal` and
:class:`Relevance` are its two subclasses. :class:`LayerPropagation` applies a method at a layer.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import GradientAttribution
from torch import Tensor, fx, nn

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.errors import InputError
from captum_mipin.graph.cache import Graphs, Starts
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layers import Site, tensors_at
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.signature import Signature, plain
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.validate import (
    as_extras,
    as_inputs,
    as_model,
    check_finite,
    check_inputs,
    check_model,
    check_output,
    finite,
    like,
    warn_of_zeros,
)
from captum_mipin.propagation.check import check, survey
from captum_mipin.propagation.final import require_logits, warn_of_result
from captum_mipin.propagation.independent import capture_apart, check_graph
from captum_mipin.propagation.runtime import Run, seed
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.report import CheckRow
from captum_mipin.rules import Rule
from captum_mipin.targets import per_example
from captum_mipin.types import Extras, Inputs, Output, Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _ByIdentity:
    """An option that is compared by identity, because ``==`` between tensors returns a tensor."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.value is self.value


def _unchanged(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Leave the graph as it is."""


@dataclass(frozen=True)
class Table(Mapping[str, Rule]):
    """The rules of a method, and a function that rewrites the graph before they are applied.

    Attributes:
        rules: Name of an operation → its rule.
        rewrite: Function that may change a marked copy of the graph. Its arguments are the copy,
            the symbol of the batch size, and the nodes of the explained tensors.
        other: The rule of all other operations. None: models with other operations are refused.
    """

    rules: Mapping[str, Rule]
    rewrite: Callable[[fx.Graph, str, Sequence[fx.Node]], None] = _unchanged
    other: Rule | None = None
    way_out = (
        "The method is not defined for them. Use LayerPropagation(method, layer) at a module after "
        "them, or rewrite that part of the model with supported operations; "
        "check(model, inputs, method=...) lists all such operations."
    )

    def __getitem__(self, operation: str) -> Rule:
        rule = self.rules.get(operation, self.other)
        if rule is None:
            raise KeyError(operation)
        return rule

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)


@dataclass(frozen=True, kw_only=True)
class NamedOperation:
    """An operation that a method inserts into the graph, together with the name of its rule.

    Attributes:
        rule: Name of the operation's rule in the method's :class:`Table`.
        name: Name of the operation that this one replaces.
        run: The function that computes the operation.
    """

    rule: str = ""
    name: str = ""
    run: Callable[..., Any] | None = None

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.rule

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the operation."""
        assert self.run is not None  # for mypy: subclasses without ``run`` override ``__call__``
        return self.run(*arguments, **named)


@dataclass(frozen=True)
class Explanation:
    """The results of one forward pass and one backward pass.

    Attributes:
        features: Values of the explained tensors (the inputs, or a layer's output), each
            (batch, ...).
        signals: Result of the backward pass for each explained tensor, shaped like ``features``.
        output: (batch,), the sum, per example, of the signal with which the backward pass starts.
    """

    features: Inputs
    signals: Inputs
    output: Tensor


class Propagation(NoFuture, GradientAttribution):
    """Base class of all methods that run one backward pass from the output by a table of rules.

    This description holds for every method. The model is captured as a graph, once for each shape
    and dtype of inputs, so different spellings of one operation give the same result. The model is
    not changed. A model with an operation that has no rule is refused, and the error names the
    operation; :func:`~captum_mipin.check` with ``method=`` lists all such operations beforehand.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode that returns logits (batch, classes), or
            (batch,). If it is in ``nn.DataParallel`` or ``torch.compile``, the module itself is
            used.
        output: The output to explain if the model returns several tensors, as for
            :class:`~captum_mipin.InverseNetwork`.
    """

    #: The method's name in Captum's tools.
    _name = "Propagation"
    #: Whether the backward pass starts with 1 at the target, instead of the target's output.
    _unit = False
    #: Whether the method starts from logits, so that a final sigmoid or softmax is left out.
    _logits = True
    #: Whether the derivative of ``detach()`` is 0, as in autograd.
    _detached = False

    def __init__(self, model: nn.Module, *, output: Output = None) -> None:
        check_output(output)
        self.model = as_model(model)
        GradientAttribution.__init__(self, model)
        self.output = output
        self._graphs = Graphs[Surrogate]()

    def explain(
        self, inputs: Tensor | Inputs, target: Any, extras: Any = (), layer: Site = None
    ) -> Explanation:
        """Run one forward and one backward pass, to the inputs or to the tensors at ``layer``.

        Args:
            inputs: Tensor (batch, ...) or tuple of such tensors, the model's inputs.
            target: The output to explain, in any form that Captum takes.
            extras: Further arguments of the model: one object, or a tuple of several.
            layer: A module of the model, whose output is explained; its
                :class:`~captum_mipin.graph.layers.LayerInput`; or None to explain the inputs.

        Returns:
            The explained tensors, the results of the backward pass, and its start.

        Raises:
            InputError: An input is invalid, or the output or the backward pass overflows.
            TargetError: The model has no such target.
            CaptureError: The model cannot be captured.
            UnsupportedOperationError: The method has no rule for an operation of the model.
        """
        check_model(self.model)
        tensors, extras = as_inputs(inputs), as_extras(extras)
        check_inputs(tensors, explained=layer is None)
        check_finite(tensors)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(tensors[0].device.type, enabled=False),
        ):
            tensors, extras = plain((tensors, extras))
            graph, surrogate = self._surrogate(tensors, extras, layer)
            dims = value_of(graph.output).shape[1:]
            targets = per_example(target, torch.empty(len(tensors[0]), *dims, device="meta"))
            run = Run(surrogate.steps, once=True)
            with TURNS.explaining():
                output = surrogate(run, graph.values(self.model, tensors, extras))
                start = self._start(output, targets)
                sources = [run.sources[index] for index in range(surrogate.starts)]
                signals = torch.autograd.grad(output, sources, start)
            if not all(finite(s) for s in signals):
                raise InputError(
                    "the model's output or the backward pass overflows for these inputs (NaN or "
                    "Inf), expected finite values: scale the inputs, or use a wider dtype"
                )
            return Explanation(
                tuple(x.detach() for x in sources),
                tuple(s.detach().contiguous() for s in signals),
                summed(start),
            )

    @classmethod
    def _bare(cls, model: nn.Module) -> "Propagation":
        """Return an object with default options, of which the table of rules is known."""
        return cls(model)

    def survey(self, captured: CapturedGraph, start: Sequence[str] | None = None) -> list[CheckRow]:
        """Return one row per operation of a graph, with the method's rule for this operation."""
        return survey(captured, self._table(), start)

    def log_rules(
        self, inputs: Tensor | Inputs, extras: Any = None, layer: nn.Module | None = None
    ) -> None:
        """Log the table of :func:`~captum_mipin.check`: the rule of each operation."""
        report = check(self.model, inputs, extras, layer=layer, output=self.output, method=self)
        logger.info("rules of %s\n%s", self.get_name(), report)

    def _table(self) -> Table:
        """Return the rules of the method."""
        raise NotImplementedError

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        """Return the start of the backward pass, shaped like the output; 0 except at targets."""
        return seed(output, targets, unit=self._unit)

    def _surrogate(
        self, inputs: Inputs, extras: Extras, layer: Site
    ) -> tuple[CapturedGraph, Surrogate]:
        def build(graph: CapturedGraph, start: Starts) -> Surrogate:
            surrogate = Surrogate(graph, self._table(), start, joint=False)
            check_graph(graph, self.model, (inputs, extras), self.output)
            return surrogate

        def graph_of(inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
            return capture_apart(
                self.model, inputs, extras, shared,
                output=self.output, explained=False, detached=self._detached,
            )  # fmt: skip

        prepare = require_logits if self._logits else warn_of_result

        def starts(graph: CapturedGraph) -> Starts:
            return tensors_at(graph, self.model, layer, (inputs, extras))

        def find() -> Signature:
            return self._graphs.find(inputs, extras, graph_of, prepare=prepare)

        # The table depends on the options: if one has changed, a new surrogate is built.
        options = [_ByIdentity(v) for name, v in vars(self).items() if not name.startswith("_")]
        return self._graphs.build(starts, options, find, build)

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return cls._name


class Signal(Propagation):
    """Base class of methods that compute a signal or a gradient, and not shares of the output."""

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None, *,
        multiply_by_inputs: bool = False,
    ) -> Any:  # fmt: skip
        """Return the method's map: its signal or gradient at the input, for the target's output.

        Args:
            multiply_by_inputs: True to return the map ⊙ x.

        Returns:
            Attributions with the shape, dtype and device of ``inputs``.

        Raises:
            UnsupportedOperationError: The method has no rule for an operation of the model.
        """
        explanation = self.explain(inputs, target, additional_forward_args)
        maps = explanation.signals
        if multiply_by_inputs:
            maps = tuple(a * x for a, x in zip(maps, explanation.features, strict=True))
        return like(inputs, maps)


class Relevance(Propagation):
    """Base class of methods that distribute the output over the input as relevance."""

    #: Whether only positive contributions get relevance, so that an example may get none.
    _positive = False

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None,
        return_convergence_delta: bool = False, verbose: bool = False,
    ) -> Any:  # fmt: skip
        """Return the relevance of each input feature for the target's output.

        Args:
            return_convergence_delta: True to return delta = R − Σ A as well, the part of the
                relevance R at the output that is lost between output and input, per example. The
                input gets the share 1 − delta / R of R.
            verbose: True to log the rule of each operation (:mod:`logging`, level INFO).

        Returns:
            Attributions with the shape, dtype and device of ``inputs``. With
            ``return_convergence_delta``, a pair of attributions and a tensor delta (batch,).

        Raises:
            UnsupportedOperationError: The method has no rule for an operation of the model.
        """
        if verbose:
            self.log_rules(inputs, additional_forward_args)
        explanation = self.explain(inputs, target, additional_forward_args)
        maps = like(inputs, explanation.signals)
        if not return_convergence_delta:
            return maps
        return maps, self.compute_convergence_delta(maps, explanation.output)

    def explain(
        self, inputs: Tensor | Inputs, target: Any, extras: Any = (), layer: Site = None
    ) -> Explanation:
        """Run one forward and one backward pass, see :meth:`Propagation.explain`."""
        found = super().explain(inputs, target, extras, layer)
        kept = [s.flatten(1).any(1) for s in found.signals if len(s) == len(found.output)]
        if self._positive and kept:
            warn_of_zeros(
                ~torch.stack(kept).any(0),
                "z⁺ sends nothing back from outputs without positive contributions, nor "
                "preset='innvestigate' from negative outputs",
            )
        return found

    @property
    def multiplies_by_inputs(self) -> bool:
        """Return True: attributions are contributions to the output, in the sense of Captum."""
        return True

    def has_convergence_delta(self) -> bool:
        """Return True: ``attribute`` can return a convergence delta."""
        return True

    def compute_convergence_delta(self, attributions: Tensor | Inputs, output: Tensor) -> Tensor:
        """Return output − Σ A per example, like Captum's LRP.

        Args:
            attributions: A, the result of :meth:`attribute`.
            output: (batch,) the relevance at the output; for most methods the target's output.

        Returns:
            Tensor (batch,).
        """
        total = torch.stack([summed(a) for a in as_inputs(attributions)]).sum(0)
        return output.flatten() - total


def single(tensors: Inputs) -> Tensor | Inputs:
    """Return the only tensor of a tuple, or the tuple if there are several."""
    return tensors[0] if len(tensors) == 1 else tensors


def summed(values: Tensor) -> Tensor:
    """Return the sum over each example: (batch,)."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values
