"""The map that is proposed for photographs: its layer and its reading."""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin._captum import captum_entry
from captum_mipin.attribution import LayerMIPINAttribution
from captum_mipin.calls import explained
from captum_mipin.copies import copy_memo
from captum_mipin.errors import DenseHeadWarning, InputError
from captum_mipin.graph.modules import module_of
from captum_mipin.graph.validate import check_model, device_of, level_of_caller
from captum_mipin.inverse import InverseNetwork
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.inverse.data import Batches, Unpack
from captum_mipin.types import Inputs

logger = logging.getLogger(__name__)

#: Name of a reading, absolute values summed over the channels -> option of ``attribute``. The
#: second is for the layer that a dense head begins with.
UNSIGNED = {
    "unsigned × gradient": "multiply_by_gradients",
    "unsigned × feature": "multiply_by_features",
}
#: Pixels of the image per place of the layer, at least and at most: 14 x 14 places at 224 x 224.
_SCALES = 12, 20
#: What else to do where layers give no images; ``sum`` makes one map of the maps of a layer.
_OTHERS = (
    "At other layers, use maps = LayerMIPINAttribution(model, inverse).attribute(x, target), and "
    "{sum}"
)
_TOKENS = "patch_map(maps.sum(2)) of captum_mipin.methods"


