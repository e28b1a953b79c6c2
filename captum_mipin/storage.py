"""Fitted inverses as files, and the fingerprint of the model they belong to.

A file is safetensors: no code in it, none run. Its metadata holds ``format`` (the version below), ``content`` (JSON) and
``digest`` (SHA-256 over the content and all tensors), so that a file cut short, damaged or changed is noticed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_mipin.errors import InverseFileError

FORMAT = "captum-mipin-inverse-1"

#: Values of each weight that are compared at every call, evenly spaced.
_PROBED = 256


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in _named_tensors(model):
        _digest_tensor(digest, name, tensor)
    return digest.hexdigest()


class Watch:
    """Notices when a model's weights change, cheaply enough to be asked at every call.

    A sample of each tensor's values is compared every time. What replaces or writes to a tensor in the ways torch
    keeps count of is noticed as well, and then all values are compared by :func:`fingerprint`.
    """

    def __init__(self, model: nn.Module, expected: str | None = None) -> None:
        self.fingerprint = expected or fingerprint(model)
        self._probe, self._versions = _probe(model), _versions(model)

    def changed(self, model: nn.Module) -> bool:
        """Whether the weights are no longer those of the fingerprint."""
        probe = _probe(model)
        if probe.shape != self._probe.shape or not torch.equal(probe, self._probe):
            return True
        versions = _versions(model)
        if versions != self._versions:
            if fingerprint(model) != self.fingerprint:
                return True
            self._versions = versions
        return False


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all: to a temporary name beside it, flushed, then renamed.

    Args:
        path: The file.
        tensors: Its tensors by name.
        content: What JSON can hold.

    Raises:
        OSError: It cannot be written; a file that was there before is untouched.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(content, sort_keys=True)
    metadata = {"format": FORMAT, "content": text, "digest": _digest(tensors, text)}
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file back: its tensors and its content.

    Raises:
        FileNotFoundError: There is none.
        InverseFileError: It is not one of ours, of another version, cut short or changed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, ValueError, OSError, MemoryError, RuntimeError) as error:
        raise InverseFileError(f"{os.fspath(path)!r} is not a whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise InverseFileError(f"{os.fspath(path)!r} has format {metadata.get('format')!r}, expected {FORMAT!r}")
    text = metadata.get("content", "")
    if metadata.get("digest") != _digest(tensors, text):
        raise InverseFileError(f"{os.fspath(path)!r} is damaged or was changed: its contents do not match its digest")
    content: dict[str, Any] = json.loads(text)
    return tensors, content


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        _digest_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def _digest_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _probe(model: nn.Module) -> Tensor:
    samples = [t.detach().reshape(-1) for _, t in _named_tensors(model)]
    samples = [flat[:: max(1, flat.numel() // _PROBED)] for flat in samples]
    return torch.cat([sample.double() for sample in samples]).cpu() if samples else torch.empty(0)


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(tensor), tensor._version) for _, tensor in _named_tensors(model)]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
