"""Rules of LRP for all operations without weights.

Sums, averages and other linear operations distribute relevance by contribution,
R_i = x_i Σ_j a_ij R_j / z_j with z_j = Σ_i a_ij x_i, where a_ij is the operation's coefficient of
input i in output j. Activations, and normalisations by the sample's own deviation, give the
relevance of an output to the input at the same position. Maximum pooling and rearrangements give it
to the input that was copied. In a product with a gate or with attention weights, the value gets all
relevance, and so does the dividend of a ratio. In a product of two values of which neither is a
gate, each gets half of the relevance (the uniform rule of AttnLRP: Achtibat et al., ICML 2024).

:func:`attnlrp` returns the rules of AttnLRP, in which gates, queries and keys get relevance too.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.methods.gradients import run_operator
from captum_mipin.methods.lrp.rules import quotient
from captum_mipin.rules import MIPIN, Options, Passes, Recorded, Rule
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.arithmetic import ARITHMETIC
from captum_mipin.rules.attention import ATTENTION
from captum_mipin.rules.base import Back, derivative, is_floating, varies
from captum_mipin.rules.gates import DIVISIONS, SCALE_OPERATIONS, factors
from captum_mipin.rules.linear_maps import COPIES, MIXES, among, linear_in
from captum_mipin.rules.normalization import NORMALIZATION, SCALES
from captum_mipin.rules.pooling import POOLING
from captum_mipin.rules.selection import NORMS, QUANTILES

_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
_LAYER_NORM = "aten.layer_norm.default"
#: ε of the denominators of products and layer norms in AttnLRP.
_EPSILON = 1e-9


def relevance(takes: bool) -> dict[str, Rule]:
    """Return the rules of LRP for all operations without weights.

    Args:
        takes: True if constants in sums take relevance, like biases.
    """
    moves = {name: rule for name, rule in MIPIN.items() if isinstance(rule, Passes)}
    table: dict[str, Rule] = dict(moves)
    rule: Rule
    for name, rule in ACTIVATIONS.items():
        table[name] = Recorded(run=PASS_ON, note="passed on", refuse=rule.refuse)
    for name, rule in NORMALIZATION.items():
        table[name] = Recorded(run=PASS_ON, note="passed on", refuse=rule.refuse, caveat=outside)
    del table[_BATCH_NORM]  # a layer with weights replaces it, see methods/layers.py
    table["aten.glu.default"] = Recorded(
        run=_glu, note="to the value, not the gate", caveat=outside
    )
    for name, rule in POOLING.items():
        by_shares = _by_contribution(rule, carriers=varying)
        table[name] = Passes(note="to its switches") if "max_pool" in name else by_shares
    for name, rule in COPIES.items():
        table[name] = adjoint_of(rule, "to the copied value")
    for name, rule in {**NORMS, **QUANTILES}.items():  # of norms, R_i = x_i² / ‖x‖² R
        table[name] = _by_contribution(rule, carriers=varying)
    for name, rule in MIXES.items():
        table[name] = _by_contribution(rule, carriers=among(*linear_in(name), counts=varies))
    for name, rule in ARITHMETIC.items():
        if "neg" in name:
            table[name] = _by_contribution(rule, carriers=varying)
        elif "add" in name or "sub" in name:
            table[name] = _by_contribution(
                rule,
                without_constants=not takes,
                carriers=varying,
                caveat=_constant if takes else no_caveat,
            )
        else:
            table[name] = _by_contribution(rule, run=uniform, carriers=values, caveat=gated)
    for name, rule in ATTENTION.items():
        carriers = values if rule.carriers is factors else rule.carriers
        note = "to the values, by the recorded weights"
        table[name] = _by_contribution(rule, note, run=uniform, carriers=carriers, caveat=outside)
    return table


def attnlrp(takes: bool) -> dict[str, Rule]:
    """Return the rules of AttnLRP for all operations without weights.

    Attention must be written as products and a softmax, see
    :func:`~captum_mipin.propagation.attention.expand_attention`.

    Args:
        takes: True if constants in sums, and shifts of layer norms, take relevance, like biases.
    """
    table = relevance(takes)
    halves = partial(uniform, epsilon=_EPSILON)
    for name, rule in table.items():
        if isinstance(rule, Recorded) and rule.carriers is values:
            run = partial(run_operator, halves)
            table[name] = replace(
                rule, run=run, note="half to each factor", carriers=signals, caveat=no_caveat
            )
    note = "the Taylor expansion of the softmax"
    for name in ("softmax.int", "_softmax.default", "_safe_softmax.default"):
        table[f"aten.{name}"] = Recorded(run=_softmax, note=note)
    table["aten.glu.default"] = Recorded(run=_halved_glu, note="half to value and gate")
    table[_LAYER_NORM] = Recorded(
        run=partial(_layer_norm, takes), note="LRP-ε of the centring, σ as recorded"
    )
    return table


def innvestigate() -> dict[str, Rule]:
    """Return the rules of iNNvestigate's Deep Taylor for all operations without weights."""
    exact = {name: rule for name, rule in MIPIN.items() if isinstance(rule, Passes) and rule.exact}
    gradient = {
        name: Passes(note="gradient", refuse=rule.refuse)
        for name, rule in {**ACTIVATIONS, **POOLING}.items()
    }
    return {
        **exact,
        **gradient,
        "aten.add.Tensor": Passes(note="copied to each term", carriers=varying, caveat=_copied),
        _BATCH_NORM: Recorded(run=PASS_ON, note="passed on"),
    }