class PhotographAttribution(LayerMIPINAttribution):
    """MIP-IN for photographs: one map of values ≥ 0 that shows where the evidence lies.

    :func:`for_photographs` makes it. It explains like
    :class:`~captum_mipin.LayerMIPINAttribution`, with another default: A ⊙ gradient, or A ⊙ feature
    where a dense head begins, of which the absolute values are summed over the channels.

    Attributes:
        reading: Name of the reading, a key of ``UNSIGNED``.
        picked: The reading as ``compare`` names it, and the layer: a label of figures and tables.
    """

    def __init__(
        self, model: nn.Module, inverse: ModelInverse[Any], layer: Any = None,
        reading: str = next(iter(UNSIGNED)),
    ) -> None:  # fmt: skip
        super().__init__(model, inverse, layer)
        self.reading = reading
        self.picked = f"MIP-IN {reading} at {inverse._path(self.layer)}"

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False, *, local: bool = True,
        multiply_by_features: bool | None = None, multiply_by_gradients: bool | None = None,
        evidence: bool = False, contrast: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return maps (batch, 1, height, width), by default those of the reading that was picked.

        Args:
            attribute_to_layer_input: True to explain the input of the layer, False its output.
            local: True to adapt the inverse to each example. False for the global view.
            multiply_by_features: True to multiply A by the layer's output; None for the reading's.
            multiply_by_gradients: True to multiply A by the gradient at the layer; None for the
                reading's.
            evidence: True to explain only the evidence for the target, as for
                :meth:`MIPINAttribution.attribute`.
            contrast: True to explain only what the target has beyond all other classes, as there.

        Returns:
            Maps with the height and width of the layer.

        Raises:
            NotFittedError: The inverse was not fitted for this target.
            ModelChangedError: The model's weights changed since the fit.
        """
        asked = {
            "multiply_by_features": multiply_by_features,
            "multiply_by_gradients": multiply_by_gradients,
        }
        options = {
            name: UNSIGNED[self.reading] == name if value is None else value
            for name, value in asked.items()
        }
        maps: Tensor = super().attribute(
            inputs, target, additional_forward_args, attribute_to_layer_input, local=local,
            evidence=evidence, contrast=contrast, **options,
        )  # fmt: skip
        return maps.abs().sum(1, keepdim=True)


@explained
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
    another layer with a window follows; the reading is A ⊙ gradient, absolute values summed over
    channels. Where a dense head begins, as in VGG, it is the layer that the head flattens, and
    A ⊙ feature, with a DenseHeadWarning. They were chosen on other photographs than those of
    docs/results.md. The result's attribute ``picked`` and the log say what was picked.

    Args:
        model: Network for images (batch, channels, height, width), in evaluation mode.
        data: Photographs like those to explain, prepared as the model expects them, in any form
            that ``InverseNetwork.fit`` takes. By box accuracy on SqueezeNet, 5 did as well as 200.
        targets: Classes to fit; None to fit each class when it is first explained.
        layer: A module of the model or its dotted name, to read A ⊙ gradient there instead.
        unpack: Function batch → (inputs, additional_forward_args), for other kinds of batches.
        batch_size: Number of images per batch, for data that does not come in batches.
        progress: True to show a progress bar.

    Returns:
        A Captum ``LayerAttribution``, whose maps have the layer's size.

    Raises:
        InputError: No layer has such a size, so pass ``layer``; or ``layer`` gives no image.
        CaptureError: The model cannot be captured, or uses an operation without a rule.
        FitError: The data is empty or not finite, or its shape changes.

    Examples:
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
    data, reading = list(data) if isinstance(data, Iterator) else data, next(iter(UNSIGNED))
    call = next(iter(Batches(data, batch_size, unpack, device_of(network))))
    if layer is None:
        layer, reading = photograph_layer(network, *call)
    else:
        _check_places(network, module_of(layer, network), *call)
    inverse = InverseNetwork(model, layer=module_of(layer, network)).fit(
        data, targets, unpack=unpack, batch_size=batch_size, progress=progress, lazy=targets is None
    )  # fmt: skip
    inverse.photographs = reading
    mipin = PhotographAttribution(model, inverse, reading=reading)
    logger.info("picked %s", mipin.picked)
    return mipin


def photograph_layer(
    model: nn.Module, inputs: Inputs, extras: tuple[Any, ...] = ()
) -> tuple[str, str]:
    """Return the dotted name of the layer that :func:`for_photographs` picks, and the reading.

    Of the layers with 12 to 20 pixels of the image per place, after which a layer with a window
    follows, this is the last one among those with the shortest dotted name; but if a dense layer
    takes all places of an image, it is the layer that gave this image. A copy of the model runs
    once.

    Args:
        model: The network.
        inputs: Its inputs, with the images (batch, channels, height, width) first.
        extras: Further arguments of the network.

    Raises:
        InputError: There is no such layer, or the inputs are not images.

    Warns:
        DenseHeadWarning: The network has a dense head.
    """
    if inputs[0].ndim != 4:
        raise InputError(
            f"the inputs have shape {tuple(inputs[0].shape)}, expected images (batch, channels, "
            "height, width): use InverseNetwork for other inputs"
        )
    calls = _calls(model, inputs, extras)
    names = [call.path for call in calls]
    by_gradient, by_feature = UNSIGNED
    dense = [call for call in calls if call.flattened and names.count(call.path) == 1]
    if dense:
        warnings.warn(
            f"the dense head of this {type(model).__name__} takes all places of {dense[-1].path!r} "
            "at once: on such a network, other methods found objects better (docs/results.md). "
            "Compare this map with LayerPropagation(LRP(model, rule=Gamma(0.25)), layer)",
            DenseHeadWarning,
            stacklevel=level_of_caller(),
        )
        return dense[-1].path, by_feature
    pixels = max(inputs[0].shape[2:])
    low, high = _SCALES
    last_window = max((n for n, call in enumerate(calls) if call.window), default=-1)
    fitting = [
        (call.path.count("."), -number, call.path)
        for number, call in enumerate(calls)
        if low <= pixels / call.places <= high
        and number < last_window
        and names.count(call.path) == 1
    ]
    if not fitting:
        raise InputError(_why_none(type(model).__name__, calls, inputs[0].shape[2:]))
    return min(fitting)[2], by_gradient


def _why_none(model: str, calls: Sequence["_Call"], size: Sequence[int]) -> str:
    """Return why no layer was picked, in a sentence, and what to do.

    Args:
        model: Name of the model's class.
        calls: Its calls of layers that give images.
        size: Height and width of the images.
    """
    pixels, (low, high) = max(size), _SCALES
    top = [call for call in calls if "." not in call.path]
    last = next((call for call in top if _channels_last(call.shape, size)), None)
    if last is not None:
        return (
            f"no layer of this {model} can be picked: its layers have their channels last, such as "
            f"{last.path!r} with outputs {last.shape} of an image, expected (channels, height, "
            f"width). {_OTHERS.format(sum='maps.sum(3)')}"
        )
    right = {repr(call.path): None for call in calls if low <= pixels / call.places <= high}
    if right:
        return (
            f"no layer of this {model} can be picked: a convolution or pooling must come after it, "
            f"but none comes after {', '.join(islice(right, 8))}, as in transformers, whose blocks "
            f"give tokens. Pass that layer with layer=. {_OTHERS.format(sum=_TOKENS)}"
        )
    sizes = {f"{call.path} ({call.places})": None for call in top}
    return (
        f"no layer of this {model} has {low} to {high} pixels of the image per place, for images "
        f"of {pixels} pixels; layers and their sizes are {', '.join(islice(sizes, 8))}. Pass "
        "larger images, or the layer with layer="
    )


def _channels_last(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Return True if an output (three sizes) has the image's proportions in its first two."""
    # how many times the stride along one side is that along the other, for both layouts
    ratios = (high * size[1] / (wide * size[0]) for high, wide in pairwise(shape))
    last, first = (max(ratio, 1 / ratio) for ratio in ratios)
    return last < first and first > 1.5


