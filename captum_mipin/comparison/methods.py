"""Methods that users can pass to ``compare`` by name, and the controls that ``compare`` adds."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum import attr
from torch import Tensor, nn
from torch.export.unflatten import UnflattenedModule

from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.errors import InputError, NotFittedError
from captum_mipin.graph.modules import tree, unwrapped
from captum_mipin.methods import (
    LRP,
    AttentionRollout,
    Chefer,
    Deconvnet,
    DeepTaylor,
    ExcitationBackprop,
    GuidedBackprop,
    LeGrad,
    SmoothGrad,
    patch_map,
)
from captum_mipin.metrics import Method
from captum_mipin.metrics.case import attribution_of, method_name
from captum_mipin.photographs import UNSIGNED, PhotographAttribution


@dataclass(frozen=True)
class Setup:
    """The objects from which methods are made by name.

    Attributes:
        model: A copy of the network, so that hooks which a method does not remove stay on the copy.
        copied_layer: The layer of the copy for methods of a layer such as Grad-CAM, or None.
        fitted: MIP-IN with a fitted inverse of the original network, or None.
    """

    model: nn.Module
    copied_layer: nn.Module | None
    fitted: MIPINAttribution | LayerMIPINAttribution | None

    @property
    def layer(self) -> nn.Module:
        """The layer of the copy. Raises InputError if the user passed no layer."""
        if self.copied_layer is None:
            raise InputError(
                "no layer was given, but Grad-CAM and Grad×Feature need one: pass layer=, a module "
                "of the network or its name"
            )
        return self.copied_layer

    @property
    def mipin(self) -> Any:
        """MIP-IN. Raises NotFittedError if the user passed no inverse."""
        if self.fitted is None:
            raise NotFittedError(
                "the method name 'MIP-IN' needs a fitted inverse, but no inverse was passed: pass "
                "inverse= with a fitted InverseNetwork"
            )
        return self.fitted


def _deep_lift(model: nn.Module) -> Method:
    """Return Captum's DeepLift.

    Raises:
        InputError: The model is an exported program, in which DeepLift finds no activations.
    """
    if isinstance(model, UnflattenedModule):
        raise InputError(
            "the model is an exported program, but DeepLift needs a network with modules such as "
            "nn.ReLU: pass the network that was exported"
        )
    return attr.DeepLift(model)


def _patches(method: Any) -> Method:
    """Return a method with one relevance per token as a method with maps of patches."""

    def maps(x: Tensor, target: Any, extras: Any = None) -> Tensor:
        return patch_map(method.attribute(x, target, extras))

    return maps


def _with(method: Any, **options: Any) -> Method:
    """Return the function ``attribute`` of a method with keyword arguments bound."""
    return partial(method.attribute, **options)


def reading(mipin: Any, name: str) -> Method:
    """Return a reading of MIP-IN.

    Args:
        mipin: A :class:`~captum_mipin.MIPINAttribution` or a
            :class:`~captum_mipin.LayerMIPINAttribution`.
        name: A name in :data:`READINGS`.

    Raises:
        InputError: The reading is that of a layer, and the inverse goes down to the input; or the
            other way round.
    """
    at_input = isinstance(mipin, MIPINAttribution)
    if name in UNSIGNED:
        if at_input:
            raise InputError(
                f"the reading {name!r} is a map of a layer, but the inverse goes down to the "
                "input: pass an inverse that was fitted with layer="
            )
        return PhotographAttribution(mipin.forward_func, mipin.inverse, mipin.layer, name)
    if name == "S":
        signal: Method = mipin.source_signal
        return signal
    if "multiply_by_inputs" in READINGS[name] and not at_input:
        place = mipin.inverse._name(mipin.layer)
        raise InputError(
            f"the reading {name!r} is a map of the input, but {place} is explained: pass "
            f"{name.replace('input', 'feature')!r}, or explain the input with an "
            "inverse that was fitted without layer="
        )
    features = "inputs" if at_input else "features"
    options = {option.replace("features", features): True for option in READINGS[name]}
    return _with(mipin, **options) if options else mipin


#: Name of a reading of MIP-IN -> options of ``attribute``; S is the source signal.
READINGS: dict[str, tuple[str, ...]] = {
    "A": (),
    "S": (),
    "A × feature": ("multiply_by_features",),
    "A × input": ("multiply_by_inputs",),
    "A × gradient": ("multiply_by_gradients",),
    **dict.fromkeys(UNSIGNED, ()),
    "evidence": ("evidence",),
    "evidence × feature": ("evidence", "multiply_by_features"),
    "evidence × input": ("evidence", "multiply_by_inputs"),
    "evidence × gradient": ("evidence", "multiply_by_gradients"),
    "contrast": ("contrast",),
    "contrast × feature": ("contrast", "multiply_by_features"),
    "contrast × input": ("contrast", "multiply_by_inputs"),
    "contrast × gradient": ("contrast", "multiply_by_gradients"),
}
#: Name -> function that makes the method.
METHODS: dict[str, Callable[[Setup], Method]] = {
    "MIP-IN": lambda setup: setup.mipin,
    **{
        f"MIP-IN {name.removeprefix('A ')}": lambda setup, name=name: reading(setup.mipin, name)  # type: ignore[misc]
        for name in READINGS
        if name != "A"
    },
    "Saliency": lambda setup: attr.Saliency(setup.model),
    "Gradient": lambda setup: _with(attr.Saliency(setup.model), abs=False),
    "Input×Gradient": lambda setup: attr.InputXGradient(setup.model),
    "Integrated Gradients": lambda setup: _with(
        attr.IntegratedGradients(setup.model), internal_batch_size=64
    ),
    "SmoothGrad": lambda setup: SmoothGrad(setup.model),
    "DeepLift": lambda setup: _deep_lift(setup.model),
    "Guided Backprop": lambda setup: GuidedBackprop(setup.model),
    "Deconvnet": lambda setup: Deconvnet(setup.model),
    "LRP": lambda setup: LRP(setup.model),
    "AttnLRP": lambda setup: LRP(setup.model, attention="attnlrp"),
    "Deep Taylor": lambda setup: DeepTaylor(setup.model),
    "Excitation Backprop": lambda setup: ExcitationBackprop(setup.model),
    "Attention Rollout": lambda setup: _patches(AttentionRollout(setup.model)),
    "Chefer": lambda setup: _patches(Chefer(setup.model)),
    "LeGrad": lambda setup: _patches(LeGrad(setup.model)),
    "Grad-CAM": lambda setup: _with(
        attr.LayerGradCam(setup.model, setup.layer), relu_attributions=True
    ),
    "Grad×Feature": lambda setup: attr.LayerGradientXActivation(setup.model, setup.layer),
}


#: Names of the controls, see `controls`; ``compare`` takes them as methods too.
CONTROLS = ("random", "centre prior", "mask only", "pattern only")


def plain(name: str) -> str:
    """Return a name without what spellings differ in: case, spaces, hyphens, × or X, "Layer"."""
    letters = "".join(c for c in name.casefold().replace("×", "x") if c.isalnum())
    return letters.removeprefix("layer")


def known_name(name: str) -> str | None:
    """Return the name of a method or control for any spelling of the name; None if not known."""
    names = {plain(known): known for known in (*METHODS, *CONTROLS)}
    return names.get(plain(name))


def label_of(method: Any) -> str:
    """Return the default label of a method: its name in ``compare``, if any, or its own name."""
    if isinstance(method, str):
        return known_name(method) or method
    # remove "<" and ">": browsers and Markdown would read "<lambda>" as a tag
    name = method_name(method).strip("<>")
    if isinstance(attribution_of(method), (MIPINAttribution, LayerMIPINAttribution)):
        name = f"MIP-IN{_reading_of(method)}"
    return known_name(name) or name


def place_of(method: Any, label: str = "") -> str:
    """Return what pictures tell of a method beside its label: MIP-IN's reading, and the layer.

    Args:
        method: The method.
        label: Its label; what its words tell already, reading or layer, is left out.

    Returns:
        Text such as "A at features.12", "at layer4", or "" for most methods at the input.
    """
    attribution, words = attribution_of(method), list[str]()
    if isinstance(attribution, (MIPINAttribution, LayerMIPINAttribution)):
        reading = _reading_of(method).strip() or ("" if _options_of(method) else "A")
        # the features of the input are the input itself
        spellings = reading, reading.replace("input", "feature")
        words += [] if any(_tells(label, name) for name in spellings) else [reading]
    layers = getattr(attribution, "layer", None)
    if attribution is None or layers is None:
        if isinstance(attribution, MIPINAttribution) and not _tells(label, "at the input"):
            words.append("at the input")
        return " ".join(words)
    model: Any = unwrapped(attribution.forward_func)
    names = {module: name for name, module in tree(model)} if isinstance(model, nn.Module) else {}
    paths = ", ".join(
        layer if isinstance(layer, str) else names.get(layer) or f"a {type(layer).__name__}"
        for layer in (layers if isinstance(layers, list) else [layers])
    )
    # a number alone, as in "Saliency 0", need not be a layer
    by_name = any(map(str.isalpha, paths)) and _tells(label, paths)
    told = by_name or _tells(label, f"at {paths}")
    return " ".join(words if told else [*words, "at", paths])


def _tells(label: str, text: str) -> bool:
    """Return True if the words of a text stand in a label, one after the other."""
    words, inside = (re.findall(r"[\w.-]+|×", part) for part in (label, text))
    return any(words[i : i + len(inside)] == inside for i in range(len(words)))


def _options_of(method: Any) -> set[str]:
    """Return the names of the options that are bound to a method and are True."""
    options: set[str] = set()
    while isinstance(method, partial):
        options |= {option for option, value in method.keywords.items() if value}
        method = method.func
    return options


def _reading_of(method: Any) -> str:
    """Return the name of a reading of MIP-IN after a space; "" for A and for other methods."""
    options = _options_of(method)
    while isinstance(method, partial):
        method = method.func
    if getattr(method, "__name__", "") == "source_signal":
        return " S"
    attribution = attribution_of(method)
    if isinstance(attribution, PhotographAttribution):
        return f" {attribution.reading}" * (options <= {UNSIGNED[attribution.reading]})
    names = (name for name, known in READINGS.items() if known and {*known} == options)
    return "".join(f" {name.removeprefix('A ')}" for name in names)


def controls(methods: Iterable[Any], model: Any) -> dict[str, Method]:
    """Return name -> control, a method that does not use all of the network and the image.

    The controls are "random" maps; "centre prior", a blob in the centre; "mask only", 1 where the
    input or activation is not 0; and "pattern only", MIP-IN without masks. "pattern only" is added
    only if ``methods`` contains a MIP-IN method. If the first MIP-IN method explains a layer, the
    maps have the size of this layer; otherwise they have the size of the input.

    Args:
        methods: The methods to compare.
        model: The network.
    """
    kinds = (MIPINAttribution, LayerMIPINAttribution)
    mipin = next((m for m in map(attribution_of, methods) if isinstance(m, kinds)), None)
    generator = torch.Generator().manual_seed(0)

    def control(maps: Callable[[Tensor], Tensor]) -> Method:
        """Return a method whose maps are a function of the input or of the layer's activation."""

        def method(x: Tensor, target: Any, extras: Any = None) -> Tensor:
            if isinstance(mipin, LayerMIPINAttribution):
                activation = attr.LayerActivation(model, mipin.layer)
                x = activation.attribute(x, additional_forward_args=extras)
            return maps(x.detach())

        method.__name__ = maps.__name__  # the name in the settings of results
        return method

    def one_channel(x: Tensor) -> Tensor:
        return x[:, :1] if x.ndim > 2 else x

    def random(x: Tensor) -> Tensor:
        return torch.rand(one_channel(x).shape, generator=generator).to(x.device)

    def centre(x: Tensor) -> Tensor:
        # blob = exp(-8 Σ_sides ((i - (n - 1)/2) / n)²), i the pixel's index along a side of n
        sides = x.shape[2:] or x.shape[1:]
        squares = [((torch.arange(n) - (n - 1) / 2) / n) ** 2 for n in sides]
        distance = torch.stack(torch.meshgrid(*squares, indexing="ij")).sum(0)
        return torch.exp(-8 * distance).expand(one_channel(x).shape).to(x.device)

    def mask(x: Tensor) -> Tensor:
        return (x != 0).float()

    added = {name: control(f) for name, f in zip(CONTROLS, (random, centre, mask), strict=False)}
    return added if mipin is None else {**added, "pattern only": _with(mipin, local=False)}