# ------------------------------------------------------------------------------ backward functions


def share(
    without_constants: bool,
    operator: Callable[..., Tensor],
    x: tuple[Tensor, ...],
    epsilon: float = 0.0,
) -> Any:
    """Distribute relevance by contribution through a linear operator.

    Args:
        without_constants: True to subtract the operator's value at 0, which is the part of its
            constants, from the denominators.
        operator: The operator, a function of the tuple ``x``.
        x: All arguments that get relevance.
        epsilon: ε, which is added to each denominator with the denominator's sign.

    Returns:
        The operator's value, and the backward function: relevance → one tensor per argument.
    """
    value, back = derivative(operator, x)
    z = value
    if without_constants:
        # a mask of −∞ stays in the denominator, for −∞ − (−∞) is not a number
        z = (value - operator(tuple(map(torch.zeros_like, x)))).nan_to_num_(
            -torch.inf, torch.inf, -torch.inf
        )
    # R_i = x_i Σ_j a_ij R_j / z_j, where ``back`` is the adjoint s ↦ Σ_j a_ij s_j
    return value, lambda r: tuple(
        part * g for part, g in zip(x, back(quotient(r, z, epsilon)), strict=True)
    )


def uniform(operator: Callable[..., Tensor], x: tuple[Tensor, ...], epsilon: float = 0.0) -> Any:
    """Distribute relevance by contribution through a product, in equal parts to its factors.

    Args:
        operator: The product as a function of the tuple ``x``, linear in each of its entries.
        x: The factors that get relevance.
        epsilon: ε, see :func:`share`.

    Returns:
        The product, and the backward function: relevance → one tensor per factor.
    """
    value, back = share(False, operator, x, epsilon)
    # n factors: R_i = x_i Σ_j (∂z_j / ∂x_i) R_j / (n z_j), which conserves relevance
    return value, lambda r: back(r / len(x))


def hand_on(operator: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Back]:
    """Return an operator's value, and the backward function R_i = R_j at the same position."""
    value = operator(x)
    return value[0] if isinstance(value, tuple) else value, lambda r: r


def _glu(options: Options, operation: Any, x: Tensor, dim: int = -1) -> tuple[Tensor, Back]:
    return operation(x, dim), lambda r: torch.cat([r, torch.zeros_like(r)], dim)


def _halved_glu(options: Options, operation: Any, x: Tensor, dim: int = -1) -> tuple[Tensor, Back]:
    value = operation(x, dim)

    def back(r: Tensor) -> Tensor:
        # R_i = z / (z + ε s(z)) R_j / 2 for both factors of z = a ⊙ σ(b), as for other products
        half = quotient(r, value, _EPSILON).mul_(value) / 2
        return torch.cat([half, half], dim)

    return value, back


def _softmax(
    options: Options, operation: Any, x: Tensor, dim: int, *others: Any
) -> tuple[Tensor, Back]:
    """Run a softmax; the backward function is its Taylor expansion at x."""
    value = operation(x, dim, *others)
    known = x.masked_fill(x == -torch.inf, 0)  # entries that a mask left out
    # R_i = x_i (R_i − y_i Σ_j R_j) with y = softmax(x)
    return value, lambda r: known * (r - value * r.sum(dim, keepdim=True))


