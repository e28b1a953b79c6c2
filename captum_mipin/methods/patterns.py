"""PatternNet and PatternAttribution: what of the data each neuron reads, fitted in one pass, in the place of its weights.

A neuron y = wᵀx + b reads a signal a·y out of x. Its pattern a is estimated from the data, such that wᵀa = 1: from all
samples, a = cov(x, y) / var(y), or from those at which the neuron is active alone. Sums of two signals are neurons as well,
one a channel with the weights 1 and 1, and so are averages, whose patterns are known: 1 for every element.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from captum_mipin.errors import (
    FitError,
    InputError,
    ModelChangedError,
    NotFittedError,
)
from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.nodes import operation
from captum_mipin.graph.signature import Signature, first_example
from captum_mipin.graph.validate import check_model, check_output, device_of, finite, generator_kept
from captum_mipin.inverse.data import Batches, Unpack
from captum_mipin.inverse.distributed import Processes
from captum_mipin.methods.base import Explanation, Relevance, Signal, Table
from captum_mipin.methods.gradients import derivative, smooth_gate
from captum_mipin.methods.layers import Layer, layers
from captum_mipin.methods.lrp import hand_on, quotient, values, varying
from captum_mipin.propagation.channels import channels
from captum_mipin.propagation.runtime import Run
from captum_mipin.report import table
from captum_mipin.rules import MIPIN, Options, Passes, Recorded, Rule
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.arithmetic import ARITHMETIC
from captum_mipin.rules.attention import ATTENTION
from captum_mipin.rules.base import Back, varies
from captum_mipin.rules.normalization import NORMALIZATION, SCALES
from captum_mipin.rules.pooling import POOLING, shared_out
from captum_mipin.storage.saved import Saved
from captum_mipin.storage.watch import Watch
from captum_mipin.types import Extras, Inputs, Output

Estimator = Literal["linear", "positive"]

#: Share of a variance below which it is rounding.
_CONSTANT = 1e-12


@dataclass
class Sums:
    """What the pattern of one operation is estimated from: sums over rows, in float64, of one kind of rows for each neuron.

    Attributes:
        count: (neurons,) rows counted.
        x: Σ x_i for each weight, shaped like the weights.
        xy: Σ x_i y_j for each weight.
        rows: All rows.
        y: (neurons,) Σ y_j over all rows.
    """

    count: Tensor
    x: Tensor
    xy: Tensor
    rows: int
    y: Tensor

    def add(self, other: "Sums") -> None:
        """Merge ``other`` in."""
        self.count += other.count
        self.x += other.x
        self.xy += other.xy
        self.rows += other.rows
        self.y += other.y

    def total(self, over: Callable[[Tensor], Tensor]) -> "Sums":
        """The same over several processes, of which ``over`` adds up a tensor."""
        rows = over(self.y.new_tensor([self.rows]))
        return Sums(over(self.count), over(self.x), over(self.xy), int(rows), over(self.y))

    def none(self) -> "Sums":
        """The same of no rows."""
        count, x, xy, y = map(torch.zeros_like, (self.count, self.x, self.xy, self.y))
        return Sums(count, x, xy, 0, y)


@dataclass(frozen=True)
class PatternFit:
    """How one operation was fitted.

    Attributes:
        layer: Module path and operation.
        rows: Rows: samples, times places for a convolution.
        neurons: Outputs or channels, each with a pattern.
        dead: Neurons without variance, or that are never active: their patterns are zero.
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


