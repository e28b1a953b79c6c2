"""The base class of all fitted objects that can be saved to a file and loaded from it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from captum_mipin.calls import Helpful, explained
from captum_mipin.errors import InverseFileError, MIPINError, ModelChangedError
from captum_mipin.graph.validate import check_model, device_of
from captum_mipin.storage import files
from captum_mipin.storage.watch import fingerprint

_Self = TypeVar("_Self", bound="Saved")

#: Errors that code raises when it reads content of an unexpected form.
_UNEXPECTED = (
    KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, OverflowError,
    MemoryError,
)  # fmt: skip


class Saved(Helpful, ABC):
    """An object fitted to a model that can be saved to a file and loaded from it.

    A subclass implements :meth:`_pack`, which returns its tensors and its content, and
    :meth:`_unpack`, which makes an object from them. The content must have the entries
    ``fingerprint`` (of the model) and ``output`` (index, key or field of the model's output).
    """

    #: Name of the saved objects in error messages, such as "an inverse".
    _kind: ClassVar[str]

    @explained
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this object to a safetensors file.

        Args:
            path: Path of the file. An existing file is replaced after the new one is complete.

        Raises:
            NotFittedError: Nothing was fitted that could be saved.
            OSError: The file cannot be written.
        """
        files.save(path, *self._pack())

    @classmethod
    @explained
    def load(cls: type[_Self], path: str | os.PathLike[str], model: nn.Module) -> _Self:
        """Return the object from a file that :meth:`save` wrote.

        Args:
            path: Path of the file.
            model: The model of the fit, with the same weights. It may be wrapped in
                ``nn.DataParallel`` or ``torch.compile``.

        Raises:
            FileNotFoundError: There is no such file.
            InverseFileError: The file was saved by another class, or it is incomplete or changed.
            ModelChangedError: The file was fitted to another model or to other weights.
        """
        model = check_model(model)
        tensors, content = files.load(path)
        name = repr(os.fspath(path))
        if not cls._accepts(content):
            raise InverseFileError(
                f"{name} does not contain {cls._kind}: load it with the class that saved it"
            )
        with _reading(name, cls._kind):
            if content["fingerprint"] != fingerprint(model):
                raise ModelChangedError(
                    f"{name} was fitted to another model or to other weights than this "
                    f"{type(model).__name__} has: load it with the model of the fit, or fit again"
                )
            if isinstance(content["output"], list):  # JSON has no tuples
                content["output"] = tuple(content["output"])
            device = device_of(model)
            return cls._unpack({key: t.to(device) for key, t in tensors.items()}, content, model)

    @classmethod
    def _accepts(cls, content: dict[str, Any]) -> bool:
        """Return True if the content of a file was saved by this class."""
        return content.get("method") == cls.__name__

    @abstractmethod
    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the content to write to a file.

        Raises:
            NotFittedError: Nothing was fitted that could be saved.
        """

    @classmethod
    @abstractmethod
    def _unpack(
        cls: type[_Self], tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> _Self:
        """Return the object made from a file's tensors and its JSON content."""


@contextmanager
def _reading(name: str, kind: str) -> Iterator[None]:
    """Raise InverseFileError if a block fails because the content has an unexpected form.

    Args:
        name: Path of the file, for the error message.
        kind: Name of the expected objects, for the error message.
    """
    try:
        yield
    except InverseFileError as error:
        raise InverseFileError(f"{name}: {error}") from error
    except MIPINError:
        raise
    except _UNEXPECTED as error:
        raise InverseFileError(
            f"the content of {name} is not that of {kind} ({error!r}): save it again"
        ) from error
