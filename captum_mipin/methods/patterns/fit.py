"""The patterns of a network, fitted in one pass over data."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin.errors import FitError, InputError, ModelChangedError, NotFittedError
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.signature import Signature, first_example
from captum_mipin.graph.validate import (
    check_choice,
    check_model,
    check_output,
    device_of,
    finite,
    generator_kept,
)
from captum_mipin.inverse.data import Batches, Unpack
from captum_mipin.inverse.distributed import Processes
from captum_mipin.methods.base import Signal, Table
from captum_mipin.methods.layers import Layer, Neurons, Scale
from captum_mipin.methods.patterns.sums import Sums, solve, sums_of
from captum_mipin.methods.patterns.table import Merge, pattern_rules
from captum_mipin.propagation.runtime import Run
from captum_mipin.report import table
from captum_mipin.rules import Options
from captum_mipin.rules.base import Back
from captum_mipin.storage.saved import Saved
from captum_mipin.storage.watch import Watch
from captum_mipin.types import Extras, Inputs, Output

Estimator = Literal["linear", "positive"]


@dataclass(frozen=True)
class PatternFit:
    """How one operation was fitted.

    Attributes:
        layer: Module path and operation.
        rows: Number of rows: samples, times positions for a convolution.
        neurons: Number of neurons (outputs or channels), each with a pattern.
        dead: Number of neurons without variance, or never active: their patterns are 0.
    """

    layer: str
    rows: int
    neurons: int
    dead: int


@dataclass(frozen=True)
class PatternReport:
    """The fit of every operation; prints as a table."""

    layers: tuple[PatternFit, ...]

    def __str__(self) -> str:
        rows = [(fit.layer, str(fit.rows), str(fit.neurons), str(fit.dead)) for fit in self.layers]
        return table(("layer", "rows", "neurons", "dead"), rows)


@dataclass
class State:
    """The result of a fit: the patterns of each layer, their report, and the model's watch."""

    patterns: dict[str, Tensor]
    report: PatternReport
    watch: Watch