@dataclass(frozen=True)
class Merge:
    """A sum or difference of two signals, as an operation of the graph: one neuron a channel.

    Attributes:
        key: Module path and operation.
        name: Of the operation.
        operation: It.
        dim: Dimension of the channels.
    """

    key: str = ""
    name: str = ""
    operation: Any = None
    dim: int = 1

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return "captum_mipin.merge"

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run it."""
        return self.operation(*arguments, **named)


@dataclass
class _State:
    """All that a fit leaves behind: patterns by layer, and the model they are of."""

    patterns: dict[str, Tensor]
    report: PatternReport
    watch: Watch


class Patterns(Saved):
    """The patterns of a network's neurons, fitted in one pass over data like those to explain.

    Fitted are all layers with weights, batch norms behind them folded in, and sums of two signals, one neuron a channel. For a
    convolution each place of each sample is a row, padding included. Without labels, and for all classes at once.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode. Behind ``nn.DataParallel`` or ``torch.compile``, the module itself is
            taken.
        estimator: "linear", a = cov(x, y) / var(y), or "positive", the S_a+ of the paper, from the rows at which the neuron's
            own output, bias and batch norm included, is above 0: with means E₊ over those,
            a = (E₊[x y] − E₊[x] E[y]) / wᵀ(E₊[x y] − E₊[x] E[y]).
        layer: Where the way back ends, for :class:`LayerPropagation` there; what comes before is not fitted. Needed where the
            inputs are integers, such as the tokens of a text: then their embedding. By default the way ends at the inputs.
        output: Where the model returns several tensors, which of them, as for :class:`~captum_mipin.InverseNetwork`.

    Source: Kindermans et al., ICLR 2018, equations 5, 7 and appendix.

    Examples:
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
        if estimator not in ("linear", "positive"):
            raise InputError(f"estimator={estimator!r} is not one of 'linear', 'positive'")
        self.model, self.estimator, self.output = unwrapped(model), estimator, output
        self.layer = None if layer is None else unwrapped(layer)
        self._state: _State | None = None
        check_output(output)

    def __getitem__(self, layer: str) -> Tensor:
        """The pattern of a layer, by its module path and operation: shaped like its weights, (outputs, inputs) if dense."""
        patterns = self.fitted().patterns
        if layer not in patterns:
            raise NotFittedError(
                f"no pattern was fitted for {layer!r}; fitted are {', '.join(patterns)}"
            )
        return patterns[layer]

    @property
    def report(self) -> PatternReport:
        """Rows, neurons and dead neurons of every layer; prints as a table."""
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
        """Estimate all patterns, in one pass over the data, in any chunks and any order.

        If the fit fails, everything is as it was before.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader`` of (images, labels), or
                any iterable of batches. Of a batch that is a tuple, the first element is the input.
            unpack: Batch → (inputs, additional_forward_args), where a batch is anything else.
            batch_size: For data that does not come in batches.
            progress: Show a progress bar.
            distributed: Fit together with the other processes of ``torch.distributed``'s default group, which all make this
                call; the data is shared out among them as :meth:`InverseNetwork.fit <captum_mipin.InverseNetwork.fit>` does
                it, and all end with the same patterns.

        Returns:
            self

        Raises:
            FitError: The data cannot be used: empty, a single example, not finite, changing shape. Or another process failed.
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
        device, method = device_of(model), _Fitting(self.model, self)
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
                    bar.update(method.observe(inputs, extras))
            sums = self._together(method, processes)
            patterns, fits = {}, []
            for key, part in sums.items():
                layer, weight = method.weights[key]
                pattern, dead = solve(part, layer, weight.double())
                patterns[key] = pattern.to(weight)
                fits.append(PatternFit(key, part.rows, len(part.y), dead))
        self._state = _State(patterns, PatternReport(tuple(fits)), watch)
        return self

    def _together(self, method: "_Fitting", processes: Processes) -> dict[str, Sums]:
        """The sums over all processes' data."""
        count = sum(processes.gather(method.count))
        if count < 2:
            none = "the data yields no batch: nothing to fit on"
            one = "the data has 1 example, expected at least two: a pattern needs variance"
            raise FitError(one if count else none)
        example = processes.first(method.example)
        with processes.fail_together():
            if not method.count:  # this process has no data, and learns of its shape from another
                method.observe(*example)
                method.sums = {key: part.none() for key, part in method.sums.items()}
        processes.check_same(
            "inputs",
            (method.signature, [(key, part.xy.shape) for key, part in method.sums.items()]),
        )
        return {key: part.total(processes.sum) for key, part in method.sums.items()}

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
        patterns._state = _State(tensors, report, Watch(model, content["fingerprint"]))
        return patterns

    def fitted(self) -> _State:
        """What was fitted, of a model that has not changed since.

        Raises:
            NotFittedError: Nothing was.
            ModelChangedError: The model's weights are others now.
        """
        if self._state is None:
            raise NotFittedError("these Patterns are not fitted yet: call fit(data) first")
        if self._state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the patterns were fitted: fit them again"
            )
        return self._state


