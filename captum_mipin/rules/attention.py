"""Attention: a mean of values with recorded weights. Queries and keys get no signal.

The weights are the result of a softmax. Products of a gate and a tensor are treated in the same
way: the gate is recorded, and only the tensor gets a signal.
"""

from torch import fx

from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import Passes, at, depends, factors, is_gate


def _random(node: fx.Node) -> str | None:
    if argument(node, 4, "dropout_p", 0.0):
        return "its dropout_p is not 0, so that its result is random: set it to 0"
    return None


def _no_weights(node: fx.Node) -> str | None:
    if not any(map(is_gate, node.args[:2])) and not all(map(depends, node.args[:2])):
        return (
            "it multiplies by a constant matrix, whose inverse would have to be learned: "
            "use nn.Linear"
        )
    if len(factors(node)) > 1:
        return "it multiplies two values that both depend on the input, and neither is a softmax"
    return None


def _term_and_values(node: fx.Node) -> tuple[int, ...]:
    return (0,) * depends(node.args[0]) + factors(node, 1)


def _no_weights_in_product(node: fx.Node) -> str | None:
    if not any(map(is_gate, node.args[1:3])) or len(factors(node, 1)) > 1:
        return "it multiplies two values, of which exactly one must be a softmax"
    return None


_TREATED = {
    "scaled_dot_product_attention": (at(2), _random),
    "matmul": (factors, _no_weights),
    "bmm": (factors, _no_weights),
    "baddbmm": (_term_and_values, _no_weights_in_product),
}
ATTENTION = {
    f"aten.{name}.default": Passes(
        note="adjoint with the recorded attention weights; its scale is learned",
        carriers=carriers,
        records=True,
        restores=False,
        refuse=refuse,
    )
    for name, (carriers, refuse) in _TREATED.items()
}

#: Operations without a rule that may compute recorded values: gates and attention weights.
RECORDABLE = frozenset(
    f"aten.{name}"
    for name in (
        *(f"{name}.{kind}" for name in ("gt", "ge", "lt", "le", "eq", "ne")
          for kind in ("Scalar", "Tensor")),
        *(f"logical_{name}.default" for name in ("and", "or", "not")),
        "softmax.int", "_softmax.default", "linalg_vector_norm.default", "expand_as.default",
        "exp.default", "sqrt.default", "rsqrt.default", "pow.Tensor_Scalar", "masked_fill.Scalar",
        "amax.default", "maximum.default", "abs.default", "log.default", "reciprocal.default",
        "square.default",
        # indices and conditions, through which no signal could be sent
        "argmax.default", "argmin.default", "argsort.default", "argsort.stable",
        "logical_xor.default", "isnan.default", "isinf.default", "one_hot.default",
        *(f"bitwise_{name}.Tensor" for name in ("and", "or", "xor")), "bitwise_not.default",
        "any.dim", "any.dims", "all.dim", "all.dims",
    )
)  # fmt: skip