class Patterns(Saved):
    """The patterns of a network's neurons, fitted in one pass over data like those to explain.

    Layers with weights are fitted, with the batch norms behind them folded in, and sums of two
    signals, one neuron for each channel. For a convolution each position of each sample is a row,
    padding included. No labels are needed, and all classes are fitted at once.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode. Behind ``nn.DataParallel`` or
            ``torch.compile``, the module itself is used.
        estimator: "linear": a = cov(x, y) / var(y). "positive": the estimator S_a+ of the paper,
            a = (E₊[x y] − E₊[x] E[y]) / wᵀ(E₊[x y] − E₊[x] E[y]), where E₊ is the mean over rows at
            which the neuron's own output, bias and batch norm included, is above 0.
        layer: The layer where the way back ends, for :class:`LayerPropagation` there; what comes
            before it is not fitted. By default the way back ends at the inputs. If the inputs are
            integers, such as the tokens of a text, pass their embedding.
        output: Which output to explain if the model returns several tensors, as for
            :class:`~captum_mipin.InverseNetwork`.

    Source: Kindermans et al., ICLR 2018, equations 5, 7 and appendix.

    Examples:
        >>> from captum_mipin.methods import PatternAttribution
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> patterns = Patterns(model).fit(torch.randn(100, 4), progress=False)
        >>> PatternAttribution(model, patterns).attribute(torch.randn(2, 4), target=[0, 2]).shape
        torch.Size([2, 4])
        >>> a = patterns["0/linear"]
        >>> torch.allclose((a * model[0].weight).sum(1), torch.ones(8), atol=1e-4)
        True
    """

    _kind = "patterns"

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: Estimator = "positive",
        layer: nn.Module | None = None,
        output: Output = None,
    ) -> None:
        check_choice("estimator", estimator, ("linear", "positive"))
        check_output(output)
        self.model, self.estimator, self.output = unwrapped(model), estimator, output
        self.layer = None if layer is None else unwrapped(layer)
        self.state: State | None = None

    def __getitem__(self, layer: str) -> Tensor:
        """Return the pattern of a layer, shaped like its weights: (outputs, inputs) if dense.

        Args:
            layer: Module path and operation, as the report has it.

        Raises:
            NotFittedError: No pattern was fitted for this layer.
        """
        patterns = self.fitted().patterns
        if layer not in patterns:
            raise NotFittedError(
                f"no pattern was fitted for {layer!r}; fitted are {', '.join(patterns)}"
            )
        return patterns[layer]

    @property
    def report(self) -> PatternReport:
        """Return rows, neurons and dead neurons of every layer; prints as a table."""
        return self.fitted().report

    def fit(
        self,
        data: Any,
        *,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        progress: bool = True,
        distributed: bool = False,
    ) -> "Patterns":
        """Estimate all patterns in one pass over the data, in batches of any size and order.

        If the fit fails, everything is as it was before.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader``
                of (images, labels), or any iterable of batches. If a batch is a tuple, its first
                element is the input.
            unpack: Function batch → (inputs, additional_forward_args), for other batches.
            batch_size: Examples in a batch, for data that does not come in batches.
            progress: Show a progress bar.
            distributed: Fit together with the other processes of ``torch.distributed``'s default
                group, which all make this call. They divide the data as for
                :meth:`InverseNetwork.fit <captum_mipin.InverseNetwork.fit>`, and all end with the
                same patterns.

        Returns:
            self

        Raises:
            FitError: The data cannot be used: it is empty or a single example, not finite, or
                changes its shape. Or another process failed.
            CaptureError: The model cannot be captured, or uses an operation without a rule.
        """
        processes = Processes(distributed)
        with processes.fail_together():
            model = check_model(self.model)
            if batch_size < 1:
                raise InputError(f"batch_size={batch_size!r} must be at least 1")
            watch = Watch(model)
        processes.check_same("weights", watch.fingerprint)
        processes.check_same("estimators", self.estimator)
        device, fitting = device_of(model), _Fitting(self)
        with (
            generator_kept(),
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.no_grad(),
        ):
            with (
                processes.fail_together(),
                tqdm(unit="row", disable=not progress, unit_scale=True) as bar,
            ):
                shard = processes.rank, processes.count
                for inputs, extras in Batches(
                    data, batch_size, unpack, device, explained=self.layer is None, shard=shard
                ):
                    bar.update(fitting.observe(inputs, extras))
            patterns, fits = fitting.solve(processes)
        self.state = State(patterns, PatternReport(tuple(fits)), watch)
        return self

    def fitted(self) -> State:
        """Return what was fitted, for a model that has not changed since.

        Raises:
            NotFittedError: Nothing was fitted.
            ModelChangedError: The model's weights changed since the fit.
        """
        if self.state is None:
            raise NotFittedError("these Patterns are not fitted yet: call fit(data) first")
        if self.state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the patterns were fitted: fit them again"
            )
        return self.state

    @classmethod
    def _accepts(cls, content: dict[str, Any]) -> bool:
        return content.get("kind") == "patterns"

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self.fitted()
        return state.patterns, {
            "kind": "patterns",
            "estimator": self.estimator,
            "output": self.output,
            "fingerprint": state.watch.fingerprint,
            "layers": [asdict(fit) for fit in state.report.layers],
        }

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "Patterns":
        patterns = cls(model, estimator=content["estimator"], output=content["output"])
        report = PatternReport(tuple(PatternFit(**fit) for fit in content["layers"]))
        patterns.state = State(tensors, report, Watch(model, content["fingerprint"]))
        return patterns


