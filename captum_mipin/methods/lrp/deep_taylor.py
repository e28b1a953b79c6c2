"""Deep Taylor decomposition, which is LRP with certain rules."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from captum_mipin.errors import InputError
from captum_mipin.methods.layers import Layer
from captum_mipin.methods.lrp.lrp import LRP, check_one_of, check_rule
from captum_mipin.methods.lrp.rules import FullBias, LayerRule, WSquare, ZBox, ZPlus
from captum_mipin.methods.lrp.table import innvestigate
from captum_mipin.rules import Rule
from captum_mipin.types import Output, Target


class DeepTaylor(LRP):
    """Deep Taylor decomposition: z⁺ in all layers but the first.

    R_i = Σ_j (x_i w_ij)⁺ / Σ_i' (x_i' w_i'j)⁺ R_j in hidden layers. In the first layer the rule is
    z^B if the inputs have bounds, else w². Everything else is as for :class:`LRP`. Hidden values
    below 0, which networks with ReLU do not have, count with the weights below 0, as in LRP-α1β0.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.
        low: Lower bound of the input for z^B, as the first layer sees it; see :class:`ZBox`. None:
            w².
        high: Upper bound, likewise.
        bias: Which part of a bias is in the denominators of z⁺, and so takes relevance: "none", the
            "positive" part, or the "full" bias.
        last: The rule of the layer that makes the output; z⁺ by default.
        preset: "innvestigate" for what iNNvestigate 1.0 runs under this name. α1β0 with full biases
            is the rule of every layer, also of the first one unless there are bounds. Batch norms
            pass relevance on; sums copy it to each term; activations, maximum and average pooling
            send back their gradient. It starts with the positive part of the output, so a class
            with a negative output gets nothing. It does not conserve relevance. Operations that
            iNNvestigate does not know are refused.

    Source: Montavon et al., Pattern Recognition 2017; Alber et al., JMLR 2019 (iNNvestigate).

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> DeepTaylor(model, low=0, high=1).attribute(torch.rand(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Deep Taylor"

    def __init__(
        self,
        model: nn.Module,
        *,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        bias: Literal["none", "positive", "full"] = "none",
        last: LayerRule | None = None,
        preset: Literal["innvestigate"] | None = None,
        output: Output = None,
    ) -> None:
        check_one_of("bias", bias, ("none", "positive", "full"))
        check_one_of("preset", preset, (None, "innvestigate"))
        if (low is None) != (high is None):
            raise InputError("low and high are both bounds of the input: pass both or none")
        if preset and (bias != "none" or last is not None):
            raise InputError(
                "preset='innvestigate' defines the treatment of biases and of the last layer: "
                "leave out bias and last"
            )
        if last is not None:
            check_rule(last)
        box = None if low is None or high is None else ZBox(low, high)
        super().__init__(
            model,
            rule=FullBias() if preset or bias == "full" else ZPlus(),
            input_rule=box if preset else box or WSquare(),
            bias="none" if bias == "none" and not preset else "take",
            output=output,
        )
        self.last, self.preset, self._folds = last, preset, preset is None

    def _rules(self) -> tuple[LayerRule | None, ...]:
        return (*super()._rules(), self.last)

    def _chosen(self, layer: Layer, first: bool, last: bool) -> LayerRule | None:
        return super()._chosen(layer, first, last) or (self.last if last else None)

    def _others(self) -> Mapping[str, Rule]:
        return innvestigate() if self.preset else super()._others()

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        start = super()._start(output, targets)
        return start.clamp(min=0) if self.preset else start
