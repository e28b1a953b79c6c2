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
from captum_mipin.errors import InputError
from captum_mipin.graph.modules import module_of, unwrapped
from captum_mipin.graph.validate import as_extras, as_inputs, check_inputs, like
from captum_mipin.options import check_number, type_of
from captum_mipin.propagation.independent import require_independent
from captum_mipin.types import Inputs

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


class SmoothGrad(NoFuture, GradientAttribution):
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

    def __init__(
        self, model: nn.Module, *, samples: int = 50, noise: float = 0.15, seed: int = 0
    ) -> None:
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
        tensors = tuple(x.detach() for x in as_inputs(inputs))
        check_inputs(tensors)
        require_independent(self.forward_func, tensors, as_extras(additional_forward_args))
        gradient = Saliency(self.forward_func)
        ranges = [x.flatten(1).amax(1) - x.flatten(1).amin(1) for x in tensors]
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
            gradients = gradient.attribute(copies, target, False, additional_forward_args)
            total = [a + b for a, b in zip(total, gradients, strict=True)]
        return like(inputs, tuple(a / self.samples for a in total))

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return "SmoothGrad"


class GradCAM(NoFuture, Attribution):
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

    def __init__(self, model: nn.Module, layer: nn.Module | str) -> None:
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
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            shape = f" of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else ""
            raise InputError(
                f"inputs is {type_of(inputs)}{shape}, expected one tensor (batch, "
                "channels, height, width): use Grad-CAM only for images"
            )
        extras = as_extras(additional_forward_args)
        require_independent(self.forward_func, (inputs,), extras)
        cam = LayerGradCam(self.forward_func, self.layer)
        with _hooks_run(self.forward_func, self.layer):
            maps = cam.attribute(
                inputs.detach(), target, additional_forward_args, relu_attributions=True
            )
        return F.interpolate(maps.detach(), inputs.shape[2:], mode="bilinear", align_corners=False)

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return "Grad-CAM"
