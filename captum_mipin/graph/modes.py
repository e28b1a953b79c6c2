"""The modes of torch (gradients, inference, autocast) and of Python in which the package runs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """Run a block with gradients enabled, and with inference mode and autocast switched off."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Run a block without searches for cyclic garbage.

    A capture makes so many objects that Python would search through all objects of the process
    many times, among them those of the capture.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
