"""The list of the passes that turn a captured graph into the graph of a surrogate.

Each pass is a function of a :class:`~captum_mipin.propagation.draft.Draft`. It marks nodes,
rewrites the graph, or raises an error. The function ``check`` runs only the marking passes.
"""

from collections.abc import Callable, Mapping, Sequence

from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.modes import uncollected
from captum_mipin.graph.nodes import place
from captum_mipin.propagation.batch_layout import lay_out_batch
from captum_mipin.propagation.beside import lay_out_beside
from captum_mipin.propagation.calls import join_calls
from captum_mipin.propagation.canonical import canonicalise
from captum_mipin.propagation.channels import find_channels
from captum_mipin.propagation.complex_parts import replace_complex
from captum_mipin.propagation.dense import join_biases, write_layers
from captum_mipin.propagation.divisors import divide_factors
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.elementwise import join_elementwise
from captum_mipin.propagation.equivalents import (
    expand_variances,
    replace_equivalents,
    write_group_norms,
)
from captum_mipin.propagation.forms import spell
from captum_mipin.propagation.heads import rewrite_for_method
from captum_mipin.propagation.marking import (
    check_ends,
    drop_unused,
    mark_signal,
    mark_varying,
)
from captum_mipin.propagation.masks import write_masks, write_numbers
from captum_mipin.propagation.norms import recognise_norms
from captum_mipin.propagation.rewriting import cut_recordings, move_constants_first, place_steps
from captum_mipin.propagation.slices import join_slices
from captum_mipin.propagation.spelling import (
    fold_padding,
    replace_bounds,
    replace_constants,
    replace_copies,
    replace_squares,
    rewrite_constant_products,
    split_positions,
)
from captum_mipin.propagation.splits import write_slices, write_splits
from captum_mipin.propagation.sums import write_sums
from captum_mipin.propagation.treatments import check_supported
from captum_mipin.rules import Rule

Pass = Callable[[Draft], None]

MARKING: tuple[Pass, ...] = (
    mark_varying,
    drop_unused,
    write_numbers,
    replace_complex,
    replace_copies,
    split_positions,
    replace_bounds,
    replace_squares,
    fold_padding,
    replace_constants,
    write_masks,
    write_slices,
    replace_equivalents,
    rewrite_constant_products,
    write_layers,
    join_biases,
    join_calls,
    join_slices,
    write_splits,
    join_elementwise,
    write_sums,
    join_biases,
    spell,
    divide_factors,
    recognise_norms,
    write_group_norms,
    expand_variances,
    rewrite_for_method,
    mark_signal,
    lay_out_beside,
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


@uncollected()
def draft(
    captured: CapturedGraph,
    rules: Mapping[str, Rule],
    start: Sequence[str] | None = None,
    passes: tuple[Pass, ...] = PASSES,
    **options: bool,
) -> Draft:
    """Return a draft of a captured graph after all passes have changed it.

    Args:
        captured: The graph, which is copied.
        rules: Operation → rule.
        start: Names of the nodes whose values are explained; None for the inputs.
        passes: The passes, in their order.
        options: The attributes ``calibrate`` and ``joint`` of
            :class:`~captum_mipin.propagation.draft.Draft`.
    """
    result = Draft.of(captured, rules, start, **options)
    try:
        for run_pass in passes:
            run_pass(result)
    except GuardOnDataDependentSymNode as error:
        counted = next(n for n in captured.graph.nodes if free_unbacked_symbols(value_of(n)))
        where = place(counted).path or "the model itself"
        raise UnsupportedOperationError(
            f"the size of the result of {counted.target} in {where} depends on the values of the "
            "input, expected one size for all inputs: multiply with a mask, or use torch.where, in "
            "place of a choice by a mask"
        ) from error
    return result
