"""The reason why a model cannot be captured, in one line, with advice.

If the export fails, the model itself is run on a few examples. If the model fails too, its own
error is the reason, and other forms of the inputs are tried, to find one that the model takes.
"""

import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError, MIPINError
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.signature import pick, plain, select
from captum_mipin.graph.validate import SPARSE, described, device_of
from captum_mipin.targets import per_example
from captum_mipin.types import Extras, Inputs

#: Advice where no other form of the inputs is known.
RUNS = "Pass inputs of a shape, dtype and device with which model(inputs) runs."
#: Number of examples on which a model is run to find the reason of a failure.
_FEW = 4
#: Number of elements up to which inputs are run as a whole to find the reason of a failure.
_SMALL = 1 << 24

#: Advice for a model that returns one result for all inputs.
_KEEP = "Let forward keep the first dimension of its inputs, without selections such as x[0]."

#: What torch says of a model that computes with the batch size as a constant.
_CONSTANT = re.compile(r"specialized it to be a constant|inferred to be a constant")

#: What Python says of a call with too few or too many arguments.
_MISSING, _MANY = re.compile(r"missing \d+ required"), re.compile(r"takes .* positional argument")

#: What torch says of control flow that depends on values.
_VALUES = re.compile(r"data-dependent|unbacked symint|Could not guard|aten\.(allclose|equal)\.")

#: What torch says of a tensor that is converted to an array.
_ARRAY = re.compile(r"\.numpy\(\) is not supported")

#: What torch says of a write to a tensor that is no buffer.
_WRITES = re.compile(r"Constant (\S+) is mutated in the forward")


def failure(
    error: Exception, model: nn.Module, inputs: Inputs, extras: Extras, shared: bool
) -> CaptureError:
    """Return the error to raise if the export of a model fails.

    Args:
        error: The error of ``torch.export``.
        model: A copy of the model.
        inputs: Tensors (batch, ...).
        extras: Further arguments of ``forward``.
        shared: See :func:`captum_mipin.graph.signature.per_example`.
    """
    few = torch.arange(min(_FEW, len(inputs[0])), device=inputs[0].device)
    whole, part = plain((inputs, extras)), plain(pick(inputs, extras, few, shared))
    # a part of an example without a batch would be taken for an example of another shape
    for arguments in (part, whole) if inputs[0].numel() <= _SMALL else (part,):
        own, rows = _output(model, *arguments), len(arguments[0][0])
        if _fits(own, rows):
            break
    else:
        return _problem(own, rows, model, *whole)
    start = (
        f"torch.export cannot capture {_name(model)} for inputs {described(inputs)}"
        f"{_where(error, model)}: "
    )
    reason = _sparse(model, *arguments) or _turned(model, inputs, extras, shared)
    return CaptureError(f"{start}{reason or _reason(error, model, inputs)}")


def _reason(error: Exception, model: nn.Module, inputs: Inputs) -> str:
    """Return why ``torch.export`` cannot capture a model that runs, and what to do."""
    if _CONSTANT.search(str(error)):
        return (
            f"the model computes with the batch size as a fixed number, expected any batch "
            f"size. {_advice_on_batch(model, inputs)}"
        )
    if _VALUES.search(str(error)):
        return (
            "an if, a loop or a shape depends on the values of a tensor, expected the same "
            "operations for all inputs. Write if as torch.where, and leave out checks of values."
        )
    if _ARRAY.search(str(error)):
        return (
            "the model converts a tensor to a NumPy array, expected operations of torch "
            "alone: write this part with torch."
        )
    if write := _WRITES.search(str(error)):
        hidden = "lifted_tensor" in write[1]
        name = "a tensor that is not registered" if hidden else f"its tensor {write[1]!r}"
        return (
            f"the model writes to {name} in place, expected a result that depends on the "
            "arguments alone: register a tensor that the result does not depend on, such as a "
            "counter, as a buffer, and pass any other as an argument."
        )
    return (
        f"{_line(error)}. Control flow must not depend on the data, and the batch size must "
        "be free (x.shape[0] keeps it so, len(x) does not)."
    )


