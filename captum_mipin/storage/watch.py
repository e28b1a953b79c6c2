"""Detection of changes in a model's weights.

A fitted method is valid only for the weights that it was fitted to.
"""

from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.graph.modules import parts_of, tree
from captum_mipin.storage.files import digest_of

#: All tensors with fewer 8-byte words than this number are concatenated and summed together.
_SMALL = 1 << 12
#: Only a sample of a tensor is summed if it has at least this number of 8-byte words.
_LARGE = 1 << 19
#: One pair per device: the words of each larger tensor, and the words of each small tensor.
_Words = list[tuple[list[Tensor], list[Tensor]]]


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, dtypes and values of all parameters and buffers."""
    return digest_of(_named_tensors(model))


class Watch:
    """A detector of changes in a model's weights, fast enough for use at each call.

    It compares torch's count of writes to each tensor, and a sum of the values. If one of these
    differs, it compares the :func:`fingerprint`. For a tensor with more than a million values, the
    sum is over a sample of one sixteenth of them. A change is missed only if torch does not count
    the write (because it goes through ``.data``), and the sum does not change either.

    Args:
        model: The model; its present weights are the watched weights.
        expected: The fingerprint of the watched weights; by default it is computed from ``model``.
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
        """Return True for changed weights, but False if the last call had the same weights."""
        if self._reported is not None and self._reported.holds(model):
            return False
        self._reported = _Snapshot(model)
        return self.changed(model)

    @property
    def marks(self) -> list[Any]:
        """The version marks of the weights; they differ after any write that torch counts."""
        return [] if self._unchanged is None else self._unchanged.marks

    def __getstate__(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "_unchanged": None, "_reported": None}


class _Snapshot:
    """The version marks and the sums of a model's weights at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self.marks, self._words = _marks(model), _words(model)
        self._sums = _sums(self._words)

    def holds(self, model: nn.Module) -> bool:
        """Return True if the model has the same marks and sums as at that moment."""
        return self.marks == _marks(model) and self._sums == _sums(self._words)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = *model.named_parameters(), *model.named_buffers()
    return [part for name, tensor in tensors for part in parts_of(name, tensor)]


def _marks(model: nn.Module) -> list[Any]:
    """Return the version marks of a model's weights.

    They differ after a tensor was replaced, and after any write that torch counts.
    """
    return [
        (name, tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype)
        for _, module in tree(model)
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _words(model: nn.Module) -> _Words:
    """Return views of the weights' memory as integers, one pair of lists per device."""
    devices: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for _, tensor in _named_tensors(model):
        words = _memory_of(tensor)
        larger, small = devices.setdefault(words.device, ([], []))
        (small if words.numel() < _SMALL else larger).append(words)
    return list(devices.values())


def _memory_of(tensor: Tensor) -> Tensor:
    """Return a view of a tensor's memory as integers.

    For a large tensor, the view contains every sixteenth block of 64 bytes, which is a cache line.
    """
    if (
        tensor.is_contiguous()
        and tensor.stride()[-1:] in ((), (1,))
        and not (tensor.is_conj() or tensor.is_neg())
    ):
        octets = tensor.detach().reshape(-1).view(torch.uint8)
    else:  # a tensor whose elements are not adjacent: view its whole storage
        octets = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage()
        )
    if len(octets) % 8 or octets.storage_offset() % 8:
        return octets
    words = octets.view(torch.int64)
    return words if len(words) < _LARGE else words[: len(words) // 8 * 8].view(-1, 8)[::16]


def _sums(words: _Words) -> list[int]:
    """Return the sum of each larger tensor, and one sum of all small tensors, per device.

    Each device transfers its sums to the CPU at once.
    """
    sums: list[int] = []
    for larger, small in words:
        # One sum per small tensor would take longer than their concatenation.
        tensors = [*larger, torch.cat(small)] if small else larger
        sums += torch.stack([tensor.sum(dtype=torch.int64) for tensor in tensors]).tolist()
    return sums
