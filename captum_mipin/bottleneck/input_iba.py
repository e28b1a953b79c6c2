"""InputIBA, the information bottleneck at the input.

Its prior comes from a bottleneck at a layer.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_mipin._captum import captum_entry
from captum_mipin.bottleneck.adversary import Adversary, adversarial_mask
from captum_mipin.bottleneck.base import LayerBottleneck, Place, Run
from captum_mipin.bottleneck.gaussian import Bottleneck, Noise, Optimised, mask
from captum_mipin.bottleneck.maps import at_input, finished, positions
from captum_mipin.bottleneck.samples import Parts, Samples
from captum_mipin.calls import made_by_name
from captum_mipin.errors import InputError
from captum_mipin.graph.layers import tensor_name
from captum_mipin.graph.modules import layer_or_tensor
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.validate import as_inputs, like
from captum_mipin.options import check_choice
from captum_mipin.types import Inputs


@made_by_name
@dataclass(frozen=True)
class ThreeStages:
    """The settings of InputIBA; the defaults are the published ones for images.

    Attributes:
        feature: The settings of the bottleneck at the layer.
        prior: The settings of the adversarial training that gives the prior.
        input: The settings of the bottleneck at the input.

    Examples:
        >>> from dataclasses import replace
        >>> settings = ThreeStages()
        >>> replace(settings, prior=replace(settings.prior, epochs=2)).prior.epochs
        2
    """

    feature: Bottleneck = field(default_factory=lambda: Bottleneck(beta=20, sigma=0))
    prior: Adversary = field(default_factory=Adversary)
    input: Bottleneck = field(default_factory=lambda: Bottleneck(beta=20, steps=60))


#: Name → settings: "images" and "text" as released for VGG16 on ImageNet and an LSTM on IMDB, and
#: "fast" for images, with a short adversarial training.
INPUT_IBA_SETTINGS = {
    "images": ThreeStages(),
    "text": ThreeStages(
        Bottleneck(beta=15, sigma=0),
        Adversary(mask_rate=0.03, noise="position"),
        Bottleneck(beta=30, steps=30, learning_rate=0.5, sigma=0),
    ),
    "fast": ThreeStages(prior=Adversary(samples=32, groups=8, epochs=1, width=0.125)),
}


@dataclass(frozen=True)
class Stages:
    """The results of the three stages.

    Attributes:
        feature: The optimised bottlenecks at the layer.
        prior: (batch, ...) the mask m of the input at the end of the adversarial training.
        critic: (iterations, batch) the losses of the critic; NaN where none was computed.
        generator: (iterations, batch) the losses of the generator; NaN where none was computed.
        input: The optimised bottlenecks at the input. Information that the prior passes is not
            counted in their bits.
    """

    feature: Optimised
    prior: Tensor
    critic: Tensor
    generator: Tensor
    input: Optimised


class InputIBA(LayerBottleneck[ThreeStages, Stages]):
    """InputIBA, an information bottleneck at the input: maps with fine details.

    There are three stages for each sample. First, a bottleneck at a layer is optimised, as for
    :class:`~captum_mipin.IBA`. Second, a mask of the input, the prior, is trained until a critic
    cannot distinguish its features from those behind that bottleneck. Third, a bottleneck at the
    input is optimised; information that the prior passes is not counted. Inputs should be
    standardised, because the noise at the input is N(0, 1), as published. The model is not changed.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode that returns logits, as for
            :class:`~captum_mipin.IBA`.
        layer: A module of the model with one output tensor, its name, or the name of a tensor of
            the captured graph, as for :class:`~captum_mipin.IBA`.
        settings: "images" (the default), "text", "fast" (images), or a
            :class:`~captum_mipin.bottleneck.ThreeStages`.
        input_layer: A module, in the same forms as ``layer``, whose output is explained instead of
            the input, such as the embedding of tokens.
        options: ``output``, ``channels``, ``input_channels``, ``classes``, ``across``, ``min_std``
            and ``active``, as for :class:`~captum_mipin.IBA`. If there is an ``input_layer``,
            ``input_channels`` is the dimension of its output that holds the channels.

    Raises:
        InputError: An option is out of its range.

    Source: Zhang et al., "Fine-Grained Neural Network Explanation by Identifying Input Features
    with Predictive Information", NeurIPS 2021, and the released code.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        >>> model, x = nn.Sequential(*layers).eval(), torch.randn(50, 1, 8, 8)
        >>> settings = ThreeStages(prior=Adversary(epochs=1), input=Bottleneck(beta=20, steps=5))
        >>> iba = InputIBA(model, model[1], settings).estimate(x, progress=False)
        >>> iba.attribute(x[:2], target=[0, 2]).shape
        torch.Size([2, 1, 8, 8])
    """

    _kind = "InputIBA"
    _named = INPUT_IBA_SETTINGS

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        settings: ThreeStages | Literal["images", "text", "fast"] | None = None,
        *,
        input_layer: nn.Module | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, layer, settings, **options)
        if self.input_channels is None:
            raise InputError(
                f"channels={self.channels} does not determine which dimension of the input holds "
                "its channels: pass that dimension as input_channels="
            )
        self._channels: int = self.input_channels
        self.input_layer = None if input_layer is None else layer_or_tensor(input_layer, self.model)

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        kind: Literal["mask", "information"] = "mask",
        return_information: bool = False,
        per_position: bool = False,
        **run: Any,
    ) -> Any:
        """Return the optimised masks of the input, or the bits that pass through the masks.

        The model must have one input tensor, unless there is an ``input_layer``.

        Args:
            kind: "mask": sigmoid(α) of each element after the last step; the map of the released
                code is its mean over channels. "information": bits of each element in the last
                forward pass, as in the released code, without those of the prior.
            return_information: True to return also the total bits of each sample.
            per_position: True for maps without channels: (batch, height, width), (batch, tokens).
                Masks are averaged over channels, and bits are summed. Token ids have no channels,
                so their maps have one value per token in any case.
            run: ``generator``, ``internal_batch_size`` and ``progress``, as for
                :meth:`IBA.attribute`.

        Returns:
            Maps shaped like ``inputs``, or like the output of ``input_layer``. With
            ``return_information``, a pair of maps and total bits (batch,).

        Raises:
            NotFittedError: :meth:`estimate` was not called yet.
            ModelChangedError: The model has changed, as for :meth:`IBA.attribute`.
        """
        check_choice("kind", kind, ("mask", "information"))
        tensors, masks = as_inputs(inputs), kind == "mask"
        found = self.explain(tensors, target, additional_forward_args, **run).input
        x, total = tensors[0], found.information.flatten(1).sum(1)
        maps = found.alpha.sigmoid() if masks else found.information
        if per_position or (x.ndim == maps.ndim - 1 and self.input_layer is not None):
            maps = maps.mean(self._channels) if masks else maps.sum(self._channels)
        maps = finished(maps, x)
        maps = like(inputs, (maps,)) if len(tensors) == 1 else maps
        return (maps, total) if return_information else maps

    # ----------------------------------------------------------------------------- the stages

    @property
    def _layer_settings(self) -> Bottleneck:
        return self.settings.feature

    def _explain(self, samples: Samples, run: Run) -> Stages:
        start, settings = self._start(samples), self.settings
        feature = self._at_layer(samples, run)
        with run.bar("adversarial prior", len(samples.targets) * settings.prior.epochs) as bar:
            games = [
                self._game(sample, start, feature, run.seed, bar)
                for sample in samples.groups(start, 1, size=1)
            ]
        masks, critics, generators = zip(*games, strict=True)
        prior = torch.cat(masks)
        # z = λ x + (1 − λ) n with n ~ N(0, 1); its information is the KL against the z of mask m λ
        one = torch.ones((), device=prior.device)
        place = Place(start, Noise(torch.zeros_like(one), one, one), settings.input, self._channels)
        found = self._optimised("input bottleneck", samples, place, run, prior)
        return Stages(feature, prior, torch.stack(critics, 1), torch.stack(generators, 1), found)

    def _start(self, samples: Samples) -> str:
        """Return the name of the tensor that is masked as the input."""
        captured, count = samples.parts.captured, len(samples.inputs)
        if self.input_layer is not None:
            return tensor_name(captured, self.model, self.input_layer)
        dtype = samples.inputs[0].dtype
        if count > 1 or not dtype.is_floating_point:
            problem = f"{count} inputs" if count > 1 else f"inputs of dtype {dtype}"
            raise InputError(
                f"{problem} cannot be masked with noise, expected one floating-point tensor: pass "
                "input_layer=, such as the embedding of tokens"
            )
        return captured.inputs[0]

    def _game(
        self, sample: Samples, start: str, feature: Optimised, seed: int, bar: Any
    ) -> tuple[Tensor, ...]:
        """Return the mask of one sample after the adversarial training, and the losses.

        Args:
            sample: The sample.
            start: Name of the tensor that is masked as the input.
            feature: The optimised bottlenecks of all samples at the layer.
            seed: Seed of all random numbers.
            bar: Progress bar of the epochs.

        Returns:
            The mask, the critic's losses and the generator's losses, see :func:`adversarial_mask`.
        """
        part = sample.parts(start, self._name(sample.parts))
        with torch.no_grad():
            x, others = sample.below(part)
            features = part.above(x, others)
        dtype = torch.promote_types(x.dtype, torch.float32)
        bits, alpha = feature.information[sample.rows], feature.alpha[sample.rows]
        weight = bits * math.log(2)  # the capacity in nats, as in the released code
        if self.settings.prior.bottleneck == "passed":
            over = positions(alpha, self.channels)
            weight = mask(alpha, self.settings.feature.sigma, over)[0]
        beside: dict[int, Any] = {}  # number of copies → the other arguments of the part

        def above(masked: Tensor) -> Tensor:
            rows = len(masked)
            if rows not in beside:
                beside[rows] = sample.beside(part, rows, others)
            return part.above(masked.to(x.dtype), beside[rows]).to(dtype)

        x, features, weight, bits = (t.to(dtype) for t in (x, features, weight, bits))
        draw = torch.Generator(x.device).manual_seed(seed)
        with TURNS.explaining():
            return adversarial_mask(
                x, features, weight, self._initial(bits, x), above, settings=self.settings.prior,
                channels=self.channels, input_channels=self._channels, draw=draw,
                first=sample.first, bar=bar,
            )  # fmt: skip

    def _initial(self, bits: Tensor, x: Tensor) -> Tensor:
        """Return the initial α: the layer's bits at the input's positions, or 0 without positions.

        Args:
            bits: (1, ...) bits of the layer's features.
            x: (1, ...) the tensor that is masked as the input.
        """
        if bits.ndim != x.ndim or bits.ndim < 3:
            return torch.zeros_like(x)
        grid = at_input(bits, (x,), self.channels, self._channels)
        return grid.unsqueeze(self._channels % x.ndim).expand(x.shape).contiguous()

    def _check_graph(self, parts: Parts) -> None:
        if self.input_layer is not None:
            tensor_name(parts.captured, self.model, self.input_layer)

    # ----------------------------------------------------------------------------- files

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, content = super()._pack()
        own = {"stages": asdict(self.settings), "input_layer": self._where(self.input_layer)}
        return tensors, {**content, **own}

    @classmethod
    def _own_arguments(cls, content: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        stages, where = content["stages"], content["input_layer"]
        feature, last = (Bottleneck(**stages[name]) for name in ("feature", "input"))
        settings = ThreeStages(feature, Adversary(**stages["prior"]), last)
        return {"settings": settings, "input_layer": where and cls._find(where, model)}
