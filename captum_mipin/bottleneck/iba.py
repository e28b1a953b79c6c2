"""IBA: how many bits of a layer's features a prediction needs, and where they are."""

from typing import Any, Literal

import torch
from torch import Tensor

from captum_mipin._captum import captum_entry
from captum_mipin.bottleneck.base import LayerBottleneck, Run
from captum_mipin.bottleneck.gaussian import Bottleneck, Optimised
from captum_mipin.bottleneck.maps import at_input, finished, spread
from captum_mipin.bottleneck.samples import Samples
from captum_mipin.errors import InputError
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.validate import as_inputs, device_of, like
from captum_mipin.types import Inputs

#: Named settings: as published, and a faster one; docs/bottlenecks.md compares the two.
IBA_SETTINGS = {"published": Bottleneck(), "fast": Bottleneck(copies=2)}


class IBA(LayerBottleneck[Bottleneck, Optimised]):
    """Information-bottleneck attribution: the bits of a layer's features that a prediction needs.

    Noise with the mean and standard deviation of the features replaces them, as much of it as the
    prediction bears: for each sample, cross entropy + β · mean information is minimised over a
    mask. What the masked features still tell of the real ones is counted in bits, an upper bound of
    their mutual information. The model is not changed.

    Args:
        model: A module in evaluation mode that returns logits, itself or in ``nn.DataParallel`` or
            ``torch.compile``.
        layer: A module of the model with one output tensor, or the name of any tensor of the
            captured graph. The method is published for convolutional layers of medium depth:
            conv4_1 of VGG16, layer2 of ResNet50.
        settings: "published" (the default), "fast", or a
            :class:`~captum_mipin.bottleneck.Bottleneck`.
        output: Which of several outputs, as for :class:`~captum_mipin.InverseNetwork`.
        channels: The dimension of the layer's output that holds the channels; all others but the
            first are positions. 1 for images (batch, channels, height, width), -1 for sequences
            (batch, tokens, features).
        input_channels: The dimension of the input that holds its channels. By default 1 if
            ``channels`` is 1; otherwise it has to be given.
        classes: The dimension of the model's output that holds the classes.
        across: Dimensions of the layer's output across which elements share mean and standard
            deviation, such as the tokens of a sequence; their sizes may then differ between calls.
        min_std: Floor of the standard deviations.
        active: Elements that are not zero in more than this share of the data take part.

    Raises:
        InputError: An option is out of its range.

    Source: Schulz et al., "Restricting the Flow: Information Bottlenecks for Attribution",
    ICLR 2020.

    Examples:
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        >>> model, x = nn.Sequential(*layers).eval(), torch.randn(50, 1, 8, 8)
        >>> iba = IBA(model, model[1]).estimate(x, progress=False)
        >>> bits, total = iba.attribute(x[:2], target=[0, 2], return_information=True)
        >>> bits.shape, torch.allclose(bits.sum((1, 2, 3)), total)
        (torch.Size([2, 1, 8, 8]), True)
    """

    _kind = "IBA"
    _named = IBA_SETTINGS

    @captum_entry
    def attribute(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        at: Literal["input", "layer"] = "input",
        per_position: bool = False,
        generator: torch.Generator | None = None,
        internal_batch_size: int | None = None,
        return_information: bool = False,
        progress: bool = False,
    ) -> Any:
        """Return the bits of the layer's features that the target's cross entropy needs.

        Samples are optimised together, and each as if it were alone: all meet the same noise. For a
        model with one logit, the sign of the logit is explained.

        Args:
            at: "input": bits of each position, summed over channels and interpolated to the
                positions of the input. Each channel of the input has an equal share, so that the
                map has the input's shape and sums to the total. For one input tensor with positions
                like the layer's. "layer": bits of each feature, shaped like the layer's output.
            per_position: True for maps without channels: (batch, height, width), (batch, tokens).
            generator: Draws the seed of the noise. By default the noise is the same at each call.
            internal_batch_size: Samples optimised together; results do not depend on it. By default
                so many that memory stays bounded, and on a CPU few enough to be fast.
            return_information: True to return also the total bits of each sample.
            progress: True to show a progress bar.

        Returns:
            Bits, shaped as ``at`` and ``per_position`` say; with ``return_information`` a pair of
            them and the total (batch,).

        Raises:
            NotFittedError: Nothing was estimated yet.
            ModelChangedError: The model's weights changed since the estimate, or what it computes
                for inputs of a shape that was estimated on.
        """
        if at not in ("input", "layer"):
            raise InputError(f"at={at!r} is not one of 'input', 'layer'")
        tensors = as_inputs(inputs)
        with plain_modes(device_of(self.model)):
            samples = self._samples(tensors, target, additional_forward_args, internal_batch_size)
            if at == "input":  # refuse what has no such map before all the work
                shape = samples.shape(self._name(samples.parts))
                self._grid(torch.empty(len(tensors[0]), *shape, device="meta"), tensors)
            run = Run.of(generator, internal_batch_size, progress)
            bits = self._explain(samples, run).information
        total = bits.flatten(1).sum(1)
        if at == "layer":
            maps = bits.sum(self.channels) if per_position else bits
        else:
            maps, x = self._grid(bits, tensors), tensors[0]
            maps = maps if per_position else spread(maps, x, self.input_channels or -1)
            maps = like(inputs, (finished(maps, x),))
        return (maps, total) if return_information else maps

    def _grid(self, bits: Tensor, inputs: Inputs) -> Tensor:
        """Return bits of features as bits of the input's positions."""
        return at_input(bits, inputs, self.channels, self.input_channels)

    @property
    def _layer_settings(self) -> Bottleneck:
        return self.settings

    def _explain(self, samples: Samples, run: Run) -> Optimised:
        return self._at_layer(samples, run)
