"""SmoothGrad and Grad-CAM with their usual settings, made from Captum's methods."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from captum.attr import Attribution, GradientAttribution, LayerGradCam, Saliency
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.errors import CaptureError, InputError
from captum_mipin.graph.diagnosis import reasons
from captum_mipin.graph.modules import module_of, unwrapped
from captum_mipin.graph.validate import (
    as_extras,
    as_inputs,
    as_model,
    check_finite,
    check_inputs,
    like,
)
from captum_mipin.options import check_callable, check_number, type_of
from captum_mipin.propagation.independent import Differentiated, require_independent
from captum_mipin.types import Extras, Inputs

#: Held while torch compiles nothing, which holds for all threads.
_EAGER = Lock()


@contextmanager
def _hooks_run(model: Any, layer: nn.Module) -> Iterator[None]:
    """Switch compilation off if the layer lies in a compiled part, which may skip its hooks."""
    owner = model if isinstance(model, nn.Module) else unwrapped(model)
    compiled = (
        part
        for part in owner.modules()
        if isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
    )
    if any(layer in set(part.modules()) for part in compiled):
        with _EAGER, torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


class SmoothGrad(Differentiated, NoFuture, GradientAttribution):
    """The mean gradient over noisy copies of each example.

    A = 1/n Σ_k ∂Φ_c/∂x (x + ν_k) with ν_k ~ N(0, σ²). Each example has its own σ, in proportion to
    the range of its values. Captum's ``NoiseTunnel`` has one σ for all examples.

    Args:
        model: The network, a ``torch.nn.Module``.
        samples: n, the number of noisy copies of each example.
        noise: σ / (maximum − minimum), where maximum and minimum are those of one example in one
            input tensor.
        seed: Seed of the noise, which is the same in each call. torch's global generator is not
            used.

    Raises:
        InputError: ``samples`` or ``noise`` is out of range.

    Source: Smilkov et al., 2017. They use 50 samples and 10 to 20 % noise.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        >>> SmoothGrad(model).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _logits = False

    def __init__(
        self, model: nn.Module, *, samples: int = 50, noise: float = 0.15, seed: int = 0
    ) -> None:
        check_callable(model)
        check_number("samples", samples, 1, whole=True)
        check_number("noise", noise)
        GradientAttribution.__init__(self, model)
        self.samples, self.noise, self.seed = samples, noise, seed

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """Return the mean gradient, with its sign.

        Returns:
            Tensors shaped like ``inputs``.

        Raises:
            UnsupportedOperationError: The model mixes the examples of a batch, or is random.
        """
        tensors, extras = as_inputs(inputs), as_extras(additional_forward_args)
        check_inputs(tensors)
        check_finite(tensors)
        tensors = tuple(x.detach() for x in tensors)
        with reasons(self.forward_func, tensors, target, extras):
            return like(inputs, self._mean_gradients(tensors, target, extras))

    def _mean_gradients(self, tensors: Inputs, target: Any, extras: Extras) -> Inputs:
        """Return the mean gradient of each input."""
        require_independent(self.forward_func, tensors, extras)
        gradient = Saliency(self.forward_func)
        flat = [x.reshape(len(x), -1) for x in tensors]
        ranges = [x.amax(1) - x.amin(1) for x in flat]
        sigmas = [
            self.noise * span.view(-1, *(1,) * (x.ndim - 1))
            for x, span in zip(tensors, ranges, strict=True)
        ]
        generators = [
            torch.Generator(x.device).manual_seed(self.seed + index)
            for index, x in enumerate(tensors)
        ]

        def noisy(x: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
            # All examples get the same draw, so a map does not depend on the rest of its batch.
            draw = torch.randn(x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)
            return (x + sigma * draw).requires_grad_()

        total = [torch.zeros_like(x) for x in tensors]
        for _ in range(self.samples):
            copies = tuple(map(noisy, tensors, sigmas, generators))
            gradients = gradient.attribute(copies, target, False, extras or None)
            total = [a + b for a, b in zip(total, gradients, strict=True)]
        return tuple(a / self.samples for a in total)

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return "SmoothGrad"


class GradCAM(Differentiated, NoFuture, Attribution):
    """Captum's Grad-CAM with its ReLU, interpolated bilinearly to the size of the input.

    Args:
        model: The network, a ``torch.nn.Module``.
        layer: A module of the model, or its name, with output (batch, channels, height, width),
            such as the last convolution.

    Source: Selvaraju et al., ICCV 2017.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        >>> GradCAM(model.eval(), model[1]).attribute(torch.rand(2, 1, 8, 8), target=0).shape
        torch.Size([2, 1, 8, 8])
    """

    _logits = False

    def __init__(self, model: nn.Module, layer: nn.Module | str) -> None:
        as_model(model)
        Attribution.__init__(self, model)
        self.layer = module_of(layer, model)

    @captum_entry
    def attribute(
        self, inputs: Tensor, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        """Return the map of one input tensor (batch, channels, height, width).

        Returns:
            Tensor (batch, 1, height, width) with values of at least 0.

        Raises:
            UnsupportedOperationError: The model mixes the examples of a batch, or is random.
        """
        tensors, extras = as_inputs(inputs), as_extras(additional_forward_args)
        check_inputs(tensors, explained=False)
        x, several = tensors[0], isinstance(inputs, tuple)
        if several or x.ndim != 4:
            shape = type_of(inputs) if several else f"a tensor of shape {tuple(x.shape)}"
            one = "one image is x.unsqueeze(0), and other" if x.ndim == 3 else "other"
            raise InputError(
                f"inputs are {shape}, expected one tensor (batch, channels, height, width): pass a "
                f"batch of images; {one} inputs need another method"
            )
        check_finite((x,))
        with reasons(self.forward_func, (x,), target, extras):
            require_independent(self.forward_func, (x,), extras)
            maps = self._maps(x.detach(), target, extras)
        return F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)

    def _maps(self, x: Tensor, target: Any, extras: Extras) -> Tensor:
        """Return Captum's maps (batch, 1, height, width), of the size of the layer."""
        cam = LayerGradCam(self.forward_func, self.layer)
        name = f"layer {type(self.layer).__name__}"
        try:
            with _hooks_run(self.forward_func, self.layer):
                maps = cam.attribute(x, target, extras or None, relu_attributions=True)
        except AssertionError as error:
            if "hook" not in str(error):
                raise
            raise CaptureError(
                f"{name} is not called for these inputs, expected a layer that the model runs: "
                "name another module"
            ) from error
        if maps.ndim != 4:
            raise InputError(
                f"{name} has an output of {maps.ndim} dimensions, expected (batch, channels, "
                "height, width): name a layer with places, such as the last convolution"
            )
        detached: Tensor = maps.detach()
        return detached

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return "Grad-CAM"