class _WithPatterns:
    """What PatternNet and PatternAttribution share: a table that needs patterns."""

    patterns: Patterns
    model: nn.Module

    def _of(self, patterns: Patterns) -> Output:
        if not isinstance(patterns, Patterns):
            raise InputError(
                f"patterns is a {type(patterns).__name__}, expected Patterns(model).fit(data)"
            )
        self.patterns = patterns
        return patterns.output

    def _pattern(self, key: str) -> Tensor:
        state = self.patterns._state
        if state is None or key not in state.patterns:
            raise NotFittedError(
                f"the patterns have nothing for {key}: fit them on this model, with the same output="
            )
        return state.patterns[key]


class PatternNet(_WithPatterns, Signal):
    """PatternNet: the signal that the target's output reads out of the input.

    A gradient with patterns for weights, started at the output itself: layers with weights and sums by their fitted patterns,
    batch norms of their own and products with constants and gates by division, averages by handing their signal to each
    element. Layer, group, instance and RMS norms are scales too, once mean and deviation of the sample are recorded: by
    division. Activations have their derivative, maximum pooling its switches, attention its recorded weights.

    Args:
        model: The network that ``patterns`` were fitted to.
        patterns: Its :class:`Patterns`.

    Source: Kindermans et al., ICLR 2018.
    """

    _name = "PatternNet"

    def __init__(self, model: nn.Module, patterns: Patterns) -> None:
        Signal.__init__(self, model, output=self._of(patterns))
        _same(self.model, patterns)

    def explain(
        self, inputs: Inputs, target: Any, extras: Extras = (), layer: nn.Module | None = None
    ) -> Explanation:
        """See :meth:`Propagation.explain`; besides, NotFittedError and ModelChangedError."""
        self.patterns.fitted()
        return super().explain(inputs, target, extras, layer)

    def _table(self) -> Table:
        return _rules(
            partial(_through, self._pattern, False),
            partial(_merged, self._pattern, False),
            attribution=False,
        )


class PatternAttribution(_WithPatterns, Relevance):
    """PatternAttribution: how much each input's signal contributes to the target's output.

    As :class:`PatternNet` with patterns times weights in the place of patterns. What is sent back is not conserved: wᵀa = 1
    holds for each neuron, but a neuron that is active sends its whole signal to inputs that may be inactive.

    Args:
        model: The network that ``patterns`` were fitted to.
        patterns: Its :class:`Patterns`.

    Source: Kindermans et al., ICLR 2018.
    """

    _name = "PatternAttribution"

    def __init__(self, model: nn.Module, patterns: Patterns) -> None:
        Relevance.__init__(self, model, output=self._of(patterns))
        _same(self.model, patterns)

    def explain(
        self, inputs: Inputs, target: Any, extras: Extras = (), layer: nn.Module | None = None
    ) -> Explanation:
        """See :meth:`Propagation.explain`; besides, NotFittedError and ModelChangedError."""
        self.patterns.fitted()
        return super().explain(inputs, target, extras, layer)

    def _table(self) -> Table:
        return _rules(
            partial(_through, self._pattern, True),
            partial(_merged, self._pattern, True),
            attribution=True,
        )