def _check_places(
    model: nn.Module, layer: nn.Module, inputs: Inputs, extras: tuple[Any, ...] = ()
) -> None:
    """Raise InputError if the output of a layer is no image; a copy of the model runs once.

    Args:
        model, inputs, extras: As for :func:`photograph_layer`.
        layer: The layer.
    """
    copied, site = copy.deepcopy((model, layer), copy_memo(model))
    shapes: list[tuple[int, ...]] = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            shapes.append(tuple(first.shape[1:]))

    site.register_forward_hook(hook)
    with torch.no_grad():
        copied(*inputs, *extras)
    for shape in shapes:
        if len(shape) != 3 or _channels_last(shape, inputs[0].shape[2:]):
            name = next(path for path, part in model.named_modules() if part is layer)
            way = _OTHERS.format(sum=_TOKENS if len(shape) == 2 else "maps.sum(3)")
            raise InputError(
                f"layer {name!r} gives {shape} for an image, expected (channels, height, width): "
                f"pass a layer that gives an image, such as a convolution. {way * (len(shape) > 1)}"
            )


@dataclass
class _Call:
    """A call of a module that gives an image.

    Attributes:
        path: Dotted name of the module.
        shape: Channels, height and width of its output.
        window: True if the module itself has a window of more than one place, and gives several.
        flattened: True if a dense layer takes all places of the output, which are several.
    """

    path: str
    shape: tuple[int, ...]
    window: bool
    flattened: bool = False

    @property
    def places(self) -> int:
        """Height of the output if that is the longer side, else its width."""
        return max(self.shape[1:])


def _calls(model: nn.Module, inputs: Inputs, extras: tuple[Any, ...]) -> list[_Call]:
    """Return the calls of modules that give images, in the order in which they end."""
    copied = copy.deepcopy(model, copy_memo(model))
    calls: list[_Call] = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if isinstance(module, nn.Linear) and output.ndim == 2 and calls:
                last = calls[-1]
                last.flattened |= module.in_features == prod(last.shape) and last.places > 1
            if output.ndim == 4 and min(output.shape[2:]) > 0:
                window = getattr(module, "kernel_size", 1)
                sides = window if isinstance(window, tuple) else (window,)
                shape = tuple(output.shape[1:])
                # a global average has a window too, but no layer with places follows
                calls.append(_Call(path, shape, max(sides) > 1 and max(shape[1:]) > 1))

        return hook

    for path, module in copied.named_modules(remove_duplicate=False):
        if path:
            module.register_forward_hook(note(path))
    with torch.no_grad():
        copied(*inputs, *extras)
    return calls
