"""The reason why a model cannot be captured, in one line, with advice.

If the export fails, the model itself is run on a few examples. If the model fails too, its own
error is the reason, and other forms of the inputs are tried, to find one that the model takes.
"""

import linecache
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.errors import CaptureError, MIPINError
from captum_mipin.graph.signature import pick, plain
from captum_mipin.graph.validate import described, device_of
from captum_mipin.types import Extras, Inputs

#: Number of examples on which a model is run to find the reason of a failure.
_FEW = 4

#: What torch says of a model that computes with the batch size as a constant.
_CONSTANT = re.compile(r"specialized it to be a constant|inferred to be a constant")

#: What Python says of a call with too few or too many arguments.
_MISSING, _MANY = re.compile(r"missing \d+ required"), re.compile(r"takes .* positional argument")

#: What torch says of control flow that depends on values.
_VALUES = re.compile(r"data-dependent|unbacked symint|Could not guard")

#: Loggers of torch that print a traceback for an error that is reported in one line here.
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


class _OtherThreads:
    """A stream without what the present thread writes to it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, get_ident()

    def write(self, text: str) -> int:
        """Write text of any other thread."""
        silent = get_ident() == self._thread
        return len(text) if silent else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging the errors of an export, which are raised as well.

    torch also prints the operations that it had recorded before the error.
    """
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    stream: Any = _OtherThreads(sys.stderr)
    try:
        with redirect_stderr(stream):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


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
    name, shown = type(model).__name__, described(inputs)
    few = torch.arange(min(_FEW, len(inputs[0])), device=inputs[0].device)
    inputs, extras = plain(pick(inputs, extras, few, shared))
    own = _output(model, inputs, extras)
    if isinstance(own, MIPINError):
        return CaptureError(str(own))
    if isinstance(own, Exception):
        hint = _advice(own, model, inputs, extras)
        return CaptureError(f"{name} cannot run on inputs {shown}{_where(own, model)}: "
                            f"{_line(own)}. {hint}")  # fmt: skip
    if isinstance(own, Tensor) and own.shape[:1] != inputs[0].shape[:1]:
        return CaptureError(
            f"{name} returns an output of shape {tuple(own.shape)} for inputs of shape "
            f"{tuple(inputs[0].shape)}, expected one row for each example, the first dimension of "
            "the inputs: if the inputs are one example, pass x.unsqueeze(0)"
        )
    start = f"torch.export cannot capture {name} for inputs {shown}{_where(error, model)}: "
    if _CONSTANT.search(str(error)):
        return CaptureError(
            f"{start}the model computes with the batch size as a fixed number, expected any batch "
            f"size. {_advice_on_batch(model, inputs, extras)}"
        )
    if _VALUES.search(str(error)):
        return CaptureError(
            f"{start}an if, a loop or a shape depends on the values of a tensor, expected the same "
            "operations for all inputs. Write if as torch.where, and leave out checks of values."
        )
    return CaptureError(
        f"{start}{_line(error)}. Control flow must not depend on the data, and the batch size must "
        "be free (x.shape[0] keeps it so, len(x) does not)."
    )


def _output(model: nn.Module, inputs: Inputs, extras: Extras) -> Any:
    """Return the output of a model, or the error that the model raises."""
    try:
        with torch.no_grad():
            return model(*inputs, *extras)
    except Exception as error:  # of any type: the model is the user's
        return error


def _line(error: Exception) -> str:
    """Return the first line of an error that says something, without its full stop."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def _advice(error: Exception, model: nn.Module, inputs: Inputs, extras: Extras) -> str:
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
    for form, change in _forms(model):
        changed = [x if y is None else y for x in inputs for y in (change(x),)]
        same = all(x is y for x, y in zip(inputs, changed, strict=True))
        if not same and not isinstance(_output(model, tuple(changed), extras), Exception):
            shapes = ", ".join(str(("batch", *x.shape[1:])).replace("'", "") for x in changed)
            return f"The model takes {form}, of shape {shapes}: pass {form}."
    return "Pass inputs of a shape, dtype and device with which model(inputs) runs."


def _forms(model: nn.Module) -> list[tuple[str, Callable[[Tensor], Tensor | None]]]:
    """Return conversions of inputs: the code of each conversion, and a function that does it.

    A function returns None for a tensor that has no such form.
    """
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype, device = next(floating, torch.float32), device_of(model)
    return [
        (f"x.to({dtype})", lambda x: x.to(dtype) if x.is_floating_point() else None),
        (f"x.to({str(device)!r})", lambda x: x.to(device)),
        ("x.unsqueeze(0)", lambda x: x.unsqueeze(0)),
        ("x.movedim(-1, 1)", lambda x: x.movedim(-1, 1) if x.ndim > 2 else None),
        (
            "x.repeat(1, 3, 1, 1)",
            lambda x: x.repeat(1, 3, 1, 1) if x.ndim == 4 and x.shape[1] == 1 else None,
        ),
    ]


def _advice_on_batch(model: nn.Module, inputs: Inputs, extras: Extras) -> str:
    """Return what to do about a model for which the first dimension is not a free batch."""
    for path, module in model.named_modules():
        if getattr(module, "batch_first", True) is False:
            return (
                f"Module {path!r} ({type(module).__name__}) has batch_first=False, so it takes the "
                "batch as the second dimension: make it with batch_first=True, or transpose its "
                "input and output in forward."
            )
    x = inputs[0]
    convolutions = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    if any(len(module.kernel_size) + 1 == x.ndim for module in convolutions):
        return f"If this is one example, pass x.unsqueeze(0), of shape {(1, *x.shape)}."
    return "In forward, x.shape[0] keeps the batch size free; len(x), int(...) and loops do not."


def _where(error: Exception, model: nn.Module) -> str:
    """Return the innermost module and the line where a model failed; "" if they are unknown."""
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
