"""The patterns of a network, fitted in one pass over data."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin.calls import explained
from captum_mipin.errors import FitError, ModelChangedError, NotFittedError
from captum_mipin.graph.modules import module_of
from captum_mipin.graph.signature import Signature, first_example
from captum_mipin.graph.validate import (
    as_model,
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
from captum_mipin.options import check_choice, check_number
from captum_mipin.propagation.runtime import Run
from captum_mipin.report import table
from captum_mipin.rules import Options
from captum_mipin.rules.base import Back
from captum_mipin.storage.saved import Saved
from captum_mipin.storage.watch import Watch
from captum_mipin.types import Extras, Inputs, Output, Target

Estimator = Literal["linear", "positive"]


@dataclass(frozen=True)
class PatternFit:
    """The fit of one operation: counts of rows and neurons.

    Attributes:
        layer: Module path and operation.
        rows: Number of rows: samples × positions.
        neurons: Number of neurons (outputs or channels), each with a pattern.
        dead: Number of neurons without variance or never active, whose patterns are 0.
    """

    layer: str
    rows: int
    neurons: int
    dead: int


@dataclass(frozen=True)
class PatternReport:
    """The fits of all operations; ``print`` shows them as a table."""

    layers: tuple[PatternFit, ...]

    def __str__(self) -> str:
        rows = [(fit.layer, str(fit.rows), str(fit.neurons), str(fit.dead)) for fit in self.layers]
        return table(("layer", "rows", "neurons", "dead"), rows)


@dataclass
class State:
    """The result of a fit.

    Attributes:
        patterns: Module path and operation → the operation's patterns, shaped like its weights.
        report: The fits of all operations.
        watch: Detects changes of the model's weights.
        zero: The classes whose output was 0 for all examples of the fit.
    """

    patterns: dict[str, Tensor]
    report: PatternReport
    watch: Watch
    zero: frozenset[Target] = frozenset()


class Patterns(Saved):
    """The patterns of a network's neurons, fitted in one pass over data.

    Patterns are fitted for layers with weights (with folded batch norms), and for sums of two
    signals, with one neuron per channel. In a convolution each position of each sample is a row,
    also positions at the padding. No labels are needed, and one fit is for all classes. The data
    should be similar to the examples to explain.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode. If it is in ``nn.DataParallel`` or
            ``torch.compile``, the module itself is used.
        estimator: "linear": a = cov(x, y) / var(y). "positive": the estimator S_a+ of the paper,
            a = (E₊[x y] − E₊[x] E[y]) / wᵀ(E₊[x y] − E₊[x] E[y]). E is the mean over all rows, and
            E₊ that over the rows in which the neuron's output, with bias and batch norm, is > 0.
        layer: A module of the model that :class:`LayerPropagation` will explain: only operations
            after it are fitted. By default all operations after the inputs are fitted. If the
            inputs are integers, such as the tokens of a text, pass their embedding.
        output: The output to explain if the model returns several tensors, as for
            :class:`~captum_mipin.InverseNetwork`.

    Source: Kindermans et al., ICLR 2018, equations 5, 7 and appendix.

    Examples:
        >>> from captum_mipin.methods import PatternAttribution
        >>> _ = torch.manual_seed(0)
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
        layer: nn.Module | str | None = None,
        output: Output = None,
    ) -> None:
        check_choice("estimator", estimator, ("linear", "positive"))
        check_output(output)
        self.model, self.estimator, self.output = as_model(model), estimator, output
        self.layer = None if layer is None else module_of(layer, self.model)
        self.state: State | None = None

    def __getitem__(self, layer: str) -> Tensor:
        """Return the patterns of a layer, shaped like its weights: (outputs, inputs) if dense.

        Args:
            layer: Module path and operation, such as "0/linear", from the table of the report.

        Raises:
            NotFittedError: No pattern was fitted for this layer.
        """
        patterns = self.fitted().patterns
        if layer not in patterns:
            raise NotFittedError(
                f"no pattern was fitted for {layer!r}: use one of {', '.join(patterns)}"
            )
        return patterns[layer]

    @property
    def report(self) -> PatternReport:
        """Return the counts of rows, neurons and dead neurons of each layer, printed as a table."""
        return self.fitted().report

    @explained
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

        If an error is raised, earlier patterns stay.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader``
                of (images, labels), or any iterable of batches. If a batch is a tuple, its first
                element is the input.
            unpack: Function batch → (inputs, additional_forward_args), for any other batches.
            batch_size: Number of examples per batch, for data that is not in batches already.
            progress: True to show a progress bar.
            distributed: True to fit together with all other processes of ``torch.distributed``'s
                default group; each of them must make this call. The data is divided as for
                :meth:`InverseNetwork.fit <captum_mipin.InverseNetwork.fit>`, and all processes get
                the same patterns.

        Returns:
            self

        Raises:
            FitError: The data is empty, has one example only, has NaN or Inf, or features whose
                shape differs between batches; or another process failed.
            CaptureError: The model cannot be captured, or uses an operation without a rule.
        """
        processes = Processes(distributed)
        with processes.fail_together():
            model = check_model(self.model)
            check_number("batch_size", batch_size, 1, whole=True)
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
            zero = fitting.zero(processes)
            patterns, fits = fitting.solve(processes)
        self.state = State(patterns, PatternReport(tuple(fits)), watch, zero)
        return self

    def fitted(self) -> State:
        """Return the result of the fit, after a check that the model has not changed.

        Raises:
            NotFittedError: :meth:`fit` was not called yet.
            ModelChangedError: The model's weights changed since the fit.
        """
        if self.state is None:
            raise NotFittedError("these Patterns are not fitted yet: call fit(data) first")
        if self.state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the patterns were fitted: call fit(data) "
                "again"
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
            **({"zero": sorted(map(list, state.zero))} if state.zero else {}),
        }

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "Patterns":
        patterns = cls(model, estimator=content["estimator"], output=content["output"])
        report = PatternReport(tuple(PatternFit(**fit) for fit in content["layers"]))
        zero = frozenset(map(tuple, content.get("zero", ())))
        patterns.state = State(tensors, report, Watch(model, content["fingerprint"]), zero)
        return patterns


class _Fitting(Signal):
    """The sums over all batches from which patterns are estimated.

    Attributes:
        sums: Name of an operation → its sums, in order of execution.
        weights: Name of an operation → the operation and its weights.
        count: Number of examples in all batches up to now.
        example: Inputs and further arguments of the first example; None before the first batch.
        signature: Shapes and dtypes of the inputs; None before the first batch.
    """

    def __init__(self, patterns: Patterns) -> None:
        super().__init__(patterns.model, output=patterns.output)
        self.sums: dict[str, Sums] = {}
        self.weights: dict[str, tuple[Neurons, Tensor]] = {}
        self.example: tuple[Inputs, Extras] | None = None
        self.signature: Signature | None = None
        self._nonzero: Tensor | None = None  # entries of the output that have not been 0 always
        self.count, self._batch = 0, 0
        self._layer_at, self._positive = patterns.layer, patterns.estimator == "positive"
        self._gradients = torch.is_grad_enabled()  # the graph is that of the caller's methods

    def observe(self, inputs: Inputs, extras: Extras) -> int:
        """Run the model on one batch, add the batch's sums, and return its number of examples.

        Raises:
            FitError: An output or a feature is not finite.
        """
        with torch.set_grad_enabled(self._gradients):
            captured, surrogate = self._surrogate(inputs, extras, self._layer_at)
        output = surrogate(
            Run(surrogate.steps, fitting=()), captured.values(self.model, inputs, extras)
        )
        if not finite(output) or not all(finite(sums.xy) for sums in self.sums.values()):
            raise FitError(
                f"batch {self._batch}: the model's output or features contain NaN or Inf, "
                "expected finite values: remove the examples that cause it"
            )
        self.example = self.example or first_example(inputs, extras, captured.shared)
        self.signature = self.signature or Signature.of(inputs, extras, captured.shared)
        self.count, self._batch = self.count + len(output), self._batch + 1
        nonzero = (output != 0).any(0).cpu()
        before = nonzero if self._nonzero is None else self._nonzero
        # an output of the size of the inputs is not followed
        self._nonzero = nonzero | (before if before.shape == nonzero.shape else True)
        return len(output)

    def zero(self, processes: Processes) -> frozenset[Target]:
        """Return the classes whose output is 0 for all examples of all processes."""
        known = [part for part in processes.gather(self._nonzero) if part is not None]
        same = len({part.shape for part in known}) == 1  # else it has the size of the inputs
        zeros = (~torch.stack(known).any(0)).nonzero().tolist() if same else []
        return frozenset(map(tuple, zeros))

    def solve(self, processes: Processes) -> tuple[dict[str, Tensor], list[PatternFit]]:
        """Return the patterns of all operations, and the counts of each operation's fit."""
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
            FitError: There are fewer than two examples, or the inputs have different shapes or
                dtypes in different processes.
        """
        count = sum(processes.gather(self.count))
        if count < 2:
            empty = "the data has no batch, expected at least two examples: pass more data"
            single = "the data has 1 example, expected at least two: pass more data"
            raise FitError(single if count else empty)
        example = processes.first(self.example)
        with processes.fail_together():
            if not self.count:  # run another process's example, to have sums of the same shapes
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
        exact = x.to(weight)  # the weight is wider if the model uses autocast
        linear = layer.apply(exact, weight)
        value = layer.shifted(linear, bias)
        if not isinstance(layer, Scale):
            self._add(layer, exact, weight, linear, value)
        return value.to(x), lambda s: s

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
