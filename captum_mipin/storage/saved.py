"""The base class of everything that can be saved to a file and loaded from it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from captum_mipin.errors import InverseFileError, MIPINError, ModelChangedError
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.validate import check_model, device_of
from captum_mipin.storage import files
from captum_mipin.storage.watch import fingerprint

_Self = TypeVar("_Self", bound="Saved")

#: What code that reads unexpected content raises.
_UNEXPECTED = (
    KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, OverflowError,
    MemoryError,
)  # fmt: skip


class Saved(ABC):
    """Something fitted to a model that can be saved to a file and loaded from it.

    A subclass gives its tensors and its content by :meth:`_pack`, and is made from them by
    :meth:`_unpack`. The content must have the entries ``fingerprint`` (of the model) and ``output``
    (index, key or field of the model's output).
    """

    #: What a file holds, for error messages.
    _kind: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was fitted to a safetensors file, whole or not at all.

        Args:
            path: The file. An existing file is replaced once the new one is complete.

        Raises:
            NotFittedError: There is nothing to save.
            OSError: The file cannot be written.
        """
        files.save(path, *self._pack())

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str], model: nn.Module) -> _Self:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            model: The model that was fitted to, with the same weights; itself, or in
                ``nn.DataParallel`` or ``torch.compile``.

        Raises:
            FileNotFoundError: There is no such file.
            InverseFileError: The file is of another kind, cut short or changed.
            ModelChangedError: The file belongs to another model or other weights.
        """
        model = check_model(unwrapped(model))
        tensors, content = files.load(path)
        name = repr(os.fspath(path))
        if not cls._accepts(content):
            raise InverseFileError(
                f"{name} does not hold {cls._kind}: load it with the class that saved it"
            )
        with _reading(name, cls._kind):
            if content["fingerprint"] != fingerprint(model):
                raise ModelChangedError(
                    f"{name} was fitted to another model, or to other weights, than this "
                    f"{type(model).__name__}: load it with that model, or fit again"
                )
            if isinstance(content["output"], list):  # JSON has no tuples
                content["output"] = tuple(content["output"])
            device = device_of(model)
            return cls._unpack({key: t.to(device) for key, t in tensors.items()}, content, model)

    @classmethod
    def _accepts(cls, content: dict[str, Any]) -> bool:
        """Return True if a file's content is of this class."""
        return content.get("method") == cls.__name__

    @abstractmethod
    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the content of a file.

        Raises:
            NotFittedError: There is nothing to save.
        """

    @classmethod
    @abstractmethod
    def _unpack(
        cls: type[_Self], tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> _Self:
        """Return the object that a file's tensors and content describe."""


@contextmanager
def _reading(name: str, kind: str) -> Iterator[None]:
    """Raise InverseFileError where content lacks an entry, or has one of another type."""
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
