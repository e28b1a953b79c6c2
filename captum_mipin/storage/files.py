"""Fitted inverses as files, and the fingerprint of the model they belong to.

A file is safetensors: no code in it, none run. Its metadata holds ``format`` (the version below), ``content`` (JSON) and
``digest`` (SHA-256 over the content and all tensors), so that a file cut short, damaged or changed is noticed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_mipin.errors import InverseFileError, MIPINError, ModelChangedError
from captum_mipin.graph.capture import memory, tree

FORMAT = "captum-mipin-inverse-3"

#: Marks of a model's tensors, parts of their memory, and the sums of these.
_Look = tuple[list[Any], list[list[list[Tensor]]], list[int]]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in _named_tensors(model):
        _digest_tensor(digest, name, tensor)
    return digest.hexdigest()


class Watch:
    """Notices when a model's weights change, cheaply enough to be asked at every call.

    Each time, torch's own count of writes and a sum of the values are compared; where one differs, :func:`fingerprint`
    decides. Of tensors of more than a million values the sum takes one in sixteen. What remains unseen is a write that
    goes round torch's count (through ``.data``) and keeps the sum, or hits only what is not sampled.
    """

    def __init__(self, model: nn.Module, expected: str | None = None) -> None:
        self.fingerprint = expected or fingerprint(model)
        self._seen: _Look | None = _look(model)
        self._told: _Look | None = None

    def changed(self, model: nn.Module) -> bool:
        """Whether a parameter or buffer is no longer as it was."""
        if self._seen is not None:
            marks, parts, sums = self._seen
            if marks == _marks(model) and sums == _sums(parts):
                return False
        if fingerprint(model) != self.fingerprint:
            return True
        self._seen = _look(model)
        return False

    def news(self, model: nn.Module) -> bool:
        """Whether a parameter or buffer is no longer as it was, unless this was told before and nothing has changed since."""
        look = _look(model)
        if self._told is not None and (self._told[0], self._told[2]) == (look[0], look[2]):
            return False
        self._told = look
        return self.changed(model)

    @property
    def marks(self) -> list[Any]:
        """What is another whenever a tensor has been written to or replaced, since it was last found unchanged."""
        return [] if self._seen is None else self._seen[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "_seen": None, "_told": None}


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> str:
    """Write a file whole or not at all: to a temporary name beside it, flushed, then renamed.

    Args:
        path: The file.
        tensors: Its tensors by name.
        content: What JSON can hold.

    Returns:
        The file's digest.

    Raises:
        OSError: It cannot be written; a file that was there before is untouched.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: there is no folder {os.fspath(path.parent)!r}"
        )
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
    return metadata["digest"]


def load(
    path: str | os.PathLike[str], digest: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file back: its tensors and its content.

    Args:
        path: The file.
        digest: What :func:`save` returned, where no other file will do.

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
        raise InverseFileError(
            f"{os.fspath(path)!r} is not a whole safetensors file: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise InverseFileError(
            f"{os.fspath(path)!r} has format {metadata.get('format')!r}, expected {FORMAT!r}"
        )
    if digest is not None and metadata.get("digest") != digest:
        raise InverseFileError(f"{os.fspath(path)!r} is another file than was written there")
    text = metadata.get("content", "")
    if metadata.get("digest") != _digest(tensors, text):
        raise InverseFileError(
            f"{os.fspath(path)!r} is damaged or was changed: its contents do not match its digest"
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InverseFileError(
            f"the content of {os.fspath(path)!r} cannot be read: {error}"
        ) from error
    if not isinstance(content, dict):
        raise InverseFileError(
            f"the content of {os.fspath(path)!r} is a {type(content).__name__}, expected a dictionary"
        )
    return tensors, content


@contextmanager
def reading(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Whatever is not found in a file's content, or is of another kind, is told as such.

    Args:
        path: The file.
        what: What its content should be of.

    Raises:
        InverseFileError: It is not.
    """
    try:
        yield
    except MIPINError:
        raise
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ValueError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise InverseFileError(
            f"the content of {os.fspath(path)!r} is not that of {what}: {error!r}"
        ) from error


def check_belongs(
    path: str | os.PathLike[str], content: Mapping[str, Any], model: nn.Module
) -> None:
    """Refuse what was fitted to another model.

    Raises:
        ModelChangedError: It was.
    """
    if content["fingerprint"] != fingerprint(model):
        raise ModelChangedError(
            f"{os.fspath(path)!r} was fitted to another model, or to other weights, than this {type(model).__name__}"
        )


def output_of(content: Mapping[str, Any]) -> Any:
    """Which of several outputs was explained: JSON has no tuples."""
    return tuple(content["output"]) if isinstance(content["output"], list) else content["output"]


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        _digest_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def _digest_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(memory(tensor))


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _look(model: nn.Module) -> _Look:
    parts = _parts([_words(tensor) for _, tensor in _named_tensors(model)])
    return _marks(model), parts, _sums(parts)


def _marks(model: nn.Module) -> list[Any]:
    """What changes when a tensor is replaced, or written to in a way torch keeps count of."""
    return [
        (name, tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype)
        for _, module in tree(model)
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _words(tensor: Tensor) -> Tensor:
    """A tensor's memory as integers, for large ones one cache line in sixteen: a view, so that it shows what is written there.

    Of what does not lie there in order, without gaps, that is all the memory it lies in.
    """
    flat = (
        tensor.is_contiguous()
        and tensor.stride()[-1:] in ((), (1,))
        and not (tensor.is_conj() or tensor.is_neg())
    )
    if flat:
        octets = tensor.detach().reshape(-1).view(torch.uint8)
    else:
        octets = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage()
        )
    if len(octets) % 8 or octets.storage_offset() % 8:
        return octets
    words = octets.view(torch.int64)
    return words if len(words) < 1 << 19 else words[: len(words) // 8 * 8].view(-1, 8)[::16]


def _parts(words: list[Tensor]) -> list[list[list[Tensor]]]:
    """What is summed up at once, by device: each large tensor, and all small ones, since a call costs more than adding them."""
    here = [[w for w in words if w.device == device] for device in {w.device for w in words}]
    large = [[[w] for w in own if w.numel() >= 1 << 12] for own in here]
    small = [[w for w in own if w.numel() < 1 << 12] for own in here]
    return [[*each, few] if few else each for each, few in zip(large, small, strict=True)]


def _sums(parts: list[list[list[Tensor]]]) -> list[int]:
    """The sum of each of them."""
    found: list[int] = []
    for own in parts:
        whole = [each[0] if len(each) == 1 else torch.cat(each) for each in own]
        found += torch.stack([part.sum(dtype=torch.int64) for part in whole]).tolist()
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
