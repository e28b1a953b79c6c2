"""What users pass, brought into one form and given back in theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.errors import InputError
from captum_mipin.graph.capture import Extras, Inputs


def as_inputs(inputs: Any) -> Inputs:
    """A tensor or a tuple of tensors, as a tuple."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    if not isinstance(inputs, tuple):
        raise InputError(
            f"inputs are a {type(inputs).__name__}, expected a torch.Tensor or a tuple of them"
        )
    return inputs


def as_extras(arguments: Any) -> Extras:
    """``additional_forward_args`` as Captum takes them, as a tuple."""
    if arguments is None:
        return ()
    return arguments if isinstance(arguments, tuple) else (arguments,)


def like(inputs: Any, results: Inputs) -> Any:
    """A tensor for a tensor, a tuple for a tuple."""
    return results if isinstance(inputs, tuple) else results[0]


def check_output(output: Any) -> None:
    """Refuse what cannot say which output is meant."""
    path = output if isinstance(output, tuple) else (output,)
    if not all(type(key) in (int, str) for key in path) and output is not None:
        raise InputError(
            f"output={output!r} must be an index, a key or a field's name, or a tuple of such"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if first is None else first.device


@contextmanager
def generator_kept() -> Iterator[None]:
    """Leave torch's global generator as it was: a ``DataLoader`` draws a seed from it each time it is gone through."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
