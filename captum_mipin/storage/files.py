"""Files of tensors and JSON content. Writing a file succeeds completely, or changes nothing.

The files have the safetensors format, which cannot contain code. Their metadata has three entries:
``format`` (the constant ``FORMAT``), ``content`` (JSON text) and ``digest`` (SHA-256 of the content
and of all tensors). The digest shows whether a file is incomplete, damaged or changed.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from captum_mipin.errors import InverseFileError, MissingFileError
from captum_mipin.graph.modules import tensor_bytes
from captum_mipin.options import type_of

FORMAT = "captum-mipin-inverse-3"


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> str:
    """Write tensors and content to a file.

    The file is written under a temporary name in the same folder, flushed to the disk and renamed.

    Args:
        path: Path of the file. An existing file is replaced after the new one is complete.
        tensors: Name → tensor, of any dtype, device and memory layout.
        content: Dictionary that can be converted to JSON.

    Returns:
        The digest of the file.

    Raises:
        OSError: The file cannot be written. An existing file is not changed.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"cannot write {os.fspath(path)!r}: it is a folder; pass the path of a file in it"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: there is no folder {os.fspath(path.parent)!r}; "
            "create it first"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(content, sort_keys=True)
    metadata = {"format": FORMAT, "content": text, "digest": _digest(tensors, text)}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)
        # safetensors lets only the owner read its files, so the usual permissions are restored.
        permissions = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(permissions)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(
            f"cannot write {path} ({error}): check the free space and the permissions of its folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return metadata["digest"]


def load(
    path: str | os.PathLike[str], digest: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file's tensors, on the CPU, and its JSON content as a dictionary.

    Args:
        path: Path of the file.
        digest: The digest that :func:`save` returned for this file; None to accept any file.

    Raises:
        FileNotFoundError: There is no such file.
        InverseFileError: The file has another format or digest, or it is incomplete or changed.
    """
    name = repr(os.fspath(path))
    if not Path(path).is_file():
        found = f"{name} is a folder" if Path(path).is_dir() else f"there is no file {name}"
        raise MissingFileError(f"{found}, expected a file that this package wrote: pass its path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()  # an open file is not a mapping, so that items() is missing
            tensors = {key: file.get_tensor(key) for key in names}
    except (SafetensorError, ValueError, OSError, MemoryError, RuntimeError) as error:
        raise InverseFileError(
            f"{name} is not a complete safetensors file ({error}), expected a file that this "
            "package wrote: pass its path, or save it again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise InverseFileError(
            f"{name} has format {metadata.get('format')!r}, expected {FORMAT!r}: fit again and "
            "save with this version of captum-mipin, if save() wrote the file; else pass the path "
            "of a file that save() wrote"
        )
    if digest is not None and metadata.get("digest") != digest:
        raise InverseFileError(
            f"{name} was replaced by another file since it was written, expected the file with "
            f"digest {digest}: save it again"
        )
    text = metadata.get("content", "")
    if metadata.get("digest") != _digest(tensors, text):
        raise InverseFileError(
            f"{name} is damaged or was changed: the digest of its data differs from "
            "the digest stored in it; save it again"
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InverseFileError(
            f"the content of {name} is not valid JSON ({error}): save it again"
        ) from error
    if not isinstance(content, dict):
        raise InverseFileError(
            f"the content of {name} is {type_of(content)}, expected a dictionary: save it again"
        )
    # Tensors of a file are not aligned in memory, and their matrix products would round differently
    # from those of aligned tensors: copy them.
    return {key: tensor.clone() for key, tensor in tensors.items()}, content


def digest_of(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """Return the SHA-256 of a text and of the names, shapes, dtypes and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return digest_of(sorted(tensors.items()), text)
