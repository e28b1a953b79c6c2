"""What all methods that are a table of rules share: Captum's contract, at the input and at a layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor, fx, nn

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.errors import InputError
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import (
    TURNS,
    CapturedGraph,
    Extras,
    Inputs,
    Output,
    Signature,
    capture,
    check_finite,
    check_inputs,
    check_model,
    finite,
    plain,
    unwrapped,
)  # fmt: skip
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.validate import as_extras, as_inputs, check_output, like
from captum_mipin.propagation.check import Treatment, survey
from captum_mipin.propagation.runtime import Run, seed
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.rules import Rule
from captum_mipin.targets import per_example
from captum_mipin.types import Target


@dataclass(frozen=True, eq=False)
class _Itself:
    """An option, which is the same only if it is the same object: options may hold tensors."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _as_it_is(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Rewrite nothing."""


@dataclass(frozen=True)
class Table(Mapping[str, Rule]):
    """A method: operation → rule, and what it makes of the graph before.

    Attributes:
        rules: Operation → rule.
        rewrite: (marked copy of the graph, symbol of the batch, starts) → nothing; changes the copy.
        other: The rule of all other operations; None where they are refused.
    """

    rules: Mapping[str, Rule]
    rewrite: Callable[[fx.Graph, str, Sequence[fx.Node]], None] = _as_it_is
    other: Rule | None = None
    way_out = (
        "The method is not defined there. Take LayerPropagation(method, layer) at a module behind it, or write that part "
        "of the model with supported operations; check(model, inputs, method=...) lists all."
    )

    def __getitem__(self, operation: str) -> Rule:
        found = self.rules.get(operation, self.other)
        if found is None:
            raise KeyError(operation)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)


@dataclass(frozen=True)
class Explanation:
    """What one pass forward and one back yield.

    Attributes:
        features: Values where the pass ends, at the inputs or a layer's output, each (batch, ...).
        signals: What came back to them.
        output: (batch,) what was sent back from each example's output.
    """

    features: Inputs
    signals: Inputs
    output: Tensor


class Propagation(NoFuture, GradientAttribution):
    """A method that sends something from the output back to the input in one pass: a table of rules.

    The base of the methods of this package; what is said here holds for all of them. The model is captured as a graph, once
    for each kind of inputs, so the spelling of an operation does not matter, and nothing of the model is touched. What a
    method has no rule for is refused by name; :func:`~captum_mipin.check` tells beforehand, with ``method=``.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode that returns logits (batch, classes), or (batch,). Behind
            ``nn.DataParallel`` or ``torch.compile``, the module itself is taken.
        output: Where the model returns several tensors, which of them, as for :class:`~captum_mipin.InverseNetwork`.
    """

    #: The method's name, as Captum's tools show it.
    _name = "Propagation"

    def __init__(self, model: nn.Module, *, output: Output = None) -> None:
        check_output(output)
        GradientAttribution.__init__(self, model)
        self.model = unwrapped(model)
        self.output = output
        self._graphs = Graphs[Surrogate]()

    def explain(
        self, inputs: Inputs, target: Any, extras: Extras = (), layer: nn.Module | None = None
    ) -> Explanation:
        """One pass forward and one back, to the inputs or to the output of ``layer``.

        Args:
            inputs: Tensors (batch, ...).
            target: As Captum's ``target``.
            extras: Further arguments of the model.
            layer: A module of the model with one output tensor.

        Returns:
            Values there, what came back, and what the method started with, summed over each example.

        Raises:
            InputError, TargetError, CaptureError, UnsupportedOperationError: As their descriptions say.
        """
        check_model(self.model)
        check_inputs(inputs, explained=layer is None)
        check_finite(inputs)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(inputs[0].device.type, enabled=False),
        ):
            inputs, extras = plain((inputs, extras))
            graph, surrogate = self._surrogate(inputs, extras, layer)
            dims = value_of(graph.output).shape[1:]
            targets = per_example(target, torch.empty(len(inputs[0]), *dims, device="meta"))
            run = Run(surrogate.steps, once=True)
            with TURNS.explaining():
                output = surrogate(run, graph.values(self.model, inputs, extras))
                start = self._start(output, targets)
                sources = [run.sources[index] for index in range(surrogate.starts)]
                found = torch.autograd.grad(output, sources, start)
            if not all(finite(s) for s in found):
                raise InputError(
                    "the model's output or what is sent back overflows for these inputs: it contains NaN or Inf"
                )
            total = start.flatten(1).sum(1) if start.ndim > 1 else start
            return Explanation(
                tuple(x.detach() for x in sources),
                tuple(s.detach().contiguous() for s in found),
                total,
            )

    def survey(self, captured: CapturedGraph, start: str | None = None) -> list[Treatment]:
        """What the method makes of each operation of a graph."""
        return survey(captured, self._table(), start)

    def _table(self) -> Table:
        """The method."""
        raise NotImplementedError

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        """What is sent back from the output."""
        return seed(output, targets)

    def _surrogate(
        self, inputs: Inputs, extras: Extras, layer: nn.Module | None
    ) -> tuple[CapturedGraph, Surrogate]:
        def build(graph: CapturedGraph, start: str | None) -> Surrogate:
            return Surrogate(graph, self._table(), start, joint=False)

        options = [_Itself(value) for name, value in vars(self).items() if not name.startswith("_")]
        return self._graphs.build(
            self.model, layer, options, lambda: self._find(inputs, extras), build
        )

    def _find(self, inputs: Inputs, extras: Extras) -> Signature:
        return self._graphs.find(inputs, extras, self._capture)

    def _capture(self, inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
        return capture(self.model, inputs, extras, shared, output=self.output, explained=False)

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return cls._name


class Signal(Propagation):
    """A method whose answer is no share of the output, but something like a gradient or a signal."""

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        multiply_by_inputs: bool = False,
    ) -> Any:
        """What the method sends back to the input from the target's output.

        Args:
            inputs: Tensor (batch, ...) or tuple of such, floating.
            target: The class, as any Captum method takes it: int, tuple, list, integer tensor; may differ between
                examples. None for a model with one output.
            additional_forward_args: Further arguments of the model.
            multiply_by_inputs: Return the answer ⊙ x.

        Returns:
            Attributions shaped, typed and placed like ``inputs``.

        Raises:
            InputError: Not a tensor or tuple, empty, integer, NaN. Also an AssertionError and a ValueError.
            TargetError: Not a target of this model. Also an AssertionError; out of range also an IndexError.
            CaptureError: The model cannot be captured.
            UnsupportedOperationError: It has an operation that the method has no rule for.
        """
        found = self.explain(as_inputs(inputs), target, as_extras(additional_forward_args))
        maps = found.signals
        if multiply_by_inputs:
            maps = tuple(a * x for a, x in zip(maps, found.features, strict=True))
        return like(inputs, maps)