class _Fitting(Signal):
    """Runs the model and sums up what patterns are estimated from.

    Attributes:
        sums: By layer, in order of execution.
        weights: Of each layer.
        count: Examples seen.
        example: One like them; None before the first.
        signature: Of their kind.
    """

    def __init__(self, model: nn.Module, patterns: Patterns) -> None:
        super().__init__(model, output=patterns.output)
        self.sums: dict[str, Sums] = {}
        self.weights: dict[str, tuple[Layer | Merge, Tensor]] = {}
        self.example: tuple[Inputs, Extras] | None = None
        self.signature: Signature | None = None
        self.count, self._batch = 0, 0
        self._layer_at, self._positive = patterns.layer, patterns.estimator == "positive"

    def observe(self, inputs: Inputs, extras: Extras) -> int:
        """Sum up one batch; the number of its examples.

        Raises:
            FitError: Something in it is not finite.
        """
        captured, surrogate = self._surrogate(inputs, extras, self._layer_at)
        output = surrogate(
            Run(surrogate.steps, fitting=()), captured.values(self.model, inputs, extras)
        )
        if not finite(output) or not all(finite(part.xy) for part in self.sums.values()):
            raise FitError(f"batch {self._batch}: NaN or Inf in the model's output or features")
        self.example = self.example or first_example(inputs, extras, captured.shared)
        self.signature = self.signature or Signature.of(inputs, extras, captured.shared)
        self.count, self._batch = self.count + len(output), self._batch + 1
        return len(output)

    def _table(self) -> Table:
        return _rules(self._layer, self._merge, attribution=True)

    def _layer(
        self, options: Options, layer: Layer, x: Tensor, weight: Any, bias: Any, norm: Any
    ) -> tuple[Tensor, Back]:
        w, b = layer.parameters(weight, bias, norm)
        linear = layer.apply(x, w)
        value = layer.shifted(linear, b)
        if layer.kind != "scale":
            self._add(
                layer.key,
                layer,
                w,
                sums_of(layer, x, w, linear, value > 0 if self._positive else None),
            )
        return value, lambda s: s

    def _merge(self, options: Options, operation: Any, x: tuple[Tensor, ...], **named: Any) -> Any:
        value, merge = operation(x, **named), _merge_of(operation)
        rows = [_channels(part.expand_as(value), merge.dim) for part in x]
        y = _channels(value, merge.dim)
        of = (y > 0 if self._positive else torch.ones_like(y, dtype=torch.bool)).double()
        stacked = torch.stack(rows, 2).double()
        y = y.double()
        found = Sums(
            of.sum(0),
            torch.einsum("nc,nck->ck", of, stacked),
            torch.einsum("nc,nck->ck", of * y, stacked),
            len(y),
            y.sum(0),
        )
        self._add(merge.key, merge, _coefficients(merge, value, named), found)
        return value, lambda s: (s,) * len(x)

    def _add(self, key: str, layer: Layer | Merge, weight: Tensor, found: Sums) -> None:
        self.weights[key] = layer, weight
        if key in self.sums:
            self.sums[key].add(found)
        else:
            self.sums[key] = found


def sums_of(layer: Layer, x: Tensor, weight: Tensor, linear: Tensor, active: Tensor | None) -> Sums:
    """Sums over one batch: all rows, or for each neuron those at which it is ``active``.

    y is centred by its mean over these rows before products are taken, in the dtype of ``x``, and moved back in float64.

    Args:
        layer: The layer.
        x: Its input.
        weight: W.
        linear: y = A(x; W), without bias.
        active: Shaped like y; None for all rows.
    """
    if x.element_size() < 4:
        x, weight, linear = x.float(), weight.float(), linear.float()
    of = torch.ones_like(linear) if active is None else active.to(linear)
    rows, y = layer.outputs(of).double(), layer.outputs(linear).double()
    count = rows.sum(0)
    mean = (rows * y).sum(0) / count.clamp(min=1)
    centred = (
        linear - mean.to(linear)
        if layer.kind == "dense"
        else linear - mean.to(linear).view(-1, *(1,) * (linear.ndim - 2))
    )
    sum_x = layer.products(x, of, weight).double()
    sum_xy = layer.products(x, of * centred, weight).double() + sum_x * layer.spread(
        mean.to(linear).double(), weight
    )
    return Sums(count, sum_x, sum_xy, len(y), y.sum(0))


