"""The treatment of each operation in a marked graph, and the pass that refuses unsupported ones."""

import operator
from collections.abc import Mapping, Sequence

from torch import fx

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.marks import marks, original, value_of
from captum_mipin.graph.nodes import is_random, is_size, nodes_in, operation, place
from captum_mipin.propagation.batch_layout import FOLLOWS
from captum_mipin.propagation.beside import BATCH_SIZE, mixed_beside
from captum_mipin.propagation.complex_parts import obstacle
from captum_mipin.propagation.draft import Draft
from captum_mipin.report import CheckRow
from captum_mipin.rules import Passes, Recorded, Rule

#: Operations that change nothing but shapes. Their arguments may depend on the batch size.
SHAPE = (
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "alias", "clone", "contiguous",
    "expand",
)  # fmt: skip

#: Operations whose result has sizes that their arguments tell; :mod:`batch_layout` checks them.
_SIZED = (
    *SHAPE, "split", "split_with_sizes", "unsafe_split", "new_zeros", "new_ones", "new_empty",
)  # fmt: skip

#: Operations on logits, by which a model may end.
_FROM_LOGITS = (
    "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp",
)  # fmt: skip

#: Losses, by which a model may end.
_LOSSES = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "poisson_nll_loss",
    "soft_margin_loss", "hinge_embedding_loss", "margin_ranking_loss", "multi_margin_loss",
    "multilabel_margin_loss", "cosine_embedding_loss", "triplet_margin_loss", "ctc_loss",
)  # fmt: skip

#: Operation without a rule → reason or advice, appended to the reason for its refusal.
_HINTS = {
    **dict.fromkeys(
        _FROM_LOGITS,
        "; where it ends the model, return the logits that go into it; elsewhere its values depend "
        "only on differences of its inputs, so that no input has a share of its own",
    ),
    **dict.fromkeys(
        _LOSSES,
        "; no part of a loss belongs to one input: return what the loss is computed from, and "
        "explain this",
    ),
    **dict.fromkeys(
        ("cross_entropy_loss", "nll_loss_nd"),
        "; return the logits, or the loss of one label for each example, without weights and "
        'smoothing: cross_entropy(z, y, reduction="none"), which is explained as minus the logit '
        "of the label",
    ),
    **dict.fromkeys(
        ("binary_cross_entropy", "binary_cross_entropy_with_logits"),
        "; labels between 0 and 1 have a share of a logit z and of −z, so that no signal at z is "
        "the only possible one: return the logits, or (1 - 2 * y) * z for labels y of 0 and 1",
    ),
    "broadcast_tensors": "; use expand, or the broadcasting of + and ×",
    "quantile": "; for several quantiles, stack torch.quantile(h, q, dim) with one number q each",
    **dict.fromkeys(
        ("exp", "exp2"),
        "; if it is part of a softmax by which the model ends, return the logits that go into it",
    ),
    **dict.fromkeys(
        ("log", "log2", "log10"),
        ", since it has no value at 0; bound it, as in log(x.clamp(min=1e-6)), or use log1p(x)",
    ),
    **dict.fromkeys(
        ("reciprocal", "rsqrt"),
        "; a divisor is recorded as a scale, so that no value is left that a signal could go to",
    ),
}

#: Advice for refused operations; a method may have another text, in ``way_out`` of its table.
_WAY_OUT = (
    "Explain the output of a later module with InverseNetwork(model, layer=...), rewrite this part "
    "of the model with supported operations, or give an operation without a rule one of your own "
    "with captum_mipin.register_rule; check(model, inputs) lists all."
)

#: Reason for the refusal of random operations that the output depends on.
RANDOM = (
    "it is random, so that each call would give another explanation: switch it off in evaluation "
    "mode, as F.dropout(h, training=self.training), or pass the random values to the model as a "
    "further argument"
)

#: Largest number of refused operations that an error lists.
NAMED = 8


def check_supported(draft: Draft) -> None:
    """Raise UnsupportedOperationError if an operation is refused."""
    refused = [row for row in treatments(draft) if row.status == "refused"]
    if refused:
        raise UnsupportedOperationError(refusal(refused, draft.rules))