class Relevance(Propagation):
    """A method that shares its output out over the input, as far as it conserves."""

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: bool = False,
    ) -> Any:
        """The relevance of each input feature for the target's output.

        Args:
            inputs: Tensor (batch, ...) or tuple of such, floating.
            target: The class, as any Captum method takes it: int, tuple, list, integer tensor; may differ between
                examples. None for a model with one output.
            additional_forward_args: Further arguments of the model.
            return_convergence_delta: Return also what is lost on the way, example by example: R − Σ A, where R is what the
                method starts with. The share that arrives is 1 − delta / R.

        Returns:
            Attributions shaped, typed and placed like ``inputs``; with ``return_convergence_delta`` a pair of them and a
            tensor (batch,).

        Raises:
            InputError: Not a tensor or tuple, empty, integer, NaN. Also an AssertionError and a ValueError.
            TargetError: Not a target of this model. Also an AssertionError; out of range also an IndexError.
            CaptureError: The model cannot be captured.
            UnsupportedOperationError: It has an operation that the method has no rule for.
        """
        found = self.explain(as_inputs(inputs), target, as_extras(additional_forward_args))
        maps = like(inputs, found.signals)
        return (
            (maps, self.compute_convergence_delta(maps, found.output))
            if return_convergence_delta
            else maps
        )

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are contributions, as Captum's tools ask: they are."""
        return True

    def has_convergence_delta(self) -> bool:
        """Whether ``attribute`` can return a convergence delta: it can."""
        return True

    def compute_convergence_delta(self, attributions: Tensor | Inputs, output: Tensor) -> Tensor:
        """What of ``output`` the attributions do not add up to, example by example, as for Captum's LRP.

        Args:
            attributions: What :meth:`attribute` gave.
            output: (batch,) what the method started with: for most the target's output.

        Returns:
            (batch,)
        """
        sums = [a.flatten(1).sum(1) if a.ndim > 1 else a for a in as_inputs(attributions)]
        total: Tensor = torch.stack(sums).sum(0)
        return output.flatten() - total


class LayerPropagation(NoFuture, LayerAttribution, GradientAttribution):
    """A method of this package at the output of a layer.

    Args:
        method: The method at the input, such as ``LRP(model)``.
        layer: A module of the model with one output tensor. Between a batch norm and its layer, the batch norm is taken for
            itself. The model's inputs may then be integers, such as the tokens of a text.

    Raises:
        InputError: ``method`` is none of this package.

    Examples:
        >>> from captum_mipin.methods import GuidedBackprop
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> LayerPropagation(GuidedBackprop(model), model[1]).attribute(torch.randn(2, 1, 8, 8), target=0).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(self, method: Propagation, layer: nn.Module) -> None:
        if not isinstance(method, Propagation):
            raise InputError(
                f"method is a {type(method).__name__}, expected a method of this package, such as LRP(model)"
            )
        LayerAttribution.__init__(self, method.forward_func, unwrapped(layer))
        GradientAttribution.__init__(self, method.forward_func)
        self.method = method

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        multiply_by_features: bool = False,
    ) -> Tensor:
        """What the method sends back to the layer's output.

        Args:
            inputs, target, additional_forward_args: As for the method itself.
            attribute_to_layer_input: Only False: name the layer before it instead.
            multiply_by_features: Return the answer ⊙ features.

        Returns:
            Shaped like the layer's output.

        Raises:
            As the method itself; CaptureError where the layer has not exactly one output tensor.
        """
        if attribute_to_layer_input:
            raise InputError(
                "attribute_to_layer_input=True is not supported: name the layer before it"
            )
        found = self.method.explain(
            as_inputs(inputs), target, as_extras(additional_forward_args), self.layer
        )
        (a,), (x,) = found.signals, found.features
        return a * x if multiply_by_features else a

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return "Layer propagation"