def solve(sums: Sums, layer: Layer | Merge, weight: Tensor) -> tuple[Tensor, int]:
    """The pattern of each neuron, shaped like the weights, and the number of those without."""
    count, mean = sums.count.clamp(min=1), sums.y / max(sums.rows, 1)
    spread = (
        (lambda v: v.unsqueeze(1))
        if isinstance(layer, Merge)
        else (lambda v: layer.spread(v, weight))
    )
    each = (lambda t: t) if isinstance(layer, Merge) else layer.of_outputs
    above = (sums.xy - sums.x * spread(mean)) / spread(count)
    below = each(weight * above).sum(1)
    size = (
        each(weight * sums.xy).abs().sum(1) + each(weight * sums.x).abs().sum(1) * mean.abs()
    ) / count
    dead = below.abs() <= _CONSTANT * size
    return above / spread(below.masked_fill(dead, torch.inf)), int(dead.sum())


def _through(
    pattern: Callable[[str], Tensor],
    attribution: bool,
    options: Options,
    layer: Layer,
    x: Tensor,
    *weights: Any,
) -> tuple[Tensor, Back]:
    """Send s through a layer's patterns, or patterns times weights."""
    w, b = layer.parameters(*weights)
    value = layer.apply(x, w, b)
    if layer.kind == "scale":
        inverse = (w != 0).to(w) if attribution else 1 / w.masked_fill(w == 0, torch.inf)
        return value, lambda s: layer.adjoint(s, x, inverse)
    a = pattern(layer.key).to(w)
    if a.shape != w.shape:
        raise InputError(
            f"the pattern of {layer.key} has shape {tuple(a.shape)}, its weights {tuple(w.shape)}: fit again"
        )
    return value, lambda s: layer.adjoint(s, x, layer.made(torch.mul, a, w) if attribution else a)


def _merged(
    pattern: Callable[[str], Tensor],
    attribution: bool,
    options: Options,
    operation: Any,
    x: tuple[Tensor, ...],
    **named: Any,
) -> Any:
    """Send s to each term of a sum by its pattern."""
    value, merge = operation(x, **named), _merge_of(operation)
    a = pattern(merge.key).to(value)
    weights = a * _coefficients(merge, value, named) if attribution else a
    shape = [-1 if dim == merge.dim % value.ndim else 1 for dim in range(value.ndim)]
    parts = [weight.view(shape) for weight in weights.unbind(1)]
    return value, lambda s: tuple(
        (s * weight).sum_to_size(t.shape) for weight, t in zip(parts, x, strict=True)
    )


