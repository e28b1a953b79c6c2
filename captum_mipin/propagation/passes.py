"""The passes from a captured graph to the graph of a surrogate, in their order.

Each pass is a function of a :class:`~captum_mipin.propagation.draft.Draft`: it marks nodes,
rewrites the graph, or raises an error. ``check`` needs only what the marking passes tell.
"""

from collections.abc import Callable, Mapping

from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.propagation.batch_layout import lay_out_batch
from captum_mipin.propagation.canonical import canonicalise
from captum_mipin.propagation.channels import find_channels
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.marking import (
    check_ends,
    drop_unused,
    mark_signal,
    mark_varying,
    rewrite_for_method,
)
from captum_mipin.propagation.rewriting import cut_recordings, move_constants_first, place_steps
from captum_mipin.propagation.treatments import check_supported
from captum_mipin.rules import Rule

Pass = Callable[[Draft], None]

MARKING: tuple[Pass, ...] = (
    mark_varying,
    drop_unused,
    rewrite_for_method,
    mark_signal,
    lay_out_batch,
    check_ends,
)
REWRITING: tuple[Pass, ...] = (
    check_supported,
    canonicalise,
    find_channels,
    cut_recordings,
    move_constants_first,
    place_steps,
)
PASSES = (*MARKING, *REWRITING)


def draft(
    captured: CapturedGraph,
    rules: Mapping[str, Rule],
    start: str | None = None,
    passes: tuple[Pass, ...] = PASSES,
    **options: bool,
) -> Draft:
    """Return a draft that has gone through passes.

    Args:
        captured: The graph; it is copied.
        rules: Operation → rule.
        start: Name of the node that is explained; None for the inputs.
        passes: The passes, in order.
        options: ``calibrate`` and ``joint``, see :class:`Draft`.
    """
    result = Draft.of(captured, rules, start, **options)
    for run_pass in passes:
        run_pass(result)
    return result