@contextmanager
def reasons(model: Any, inputs: Inputs, target: Any, extras: Extras = ()) -> Iterator[None]:
    """Replace errors in a block by those of inputs or a target that do not fit the model.

    Captum's methods, and functions of the user, raise errors of many types, which say neither what
    was expected nor what to do.

    Args:
        model: The model that the block calls.
        inputs: Tensors (batch, ...).
        target: The target, in any form that Captum takes.
        extras: Further arguments of the model.

    Raises:
        CaptureError: The model cannot run on the inputs, or its output is not one tensor.
        TargetError: The model has no such target.
    """
    try:
        yield
    except (MIPINError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type: the block calls the user's code
        model, arguments = unwrapped(model), plain((inputs, extras))
        own = _output(model, *arguments)
        if isinstance(own, torch.OutOfMemoryError):
            raise
        if not _fits(own, len(inputs[0])):
            raise _problem(own, len(inputs[0]), model, *arguments) from error
        per_example(target, select(own, None))  # raises the error of the target
        raise


def _fits(own: Any, rows: int) -> bool:
    """Return False for an error, and for a tensor that has not one row for each of the inputs."""
    return not isinstance(own, Exception) and not (
        isinstance(own, Tensor) and own.shape[:1] != (rows,)
    )


def _problem(own: Any, rows: int, model: Any, inputs: Inputs, extras: Extras) -> CaptureError:
    """Return the error of inputs that a model does not take.

    Args:
        own: The error that the model raises, or its output, for the first ``rows`` examples.
        rows: Number of these examples.
        model: The model.
        inputs: All examples.
        extras: Further arguments of the model.
    """
    if isinstance(own, MIPINError):
        return CaptureError(str(own))
    if isinstance(own, Exception):
        return CaptureError(
            f"{_name(model)} cannot run on inputs {described(inputs)}{_where(own, model)}: "
            f"{_line(own)}. {_advice(own, model, inputs, extras)}"
        )
    hint = _fitting(model, inputs, extras, own.shape) or _batch_second(model) or _KEEP
    return CaptureError(
        f"{_name(model)} returns an output of shape {tuple(own.shape)} for inputs of shape "
        f"{(rows, *inputs[0].shape[1:])}, expected one row for each example, the first dimension "
        f"of the inputs. {hint}"
    )


def _name(model: Any) -> str:
    """Return the name of a model's class, for error messages."""
    return type(model).__name__ if isinstance(model, nn.Module) else "the model"


def _output(model: Any, inputs: Inputs, extras: Extras) -> Any:
    """Return the output of a model, or the error that the model raises."""
    try:
        with torch.no_grad():
            return model(*inputs, *extras)
    except Exception as error:  # of any type: the model is the user's
        return error


class _Sparse(TorchFunctionMode):
    """A mode that notes the first function that takes a sparse tensor, wherever it is kept."""

    found = ""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for x in () if self.found else pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.layout in SPARSE:
                name = getattr(function, "__name__", "an operation")
                self.found = f"{name} with a tensor of the layout {x.layout}"
        return function(*args, **(kwargs or {}))


def _sparse(model: Any, inputs: Inputs, extras: Extras) -> str:
    """Return what a model computes with a sparse tensor, and what to do; "" if there is none."""
    with _Sparse() as mode:
        _output(model, inputs, extras)
    return mode.found and (
        f"the model computes {mode.found}, whose products have no rules; expected dense tensors: "
        "make this one dense with to_dense()."
    )


def _turned(model: Any, inputs: Inputs, extras: Extras, shared: bool) -> str:
    """Return which further argument has its examples along another dimension, and what to do.

    The states of a recurrent layer have, (layers, batch, hidden). Return "" if the model takes no
    other number of examples with fewer entries along such a dimension.
    """
    count, one = len(inputs[0]), torch.zeros(1, dtype=torch.long, device=inputs[0].device)
    dims = {
        x.shape.index(count, 1): tuple(x.shape)
        for x in pytree.tree_leaves(extras)
        if isinstance(x, Tensor) and len(x.shape) > 1 and count in x.shape[1:] and count > 1
    }
    first, others = plain(pick(inputs, extras, one, shared))
    for dim, shape in dims.items():
        narrow = partial(_first_along, dim, count)
        if _fits(_output(model, first, pytree.tree_map_only(Tensor, narrow, others)), 1):
            return (
                f"a further argument has shape {shape}, with the {count} examples along dimension "
                f"{dim}; expected them along the first dimension: pass h.transpose(0, {dim}) in "
                "place of such a tensor h, and let forward begin with "
                f"h = h.transpose(0, {dim}).contiguous()."
            )
    return ""


def _first_along(dim: int, count: int, x: Tensor) -> Tensor:
    """Return the first entry of a tensor that has ``count`` entries along a dimension."""
    return x.narrow(dim, 0, 1) if x.ndim > dim and x.shape[dim] == count else x


def _line(error: Exception) -> str:
    """Return the first line of an error that says something, without its full stop."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def _advice(error: Exception, model: Any, inputs: Inputs, extras: Extras) -> str:
    """Return what to do about the error that a model raises for inputs."""
    if isinstance(error, TypeError) and _MISSING.search(str(error)):
        return (
            "Pass several inputs as a tuple, and arguments that are not to be explained as "
            "additional_forward_args; from batches of data, fit takes both by unpack=lambda batch: "
            "((batch[0], batch[1]), None), a pair of inputs and additional_forward_args."
        )
    if isinstance(error, TypeError) and _MANY.search(str(error)):
        return (
            f"The call has {len(inputs)} input(s) and {len(extras)} additional_forward_args: leave "
            "out those that the model does not take. Labels of data are no input. In fit, the "
            "function unpack= returns a pair (inputs, additional_forward_args)."
        )
    form = _fitting(model, inputs, extras)
    return form or RUNS


def _fitting(model: Any, inputs: Inputs, extras: Extras, alone: torch.Size | None = None) -> str:
    """Return the advice to convert the inputs to a form that the model takes; "" if none fits.

    Args:
        model: The model.
        inputs: The inputs that it does not take.
        extras: Further arguments of the model.
        alone: Shape of the output if the inputs are one example; None if it is not known.
    """
    for form, change in _forms(model):
        changed = tuple(x if y is None else y for x in inputs for y in (change(x),))
        if all(x is y for x, y in zip(inputs, changed, strict=True)):
            continue
        few = torch.arange(min(_FEW, len(changed[0])), device=changed[0].device)
        arguments = pick(changed, extras, few, shared=False)
        own = _output(model, *arguments)
        if _fits(own, len(few)) and alone in (None, getattr(own, "shape", few.shape)[1:]):
            shapes = ", ".join(str(("batch", *x.shape[1:])).replace("'", "") for x in changed)
            return f"The model takes {form}, of shape {shapes}: pass {form}."
    return ""


def _forms(model: Any) -> list[tuple[str, Callable[[Tensor], Tensor | None]]]:
    """Return conversions of inputs: the code of each conversion, and a function that does it.

    A function returns None for a tensor that has no such form.
    """
    module = model if isinstance(model, nn.Module) else nn.Module()
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    dtype, device = next(floating, torch.float32), device_of(module)

    def coloured(x: Tensor) -> Tensor | None:
        grey = x.ndim in (2, 3, 4) and x.shape[-3:-2] in ((), (1,))
        return x.repeat(1, 3, 1, 1) if grey else None

    return [
        (f"x.to({dtype})", lambda x: x.to(dtype)),
        ("x.long()", lambda x: x.long()),
        (f"x.to({str(device)!r})", lambda x: x.to(device)),
        ("x.unsqueeze(0)", lambda x: x.unsqueeze(0)),
        ("x.unsqueeze(1)", lambda x: x.unsqueeze(1)),
        ("x[None, None]", lambda x: x[None, None]),
        ("x.movedim(-1, 1)", lambda x: x.movedim(-1, 1) if x.ndim > 2 else None),
        ("x.repeat(1, 3, 1, 1)", coloured),
        ("x.movedim(-1, 0)[None]", lambda x: x.movedim(-1, 0)[None] if x.ndim > 2 else None),
    ]


def _advice_on_batch(model: nn.Module, inputs: Inputs) -> str:
    """Return what to do about a model for which the first dimension is not a free batch."""
    if second := _batch_second(model):
        return second
    x = inputs[0]
    if x.ndim == 1 or any(_unbatched(module) == x.ndim for module in model.modules()):
        return f"If this is one example, pass x.unsqueeze(0), of shape {(1, *x.shape)}."
    return "In forward, x.shape[0] keeps the batch size free; len(x), int(...) and loops do not."


def _batch_second(model: Any) -> str:
    """Return what to do about a module that takes the batch second; "" if there is none."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if getattr(module, "batch_first", True) is False:
            return (
                f"Module {path!r} ({type(module).__name__}) has batch_first=False, so it takes the "
                "batch as the second dimension: make it with batch_first=True, or transpose its "
                "input and output in forward."
            )
    return ""


def _unbatched(module: nn.Module) -> int:
    """Return the number of dimensions of an example that a module takes without a batch, or 0."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.kernel_size) + 1
    sequences = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return 2 * isinstance(module, sequences)


def _where(error: Exception, model: Any) -> str:
    """Return the innermost module and the line where a model failed; "" if they are unknown."""
    if not isinstance(model, nn.Module):
        return ""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if id(frame.f_locals.get("self")) in paths
        and frame.f_code.co_filename != nn.Module.__getattr__.__code__.co_filename
    ]
    if not frames or _MISSING.search(str(error)) or _MANY.search(str(error)):
        return ""
    frame, number = frames[-1]
    module = frame.f_locals["self"]
    path = paths[id(module)]
    name = f"module {path!r} ({type(module).__name__})" if path else "the model itself"
    line = linecache.getline(frame.f_code.co_filename, number).strip()
    return f", at {line!r} in {name}" if line else f", in {name}"