def _layer_norm(
    takes: bool, options: Options, operation: Any, x: Tensor, shape: Any, *others: Any, **named: Any
) -> tuple[Tensor, Back]:
    """Run y = γ (x − μ) / σ + β; the backward function is LRP-ε with a constant σ."""
    value = operation(x, shape, *others, **named)
    shift = named.get("bias", others[1] if len(others) > 1 else None)
    z = value if takes or shift is None else value - shift
    scale, dims = SCALES[_LAYER_NORM](x, shape, *others, **named), tuple(range(-len(shape), 0))

    def back(r: Tensor) -> Tensor:
        # R_i = x_i (q_i − mean q) with q_j = γ_j / σ · R_j / (z_j + ε s(z_j))
        q = quotient(r, z, _EPSILON).mul_(scale)
        return q.sub_(q.mean(dims, keepdim=True)).mul_(x)

    return value, back


def _by_contribution(
    rule: Rule,
    note: str = "by shares",
    *,
    run: Callable[..., Any] | None = None,
    without_constants: bool = False,
    **options: Any,
) -> Recorded:
    return Recorded(
        run=partial(run_operator, run or partial(share, without_constants)),
        note=note,
        several=True,
        refuse=rule.refuse,
        records=rule.records,
        **options,
    )


def adjoint_of(rule: Rule, note: str) -> Passes:
    """Return a rule that adds up the signals of all copies, in place of ``rule``."""
    return Passes(note=note, carriers=rule.carriers, records=rule.records, refuse=rule.refuse)


#: Function of :class:`Recorded` for operations whose input gets the relevance of the output.
PASS_ON = partial(run_operator, hand_on)


# ------------------------------------------------------------------- which arguments get relevance


def varying(node: fx.Node) -> tuple[int, ...]:
    """Return the positions of arguments that are not constants.

    A term of a sum gets its share even if it does not depend on the explained tensors.
    """
    return tuple(i for i, n in enumerate(node.args) if varies(n))


def values(node: fx.Node) -> tuple[int, ...]:
    """Return the positions of factors that are neither constants nor gates, see ``factors``."""
    return factors(node, counts=varies)


def signals(node: fx.Node) -> tuple[int, ...]:
    """Return the positions of all factors with a path from the model's inputs, as AttnLRP has it.

    A path must not lead through comparisons, exponentials, roots and other scales. Of a ratio, the
    dividend gets relevance. If no factor has such a path, the positions are those of ``values``.
    """
    if operation(node) in DIVISIONS:
        return values(node)
    return tuple(i for i in varying(node) if _is_signal(node.args[i])) or values(node)


def _is_signal(node: Any) -> bool:
    """Return True if a path from the inputs to a value leads through no comparison or scale."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        sources = [n for n in node.all_input_nodes if varies(n)]
        if not sources:
            return True
        whole = not is_floating(value_of(node)) and any(is_floating(value_of(n)) for n in sources)
        compares = whole or getattr(value_of(node), "dtype", None) == torch.bool
        if compares or operation(node) in SCALE_OPERATIONS:
            continue
        sources = sources[:1] if operation(node) in DIVISIONS else sources
        waiting.extend(n for n in sources if n not in seen)
        seen.update(sources)
    return False


# ------------------------------------------------------------------------------------------ caveats


def no_caveat(node: fx.Node) -> str | None:
    """Return None: the operation has no caveat."""
    return None


def outside(node: fx.Node) -> str | None:
    """Return the caveat of operations that the method's source does not define."""
    return "outside of the definition"


def gated(node: fx.Node) -> str | None:
    """Return the caveat of products with a gate, and of ratios and products of two signals."""
    if len(varying(node)) < 2:
        return None
    what = "the gate or divisor gets nothing" if len(values(node)) < 2 else "half to each factor"
    return f"outside of the definition: {what}"


def _constant(node: fx.Node) -> str | None:
    return None if len(varying(node)) > 1 else "a constant takes relevance"


def _copied(node: fx.Node) -> str | None:
    return "relevance is not conserved: each term gets all" if len(varying(node)) > 1 else None
