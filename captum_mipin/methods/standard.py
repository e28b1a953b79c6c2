"""Captum's own methods where they are right, with the settings that are usual in the field."""

from typing import Any

import torch
from captum.attr import (
    Attribution,
    DeepLift,
    GradientAttribution,
    IntegratedGradients,
    LayerGradCam,
    Saliency,
)
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.errors import InputError
from captum_mipin.graph.capture import check_inputs
from captum_mipin.graph.validate import as_inputs, like


def saliency(model: nn.Module) -> Saliency:
    """Captum's gradient ("Grads"); ``abs=False`` in ``attribute`` keeps its sign."""
    return Saliency(model)


def integrated_gradients(model: nn.Module) -> IntegratedGradients:
    """Captum's Integrated Gradients: from a baseline of zeros, 50 steps."""
    return IntegratedGradients(model)


def deep_lift(model: nn.Module) -> DeepLift:
    """Captum's DeepLift (rescale), from a baseline of zeros.

    It looks at modules, and is silently wrong where activations are functions, or one module is called twice.
    """
    return DeepLift(model)


class SmoothGrad(NoFuture, GradientAttribution):
    """The mean gradient over noisy copies, whose σ is a share of each example's own range.

    Args:
        model: The network.
        samples: Copies of each example.
        noise: σ ÷ (maximum − minimum of the example), for each input tensor.
        seed: Of the noise, which is the same at each call. The global generator is not used.

    Source: Smilkov et al., 2017: 50 samples, 10 to 20 %.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        >>> SmoothGrad(model).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    def __init__(
        self, model: nn.Module, *, samples: int = 50, noise: float = 0.15, seed: int = 0
    ) -> None:
        if not isinstance(samples, int) or samples < 1 or not 0 <= noise < float("inf"):
            raise InputError(
                f"samples={samples!r} must be an integer of at least 1, noise={noise!r} a number of at least 0"
            )
        GradientAttribution.__init__(self, model)
        self.samples, self.noise, self.seed = samples, noise, seed

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Any:
        """The mean gradient, with its sign.

        Args:
            inputs: Tensor (batch, ...) or tuple of such.
            target: The class, as Captum takes it.
            additional_forward_args: Further arguments of the model.

        Returns:
            Shaped like ``inputs``.
        """
        tensors = tuple(x.detach() for x in as_inputs(inputs))
        check_inputs(tensors)
        gradient = Saliency(self.forward_func)
        spans = [
            (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, *(1,) * (x.ndim - 1))
            for x in tensors
        ]
        random = [
            torch.Generator(x.device).manual_seed(self.seed + index)
            for index, x in enumerate(tensors)
        ]
        total = [torch.zeros_like(x) for x in tensors]
        for _ in range(self.samples):
            noise = [
                torch.randn(x.shape[1:], generator=g, device=x.device, dtype=x.dtype)
                for x, g in zip(tensors, random, strict=True)
            ]  # the same for each example, whatever its batch
            noisy = [
                x + self.noise * span * n for x, span, n in zip(tensors, spans, noise, strict=True)
            ]
            found = gradient.attribute(
                tuple(x.requires_grad_() for x in noisy), target, False, additional_forward_args
            )
            total = [a + b for a, b in zip(total, found, strict=True)]
        return like(inputs, tuple(a / self.samples for a in total))

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return "SmoothGrad"


def smooth_grad(model: nn.Module) -> SmoothGrad:
    """:class:`SmoothGrad` with 50 samples and σ = 15 % of each example's range."""
    return SmoothGrad(model)


class GradCAM(NoFuture, Attribution):
    """Captum's Grad-CAM, ReLU included, brought to the size of the input bilinearly.

    Args:
        model: The network.
        layer: A convolution, or what follows it.

    Source: Selvaraju et al., ICCV 2017.
    """

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        Attribution.__init__(self, model)
        self.layer = layer

    @captum_entry
    def attribute(
        self, inputs: Tensor, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        """The map (batch, 1, height, width).

        Args:
            inputs: (batch, channels, height, width).
            target: The class, as Captum takes it.
            additional_forward_args: Further arguments of the model.
        """
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise InputError("Grad-CAM is for one input of shape (batch, channels, height, width)")
        inner = LayerGradCam(self.forward_func, self.layer)
        found = inner.attribute(
            inputs.detach(), target, additional_forward_args, relu_attributions=True
        ).detach()
        return F.interpolate(found, inputs.shape[2:], mode="bilinear", align_corners=False)

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum's tools show."""
        return "Grad-CAM"


def grad_cam(model: nn.Module, layer: nn.Module) -> GradCAM:
    """:class:`GradCAM` at a layer."""
    return GradCAM(model, layer)
