"""Attention rollout, Chefer's relevance and LeGrad: the relevance of tokens from attention weights.

A_l (heads, tokens, tokens) are the attention weights of block l of L blocks, for one example: row i
has the weights with which token i looks at all tokens. Z_l (tokens, features) are the tokens behind
block l. The weights are values of the captured graph, in which all attention is written as
softmax(Q Kᵀ) V. The model's classes are not changed, and it gets no hooks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_mipin._captum import NoFuture, captum_entry
from captum_mipin.errors import InputError, UnsupportedOperationError
from captum_mipin.graph import validate
from captum_mipin.graph.cache import Graphs, Starts
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.signature import plain
from captum_mipin.graph.turns import TURNS
from captum_mipin.options import check_number
from captum_mipin.propagation.attention import Encoder
from captum_mipin.propagation.final import require_logits
from captum_mipin.propagation.independent import capture_apart, check_graph
from captum_mipin.propagation.runtime import seed
from captum_mipin.targets import per_example
from captum_mipin.types import Extras, Inputs, Output, Target


class _Call(NamedTuple):
    """One call of a model whose tokens are explained.

    Attributes:
        encoder: The model's blocks.
        values: Name of a placeholder of the graph → its value.
        shown: The inputs, tensors (batch, ...).
        targets: The target of each example; empty for a result that is the same for all targets.
    """

    encoder: Encoder
    values: Mapping[str, Any]
    shown: Inputs
    targets: Sequence[Target]

    def run(self) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Return all attention weights, all tokens, and other values, see :class:`Encoder`."""
        return self.encoder.run(self.values, self.shown)