class _Fitting(Signal):
    """Runs the model and adds up the sums that patterns are estimated from.

    Attributes:
        sums: Name of an operation → its sums, in order of execution.
        weights: Name of an operation → the operation and its weights.
        count: Number of examples so far.
        example: The first example; None before it.
        signature: The kind of inputs.
    """

    def __init__(self, patterns: Patterns) -> None:
        super().__init__(patterns.model, output=patterns.output)
        self.sums: dict[str, Sums] = {}
        self.weights: dict[str, tuple[Neurons, Tensor]] = {}
        self.example: tuple[Inputs, Extras] | None = None
        self.signature: Signature | None = None
        self.count, self._batch = 0, 0
        self._layer_at, self._positive = patterns.layer, patterns.estimator == "positive"

    def observe(self, inputs: Inputs, extras: Extras) -> int:
        """Add the sums of one batch, and return the number of its examples.

        Raises:
            FitError: An output or a feature is not finite.
        """
        captured, surrogate = self._surrogate(inputs, extras, self._layer_at)
        output = surrogate(
            Run(surrogate.steps, fitting=()), captured.values(self.model, inputs, extras)
        )
        if not finite(output) or not all(finite(sums.xy) for sums in self.sums.values()):
            raise FitError(
                f"batch {self._batch}: NaN or Inf in the model's output or features. Remove the "
                "examples that cause it"
            )
        self.example = self.example or first_example(inputs, extras, captured.shared)
        self.signature = self.signature or Signature.of(inputs, extras, captured.shared)
        self.count, self._batch = self.count + len(output), self._batch + 1
        return len(output)

    def solve(self, processes: Processes) -> tuple[dict[str, Tensor], list[PatternFit]]:
        """Return the patterns of all operations, and how each was fitted."""
        patterns, fits = {}, []
        for key, sums in self._total(processes).items():
            neurons, weight = self.weights[key]
            pattern, dead = solve(sums, neurons, weight.double())
            patterns[key] = pattern.to(weight)
            fits.append(PatternFit(key, int(sums.rows), len(dead), int(dead.sum())))
        return patterns, fits

    def _total(self, processes: Processes) -> dict[str, Sums]:
        """Return the sums over the data of all processes.

        Raises:
            FitError: There are fewer than two examples, or the processes saw different inputs.
        """
        count = sum(processes.gather(self.count))
        if count < 2:
            empty = "the data yields no batch: nothing to fit on"
            single = "the data has 1 example, expected at least two: a pattern needs variance"
            raise FitError(single if count else empty)
        example = processes.first(self.example)
        with processes.fail_together():
            if not self.count:  # a process without data learns the layers from another's example
                self.observe(*example)
                self.sums = {key: sums.mapped(torch.zeros_like) for key, sums in self.sums.items()}
        shapes = [(key, sums.xy.shape) for key, sums in self.sums.items()]
        processes.check_same("inputs", (self.signature, shapes))
        return {key: sums.mapped(processes.sum) for key, sums in self.sums.items()}

    def _table(self) -> Table:
        return pattern_rules(self._layer, self._merge, attribution=True)

    def _layer(
        self, options: Options, layer: Layer, x: Tensor, *parameters: Any
    ) -> tuple[Tensor, Back]:
        weight, bias = layer.parameters(*parameters)
        linear = layer.apply(x, weight)
        value = layer.shifted(linear, bias)
        if not isinstance(layer, Scale):
            self._add(layer, x, weight, linear, value)
        return value, lambda s: s

    def _merge(self, options: Options, operation: Any, x: tuple[Tensor, ...], **named: Any) -> Any:
        value, merge = operation(x, **named), Merge.of(operation)
        terms = torch.stack([term.expand_as(value) for term in x]).double()
        self._add(merge, terms, merge.coefficients(value, named), value.double(), value)
        return value, lambda s: (s,) * len(x)

    def _add(
        self, neurons: Neurons, x: Tensor, weight: Tensor, linear: Tensor, value: Tensor
    ) -> None:
        sums = sums_of(neurons, x, weight, linear, value > 0 if self._positive else None)
        self.weights[neurons.key] = neurons, weight
        if neurons.key in self.sums:  # another batch, or a module that is called twice
            sums = self.sums[neurons.key].mapped(Tensor.add_, sums)
        self.sums[neurons.key] = sums
