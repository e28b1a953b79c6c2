"""Checks and conversions of the arguments that users pass."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from captum_mipin.errors import CaptureError, DataWarning, InputError
from captum_mipin.graph.modules import unwrapped
from captum_mipin.options import for_inputs, for_model, type_of
from captum_mipin.training import check_evaluation
from captum_mipin.types import Extras, Inputs

#: The Python modules whose layers compute with quantised numbers.
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")

#: Layouts of tensors that contain a part of their elements.
SPARSE = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc
)  # fmt: skip

#: Largest number of examples that a warning names.
_NAMED = 8


def as_inputs(inputs: Any) -> Inputs:
    """Return a tensor, or a tuple of tensors, as a tuple.

    Raises:
        InputError: ``inputs`` is neither a tensor nor a tuple.
    """
    if isinstance(inputs, Tensor):
        return (inputs,)
    if not isinstance(inputs, tuple):
        raise InputError(
            f"inputs are {type_of(inputs)}, expected a torch.Tensor or a tuple of them: "
            f"{for_inputs(inputs)}"
        )
    return inputs


def as_extras(arguments: Any) -> Extras:
    """Return ``additional_forward_args`` (None, one value, or a tuple) as a tuple."""
    if arguments is None:
        return ()
    return arguments if isinstance(arguments, tuple) else (arguments,)


def like(inputs: Any, results: Inputs) -> Any:
    """Return ``results`` if ``inputs`` is a tuple, else its first element."""
    return results if isinstance(inputs, tuple) else results[0]


def described(tensors: Iterable[Any]) -> str:
    """Return shape, dtype and device of each tensor, for error messages."""
    given = (x for x in tensors if isinstance(x, Tensor))
    return ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in given)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has neither."""
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if first is None else first.device


@contextmanager
def generator_kept() -> Iterator[None]:
    """Restore the state of torch's global random generator at the end of a block.

    Without it, loops over a ``DataLoader`` would change the user's random numbers: a ``DataLoader``
    draws a seed from the global generator at the start of each loop.
    """
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def finite(x: Tensor) -> bool:
    """Return True if ``x`` contains neither NaN nor Inf."""
    # If the sum is finite, all terms are, and no mask of the size of x is needed. The sum of finite
    # terms may overflow, and only then the elements are tested.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def check_output(output: Any) -> None:
    """Raise InputError unless ``output`` is None, an index, a key, or a tuple of these."""
    path = output if isinstance(output, tuple) else (output,)
    if not all(type(key) in (int, str) for key in path) and output is not None:
        raise InputError(
            f"output={output!r} must be an index, a key or a field's name, or a tuple of such "
            "(for nested outputs): pass the one that selects the logits"
        )


def as_model(model: Any) -> nn.Module:
    """Return the module inside ``DataParallel`` and the like, see :func:`unwrapped`.

    Raises:
        CaptureError: ``model`` is not a module, or it is the module of an exported program.
    """
    model = unwrapped(model)
    program = isinstance(model, fx.GraphModule) and "eval" in vars(model)  # program.module()
    if program or isinstance(model, ExportedProgram):
        raise CaptureError(
            "the model is an exported program, expected a torch.nn.Module with layers and an "
            "evaluation mode: take torch.export.unflatten(program).eval(). The program must have "
            "been exported in evaluation mode and with a dynamic batch size"
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is {type_of(model)}, expected a torch.nn.Module: {for_model(model)}"
        )
    return model


def _check_dense(module: nn.Module, name: str) -> None:
    """Raise CaptureError if a tensor of a module is sparse."""
    for key, tensor in (vars(module) | module._parameters | module._buffers).items():
        if isinstance(tensor, Tensor) and tensor.layout in SPARSE:
            raise CaptureError(
                f"the tensor {key!r} of {name} has the layout {tensor.layout}, whose products have "
                f"no rules; expected a dense tensor: module.{key} = module.{key}.to_dense()"
            )


def check_model(model: Any) -> nn.Module:
    """Return the module of :func:`as_model` if it is in evaluation mode.

    Raises:
        CaptureError: See :func:`as_model`.
        TrainingModeError: A module is in training mode and computes something else in it.
    """
    module = as_model(model)
    check_evaluation(module)
    return module


