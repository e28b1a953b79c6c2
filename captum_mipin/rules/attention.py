"""Attention: a weighted mean of values, whose weights are recorded. Nothing is sent to queries and keys."""

from torch import fx

from captum_mipin.rules.base import Passes, argument, is_gate


def _values(node: fx.Node) -> tuple[int, ...]:
    return (2,)


def _random(node: fx.Node) -> str | None:
    return "its dropout_p is not 0, so that it is random" if argument(node, 4, "dropout_p", 0.0) else None


def _weighted(node: fx.Node) -> tuple[int, ...]:
    """The factor that attention weights multiply."""
    positions = [i for i in (0, 1) if isinstance(node.args[i], fx.Node) and node.args[i].meta.get("depends")]  # type: ignore[union-attr]
    return tuple(i for i in positions if not is_gate(node.args[i])) or tuple(positions)


def _no_weights(node: fx.Node) -> str | None:
    if any(map(is_gate, node.args[:2])) or all(isinstance(n, fx.Node) and n.meta.get("depends") for n in node.args[:2]):
        return (
            None
            if len(_weighted(node)) == 1
            else "it multiplies two values that both depend on the input, and neither is a softmax"
        )
    return "it multiplies by a constant matrix, whose inverse would have to be learned: use nn.Linear"


_NOTE = "adjoint with the recorded attention weights; its scale is learned"
ATTENTION = {
    "aten.scaled_dot_product_attention.default": Passes(
        note=_NOTE, carriers=_values, records=True, restores=False, refuse=_random
    ),
    **{
        f"aten.{name}.default": Passes(note=_NOTE, carriers=_weighted, records=True, restores=False, refuse=_no_weights)
        for name in ("matmul", "bmm")
    },
}

#: Operations that may compute what is recorded (attention weights, gates), besides those with a rule.
RECORDABLE = frozenset(
    f"aten.{name}"
    for name in (
        "softmax.int", "_softmax.default", "linalg_vector_norm.default", "expand_as.default", "exp.default", "sqrt.default",
        "rsqrt.default", "pow.Tensor_Scalar", "masked_fill.Scalar", "amax.default", "maximum.default", "abs.default",
        "log.default", "reciprocal.default", "square.default",
    )
)  # fmt: skip
