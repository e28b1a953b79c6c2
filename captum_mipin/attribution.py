"""MIP-IN as Captum attributions, at the input and at a layer."""

from typing import Any

import torch
from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_mipin._captum import NoFuture, captum_entry, describe_common
from captum_mipin.errors import InputError
from captum_mipin.graph.layers import Site, at_places
from captum_mipin.graph.modules import modules_of
from captum_mipin.graph.signature import select
from captum_mipin.graph.validate import as_extras, as_inputs, as_model, like
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.inverse.explain import Explanation
from captum_mipin.methods.base import single, summed
from captum_mipin.methods.gradients import Gradient
from captum_mipin.options import type_of
from captum_mipin.propagation.runtime import seed
from captum_mipin.targets import per_example
from captum_mipin.types import Extras, Inputs

#: Inputs, target and further arguments of one call, in the order of the parameters of ``explain``.
Call = tuple[Inputs, Any, Extras]


class _MIPIN(NoFuture, GradientAttribution):
    """Base class of the attributions at the input and at a layer."""

    def __init__(self, model: nn.Module, inverse: ModelInverse[Any]) -> None:
        self.model = as_model(model)
        if not isinstance(inverse, ModelInverse):
            raise InputError(
                f"inverse is {type_of(inverse)}, expected an InverseNetwork: pass "
                "InverseNetwork(model).fit(data), and a layer only after it"
            )
        if inverse.model is not self.model:
            raise InputError(
                "the inverse was made for another model object than this model: pass that object "
                "as model, or load the inverse for this model with InverseNetwork.load(path, model)"
            )
        GradientAttribution.__init__(self, model)
        self.inverse = inverse
        self._gradient = Gradient(model, output=inverse.output)
        self._gradient_of_contrast = Gradient(model, output=inverse.output, contrast=True)

    def _products(
        self,
        explanation: Explanation,
        call: Call,
        *,
        features: bool,
        gradients: bool,
        contrast: bool,
        layer: Site = None,
    ) -> Inputs:
        """Return the attribution A, multiplied by features or gradients according to the options.

        Args:
            explanation: The explanation, whose first signal is A.
            call: The call that is explained.
            features: True to multiply by the values at the inputs or at the layer's output.
            gradients: True to multiply by the gradient of the target's logit with respect to them.
            contrast: True for the gradient of the target's contrast in place of its logit.
            layer: The place that is explained.
        """
        maps = explanation.signals[0]
        if features:
            maps = tuple(a * x for a, x in zip(maps, explanation.features, strict=True))
        if gradients:
            gradient = self._gradient_of_contrast if contrast else self._gradient
            slopes = gradient.explain(*call, layer).signals
            maps = tuple(a * g for a, g in zip(maps, slopes, strict=True))
        return maps