def check_exportable(model: nn.Module) -> None:
    """Raise CaptureError if torch.export cannot read a module, or takes a part of its weights."""
    # neither is imported for this question
    fsdp, tensor = map(sys.modules.get, ("torch.distributed.fsdp", "torch.distributed.tensor"))
    sharded = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule) if fsdp else ()
    parts = (tensor.DTensor,) if tensor else ()
    for path, module in model.named_modules():
        name = f"module {path!r}" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name} is compiled by TorchScript, which torch.export cannot read; expected a "
                "Python module: use the module from before torch.jit.script or torch.jit.trace"
            )
        if type(module).__module__.startswith(_QUANTISED):
            raise CaptureError(
                f"{name} ({type(module).__name__}) is quantised by torch.ao.quantization, whose "
                "packed weights and quantised activations have no graph; expected floating "
                "weights: explain the model from before the quantisation"
            )
        own = (*module._parameters.values(), *module._buffers.values())
        _check_dense(module, name)
        how = "by FSDP" if isinstance(module, sharded) else "as DTensors"
        if isinstance(module, sharded) or any(isinstance(one, parts) for one in own):
            raise CaptureError(
                f"{name} is sharded {how}, so that no process has all of its weights; expected "
                "whole weights: on all processes, get them with torch.distributed.checkpoint."
                "state_dict.get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)), and load them into a model without shards"
            )


def check_inputs(inputs: Inputs, explained: bool = True) -> None:
    """Raise InputError unless ``inputs`` are dense tensors of one common length.

    Args:
        inputs: Tensors (batch, ...).
        explained: Whether the inputs themselves are explained; then their dtypes must be floating.
            If a layer is explained instead, the inputs may be integers.
    """
    if not inputs:
        raise InputError("no input tensor was given, expected at least one: pass inputs=")
    mixed = any(isinstance(x, Tensor) and x.is_floating_point() for x in inputs)
    for index, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(
                f"input {index} is {type_of(x)}, expected a torch.Tensor: {for_inputs(x)}"
            )
        if problem := _problem(x, explained, mixed):
            raise InputError(f"input {index} {problem}")
        if len(x) != len(inputs[0]):
            raise InputError(
                f"input {index} has {len(x)} examples, input 0 has {len(inputs[0])}: pass inputs "
                "of the same length, and arguments without examples as additional_forward_args"
            )


def _problem(x: Tensor, explained: bool, mixed: bool) -> str:
    """Return the reason why a tensor cannot be an input; "" if it can.

    Args:
        x: The tensor.
        explained: Whether the tensor itself is explained.
        mixed: Whether there are inputs of a floating dtype.
    """
    if x.is_meta:
        return "is on the meta device, where tensors have no values: move it to a real device"
    if x.is_complex():
        return f"has dtype {x.dtype}, expected a floating dtype: pass torch.view_as_real(x)"
    if explained and not x.is_floating_point():
        further = "additional_forward_args, which fit takes by unpack="
        found = f"has dtype {x.dtype}, expected a floating dtype: integers carry no signal. "
        if x.ndim < 2 and not mixed:
            found += "If they are classes, pass them second, after the inputs. "
        return found + (
            f"An argument that is not to be explained, such as a mask, goes into {further}. "
            "Labels are no input: leave them out."
            if mixed
            else "Convert it, scaled as in the training, by x.float(), or explain the output of a "
            "layer instead, such as its embedding, by layer= of InverseNetwork or "
            "LayerPropagation(method, layer)."
        )
    if x.is_nested:
        return "is a nested tensor, expected the same shape for all examples: pad them"
    if x.layout != torch.strided:
        return f"has layout {x.layout}, expected a dense tensor: call to_dense() first"
    if x.ndim == 0 or x.numel() == 0:
        return (
            f"is empty: its shape is {tuple(x.shape)}, expected (batch, ...) without zeros: pass "
            "at least one example"
        )
    return ""


def check_finite(inputs: Inputs) -> None:
    """Raise InputError if ``inputs`` contain NaN or Inf."""
    for index, x in enumerate(inputs):
        if not finite(x):
            raise InputError(
                f"input {index} contains NaN or Inf, expected finite values: remove those examples"
            )


def warn_of_zeros(zero: Tensor, cause: str) -> None:
    """Warn of examples whose maps are 0.

    Args:
        zero: (batch,) True for such an example.
        cause: Why their maps are 0.
    """
    found = zero.nonzero().flatten().tolist()
    if found:
        examples = ", ".join(map(str, found[:_NAMED])) + ", ..." * (len(found) > _NAMED)
        warnings.warn(
            f"the maps of {len(found)} of {len(zero)} examples ({examples}) are 0: {cause}; "
            "expected a target whose output is positive: explain another target, or use LRP",
            DataWarning,
            stacklevel=level_of_caller(),
        )


def level_of_caller() -> int:
    """Return the stack level of the first caller outside this package."""
    package = f"{__name__.partition('.')[0]}."
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        frame, level = frame.f_back, level + 1
    return level
