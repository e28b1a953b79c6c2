"""Attention: a weighted mean of values, whose weights are recorded. Nothing is sent to queries and keys."""

from torch import fx

from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import Passes, depends, factors, is_gate


def _values(node: fx.Node) -> tuple[int, ...]:
    return (2,)


def _random(node: fx.Node) -> str | None:
    return (
        "its dropout_p is not 0, so that it is random"
        if argument(node, 4, "dropout_p", 0.0)
        else None
    )


def _no_weights(node: fx.Node) -> str | None:
    depend = list(map(depends, node.args[:2]))
    if not any(map(is_gate, node.args[:2])) and not all(depend):
        return "it multiplies by a constant matrix, whose inverse would have to be learned: use nn.Linear"
    if len(factors(node)) > 1:
        return "it multiplies two values that both depend on the input, and neither is a softmax"
    return None


def _term_and_values(node: fx.Node) -> tuple[int, ...]:
    return (*([0] if depends(node.args[0]) else []), *factors(node, 1))


def _no_weights_in_product(node: fx.Node) -> str | None:
    if not any(map(is_gate, node.args[1:3])) or len(factors(node, 1)) > 1:
        return "it multiplies two values of which not just one is a softmax"
    return None


_NOTE = "adjoint with the recorded attention weights; its scale is learned"
ATTENTION = {
    "aten.scaled_dot_product_attention.default": Passes(
        note=_NOTE, carriers=_values, records=True, restores=False, refuse=_random
    ),
    **{
        f"aten.{name}.default": Passes(
            note=_NOTE, carriers=factors, records=True, restores=False, refuse=_no_weights
        )
        for name in ("matmul", "bmm")
    },
    "aten.baddbmm.default": Passes(
        note=_NOTE,
        carriers=_term_and_values,
        records=True,
        restores=False,
        refuse=_no_weights_in_product,
    ),
}

#: Operations that may compute what is recorded (attention weights, gates), besides those with a rule.
RECORDABLE = frozenset(
    f"aten.{name}"
    for name in (
        *(f"{name}.{kind}" for name in ("gt", "ge", "lt", "le", "eq", "ne") for kind in ("Scalar", "Tensor")),
        *(f"logical_{name}.default" for name in ("and", "or", "not")),
        "softmax.int", "_softmax.default", "linalg_vector_norm.default", "expand_as.default", "exp.default", "sqrt.default",
        "rsqrt.default", "pow.Tensor_Scalar", "masked_fill.Scalar", "amax.default", "maximum.default", "abs.default",
        "log.default", "reciprocal.default", "square.default",
    )
)  # fmt: skip
