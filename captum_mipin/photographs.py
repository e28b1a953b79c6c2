"""The map that is proposed for photographs: its layer and its reading."""

import copy
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin._captum import captum_entry
from captum_mipin.attribution import LayerMIPINAttribution
from captum_mipin.copies import copy_memo
from captum_mipin.errors import InputError
from captum_mipin.graph.modules import module_of
from captum_mipin.graph.validate import check_model, device_of
from captum_mipin.inverse import InverseNetwork
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.inverse.data import Batches, Unpack
from captum_mipin.types import Inputs

logger = logging.getLogger(__name__)

#: Name of the reading: |A ⊙ gradient|, summed over the channels.
UNSIGNED = "unsigned × gradient"
#: Pixels of the image per place of the layer, at least and at most: 14 x 14 places at 224 x 224.
_SCALES = 12, 20


class PhotographAttribution(LayerMIPINAttribution):
    """MIP-IN for photographs: one map of values ≥ 0 that shows where the evidence lies.

    :func:`for_photographs` makes it. It explains like
    :class:`~captum_mipin.LayerMIPINAttribution`, with another default: A ⊙ gradient, of which the
    absolute values are summed over the channels.

    Attributes:
        picked: The reading as ``compare`` names it, and the layer: a label of figures and tables.
    """

    def __init__(self, model: nn.Module, inverse: ModelInverse[Any], layer: Any = None) -> None:
        super().__init__(model, inverse, layer)
        self.picked = f"MIP-IN {UNSIGNED} at {inverse._path(self.layer)}"

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False, *, local: bool = True,
        multiply_by_features: bool = False, multiply_by_gradients: bool = True,
        evidence: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return maps (batch, 1, height, width), by default the sum of |A ⊙ gradient| of channels.

        Args:
            attribute_to_layer_input: True to explain the input of the layer, False its output.
            local: True to adapt the inverse to each example. False for the global view.
            multiply_by_features: True to multiply A by the layer's output.
            multiply_by_gradients: True to multiply A by the gradient at the layer.
            evidence: True to explain only the evidence for the target, as for
                :meth:`MIPINAttribution.attribute`.

        Returns:
            Maps with the height and width of the layer.

        Raises:
            NotFittedError: The inverse was not fitted for this target.
            ModelChangedError: The model's weights changed since the fit.
        """
        maps: Tensor = super().attribute(
            inputs, target, additional_forward_args, attribute_to_layer_input, local=local,
            evidence=evidence,
            multiply_by_features=multiply_by_features, multiply_by_gradients=multiply_by_gradients,
        )  # fmt: skip
        return maps.abs().sum(1, keepdim=True)


def for_photographs(
    model: nn.Module,
    data: Any,
    targets: Any = None,
    *,
    layer: nn.Module | str | None = None,
    unpack: Unpack | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> PhotographAttribution:
    """Return MIP-IN with the layer and the reading that found objects best, fitted on photographs.

    The layer is the last one with about 14 x 14 places for an image of 224 x 224 after which
    another layer with a window follows. The reading is A ⊙ gradient, with absolute values summed
    over channels. Both were chosen on other photographs than those on which docs/results.md reports
    them; networks with a dense head were not measured. The attribute ``picked`` of the result and
    the log say what was picked.

    Args:
        model: Network for images (batch, channels, height, width), in evaluation mode.
        data: Photographs to fit on, like those to explain, prepared as the model expects them. By
            box accuracy on SqueezeNet, 5 did as well as 200. Labels are not needed. The kinds are
            those of ``InverseNetwork.fit``.
        targets: Classes to fit; None to fit each class when it is first explained.
        layer: A module of the model or its dotted name, instead of the one that is picked.
        unpack: Function batch → (inputs, additional_forward_args), for other kinds of batches.
        batch_size: Number of images per batch, for data that does not come in batches.
        progress: True to show a progress bar.

    Returns:
        A Captum ``LayerAttribution``, whose maps have the size of the layer.

    Raises:
        InputError: The images are too small, or no layer has such a size: pass ``layer``.
        CaptureError: The model cannot be captured, or uses an operation without a rule.
        FitError: The data is empty or not finite, or its shape changes.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> convolutions = nn.Conv2d(3, 4, 16, stride=16), nn.ReLU(), nn.Conv2d(4, 4, 3)
        >>> model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> photographs = torch.rand(20, 3, 96, 96)
        >>> mipin = for_photographs(model, photographs, targets=[1], progress=False)
        >>> mipin.picked
        'MIP-IN unsigned × gradient at 1'
        >>> mipin.attribute(photographs[:2], target=1).shape
        torch.Size([2, 1, 6, 6])
    """
    network = check_model(model)
    data = list(data) if isinstance(data, Iterator) else data
    if layer is None:
        call = next(iter(Batches(data, batch_size, unpack, device_of(network))))
        layer = photograph_layer(network, *call)
    inverse = InverseNetwork(model, layer=module_of(layer, network)).fit(
        data, targets, unpack=unpack, batch_size=batch_size, progress=progress, lazy=targets is None
    )  # fmt: skip
    inverse.photographs = True
    mipin = PhotographAttribution(model, inverse)
    logger.info("picked %s", mipin.picked)
    return mipin


def photograph_layer(model: nn.Module, inputs: Inputs, extras: tuple[Any, ...] = ()) -> str:
    """Return the dotted name of the layer that :func:`for_photographs` picks.

    Of the layers with 12 to 20 pixels of the image per place, after which a layer with a window
    follows, this is the last one among those with the shortest dotted name. A copy of the model
    runs once.

    Args:
        model: The network.
        inputs: Its inputs, with the images (batch, channels, height, width) first.
        extras: Further arguments of the network.

    Raises:
        InputError: There is no such layer, or the inputs are not images.
    """
    if inputs[0].ndim != 4:
        raise InputError(
            f"the inputs have shape {tuple(inputs[0].shape)}, expected images (batch, channels, "
            "height, width): use InverseNetwork for other inputs"
        )
    calls = _calls(model, inputs, extras)
    names = [path for path, _, _ in calls]
    pixels = max(inputs[0].shape[2:])
    low, high = _SCALES
    last_window = max((n for n, (_, _, window) in enumerate(calls) if window), default=-1)
    fitting = [
        (path.count("."), -number, path)
        for number, (path, size, _) in enumerate(calls)
        if low <= pixels / size <= high and number < last_window and names.count(path) == 1
    ]
    if not fitting:
        sizes = {f"{path} ({size})": None for path, size, _ in calls if "." not in path}
        raise InputError(
            f"no layer of this {type(model).__name__} has {low} to {high} pixels of the image per "
            f"place, for images of {pixels} pixels; layers and their sizes are "
            f"{', '.join(islice(sizes, 8))}. Pass larger images, or the layer with layer="
        )
    return min(fitting)[2]


def _calls(
    model: nn.Module, inputs: Inputs, extras: tuple[Any, ...]
) -> list[tuple[str, int, bool]]:
    """Return the modules that give images, in the order in which their calls end.

    Returns:
        Path of a module, height of its output if that is the longer side and else its width, and
        whether the module itself has a window of more than one place.
    """
    copied = copy.deepcopy(model, copy_memo(model))
    calls: list[tuple[str, int, bool]] = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 0:
                window = getattr(module, "kernel_size", 1)
                sides = window if isinstance(window, tuple) else (window,)
                places = max(output.shape[2:])
                # a global average has a window too, but no layer with places follows
                calls.append((path, places, max(sides) > 1 and places > 1))

        return hook

    for path, module in copied.named_modules(remove_duplicate=False):
        if path:
            module.register_forward_hook(note(path))
    with torch.no_grad():
        copied(*inputs, *extras)
    return calls
