"""The modes of torch that a method of this package runs in, whatever its caller has set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """Run a block with gradients enabled, and outside of inference mode and autocast."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield
