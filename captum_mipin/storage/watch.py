"""The watch over a model's weights: a fitted method is valid for the weights it was fitted to."""

from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.graph.modules import tree
from captum_mipin.storage.files import digest_of

#: A tensor of fewer 8-byte words than this is summed together with all others of that kind.
_SMALL = 1 << 12
#: Of a tensor of at least this many 8-byte words, only a sample is summed.
_LARGE = 1 << 19
#: For each device, the words of each larger tensor, and of all small ones.
_Words = list[tuple[list[Tensor], list[Tensor]]]


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, dtypes and values of all parameters and buffers."""
    return digest_of(_named_tensors(model))


class Watch:
    """Notices a change of a model's weights, fast enough to be asked at each call.

    It compares torch's count of writes to each tensor, and a sum of the values. If one of them
    differs, :func:`fingerprint` decides. The sum takes one value in sixteen of a tensor with more
    than a million values. Only a write that torch does not count (through ``.data``) and that keeps
    the sum, or is outside the sample, stays unnoticed.

    Args:
        model: The model with the weights that count as unchanged.
        expected: Their fingerprint, if it is known; by default it is computed.
    """

    def __init__(self, model: nn.Module, expected: str | None = None) -> None:
        self.fingerprint = expected or fingerprint(model)
        self._unchanged: _Snapshot | None = _Snapshot(model)
        self._reported: _Snapshot | None = None

    def changed(self, model: nn.Module) -> bool:
        """Return True if a parameter or buffer differs from the watched weights."""
        if self._unchanged is not None and self._unchanged.holds(model):
            return False
        if fingerprint(model) != self.fingerprint:
            return True
        self._unchanged = _Snapshot(model)
        return False

    def newly_changed(self, model: nn.Module) -> bool:
        """Return True if :meth:`changed`, and the weights differ from those of the last call."""
        if self._reported is not None and self._reported.holds(model):
            return False
        self._reported = _Snapshot(model)
        return self.changed(model)

    @property
    def marks(self) -> list[Any]:
        """Version marks, which differ after any write to the weights that torch counts."""
        return [] if self._unchanged is None else self._unchanged.marks

    def __getstate__(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "_unchanged": None, "_reported": None}


class _Snapshot:
    """Version marks and sums of a model's weights at one time."""

    def __init__(self, model: nn.Module) -> None:
        self.marks, self._words = _marks(model), _words(model)
        self._sums = _sums(self._words)

    def holds(self, model: nn.Module) -> bool:
        """Return True if marks and sums are still the same."""
        return self.marks == _marks(model) and self._sums == _sums(self._words)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _marks(model: nn.Module) -> list[Any]:
    """Return what changes when a tensor is replaced, or written to in a way that torch counts."""
    return [
        (name, tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype)
        for _, module in tree(model)
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _words(model: nn.Module) -> _Words:
    """Return views of the weights' memory as integers, by device."""
    devices: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for _, tensor in _named_tensors(model):
        words = _memory_of(tensor)
        larger, small = devices.setdefault(words.device, ([], []))
        (small if words.numel() < _SMALL else larger).append(words)
    return list(devices.values())


def _memory_of(tensor: Tensor) -> Tensor:
    """Return a view of a tensor's memory as integers: of a large one a cache line in sixteen."""
    if (
        tensor.is_contiguous()
        and tensor.stride()[-1:] in ((), (1,))
        and not (tensor.is_conj() or tensor.is_neg())
    ):
        octets = tensor.detach().reshape(-1).view(torch.uint8)
    else:  # a tensor with gaps: all of the memory that it is part of
        octets = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage()
        )
    if len(octets) % 8 or octets.storage_offset() % 8:
        return octets
    words = octets.view(torch.int64)
    return words if len(words) < _LARGE else words[: len(words) // 8 * 8].view(-1, 8)[::16]


def _sums(words: _Words) -> list[int]:
    """Return the sum of each larger tensor and of all small ones, with one transfer a device."""
    sums: list[int] = []
    for larger, small in words:
        # a call costs more than the addition of a small tensor: join these first
        tensors = [*larger, torch.cat(small)] if small else larger
        sums += torch.stack([tensor.sum(dtype=torch.int64) for tensor in tensors]).tolist()
    return sums