def _scaled(
    attribution: bool, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """Send s / g for y = g ⊙ x, for which a = 1 / g; a ⊙ g = 1 for attributions. Nothing where g = 0."""
    value = operation(x, *arguments, **named)
    g = operation(torch.ones_like(x), *arguments, **named)
    factor = (g != 0).to(g) if attribution else 1 / g.masked_fill(g == 0, torch.inf)
    return value, lambda s: (s * factor).sum_to_size(x.shape)


def _shifted(
    attribution: bool, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """The same for y = g x + c with a constant c, such as 1 − x."""
    constant, *others = arguments
    zero = torch.zeros_like(constant) if isinstance(constant, Tensor) else 0
    _, back = _scaled(attribution, options, operation, x, zero, *others, **named)
    return operation(x, *arguments, **named), back


def _normalised(
    scale: Callable[..., Tensor], options: Options, operation: Any, x: Tensor, *arguments: Any
) -> tuple[Tensor, Back]:
    """The same for the scale g = γ / σ of a normalisation, whose mean and deviation of the sample are recorded."""
    return operation(x, *arguments), lambda s: quotient(s, scale(x, *arguments).expand_as(x))


def _averaged(
    attribution: bool, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """The signal of an average is that of each of its elements (the mean where windows overlap), of a sum its part."""
    if not attribution:
        return shared_out(lambda t: operation(t, *arguments, **named), x, recorded=False)
    value, back = derivative(lambda xs: operation(*xs, *arguments, **named), (x,))
    weights = operation(torch.ones_like(x), *arguments, **named)
    return value, lambda s: back(s / weights)[0]


def _rules(layer: Callable[..., Any], merge: Callable[..., Any], attribution: bool) -> Table:
    """The table of a method with patterns."""
    passes = {name: rule for name, rule in MIPIN.items() if isinstance(rule, Passes)}
    rules: dict[str, Rule] = {
        **passes,
        **{
            name: Passes(note="derivative", refuse=rule.refuse)
            for name, rule in ACTIVATIONS.items()
        },
        "captum_mipin.layer": Recorded(
            run=layer, note="patterns times weights" if attribution else "patterns"
        ),
        str(Merge()): Recorded(
            run=merge, note="patterns, one a channel", several=True, carriers=lambda node: (0, 1)
        ),
    }
    rule: Rule
    for name, rule in POOLING.items():
        if "max_pool" in name:
            rules[name] = Passes(note="to its switches")
        else:
            rules[name] = Recorded(
                run=partial(_averaged, attribution), note="evenly", refuse=rule.refuse
            )
    for name, rule in ARITHMETIC.items():
        if any(part in name for part in ("mul", "div", "neg")):
            run = partial(_scaled, attribution)
            rules[name] = Recorded(
                run=run, note="divided by what it was multiplied by" if not attribution else "handed on",
                carriers=values, records=rule.records, refuse=rule.refuse, caveat=_gated,
            )  # fmt: skip
        else:
            rules[name] = Recorded(
                run=partial(_shifted, attribution),
                note="handed on",
                carriers=varying,
                refuse=rule.refuse,
            )
    for name, rule in ATTENTION.items():
        rules[name] = replace(rule, note="adjoint with the recorded weights", caveat=_decided)
    for name in NORMALIZATION if attribution else SCALES:
        how: Callable[..., Any] = hand_on if attribution else partial(_normalised, SCALES[name])
        note = "handed on" if attribution else "divided by the scale of the sample"
        rules[name] = Recorded(run=how, note=note, caveat=_decided)
    return Table(rules, _rewrite)


def _rewrite(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Layers with weights, and sums of two signals, become operations of their own."""
    layers(graph, batch, starts, lambda layer, first, last: "captum_mipin.layer")
    node: Any
    for node in graph.nodes:
        if operation(node) == "mul":
            smooth_gate(node)
        elif (
            operation(node) in ("add", "sub")
            and len(node.args) == 2
            and all(map(varies, node.args))
        ):
            mark(node, original=node.target)
            sizes = list(map(str, value_of(node).shape))
            dim = channels(node, sizes.index(batch) if batch in sizes else 0)
            node.target = Merge(marks(node).key, operation(node), node.target, dim or 0)


def _merge_of(operation: Any) -> Merge:
    """The operation that takes its two terms at their positions."""
    merge: Merge = operation.args[0]
    return merge


def _coefficients(merge: Merge, value: Tensor, named: Mapping[str, Any]) -> Tensor:
    """(channels, 2): what each term is multiplied by."""
    alpha = named.get("alpha", 1) * (-1 if merge.name == "sub" else 1)
    return value.new_tensor([1.0, float(alpha)]).expand(value.shape[merge.dim], 2)


def _channels(value: Tensor, dim: int) -> Tensor:
    """The same as (rows, channels)."""
    return value.movedim(dim, -1).flatten(0, -2)


def _gated(node: fx.Node) -> str | None:
    return (
        "outside of the definition: the gate gets nothing"
        if sum(map(varies, node.args)) > 1
        else None
    )


def _decided(node: fx.Node) -> str | None:
    return "outside of the definition"


def _same(model: nn.Module, patterns: Patterns) -> None:
    if patterns.model is not model:
        raise InputError(
            "the patterns belong to another model object; Patterns.load(path, model) binds them to this"
        )
