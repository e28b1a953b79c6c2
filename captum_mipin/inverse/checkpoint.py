"""The options of a fit, and the file that stores the results of an unfinished fit."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captum_mipin.errors import InputError, InverseFileError
from captum_mipin.inverse.data import Unpack
from captum_mipin.inverse.distributed import Processes
from captum_mipin.inverse.request import Fitted, Settings
from captum_mipin.inverse.state import packed, unpacked
from captum_mipin.options import check_number
from captum_mipin.storage import files


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of :meth:`InverseNetwork.fit`."""

    unpack: Unpack | None
    batch_size: int
    memory: int
    progress: bool
    checkpoint: str | os.PathLike[str] | None
    distributed: bool
    lazy: bool
    keep: str | os.PathLike[str] | None
    cache: int

    def check(self, settings: Settings) -> None:
        """Raise InputError if an option is not allowed, or two options exclude each other."""
        check_number("batch_size", self.batch_size, 1, whole=True)
        check_number("cache", self.cache)
        if self.keep is not None and not self.lazy:
            raise InputError(
                "keep= needs lazy=True, which stores activations in this folder: pass both or none"
            )
        if self.lazy and (self.distributed or self.checkpoint is not None or settings.sharing):
            raise InputError(
                "lazy=True fits one class at a time, when it is explained: use it without "
                'distributed=True, checkpoint= and sharing="classes"'
            )
        if self.distributed and settings.solver == "sgd":
            raise InputError(
                'solver="sgd" runs in a single process: fit without distributed=True, or with '
                'solver="exact"'
            )


class Checkpoint:
    """The file that stores the results of an unfinished fit; the first process writes it.

    Args:
        path: Path of the file; None to store nothing.
        head: The file's metadata of the model and the options.
        unfinished: The classes to fit, and the range of their outputs, which identifies the data.
        processes: The processes that fit together.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        head: dict[str, Any],
        unfinished: dict[str, Any],
        processes: Processes,
    ) -> None:
        self._path = None if path is None or processes.rank > 0 else Path(path)
        self._head, self._unfinished, self._processes = head, unfinished, processes

    def read(self, fitted: Fitted, device: torch.device) -> Fitted:
        """Return the results in the file, in each process; return ``fitted`` if there is no file.

        Raises:
            InverseFileError: The file is damaged, or belongs to another fit.
        """
        with self._processes.fail_together():
            if self._path is not None and self._path.exists():
                tensors, content = files.load(self._path)
                self._check_same_fit(content)
                fitted = unpacked({name: t.to(device) for name, t in tensors.items()}, content)
        first: Fitted = self._processes.gather(fitted if self._processes.rank == 0 else None)[0]
        return first

    def write(self, fitted: Fitted) -> None:
        """Write the results of the fit so far to the file."""
        with self._processes.fail_together():
            if self._path is not None:
                tensors, content = packed(fitted)
                content = {**self._head, **content, "unfinished": self._unfinished}
                files.save(self._path, tensors, content)

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _check_same_fit(self, content: dict[str, Any]) -> None:
        """Raise InverseFileError if the options or data of the file's fit differ from these."""
        expected = json.loads(json.dumps({**self._head, **self._unfinished}))
        actual = {**content, **(content.get("unfinished") or {})}
        different = [
            name
            for name, value in expected.items()
            if name not in ("version", "model") and not _same(name, actual.get(name), value)
        ]
        if different:
            raise InverseFileError(
                f"the checkpoint {os.fspath(self._path or '')!r} is of another fit: its "
                f"{', '.join(different)} differ. Continue that fit, or pass another file"
            )


def _same(name: str, old: Any, new: Any) -> bool:
    """Return True if two values are equal; outputs may differ as they do on another machine."""
    if name != "data" or not old or len(old) != len(new):
        return bool(old == new)
    (count, *before), (examples, *after) = old, new
    # the minimum and the maximum of each output
    sizes = [
        1e-4 * max(abs(low), abs(high)) for low, high in zip(after[::2], after[1::2], strict=True)
    ]
    differences = [abs(a - b) for a, b in zip(before, after, strict=True)]
    near = [d <= sizes[at // 2] for at, d in enumerate(differences)]
    return bool(count == examples) and all(near)
