"""The torch modes (gradients, inference, autocast) in which all methods of this package run."""

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