def refusal(refused: Sequence[CheckRow], rules: Mapping[str, Rule]) -> str:
    """Return the error text for refused operations: their names, module paths, reasons and advice.

    Args:
        refused: The rows of the refused operations.
        rules: The table of rules; it may have its own advice as ``way_out``.
    """
    way_out = getattr(rules, "way_out", _WAY_OUT)
    return "\n".join(["no signal can be sent back through", *listed(refused), way_out])


def listed(refused: Sequence[CheckRow]) -> list[str]:
    """Return one line of an error text per refused operation, for the first ones.

    Operations that are refused only because one before them is refused are left out.
    """
    refused = causes(refused)
    lines = [
        f"  {row.operation} in {row.path or 'the model itself'}: {row.note}"
        for row in refused[:NAMED]
    ]
    return lines + [f"  … and {len(refused) - NAMED} more"] * (len(refused) > NAMED)


def causes(refused: Sequence[CheckRow]) -> list[CheckRow]:
    """Return the rows of refused operations, without those that only follow from others."""
    return [row for row in refused if row.note != FOLLOWS]


def treatments(draft: Draft) -> list[CheckRow]:
    """Return one row per marked operation with its treatment, in order of execution.

    What a rewrite has added, as the conversion of integers, has one only if it is refused.
    """
    rows = []
    for node in draft.graph.nodes:
        if is_random(node):
            path = place(node).path
            rows.append(CheckRow(path, str(original(node)), "refused", RANDOM))
        elif _is_treated(node):
            row = _treatment(draft, node)
            if row.status == "refused" or not marks(node).added:
                rows.append(row)
    return rows


def uses_batch(node: fx.Node) -> str:
    """Return why an operation uses the size of the batch, or what is computed from all of it.

    The use of the size as a shape does not count. Returns "" if it uses neither.
    """
    if reason := mixed_beside(node):
        return reason
    start = 2 if operation(node) == "new_full" else 1  # behind its shape
    further = nodes_in((node.args[start:], node.kwargs))
    uses = operation(node) not in _SIZED and any(map(is_size, further))
    return BATCH_SIZE if uses else ""


def _is_treated(node: fx.Node) -> bool:
    """Return True for an operation between the explained nodes and the output."""
    known = marks(node)
    return (
        node.op == "call_function"
        and (known.signal or known.discrete or known.recorded)
        and any(marks(n).depends for n in node.all_input_nodes)
        and node.target is not operator.getitem
    )


def _treatment(draft: Draft, node: fx.Node) -> CheckRow:
    """Return the row of one operation: its status and a note."""
    known, rule = marks(node), draft.rule(node)
    reason = _objection(draft, node, rule)
    caveat = rule.caveat(node) if rule and not (reason or known.recorded) else None
    if reason:
        status, note = "refused", reason
    elif known.joined:
        status, note = "supported", "taken together with the dense layer behind it"
    elif known.recorded:
        status, note = "supported", "recorded: it makes gates or weights, and gets no signal"
    else:
        status = "passes" if isinstance(rule, Passes) else "supported"
        note = rule.note if rule else ""
    return CheckRow(place(node).path, str(original(node)), status, note, caveat or "")


def _objection(draft: Draft, node: fx.Node, rule: Rule | None) -> str | None:
    """Return the reason why an operation is refused; None for a supported operation."""
    known, value = marks(node), value_of(node)
    if known.discrete:
        reason = f"it turns the input into {value.dtype}, through which no signal can be sent"
        return reason + obstacle(node)
    if rule is None and not known.recorded:
        return "no rule covers it" + _HINTS.get(operation(node), "")
    if reason := uses_batch(node):
        return reason
    if rule is None or known.recorded:
        return known.mixes or None
    carried = draft.carried(node)
    others = [n for n in node.all_input_nodes if n not in carried]
    if not rule.records and any(marks(n).depends for n in others):
        return "a second argument of it depends on the input as well; its rule allows only one"
    several = isinstance(rule, Passes) or (isinstance(rule, Recorded) and rule.several)
    if not several and len(draft.carriers(node)) != 1:
        return (
            "its rule sends signal to several arguments or to none, which only Passes, or Recorded "
            "with several=True, can"
        )
    parts = [user for user in node.users if user.target is operator.getitem]
    outputs = isinstance(value, (tuple, list)) and not isinstance(rule, Passes)
    if outputs and any(part.args[1] != 0 for part in parts):
        return "the model uses a second output of it, but its rule covers only the first output"
    return known.mixes or rule.refuse(node)
