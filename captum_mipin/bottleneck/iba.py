"""IBA: the number of bits of a layer's features that a prediction needs, at each position."""

from typing import Any, Literal

import torch
from torch import Tensor

from captum_mipin._captum import captum_entry
from captum_mipin.bottleneck.base import LayerBottleneck, Run
from captum_mipin.bottleneck.gaussian import Bottleneck, Optimised
from captum_mipin.bottleneck.maps import at_input, finished, spread
from captum_mipin.bottleneck.samples import Samples
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.validate import as_inputs, device_of, like
from captum_mipin.options import check_choice
from captum_mipin.types import Inputs

#: Name → settings: the published ones, and faster ones. docs/bottlenecks.md compares the two.
IBA_SETTINGS = {"published": Bottleneck(), "fast": Bottleneck(copies=2)}


class IBA(LayerBottleneck[Bottleneck, Optimised]):
    """Information-bottleneck attribution: the bits of a layer's features that a prediction needs.

    A mask replaces features by noise with their mean and standard deviation on data. For each
    sample, the mask minimises cross entropy + β · mean information, so noise replaces the features
    that the prediction does not need. The information that the masked features have about the real
    ones is measured in bits; it is an upper bound of their mutual information. The model is not
    changed.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode that returns logits. If it is wrapped by
            ``nn.DataParallel`` or ``torch.compile``, the module inside is used.
        layer: A module of the model with one output tensor, its name, or the name of a tensor of
            the captured graph. The method is published for convolutional layers of medium depth:
            conv4_1 of VGG16, layer2 of ResNet50.
        settings: "published" (the default), "fast", or a
            :class:`~captum_mipin.bottleneck.Bottleneck`.
        output: The output to explain if the model returns several tensors, as for
            :class:`~captum_mipin.InverseNetwork`.
        channels: The dimension of the layer's output that holds the channels: 1 for images (batch,
            channels, height, width), -1 for sequences (batch, tokens, features). The other
            dimensions, without the batch, are positions.
        input_channels: The dimension of the input that holds the channels. The default is 1 if
            ``channels`` is 1; otherwise there is no default.
        classes: The dimension of the model's output that holds the classes.
        across: Dimensions of the layer's output along which all elements share one mean and one
            standard deviation, such as the tokens of a sequence. The sizes of these dimensions may
            then differ between calls.
        min_std: Smallest standard deviation of the noise, which replaces smaller ones.
        active: Share of the data, from 0 to 1. A feature is active if it is not 0 in more than this
            share; only active features are masked and have information.

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
        """Return the bits of the layer's features that the prediction of the target needs.

        Samples are optimised together, but the map of one does not depend on the others: all get
        the same noise. For a model with one logit, the sign of the logit is explained.

        Args:
            at: "input": bits at the input, shaped like the input. The bits of the layer are summed
                over channels and interpolated to the input's positions; each channel of the input
                gets an equal share. The model must have one input tensor, with as many dimensions
                of positions as the layer. "layer": bits of each feature, shaped like the layer's
                output.
            per_position: True for maps without channels: (batch, height, width), (batch, tokens).
            generator: Generator that the seed of the noise is drawn from. By default the noise is
                the same in each call.
            internal_batch_size: Number of samples that are optimised together; results do not
                depend on it. By default it is chosen from the size of the samples.
            return_information: True to return also the total bits of each sample.
            progress: True to show a progress bar.

        Returns:
            Maps in bits, those of the last forward pass as in the released code, shaped according
            to ``at`` and ``per_position``; with ``return_information``, also total bits (batch,).

        Raises:
            NotFittedError: :meth:`estimate` was not called yet.
            ModelChangedError: The model's weights changed since the call of :meth:`estimate`, or
                the model runs other operations for inputs of the same shape.
        """
        check_choice("at", at, ("input", "layer"))
        tensors = as_inputs(inputs)
        with plain_modes(device_of(self.model)):
            samples = self._samples(tensors, target, additional_forward_args, internal_batch_size)
            if at == "input":  # raise its InputError now, and not after the optimisation
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
        """Return the bits of each input position, for the bits of each feature."""
        return at_input(bits, inputs, self.channels, self.input_channels)

    @property
    def _layer_settings(self) -> Bottleneck:
        return self.settings

    def _explain(self, samples: Samples, run: Run) -> Optimised:
        return self._at_layer(samples, run)