class TokenAttribution(NoFuture, Attribution):
    """Base class of methods that return one relevance per token, from attention weights.

    The model may be any that is a row of blocks with self-attention of all tokens to all tokens, in
    any spelling: an encoder of images or of a text. Attention of windows, cross-attention, blocks
    with different numbers of tokens, and attention weights that are mixed after the softmax are
    refused by name.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode, as for
            :class:`~captum_mipin.methods.base.Propagation`.
        row: The row of the result, as a product of matrices (tokens, tokens), that is returned: the
            number of a token, such as 0 for a class token, or "mean" for the mean over all. None:
            the token that the output reads behind the last block, or the mean over these tokens.
        output: The output to explain if the model returns several tensors.
    """

    _name = "Attention"
    #: Whether the result depends on the target.
    _explains = True

    def __init__(
        self, model: nn.Module, *, row: int | Literal["mean"] | None = None, output: Output = None
    ) -> None:
        validate.check_output(output)
        if row not in (None, "mean") and (isinstance(row, bool) or not isinstance(row, int)):
            raise InputError(
                f"row={row!r}, expected the number of a token, 'mean' or None: pass 0 for a class "
                "token"
            )
        Attribution.__init__(self, model)
        self.model, self.row, self.output = validate.as_model(model), row, output
        self._graphs = Graphs[Encoder]()

    @captum_entry
    def attribute(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        """Return the relevance of each token for the target's output.

        Inputs may be integers, such as the tokens of a text.

        Returns:
            Tensor (batch, tokens), with class and register tokens; :func:`patch_map` makes a map of
            the patches of an image. It is one tensor, also for several inputs.

        Raises:
            UnsupportedOperationError: The model is no row of blocks with self-attention.
        """
        tensors, extras = validate.as_inputs(inputs), validate.as_extras(additional_forward_args)
        validate.check_model(self.model)
        validate.check_inputs(tensors, explained=False)
        validate.check_finite(tensors)
        with torch.inference_mode(False), torch.autocast(tensors[0].device.type, enabled=False):
            tensors, extras = plain((tensors, extras))
            graph, encoder = self._encoder(tensors, extras)
            dims = value_of(graph.output).shape[1:]
            targets: Sequence[Target] = ()
            if self._explains or (encoder.per_token and self.row is None):
                like = torch.empty(len(tensors[0]), *dims, device="meta")
                targets = per_example(target, like)
            with TURNS.explaining(), torch.enable_grad():
                values = graph.values(self.model, tensors, extras)
                result = self._relevance(_Call(encoder, values, tensors, targets))
        if not validate.finite(result):
            raise InputError(
                "the model's output or its gradient overflows for these inputs (NaN or Inf), "
                "expected finite values: scale the inputs, or use a wider dtype"
            )
        return result.detach().contiguous()

    def _relevance(self, call: _Call) -> Tensor:
        raise NotImplementedError

    def _row(self, call: _Call, z: Tensor, others: Sequence[Any]) -> Tensor:
        """Return the row that is returned, as weights (batch, tokens) over all rows."""
        encoder = call.encoder
        if self.row is None:
            return encoder.rows(z, others, call.targets)
        rows = z.new_zeros(z.shape[1 - encoder.place], encoder.tokens)
        if self.row == "mean":
            return rows + 1 / encoder.tokens
        if not -encoder.tokens <= self.row < encoder.tokens:
            raise InputError(
                f"row={self.row}, but the model has {encoder.tokens} tokens: pass one of 0 to "
                f"{encoder.tokens - 1}"
            )
        rows[:, self.row] = 1
        return rows

    def _encoder(self, inputs: Inputs, extras: Extras) -> tuple[CapturedGraph, Encoder]:
        def graph_of(inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
            options: dict[str, Any] = {"output": self.output, "explained": False}
            return capture_apart(self.model, inputs, extras, shared, **options)

        def build(graph: CapturedGraph, start: Starts) -> Encoder:
            encoder = Encoder(graph)
            check_graph(graph, self.model, (inputs, extras), self.output)
            return encoder

        return self._graphs.build(
            lambda graph: (), self.output,
            lambda: self._graphs.find(inputs, extras, graph_of, prepare=require_logits), build,
        )  # fmt: skip

    @classmethod
    def get_name(cls) -> str:
        """Return the name that Captum's tools show."""
        return cls._name


class AttentionRollout(TokenAttribution):
    """Attention rollout: the product of all attention weights, with the residual connections.

    A row of Â_L ⋯ Â_1, with Â_l = (mean over heads of A_l + I) / 2. It is the same for all targets,
    and at least 0.

    Args:
        model: See :class:`TokenAttribution`.
        row: See :class:`TokenAttribution`.
        output: See :class:`TokenAttribution`.

    Source: Abnar and Zuidema, ACL 2020.

    Examples:
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3).eval()
        >>> tokens = AttentionRollout(model).attribute(torch.rand(2, 3, 8, 8))
        >>> tokens.shape, patch_map(tokens).shape
        (torch.Size([2, 5]), torch.Size([2, 1, 2, 2]))
    """

    _name = "Attention rollout"
    _explains = False

    def _relevance(self, call: _Call) -> Tensor:
        with torch.no_grad():
            weights, streams, others = call.run()
        result = self._row(call, streams[-1], others)
        for a in reversed(call.encoder.by_example(weights)):
            # r Â = (r Ā + r) / 2
            result = (_times(result, a.mean(1)) + result) / 2
        return result


class Chefer(TokenAttribution):
    """Chefer's relevance: attention weights times their gradients, rolled out.

    A row of R_L, where R_0 = I and R_l = R_{l−1} + Ā_l R_{l−1}, with Ā_l = mean over heads of
    (∂Φ_c/∂A_l ⊙ A_l)⁺. The part I of the product gives the row's own token 1.

    Args:
        model: See :class:`TokenAttribution`.
        row: See :class:`TokenAttribution`.
        output: See :class:`TokenAttribution`.

    Source: Chefer, Gur and Wolf, ICCV 2021: equations 5 and 6, for self-attention.

    Examples:
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3).eval()
        >>> Chefer(model).attribute(torch.rand(2, 3, 8, 8), target=1).shape
        torch.Size([2, 5])
    """

    _name = "Chefer"

    def _relevance(self, call: _Call) -> Tensor:
        weights, streams, others = call.run()
        output = call.encoder.output(streams[-1], others)
        gradients = torch.autograd.grad(output, weights, seed(output, call.targets, unit=True))
        result = self._row(call, streams[-1], others)
        pairs = zip(
            call.encoder.by_example(gradients), call.encoder.by_example(weights), strict=True
        )
        for gradient, a in reversed(list(pairs)):
            # r R_l = r (I + Ā_l) R_{l−1}
            result = result + _times(result, (gradient * a.detach()).clamp_(min=0).mean(1))
        return result


class LeGrad(TokenAttribution):
    """LeGrad: the positive gradients of attention weights, for the score of each block.

    The mean over blocks, heads and rows of (∂s_l/∂A_l)⁺. The score s_l is the model's output for
    the target if what follows the last block takes the mean of the tokens Z_l, as each of its
    tokens. Weights that a mask sets to 0 count as 0, but padding counts in the mean of the tokens.
    The published maps are scaled to [0, 1] afterwards.

    Args:
        model: See :class:`TokenAttribution`. It needs at least two blocks.
        blocks: Number of blocks before the output that are used; None for all.
        output: See :class:`TokenAttribution`.

    Source: Bousselham et al., ICCV 2025, with the score of their code.

    Examples:
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3).eval()
        >>> LeGrad(model).attribute(torch.rand(2, 3, 8, 8), target=[0, 2]).shape
        torch.Size([2, 5])
    """

    _name = "LeGrad"

    def __init__(
        self, model: nn.Module, *, blocks: int | None = None, output: Output = None
    ) -> None:
        super().__init__(model, output=output)
        if blocks is not None:
            check_number("blocks", blocks, 1, whole=True)
        self.blocks = blocks

    def _relevance(self, call: _Call) -> Tensor:
        if not call.encoder.blocks:
            raise UnsupportedOperationError(
                "the ends of the model's blocks are not known, since it has a single block or "
                "blocks of several kinds; expected two or more blocks of one kind: use Chefer"
            )
        weights, streams, others = call.run()
        gradients = []
        for z, a in zip(streams, weights, strict=True):
            mean = z.mean(call.encoder.place, keepdim=True).expand_as(z)
            score = call.encoder.output(mean, others)
            start = seed(score, call.targets, unit=True)
            (gradient,) = torch.autograd.grad(score, a, start, retain_graph=True)
            gradients.append(gradient * (a != 0))  # a mask set this weight to 0, whatever its slope
        # mean over heads and rows of (∂s_l / ∂A_l)⁺
        parts = [g.clamp(min=0).mean((1, 2)) for g in call.encoder.by_example(gradients)]
        return torch.stack(parts[-self.blocks :] if self.blocks else parts).mean(0).to(z.dtype)


def patch_map(tokens: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
    """Return the relevance of the patches of an image as a map.

    Args:
        tokens: Tensor (batch, tokens), with the patches row by row behind all other tokens.
        height: Number of patches from top to bottom; None for a square.
        width: Number of patches from left to right; None for a square.

    Returns:
        Tensor (batch, 1, height, width).

    Raises:
        InputError: There are fewer tokens than patches.

    Examples:
        >>> patch_map(torch.rand(2, 197)).shape  # a class token and 14 × 14 patches
        torch.Size([2, 1, 14, 14])
    """
    side = int(tokens.shape[1] ** 0.5)
    height, width = height or side, width or side
    if not 0 < height * width <= tokens.shape[1]:
        raise InputError(
            f"{height} × {width} patches, but there are {tokens.shape[1]} tokens: pass the height "
            "and width of the grid of patches"
        )
    patches: Tensor = tokens[:, tokens.shape[1] - height * width :]
    return patches.reshape(-1, 1, height, width)


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    """Return a row times a matrix, for each example; weights may have a dtype of their own."""
    return torch.einsum("bi,bij->bj", row, matrix.to(row.dtype))
