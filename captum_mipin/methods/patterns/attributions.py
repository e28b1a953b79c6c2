"""PatternNet and PatternAttribution as Captum attributions."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from captum_mipin.errors import InputError, NotFittedError
from captum_mipin.graph.layers import Site
from captum_mipin.graph.validate import as_model
from captum_mipin.methods.base import Explanation, Propagation, Relevance, Signal, Table
from captum_mipin.methods.layers import Layer, Neurons, Scale
from captum_mipin.methods.patterns.fit import Patterns
from captum_mipin.methods.patterns.table import Merge, pattern_rules, reciprocal
from captum_mipin.options import type_of
from captum_mipin.rules import Options
from captum_mipin.rules.base import Back
from captum_mipin.targets import target_label
from captum_mipin.types import Inputs, Target


class PatternPropagation(Propagation):
    """Base class of both methods: the backward pass uses patterns a, or a ⊙ w, as weights."""

    #: Whether patterns are multiplied by weights.
    _attribution: ClassVar[bool]

    def __init__(self, model: nn.Module, patterns: Patterns) -> None:
        as_model(model)
        if not isinstance(patterns, Patterns):
            raise InputError(
                f"patterns is {type_of(patterns)}, expected Patterns: pass "
                "Patterns(model).fit(data)"
            )
        super().__init__(model, output=patterns.output)
        if patterns.model is not self.model:
            raise InputError(
                "the patterns were made for another model object than this model: pass that "
                "object as model, or load the patterns for this model with Patterns.load(path, "
                "model)"
            )
        self.patterns = patterns

    @classmethod
    def _bare(cls, model: nn.Module) -> "PatternPropagation":
        """Return an object whose patterns are not fitted."""
        return cls(model, Patterns(model))

    def explain(
        self, inputs: Tensor | Inputs, target: Any, extras: Any = (), layer: Site = None
    ) -> Explanation:
        """Run one forward and one backward pass, see :meth:`Propagation.explain`.

        Raises:
            NotFittedError: The patterns are not fitted, or the target has no pattern, because its
                logit was never positive in the data of the fit.
            ModelChangedError: The model's weights changed since the fit.
        """
        self.patterns.fitted()
        return super().explain(inputs, target, extras, layer)

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        """Return the start of the backward pass.

        Raises:
            NotFittedError: A target's output was 0 for all data of the fit, as behind a ReLU. Where
                it is 0, the start is 0 as well, and does not reach the neurons without patterns.
        """
        lost = self.patterns.fitted().zero.intersection(targets)
        if lost and self.patterns.estimator == "positive":
            place = ", ".join(str(target_label(target)) for target in sorted(lost))
            raise _no_pattern(place, "its output is always 0, as behind a ReLU,")
        return super()._start(output, targets)

    def _table(self) -> Table:
        return pattern_rules(self._layer, self._merge, attribution=self._attribution)

    def _pattern(self, key: str) -> Tensor:
        state = self.patterns.state
        if state is None or key not in state.patterns:
            raise NotFittedError(
                f"no pattern was fitted for {key}: call fit(data) of Patterns that were made with "
                "the same output= and layer="
            )
        return state.patterns[key]

    def _layer(
        self, options: Options, layer: Layer, x: Tensor, *parameters: Any
    ) -> tuple[Tensor, Back]:
        """Run a layer; return its value and the backward function with its patterns."""
        w, b = layer.parameters(*parameters)
        narrow, x = x.dtype, x.to(w)  # w is wider if the model uses autocast
        value = layer.apply(x, w, b).to(narrow)
        if isinstance(layer, Scale):  # pattern a = 1 / w; for attributions a w = 1
            factor = (w != 0).to(w) if self._attribution else reciprocal(w)
            return value, lambda s: layer.adjoint(s.to(w), x, factor)
        a = self._pattern(layer.key).to(w)
        if a.shape != w.shape:
            raise InputError(
                f"the pattern of {layer.key} has shape {tuple(a.shape)}, expected the shape of "
                f"its weights, {tuple(w.shape)}: fit the patterns again"
            )
        factor = layer.made(Tensor.mul, a, w) if self._attribution else a

        def back(s: Tensor) -> Tensor:
            self._check_live(layer, s, a, w)
            return layer.adjoint(s.to(w), x, factor)

        return value, back

    def _merge(self, options: Options, operation: Any, x: tuple[Tensor, ...], **named: Any) -> Any:
        """Run a sum of two signals; return its value and the backward function with patterns."""
        value, merge = operation(x, **named), Merge.of(operation)
        a = self._pattern(merge.key).to(value)
        weights = a * merge.coefficients(value, named) if self._attribution else a
        parts = [merge.channelwise(weight, value) for weight in weights.unbind(1)]

        def back(s: Tensor) -> tuple[Tensor, ...]:
            self._check_live(merge, s, a, merge.coefficients(value, named))
            return tuple(
                (s * weight).sum_to_size(t.shape) for weight, t in zip(parts, x, strict=True)
            )

        return value, back

    def _check_live(self, neurons: Neurons, s: Tensor, pattern: Tensor, weight: Tensor) -> None:
        """Raise NotFittedError if the target's neuron has no pattern: its map would be 0.

        Args:
            neurons: The operation. The check is made only if it is the last one with neurons.
            s: The signal at the operation's output.
            pattern: The patterns, shaped like the weights.
            weight: The weights. A neuron whose weights are all 0 needs no pattern.
        """
        if not neurons.last:
            return
        dead, idle = (~neurons.by_neuron(t).any(1) for t in (pattern, weight))
        lost = (neurons.outputs(s).any(0) & dead & ~idle).nonzero().flatten().tolist()
        if lost:
            place = f"{', '.join(map(str, lost))}, an output of {neurons.key}"
            if self.patterns.estimator == "linear":
                raise _no_pattern(place, "its logit is constant")
            way_out = ', or use Patterns(model, estimator="linear")'
            raise _no_pattern(place, "its logit is never positive, or constant", way_out)


def _no_pattern(place: str, cause: str, way_out: str = "") -> NotFittedError:
    """Return the error of a class without a pattern.

    Args:
        place: The class, and the operation of which it is an output.
        cause: What its logit is in the data of the fit.
        way_out: A way out besides other data.
    """
    return NotFittedError(
        f"no pattern was fitted for class {place}, because {cause} in the data of the fit: fit on "
        f"data in which this logit varies and is positive{way_out}"
    )


class PatternNet(PatternPropagation, Signal):
    """PatternNet: the signal in the input that determines the target's output.

    It is a backward pass that starts with the target's output and uses patterns a instead of
    weights w. Layers with weights, and sums, have fitted patterns. Operations y = g x with a known
    factor g divide the signal by g: batch norms that are not folded, products with constants and
    gates, and layer, group, instance and RMS norms, with the mean and deviation of the sample as
    constants. Averages give their signal to each of their elements. Activations multiply by their
    derivative, maximum pooling gives the signal to the maxima, and attention uses the weights that
    it has for the example.

    Args:
        model: The network that ``patterns`` were fitted to.
        patterns: The fitted :class:`Patterns` of ``model``.

    Source: Kindermans et al., ICLR 2018.

    Examples:
        >>> import torch
        >>> from captum_mipin.methods import Patterns
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 2)).eval(), torch.randn(99, 4)
        >>> patterns = Patterns(model, estimator="linear").fit(x, progress=False)
        >>> PatternNet(model, patterns).attribute(x[:3], target=0).shape
        torch.Size([3, 4])
    """

    _name = "PatternNet"
    _attribution = False


class PatternAttribution(PatternPropagation, Relevance):
    """PatternAttribution: how much each input's signal contributes to the target's output.

    It is :class:`PatternNet` with a ⊙ w instead of a. Relevance is not conserved: wᵀa = 1 holds for
    each neuron, so the inputs of a neuron get all of its relevance, but it is lost at inputs that
    are inactive neurons.

    Args:
        model: The network that ``patterns`` were fitted to.
        patterns: The fitted :class:`Patterns` of ``model``.

    Source: Kindermans et al., ICLR 2018.

    Examples:
        >>> import torch
        >>> from captum_mipin.methods import Patterns
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 1)).eval(), torch.randn(99, 2)
        >>> patterns = Patterns(model, estimator="linear").fit(x, progress=False)
        >>> relevance = PatternAttribution(model, patterns).attribute(x, target=0)
        >>> # all of the logit, since there is one neuron, and wᵀa = 1
        >>> torch.allclose(relevance.sum(1), model(x)[:, 0], rtol=1e-3, atol=1e-3)
        True
    """

    _name = "PatternAttribution"
    _attribution = True