class MIPINAttribution(_MIPIN):
    """MIP-IN attributions at the input: the part of the logit that each input feature carries.

    The inverse network maps the target's logit to the input. With its biases the result is the
    source signal S; without them it is the attribution A, which is linear in the logit (algorithm
    1). Each of the two takes one forward and one backward pass, like a gradient.

    Args:
        model: The network that ``inverse`` was fitted to, or this network in ``nn.DataParallel`` or
            ``torch.compile``.
        inverse: The fitted :class:`~captum_mipin.InverseNetwork` of ``model``. If the model has
            several outputs, the one that ``inverse`` was fitted for is explained.

    Raises:
        InputError: ``inverse`` was made for another model object.

    Source: Deng et al., KDD 2021, sections 4.2, 4.3 and algorithm 1.

    Examples:
        >>> from captum_mipin import InverseNetwork
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> x = torch.randn(200, 6)
        >>> mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
        >>> mipin.attribute(x[:4], target=[0, 1, 2, 0]).shape
        torch.Size([4, 6])
    """

    def __init__(self, model: nn.Module, inverse: ModelInverse[Any]) -> None:
        super().__init__(model, inverse)  # with this name in Python's error if one is missing

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None, *,
        local: bool = True, mask_input: bool = False, multiply_by_inputs: bool = False,
        multiply_by_gradients: bool = False, evidence: bool = False, contrast: bool = False,
        return_convergence_delta: bool = False,
    ) -> Any:  # fmt: skip
        """Return A, the attribution of the target's logit to the input (algorithm 1).

        Args:
            local: True to adapt the inverse to each example by its forward masks and switches
                (equation 9). False for the global view, without masks.
            mask_input: True to apply the forward mask of equation 9 to the input as well.
            multiply_by_inputs: True to return A ⊙ x.
            multiply_by_gradients: True to return A ⊙ ∂Φ_c/∂x, a relevance in units of the output;
                for a linear Φ_c it sums to Φ_c. It takes one more forward and backward pass. The
                gradient is that of :class:`~captum_mipin.methods.gradients.Gradient`.
            evidence: True to explain only the evidence for the target, if its logit is an average
                over positions, or a dense layer on such an average. The average of the positive
                parts of all positions is explained then, because the logit may be negative. If the
                logit is positive, the map only differs by a factor.
            contrast: True to explain only what the target c has beyond all other classes k: at
                each position max(0, y_c − max_k≠c y_k), in place of y_c, the part of the logit that
                comes from there. It needs an average over positions, as ``evidence`` does. With
                ``multiply_by_gradients``, the gradient is that of the average of these parts.
            return_convergence_delta: True to return also the completeness error of the source
                signal, Φ_c(S) − Φ_c(x).

        Returns:
            Attributions with the shape, dtype and device of ``inputs``. With
            ``return_convergence_delta``, a pair of attributions and a tensor (batch,).

        Raises:
            NotFittedError: The inverse was not fitted for this target.
            ModelChangedError: The model's weights changed since the fit.
        """
        if (evidence or contrast) and return_convergence_delta:
            raise InputError(
                "return_convergence_delta=True measures the error for the whole output, but "
                f"{'contrast' if contrast else 'evidence'}=True explains only a part of the "
                "output: pass only one of them"
            )
        call = as_inputs(inputs), target, as_extras(additional_forward_args)
        biases = (False, True) if return_convergence_delta else (False,)
        explanation = self.inverse.explain(
            *call, biases=biases, local=local, mask=mask_input, evidence=evidence,
            contrast=contrast,
        )  # fmt: skip
        maps = self._products(
            explanation, call, features=multiply_by_inputs, gradients=multiply_by_gradients,
            contrast=contrast,
        )  # fmt: skip
        if not return_convergence_delta:
            return like(inputs, maps)
        # completeness error Φ_c(S) − Φ_c(x); Φ_c(x) is known from the pass of the explanation
        delta = self._output(explanation.signals[1], *call[1:]) - explanation.output
        return like(inputs, maps), delta

    def source_signal(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None,
        **options: bool,
    ) -> Any:  # fmt: skip
        """Return the source signal S; :meth:`InverseNetwork.source_signal` has the same options."""
        return self.inverse.source_signal(inputs, target, additional_forward_args, **options)

    def distractor(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None,
        **options: bool,
    ) -> Any:  # fmt: skip
        """Return the distractor X − S; :meth:`InverseNetwork.distractor` has the same options."""
        return self.inverse.distractor(inputs, target, additional_forward_args, **options)

    def class_attribution(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Return the global map of a class; see :meth:`InverseNetwork.class_attribution`."""
        return self.inverse.class_attribution(target, additional_forward_args)

    def has_convergence_delta(self) -> bool:
        """Return True: ``attribute`` can return a convergence delta."""
        return True

    @describe_common
    def compute_convergence_delta(
        self,
        source_signal: Any,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Return the completeness error of a source signal, Φ_c(S) − Φ_c(x) (section 5).

        Args:
            source_signal: S, the result of :meth:`source_signal` for ``inputs``.

        Returns:
            Tensor (batch,), in units of the output.
        """
        extras = as_extras(additional_forward_args)
        explained, original = (
            self._output(as_inputs(x), target, extras) for x in (source_signal, inputs)
        )
        return explained - original

    def _output(self, inputs: Inputs, target: Any, extras: Extras) -> Tensor:
        """Return the target's output Φ_c of each example, a tensor (batch,)."""
        with torch.no_grad():
            output = select(self.model(*inputs, *extras), self.inverse.output)
            explained = seed(output, per_example(target, output))
        return summed(explained)

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return "MIP-IN"


class LayerMIPINAttribution(_MIPIN, LayerAttribution):
    """MIP-IN attributions at the output of a layer.

    Args:
        model: The network that ``inverse`` was fitted to, or this network in ``nn.DataParallel`` or
            ``torch.compile``.
        inverse: The fitted :class:`~captum_mipin.InverseNetwork` of ``model``. If it was made with
            ``layer=``, the model's inputs may be integers, such as the tokens of a text.
        layer: A module of the model, or its name, or a list of several, in the part that
            ``inverse`` inverts. By default the layer with which ``inverse`` was made. The forward
            mask (equation 9) applies to the layer's output. If ``layer`` is a convolution before a
            batch norm, the signal is in units of the batch norm's output.

    Raises:
        InputError: ``inverse`` was made for another model object, or there is no layer.

    Examples:
        >>> from captum_mipin import InverseNetwork
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        >>> x = torch.randn(50, 1, 8, 8)
        >>> inverse = InverseNetwork(model.eval(), layer=model[1])
        >>> mipin = LayerMIPINAttribution(model, inverse.fit(x, targets=0, progress=False))
        >>> maps = mipin.attribute(x[:2], target=0)
        >>> LayerMIPINAttribution.interpolate(maps.mean(1, keepdim=True), (8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, model: nn.Module, inverse: ModelInverse[Any], layer: Any = None) -> None:
        _MIPIN.__init__(self, model, inverse)
        layer = inverse.layer if layer is None else layer
        if layer is None:
            raise InputError(
                "layer is None and the inverse was made without layer=, expected a module of the "
                "model: pass layer="
            )
        LayerAttribution.__init__(self, model, modules_of(layer, self.model))

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False, *, local: bool = True,
        multiply_by_features: bool = False, multiply_by_gradients: bool = False,
        evidence: bool = False, contrast: bool = False,
    ) -> Any:  # fmt: skip
        """Return A, the attribution of the target's logit to the layer's output (algorithm 1).

        Args:
            attribute_to_layer_input: True to explain the input of the layer, False its output. The
                forward mask (equation 9) applies to either.
            local: True to adapt the inverse to each example. False for the global view.
            multiply_by_features: True to return A ⊙ features, with the layer's output as features.
            multiply_by_gradients: True to return A ⊙ the gradient at the layer.
            evidence: True to explain only the evidence for the target, as for
                :meth:`MIPINAttribution.attribute`.
            contrast: True to explain only what the target has beyond all other classes, as there.

        Returns:
            Tensor shaped like the layer's output or input, but with the batch as first dimension; a
            tuple if the layer has several such tensors; a list of these for a list of layers.

        Raises:
            CaptureError: The layer is called several times, or never.
            NotFittedError: The inverse was not fitted for this target, or does not reach the layer.
            ModelChangedError: The model's weights changed since the fit.
        """
        call = as_inputs(inputs), target, as_extras(additional_forward_args)
        features, gradients = multiply_by_features, multiply_by_gradients

        def at(place: Site) -> Any:
            explanation = self.inverse.explain(
                *call, local=local, layer=place, evidence=evidence, contrast=contrast
            )
            maps = self._products(
                explanation, call,
                features=features, gradients=gradients, contrast=contrast, layer=place,
            )  # fmt: skip
            return single(maps)

        return at_places(at, self.layer, attribute_to_layer_input)

    def source_signal(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None, *,
        local: bool = True,
    ) -> Any:  # fmt: skip
        """Return the source signal S of the target's logit, shaped like the layer's output."""
        call = as_inputs(inputs), target, as_extras(additional_forward_args)

        def at(place: Site) -> Any:
            explanation = self.inverse.explain(*call, biases=(True,), local=local, layer=place)
            return single(explanation.signals[0])

        return at_places(at, self.layer)

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return "Layer MIP-IN"
