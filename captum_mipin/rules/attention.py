"""Matrix products and weighted sums of values that depend on the input.

In attention, a softmax makes the weights of a mean of values: the weights are recorded, and get no
signal; nor do queries and keys. Any other gate is treated in the same way. If neither factor is
made by a gate, each of them gets the signal through the other one, which is recorded.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument
from captum_mipin.rules.arithmetic import PRODUCT, mere_scale
from captum_mipin.rules.base import OwnOperation, Passes, at, varies


def _sum_of_product(a: Tensor, b: Tensor, dims: Any) -> Tensor:
    return (a * b).sum(dims)


#: The operation ``(a * b).sum(dims)``, whose rule is that of a matrix product.
WEIGHTED_SUM = OwnOperation("weighted_sum", _sum_of_product)


def _random(node: fx.Node) -> str | None:
    if argument(node, 4, "dropout_p", 0.0):
        return "its dropout_p is not 0, so that its result is random: set it to 0"
    return None


def _no_weights(node: fx.Node) -> str | None:
    # A tensor that is passed to the model with each example is recorded, as attention weights are.
    if all(varies(n) or (isinstance(n, fx.Node) and batched(value_of(n))) for n in node.args[:2]):
        return mere_scale(node)
    return (
        "it multiplies by a constant matrix, whose inverse would have to be learned: use nn.Linear"
    )


_PRODUCT = replace(
    PRODUCT, note="adjoint, weights and gates as recorded; its scale is learned", refuse=_no_weights
)
ATTENTION = {
    "aten.scaled_dot_product_attention.default": Passes(
        note="adjoint with the recorded attention weights; its scale is learned",
        carriers=at(2),
        records=True,
        restores=False,
        refuse=_random,
    ),
    **dict.fromkeys(("aten.matmul.default", "aten.bmm.default", str(WEIGHTED_SUM)), _PRODUCT),
}

#: Operations without a rule that often compute recorded values, and never mix examples unless they
#: work along the batch.
RECORDABLE = frozenset(
    f"aten.{name}"
    for name in (
        *(f"{name}.{kind}" for name in ("gt", "ge", "lt", "le", "eq", "ne")
          for kind in ("Scalar", "Tensor")),
        *(f"logical_{name}.default" for name in ("and", "or", "not")),
        "softmax.int", "_softmax.default", "linalg_vector_norm.default", "expand_as.default",
        "exp.default", "sqrt.default", "rsqrt.default", "pow.Tensor_Scalar", "masked_fill.Scalar",
        "amax.default", "maximum.default", "abs.default", "log.default", "reciprocal.default",
        "square.default", "exp2.default", "log2.default",
        # indices and conditions, through which no signal could be sent
        "argmax.default", "argmin.default", "argsort.default", "argsort.stable",
        "logical_xor.default", "isnan.default", "isinf.default", "one_hot.default",
        *(f"bitwise_{name}.Tensor" for name in ("and", "or", "xor")), "bitwise_not.default",
        "any.dim", "any.dims", "all.dim", "all.dims",
    )
)  # fmt: skip
