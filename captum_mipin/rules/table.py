"""The table of rules: the built-in ones, and the rules that users register.

Registered rules are global to the process. A surrogate reads the table when it is built, and it is
built again after the registered rules have changed.
"""

from collections.abc import Mapping
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch

from captum_mipin.calls import explained
from captum_mipin.errors import RuleError
from captum_mipin.graph.exporting import decompositions
from captum_mipin.options import type_of
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.arithmetic import ARITHMETIC
from captum_mipin.rules.attention import ATTENTION
from captum_mipin.rules.base import Learned, Passes, Recorded, Rule
from captum_mipin.rules.linear import LINEAR
from captum_mipin.rules.linear_maps import COPIES, MIXES
from captum_mipin.rules.normalization import NORMALIZATION
from captum_mipin.rules.pooled import POOLED
from captum_mipin.rules.pooling import POOLING
from captum_mipin.rules.rearrangement import REARRANGEMENT
from captum_mipin.rules.selection import NORMS, SELECTION

#: Operation (as ``torch.export`` names it, "aten.relu.default") → rule.
MIPIN: Mapping[str, Rule] = MappingProxyType(
    {
        **LINEAR,
        **POOLED,
        **ACTIVATIONS,
        **POOLING,
        **NORMALIZATION,
        **ARITHMETIC,
        **SELECTION,
        **NORMS,
        **REARRANGEMENT,
        **COPIES,
        **MIXES,
        **ATTENTION,
    }
)

_LOCK = Lock()
_REGISTERED: dict[str, Rule] = {}


@explained
def register_rule(
    operation: str | torch._ops.OpOverload,
    rule: Passes | Recorded | Learned,
    *,
    replace: bool = False,
) -> None:
    """Register a rule for an operation that has none: an operation of your own, or of PyTorch.

    The rule is used by all later calls in this process. A fitted inverse is valid only with the
    rules that it was fitted with, also after it was saved and loaded. Rules are compared by their
    class, their note and the names of their functions. Therefore change the note whenever you
    change the computation of a rule.

    Args:
        operation: Name of the operation, such as "mylib::swish", or "aten::where.self" for an
            overload that is not the default; or the operation itself, such as
            ``torch.ops.mylib.swish.default``. The operation must not mix the examples of a batch
            or move them to another dimension. Each fit checks this on its data.
        rule: The rule. Use :class:`Passes` for a linear operation whose autograd formula is the
            adjoint, :class:`Recorded` if values from the forward pass determine the signal, and
            :class:`Learned` for a regression. The signal goes to the first argument, unless
            ``carriers`` names others. Set ``records`` if other arguments may depend on the input.
        replace: Whether to replace a rule that was registered for this operation before. Built-in
            rules cannot be replaced.

    Raises:
        RuleError: There is no such operation, it has a rule already, no captured graph contains it,
            or ``rule`` is not a rule.

    Examples:
        >>> @torch.library.custom_op("doctest::swish", mutates_args=())
        ... def swish(x: torch.Tensor) -> torch.Tensor:
        ...     return x * torch.sigmoid(x)
        >>> _ = swish.register_fake(torch.empty_like)
        >>> def send_back(options, operation, x):
        ...     share = torch.sigmoid(x)  # the share of x in the result
        ...     return operation(x), lambda s: s * share if options.local else s
        >>> register_rule("doctest::swish", Recorded(run=send_back, note="recorded gate"))
        >>> class Swish(torch.nn.Module):
        ...     def forward(self, x):
        ...         return swish(x)
        >>> from captum_mipin import check
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), Swish()).eval()
        >>> print(check(model, torch.ones(1, 4)))
        module  operation              status     what happens to the signal
        0       aten.linear.default    supported  learned dense inverse
        1       doctest.swish.default  supported  recorded gate
        >>> unregister_rule("doctest::swish")
    """
    target = _target(operation)
    name = str(target)
    _check_rule(target, rule)
    with _LOCK:
        if name in _REGISTERED and not replace:
            raise RuleError(
                f"{name} has a registered rule ({_REGISTERED[name].note}); "
                "pass replace=True to replace it"
            )
        _REGISTERED[name] = rule


def _check_rule(target: torch._ops.OpOverload, rule: object) -> None:
    """Raise RuleError if ``rule`` is not a rule, or if it cannot be the rule of the operation."""
    name = str(target)
    if not isinstance(rule, (Passes, Recorded, Learned)):
        raise RuleError(
            f"the rule for {name} is {type_of(rule)}, "
            "expected a Passes, Recorded or Learned of captum_mipin.rules"
        )
    if name in MIPIN:
        raise RuleError(
            f"{name} has a built-in rule ({MIPIN[name].note}), which cannot be replaced. "
            "Wrap the call in a torch.library.custom_op, and register a rule for the new operation."
        )
    if target in decompositions() or target._schema.is_mutable:
        raise RuleError(
            f"no rule for {name} would ever be used: a captured graph contains in its place the "
            "operations that it consists of, or its form that does not write to memory; expected "
            "an operation of a captured graph, as check() lists them. Register rules for those, or "
            "wrap the call in a torch.library.custom_op, and register a rule for that operation"
        )


def unregister_rule(operation: str | torch._ops.OpOverload) -> None:
    """Remove the rule that :func:`register_rule` added for an operation.

    Raises:
        RuleError: No rule was registered for this operation.

    Examples:
        >>> @torch.library.custom_op("doctest::twice", mutates_args=())
        ... def twice(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> register_rule("doctest::twice", Passes(note="times 2"))
        >>> unregister_rule("doctest::twice")
    """
    name = str(_target(operation))
    with _LOCK:
        if _REGISTERED.pop(name, None) is None:
            raise RuleError(
                f"no rule is registered for {name}, expected an operation that was passed to "
                "register_rule before"
            )


def table() -> Mapping[str, Rule]:
    """Return all rules, the built-in and the registered ones.

    Examples:
        >>> table()["aten.relu.default"].note
        'forward mask'
    """
    with _LOCK:
        return {**MIPIN, **_REGISTERED}


def _target(operation: object) -> torch._ops.OpOverload:
    """Return the operation that is named, or the operation itself.

    Raises:
        RuleError: There is no such operation.
    """
    if isinstance(operation, torch._ops.OpOverload):
        return operation
    if not isinstance(operation, str):
        raise RuleError(
            f"the operation is {type_of(operation)}, "
            "expected 'namespace::name' or torch.ops.namespace.name.default"
        )
    parts = operation.replace("::", ".", 1).split(".")
    target: Any = torch.ops
    for part in (*parts, "default")[: max(3, len(parts))]:
        target = getattr(target, part, None)
    if not isinstance(target, torch._ops.OpOverload):
        raise RuleError(
            f"there is no operation {operation!r}: "
            "define or import it first, and write 'namespace::name'"
        )
    return target
