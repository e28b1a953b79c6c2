"""The export of a model by ``torch.export``, and the reasons why an export is refused."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, default_decompositions, export
from torch.nn.functional import pad
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from captum_mipin.errors import CaptureError
from captum_mipin.graph.functional import NotRewritableError, functional
from captum_mipin.graph.losses import spell_losses
from captum_mipin.graph.marks import inherit, mark, value_of
from captum_mipin.graph.modules import OWN, named_tensors
from captum_mipin.graph.nodes import argument
from captum_mipin.graph.quiet import quiet
from captum_mipin.graph.recurrence import KINDS, WHOLE, Whole, in_parts
from captum_mipin.graph.signature import per_example, plain
from captum_mipin.graph.sizes import quick_sizes
from captum_mipin.graph.turns import TURNS
from captum_mipin.options import type_of
from captum_mipin.types import Extras, Inputs

#: Batch size of the example for the capture. torch.export treats sizes 0 and 1 as constants.
_EXAMPLE_BATCH = 3

#: A model must accept all batch sizes up to this one. For larger batches torch itself uses other
#: kernels of normalisation on GPUs.
_LARGEST_BATCH = 65535

#: Pattern of a harmless warning about recurrent layers, whose weights are plain attributes as well.
_RECURRENT = (
    r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ (was|were) assigned during "
    "export"
)


#: A part of a program that runs with gradients switched on or off.
_SWITCH = torch.ops.higher_order.wrap_with_set_grad_enabled

#: Numbers of dimensions of both factors of a product → its own operation.
_VECTORS = {(1, 1): torch.ops.aten.dot.default, (2, 1): torch.ops.aten.mv.default}


class FixedBatchError(CaptureError):
    """The model cannot be captured for a free batch size.

    Attributes:
        sizes: Batch sizes at which the model may compute differently; they are tried.
    """

    sizes: tuple[int, ...] = ()


def free_batch(inputs: Inputs, extras: Extras, shared: bool) -> tuple[Any, ShapesCollection]:
    """Return the arguments for the export, and the dimensions whose size is not fixed."""
    leaves, structure = pytree.tree_flatten(plain((*inputs, *extras)))
    shapes = ShapesCollection()
    for index, own in enumerate(per_example(inputs, extras, shared)):
        if own:
            ones = (1,) * (leaves[index].ndim - 1)
            leaves[index] = leaves[index][:1].repeat(_EXAMPLE_BATCH, *ones)
            shapes[leaves[index]] = {0: Dim.DYNAMIC}
    return pytree.tree_unflatten(leaves, structure), shapes


@contextmanager
def _without_lines() -> Iterator[None]:
    """Let an export not look up the line of code of each operation; nothing here reads it."""
    option = "do_not_emit_stack_traces"
    before = getattr(fx.config, option, None)  # torch 2.9 has no such option
    if before is not None:
        setattr(fx.config, option, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(fx.config, option, before)


def export_graph(
    model: nn.Module, arguments: Any, shapes: ShapesCollection | None, detached: bool
) -> tuple[ExportedProgram, fx.Graph, bool]:
    """Return a model's program, its graph without operations that write to memory, and a flag.

    The flag is True if the model switches gradients on or off: else ``detached`` changes nothing.
    """
    device = pytree.tree_leaves(arguments)[0].device.type
    with (
        TURNS.exporting(), warnings.catch_warnings(), quiet(), _without_lines(),
        quick_sizes(), torch.autocast(device, enabled=False),
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=_RECURRENT)
        # a mode costs a part of each call of a function, and only recurrent layers need this one
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        with Whole() if recurrent else nullcontext():
            program = export(model, arguments, dynamic_shapes=shapes, strict=False)
        switches = any(node.target is _SWITCH for node in program.graph.nodes)
        if detached:
            _detach(program.graph)
        spell_losses(program.graph)
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.matmul.default:
                node.target = _VECTORS.get(tuple(value_of(n).ndim for n in node.args), node.target)
            elif node.target is torch.ops.aten.index_select.default:
                _write_index(node)
        try:
            return program, functional(program.graph, decompositions()), switches
        except NotRewritableError:  # then torch traces the program again, which takes longer
            # Without example inputs torch does not check guards: torch 2.9 fails at that check for
            # a model whose forward takes *inputs.
            program.example_inputs = None
            program = program.run_decompositions(dict(decompositions()))
            return program, program.graph, switches


def _detach(graph: fx.Graph) -> None:
    """Detach the inputs of those parts of a graph that run under ``torch.no_grad()``."""
    for node in list(graph.nodes):
        if node.target is not _SWITCH or node.args[0] is not False:
            continue
        for source in node.all_input_nodes:
            if isinstance(value_of(source), Tensor):
                with graph.inserting_before(node):
                    cut = graph.call_function(torch.ops.aten.detach.default, (source,))
                inherit(cut, source)
                node.replace_input_with(source, cut)


def _write_index(node: fx.Node) -> None:
    """Rewrite ``x.index_select(0, index)`` as ``x[index]``, for an index of one dimension."""
    x, dim, index = (argument(node, at, n) for at, n in enumerate(("self", "dim", "index")))
    if value_of(x).ndim and value_of(index).ndim == 1:
        mark(node, original=node.target)
        node.target, node.kwargs = torch.ops.aten.index.Tensor, {}
        node.args = (x, [None] * (dim % value_of(x).ndim) + [index])


def check_sizes(program: ExportedProgram) -> None:
    """Raise FixedBatchError if a program is valid for some batch sizes alone."""
    found, sizes = "", list[int]()
    for symbol, bounds in program.range_constraints.items():
        # else a number that the model counts, such as the length of nonzero()
        batch = symbol_is_type(symbol, SymT.SIZE)
        if batch and (bounds.lower > 2 or bounds.upper < _LARGEST_BATCH):
            found, sizes = f"{bounds} of {symbol}", [bounds.lower - 1, bounds.upper + 1]
    for guard in map(str, getattr(program, "_guards_code", ())):
        if remainder := re.search(r"% (\d+)", guard):  # as of: if x.shape[0] % 4 == 0
            found, number = f"with {guard}", int(remainder[1])
            sizes += [number, 2 * number, number + 1]
    if found:
        refusal = FixedBatchError(
            f"the model accepts only sizes {found}, or computes differently for other sizes; "
            f"expected all from 2 to {_LARGEST_BATCH}: the batch size must be free, so remove "
            "conditions on x.shape[0]"
        )
        refusal.sizes = tuple(int(n) for n in sizes if 1 < n <= _LARGEST_BATCH)
        raise refusal


def check_registered(program: ExportedProgram, model: nn.Module) -> None:
    """Raise CaptureError if the model uses weights of a module that it has not registered.

    A module in a plain list or dictionary is not registered. Changes of its weights would not be
    noticed, and a fitted inverse would be used with weights that it does not belong to.
    """
    constants = [tensor for tensor in program.constants.values() if isinstance(tensor, Tensor)]
    used = {tensor.data_ptr() for tensor in constants if tensor.numel()}
    used -= {tensor.data_ptr() for _, tensor in named_tensors(model)}
    known = set(model.modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for leaf in () if name in OWN else pytree.tree_leaves(value):
                hidden = isinstance(leaf, nn.Module) and leaf not in known
                if hidden and used & {t.data_ptr() for _, t in named_tensors(leaf)}:
                    where = f"{path}.{name}".lstrip(".")
                    raise CaptureError(
                        f"the model computes with {type_of(leaf)} in {where!r} that is not "
                        "registered, so that a change of its weights would not be noticed; "
                        "expected a registered module: put it into an nn.ModuleList or "
                        "nn.ModuleDict"
                    )


#: Operations that stand for several simpler ones, and other names of operations with rules.
_COMPOSITE = frozenset(
    {"einsum", "addcmul", "addcdiv", "baddbmm", "take", "take_along_dim", "inner", "tensordot",
     "linalg_vecdot", "linalg_norm", "cosine_similarity", "dot", "vdot", "multiply", "divide",
     "true_divide", "subtract", "negative", "absolute", "clip", "concat", "concatenate",
     "column_stack", "hstack", "vstack", "row_stack", "dstack", "tile", "fliplr", "flipud",
     "diff", "outer", "ger", "linalg_matmul", "greater", "greater_equal", "less", "less_equal",
     "not_equal", "fix", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctanh",
     "special_expit", "special_erf", "special_erfc", "special_expm1", "special_log1p",
     "special_exp2", "special_softmax", "special_log_softmax", "special_round", "atleast_1d",
     "atleast_2d", "atleast_3d", "msort", "rad2deg", "deg2rad", "type_as"}
)  # fmt: skip


def _aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    """Return both extremes; torch 2.9 has no derivative of ``aminmax``."""
    dims = range(x.ndim) if dim is None else (dim,)
    return x.amin(tuple(dims), keepdim), x.amax(tuple(dims), keepdim)


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the product as one of two matrices, which has a rule."""
    product: Tensor = (matrix @ vector[:, None])[:, 0]
    return product


