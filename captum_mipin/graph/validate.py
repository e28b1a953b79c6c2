"""What users pass: brought into one form, checked, and given back in theirs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from captum_mipin.errors import CaptureError, InputError, TrainingModeError
from captum_mipin.types import Extras, Inputs

#: Weights that are computed anew in a hook at each call.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def as_inputs(inputs: Any) -> Inputs:
    """Return a tensor, or a tuple of tensors, as a tuple.

    Raises:
        InputError: ``inputs`` is neither.
    """
    if isinstance(inputs, Tensor):
        return (inputs,)
    if not isinstance(inputs, tuple):
        raise InputError(
            f"inputs are a {type(inputs).__name__}, expected a torch.Tensor or a tuple of them"
        )
    return inputs


def as_extras(arguments: Any) -> Extras:
    """Return ``additional_forward_args``, in any form that Captum takes, as a tuple."""
    if arguments is None:
        return ()
    return arguments if isinstance(arguments, tuple) else (arguments,)


def like(inputs: Any, results: Inputs) -> Any:
    """Return ``results`` as a tuple if ``inputs`` is one, else the only result."""
    return results if isinstance(inputs, tuple) else results[0]


def described(tensors: Iterable[Any]) -> str:
    """Return shape, dtype and device of each tensor, for error messages."""
    given = (x for x in tensors if isinstance(x, Tensor))
    return ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in given)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, the CPU if it has none."""
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if first is None else first.device


@contextmanager
def generator_kept() -> Iterator[None]:
    """Restore torch's global generator: a ``DataLoader`` draws a seed from it at each pass."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def finite(x: Tensor) -> bool:
    """Return True if ``x`` holds neither NaN nor Inf."""
    # A finite sum has finite terms, and needs no mask as large as x; a sum may overflow, though.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def check_output(output: Any) -> None:
    """Raise InputError if ``output`` is no index, key or field, nor a tuple of these."""
    path = output if isinstance(output, tuple) else (output,)
    if not all(type(key) in (int, str) for key in path) and output is not None:
        raise InputError(
            f"output={output!r} must be an index, a key or a field's name, or a tuple of such"
        )


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise InputError unless the option ``name`` has one of these values."""
    if value not in choices:
        raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_model(model: object) -> nn.Module:
    """Return ``model`` if it is a module in evaluation mode.

    Raises:
        CaptureError: ``model`` is not a module, or the module of an exported program.
        TrainingModeError: It, or one of its modules, is in training mode.
    """
    program = isinstance(model, fx.GraphModule) and "eval" in vars(model)  # program.module()
    if program or isinstance(model, ExportedProgram):
        raise CaptureError(
            "the model is an exported program, whose module() has no evaluation mode and no "
            "layers: take torch.export.unflatten(program).eval(), of a program that was exported "
            "in evaluation mode and with a dynamic batch"
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is a {type(model).__name__}, expected a torch.nn.Module: its layers have "
            "to be known. Wrap a function in an nn.Module that holds the network and calls it in "
            "forward()."
        )
    training = [path for path, module in model.named_modules() if module.training]
    if training:
        first = repr(training[0] or "(the model itself)")
        raise TrainingModeError(
            f"the model is in training mode ({len(training)} modules, the first is {first}): "
            "dropout and batch statistics would make its explanation random. Call model.eval() "
            "first."
        )
    return model


def check_exportable(model: nn.Module) -> None:
    """Raise CaptureError if torch.export cannot see how a module computes, or makes its weights."""
    for path, module in model.named_modules():
        name = f"module {path!r}" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name} is compiled by TorchScript, and torch.export cannot follow it: take what "
                "it was made from"
            )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _WEIGHT_HOOKS):
                raise CaptureError(
                    f"{name} computes its weight anew each time in a hook, {type(hook).__name__}, "
                    "which torch.export cannot follow: make it a weight by remove_weight_norm, "
                    "remove_spectral_norm or prune.remove of torch.nn.utils, or use "
                    "torch.nn.utils.parametrizations"
                )


def check_inputs(inputs: Inputs, explained: bool = True) -> None:
    """Raise InputError if ``inputs`` cannot carry a signal.

    Args:
        inputs: Tensors (batch, ...).
        explained: Whether the inputs are explained themselves. They may be integers if only a
            layer behind them is.
    """
    if not inputs:
        raise InputError("no input tensor was given")
    for index, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"input {index} is a {type(x).__name__}, expected a torch.Tensor")
        if problem := _problem(x, explained):
            raise InputError(f"input {index} {problem}")
        if len(x) != len(inputs[0]):
            raise InputError(f"input {index} has {len(x)} examples, input 0 has {len(inputs[0])}")


def _problem(x: Tensor, explained: bool) -> str:
    """Return why a tensor cannot be explained; "" if it can."""
    if x.is_meta:
        return "is on the meta device: it has no values"
    if x.is_complex() or (explained and not x.is_floating_point()):
        return (
            f"has dtype {x.dtype}, expected a floating dtype: integers carry no signal. Convert "
            "it, or stop at a layer behind it, such as its embedding: InverseNetwork(model, "
            "layer=...). What only steers, such as a mask, goes into additional_forward_args, "
            "which fit takes by unpack=."
        )
    if x.is_nested:
        return "is a nested tensor, expected one shape for all examples: pad them"
    if x.layout != torch.strided:
        return f"has layout {x.layout}, expected a dense tensor: call to_dense() first"
    if x.ndim == 0 or x.numel() == 0:
        return f"is empty: its shape is {tuple(x.shape)}"
    return ""


def check_finite(inputs: Inputs) -> None:
    """Raise InputError if ``inputs`` hold NaN or Inf."""
    for index, x in enumerate(inputs):
        if not finite(x):
            raise InputError(f"input {index} contains NaN or Inf")
