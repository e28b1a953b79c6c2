"""The methods of this package at the input or the output of layers."""

from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.errors import InputError
from captum_mipin.graph.layers import Site, at_places
from captum_mipin.graph.modules import modules_of
from captum_mipin.graph.validate import as_extras, as_inputs
from captum_mipin.methods.base import Propagation, Relevance, single, summed
from captum_mipin.options import type_of
from captum_mipin.types import Inputs


class LayerPropagation(NoFuture, LayerAttribution, GradientAttribution):
    """A method of this package at a layer.

    Args:
        method: A method at the input, such as ``LRP(model)``.
        layer: A module of the model, or its name; or a list of several. A batch norm that follows
            a layer is not folded into it. The model's inputs may be integers, such as the tokens of
            a text.

    Raises:
        InputError: ``method`` is not a :class:`Propagation`, or the model has no such layer.

    Examples:
        >>> from captum_mipin.methods import GuidedBackprop
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        >>> guided = LayerPropagation(GuidedBackprop(model.eval()), model[1])
        >>> guided.attribute(torch.randn(2, 1, 8, 8), target=0).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self, method: Propagation, layer: nn.Module | str | Sequence[nn.Module | str]
    ) -> None:
        if not isinstance(method, Propagation):
            raise InputError(
                f"method is {type_of(method)}, expected a method of this package: pass LRP(model)"
            )
        modules = modules_of(layer, method.model)
        LayerAttribution.__init__(self, method.forward_func, modules)
        GradientAttribution.__init__(self, method.forward_func)
        self.method = method

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False, return_convergence_delta: bool = False, *,
        verbose: bool = False, multiply_by_features: bool = False,
    ) -> Any:  # fmt: skip
        """Return the method's map at the layer.

        Args:
            attribute_to_layer_input: True to explain the input of the layer, False its output.
            return_convergence_delta: For methods that distribute relevance, such as LRP: True to
                return the part of the relevance that is lost between output and layer as well.
            verbose: True to log the rule of each operation, as in LRP.
            multiply_by_features: True to return the map ⊙ features, with the values at the layer as
                features.

        Returns:
            Tensor shaped like the layer's output or input, but with the batch as first dimension; a
            tuple if the layer has several such tensors; a list of these for a list of layers. With
            ``return_convergence_delta``, a pair of these and a tensor delta (batch,), or a list of
            such tensors.

        Raises:
            CaptureError: The layer is called several times, or never.
            UnsupportedOperationError: The method has no rule for an operation after the layer.
        """
        if verbose:
            for layer in self.layer if isinstance(self.layer, list) else [self.layer]:
                self.method.log_rules(inputs, additional_forward_args, layer)
        if return_convergence_delta and not isinstance(self.method, Relevance):
            raise InputError(
                "return_convergence_delta=True needs a method that distributes relevance, such as "
                f"LRP, but the method is {self.method.get_name()}: leave it out"
            )
        call = as_inputs(inputs), target, as_extras(additional_forward_args)

        def at(place: Site) -> tuple[Any, Tensor]:
            explanation = self.method.explain(*call, place)
            maps = explanation.signals
            delta = explanation.output - torch.stack([*map(summed, maps)]).sum(0)
            if multiply_by_features:
                maps = tuple(a * x for a, x in zip(maps, explanation.features, strict=True))
            return single(maps), delta

        result = at_places(at, self.layer, attribute_to_layer_input)
        maps, deltas = map(list, zip(*result, strict=True)) if isinstance(result, list) else result
        return (maps, deltas) if return_convergence_delta else maps

    @property
    def multiplies_by_inputs(self) -> bool:
        """Return True if attributions are contributions to the output, in the sense of Captum."""
        return self.method.multiplies_by_inputs

    def has_convergence_delta(self) -> bool:
        """Return True if ``attribute`` can return a convergence delta."""
        return self.method.has_convergence_delta()

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return "Layer propagation"