def _bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y_o = a W_o b + bias_o, as Σ_j (W a)_oj b_j with a dense layer W."""
    h: Any = torch.nn.functional.linear(a, weight.permute(0, 2, 1).flatten(0, 1))
    y: Tensor = (h.unflatten(-1, weight.shape[::2]) * b.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias


def _pad_sequence(
    sequences: Sequence[Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Tensor:
    """Return sequences of different lengths as one tensor, the shorter ones padded."""
    longest = max(x.shape[0] for x in sequences)
    rows = []
    for x in sequences:
        more = longest - x.shape[0]
        ends = (0, more) if padding_side == "right" else (more, 0)
        rows.append(pad(x, (0, 0) * (x.ndim - 1) + ends, value=padding_value) if more else x)
    return torch.stack(rows, 0 if batch_first else 1)


@cache
def decompositions() -> Mapping[Any, Any]:
    """Return the composite operations to replace by their parts, such as einsum and LSTM.

    Returns:
        Operation → function that computes it from simpler operations.
    """
    apart = {*_COMPOSITE, *KINDS, *(f"{kind}_cell" for kind in KINDS)}
    table = default_decompositions().items()
    parts = {op: how for op, how in table if str(op).split(".")[1] in apart}
    parts |= dict.fromkeys(
        (torch.ops.aten.lerp.Scalar, torch.ops.aten.lerp.Tensor),
        lambda a, b, w: (1 - w) * a + w * b,
    )
    parts[torch.ops.aten.rsub.Tensor] = lambda a, b, *, alpha=1: (
        b - a if alpha == 1 else b - alpha * a
    )
    parts[torch.ops.aten.aminmax.default] = _aminmax
    parts[torch.ops.aten.mv.default] = _mv
    parts[torch.ops.aten.pad_sequence.default] = _pad_sequence
    parts[torch.ops.aten.bilinear.default] = _bilinear
    parts |= {own: in_parts(parts[original]) for own, original in WHOLE.items()}
    return MappingProxyType(parts)
