"""MIP-IN as Captum attributions: the call contract, and nothing else."""

from typing import Any

import torch
from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.errors import InputError
from captum_mipin.graph.capture import Inputs, select, unwrapped
from captum_mipin.graph.validate import as_extras, as_inputs, like
from captum_mipin.inverse.network import Explanation, InverseNetwork
from captum_mipin.methods.gradients import Gradient
from captum_mipin.propagation.runtime import seed
from captum_mipin.targets import per_example


class MIPINAttribution(NoFuture, GradientAttribution):
    """MIP-IN attributions at the input: how a class's logit is carried by each input feature.

    The attribution A is the inverse network's answer without its biases, linear in the logit; the source signal S is
    its answer with them (algorithm 1). Either takes one pass forward and one back, like a gradient.

    Args:
        model: The network that ``inverse`` was fitted to, bare or behind ``nn.DataParallel`` or ``torch.compile``.
        inverse: Its fitted :class:`~captum_mipin.InverseNetwork`, which also says which of several outputs is explained.

    Raises:
        InputError: ``inverse`` belongs to another model object.

    Source: Deng et al., KDD 2021, sections 4.2, 4.3 and algorithm 1.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> x = torch.randn(200, 6)
        >>> mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
        >>> mipin.attribute(x[:4], target=[0, 1, 2, 0]).shape
        torch.Size([4, 6])
    """

    def __init__(self, model: nn.Module, inverse: InverseNetwork) -> None:
        GradientAttribution.__init__(self, model)
        self.model = unwrapped(model)
        self.inverse = _of(inverse, model)
        self._gradient = Gradient(model, output=inverse.output)

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        local: bool = True,
        mask_input: bool = False,
        multiply_by_inputs: bool = False,
        multiply_by_gradients: bool = False,
        evidence: bool = False,
        return_convergence_delta: bool = False,
    ) -> Any:
        """A, the attribution of the target's logit to the input (algorithm 1).

        Args:
            inputs: Tensor (batch, ...) or tuple of such, floating.
            target: The class, as any Captum method takes it: int, tuple, list, integer tensor; may differ between
                examples. None for a model with one output.
            additional_forward_args: Further arguments of the model.
            local: Adapt the inverse to each example by its masks and switches (equation 9); without, the global view.
            mask_input: Apply equation 9 to the input as well.
            multiply_by_inputs: Return A ⊙ x.
            multiply_by_gradients: Return A ⊙ ∂Φ_c/∂x, what the network reads of A: relevance, in units of the output, as
                PatternAttribution's of PatternNet's signal; if Φ_c is linear, it adds up to it. Takes one more pass each way.
                It is the derivative of the operations that the model runs, whatever an ``autograd.Function`` has for its
                ``backward``; nothing comes back through ``detach()`` and what is computed under ``torch.no_grad()``.
            evidence: Explain what speaks for the target alone, place by place, of an output that is an average over places or a
                dense layer on one: the average of the places' positive parts, instead of a logit that may be negative. Where
                the average is positive, the map is the same up to its scale.
            return_convergence_delta: Return also the completeness error of the source signal, Φ_c(S) − Φ_c(x).

        Returns:
            Attributions shaped, typed and placed like ``inputs``; with ``return_convergence_delta`` a pair of them and
            a tensor (batch,).

        Raises:
            NotFittedError: A class that was not fitted.
            InputError: Not a tensor or tuple, empty, integer, NaN. Also an AssertionError and a ValueError.
            TargetError: Not a target of this model. Also an AssertionError; out of range also an IndexError.
            CaptureError: The model cannot run on inputs of this shape, dtype or device.
            ModelChangedError: The model's weights changed since the fit.
        """
        tensors, extras = as_inputs(inputs), as_extras(additional_forward_args)
        if evidence and return_convergence_delta:
            raise InputError(
                "return_convergence_delta=True is of the whole output, evidence=True explains a part: ask for one"
            )
        biases = (False, True) if return_convergence_delta else (False,)
        found = self.inverse.explain(
            tensors, target, extras, biases=biases, local=local, mask=mask_input, evidence=evidence
        )
        maps = found.signals[0]
        if multiply_by_inputs:
            maps = _product(maps, found.features)
        if multiply_by_gradients:
            maps = _product(maps, self._gradient.explain(tensors, target, extras).signals)
        if not return_convergence_delta:
            return like(inputs, maps)
        return like(inputs, maps), self._delta(found.signals[1], found.output, target, extras)

    def source_signal(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        local: bool = True,
        mask_input: bool = False,
    ) -> Any:
        """S, see :meth:`InverseNetwork.source_signal`."""
        return self.inverse.source_signal(
            inputs, target, additional_forward_args, local=local, mask_input=mask_input
        )

    def distractor(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        local: bool = True,
        mask_input: bool = False,
    ) -> Any:
        """X − S, see :meth:`InverseNetwork.distractor`."""
        return self.inverse.distractor(
            inputs, target, additional_forward_args, local=local, mask_input=mask_input
        )

    def class_attribution(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """The global map of a class, see :meth:`InverseNetwork.class_attribution`."""
        return self.inverse.class_attribution(target, additional_forward_args)

    def has_convergence_delta(self) -> bool:
        """Whether ``attribute`` can return a convergence delta: it can."""
        return True

    def compute_convergence_delta(
        self,
        source_signal: Any,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Completeness error of a source signal, Φ_c(S) − Φ_c(x), example by example (section 5).

        Args:
            source_signal: What :meth:`source_signal` gave for ``inputs``.
            inputs: The inputs.
            target: The class.
            additional_forward_args: Further arguments of the model.

        Returns:
            (batch,)
        """
        extras = as_extras(additional_forward_args)
        explained = self._explained(as_inputs(inputs), target, extras)
        return self._delta(as_inputs(source_signal), explained, target, extras)

    def _delta(self, signal: Inputs, explained: Tensor, target: Any, extras: Any) -> Tensor:
        return self._explained(signal, target, extras) - explained

    def _explained(self, inputs: Inputs, target: Any, extras: Any) -> Tensor:
        """Φ_c of each example."""
        with torch.no_grad():
            output = select(self.model(*inputs, *extras), self.inverse.output)
            picked = seed(output, per_example(target, output))
        return picked.flatten(1).sum(1) if picked.ndim > 1 else picked

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return "MIP-IN"


class LayerMIPINAttribution(NoFuture, LayerAttribution, GradientAttribution):
    """MIP-IN attributions at the output of a layer.

    Args:
        model: The network that ``inverse`` was fitted to, bare or behind ``nn.DataParallel`` or ``torch.compile``.
        inverse: Its fitted :class:`~captum_mipin.InverseNetwork`, which may itself stop at a layer. If it does, the
            model's inputs may be integers, such as the tokens of a text.
        layer: A module of the model with one output tensor, in or above what ``inverse`` inverts; by default the
            layer that ``inverse`` stops at. The forward mask (equation 9) applies to its output. Between a batch
            norm and its convolution, the signal is in units of the batch norm's output.

    Raises:
        InputError: ``inverse`` belongs to another model object, or no layer is known.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> x = torch.randn(50, 1, 8, 8)
        >>> inverse = InverseNetwork(model, layer=model[1]).fit(x, targets=0, progress=False)
        >>> maps = LayerMIPINAttribution(model, inverse).attribute(x[:2], target=0)
        >>> LayerMIPINAttribution.interpolate(maps.mean(1, keepdim=True), (8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, model: nn.Module, inverse: InverseNetwork, layer: nn.Module | None = None
    ) -> None:
        inverse = _of(inverse, model)
        layer = inverse.layer if layer is None else layer
        if layer is None:
            raise InputError(
                "no layer was given, and this inverse does not stop at one: pass layer="
            )
        LayerAttribution.__init__(self, model, unwrapped(layer))
        GradientAttribution.__init__(self, model)
        self.model = unwrapped(model)
        self.inverse = inverse
        self._gradient = Gradient(model, output=inverse.output)

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        local: bool = True,
        multiply_by_features: bool = False,
        multiply_by_gradients: bool = False,
        evidence: bool = False,
    ) -> Tensor:
        """A at the layer: how the target's logit is carried by each feature of its output.

        Args:
            inputs, target, additional_forward_args: As for :meth:`MIPINAttribution.attribute`.
            local: Adapt the inverse to each example; without, the global view.
            multiply_by_features: Return A ⊙ features.
            multiply_by_gradients: Return A ⊙ the gradient there, as for :meth:`MIPINAttribution.attribute`.
            evidence: Explain what speaks for the target alone, as for :meth:`MIPINAttribution.attribute`.

        Returns:
            Shaped like the layer's output.

        Raises:
            As :meth:`MIPINAttribution.attribute`; CaptureError where the layer has not exactly one output tensor.
        """
        found = self._explain(inputs, target, additional_forward_args, False, local, evidence)
        maps = found.signals[0]
        if multiply_by_features:
            maps = _product(maps, found.features)
        if multiply_by_gradients:
            extras = as_extras(additional_forward_args)
            maps = _product(
                maps, self._gradient.explain(as_inputs(inputs), target, extras, self.layer).signals
            )
        return maps[0]

    def source_signal(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        local: bool = True,
    ) -> Tensor:
        """S at the layer: what of its output the target's logit carries, shaped like it."""
        return self._explain(inputs, target, additional_forward_args, True, local).signals[0][0]

    def _explain(
        self,
        inputs: Any,
        target: Any,
        arguments: Any,
        bias: bool,
        local: bool,
        evidence: bool = False,
    ) -> Explanation:
        return self.inverse.explain(
            as_inputs(inputs),
            target,
            as_extras(arguments),
            biases=(bias,),
            local=local,
            layer=self.layer,
            evidence=evidence,
        )

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return "Layer MIP-IN"


def _product(maps: Inputs, factors: Inputs) -> Inputs:
    return tuple(a * b for a, b in zip(maps, factors, strict=True))


def _of(inverse: object, model: nn.Module) -> InverseNetwork:
    if not isinstance(inverse, InverseNetwork):
        raise InputError(f"inverse is a {type(inverse).__name__}, expected an InverseNetwork")
    if inverse.model is not unwrapped(model):
        raise InputError(
            "the inverse belongs to another model object; InverseNetwork.load(path, model) binds one to this"
        )
    return inverse
