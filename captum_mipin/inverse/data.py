"""The data of a fit: batches, divided between processes, or stored for classes fitted later."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)  # fmt: skip

from captum_mipin.errors import FitError, InputError
from captum_mipin.graph.signature import pick, plain
from captum_mipin.graph.validate import check_inputs, finite
from captum_mipin.inverse.scale import Scale
from captum_mipin.options import for_inputs, type_of
from captum_mipin.storage import files
from captum_mipin.types import Extras, Inputs

#: A function batch → (inputs, additional_forward_args).
Unpack = Callable[[Any], tuple[Any, Any]]
#: The values at the start of a model's inverted part, for one batch: tensors and sizes by name.
Values = Mapping[str, Any]


class Batches:
    """Data of any kind as batches of inputs and further arguments, for any number of passes.

    Args:
        data: A tensor or a tuple of tensors (the inputs of the model), a ``Dataset``, a
            ``DataLoader`` or any iterable of batches. A batch is a tensor, or a tuple or list whose
            first element is the input or a tuple of inputs.
        batch_size: Number of examples per batch, for tensors and a ``Dataset``.
        unpack: Function batch → (inputs, additional_forward_args), for other kinds of batches;
            None for the kinds listed for ``data``.
        device: The device of the model.
        explained: False if inputs may be integers, because a layer is explained instead of them.
        shard: Pair (rank r, number n) of the processes. Process r takes the batches r, r + n,
            r + 2n, ..., or these examples of a ``DataLoader``, unless the ``DataLoader`` has a
            ``DistributedSampler``. A shard may be empty.

    Attributes:
        scale: Mean and standard deviation of the inputs of all batches so far.

    Raises:
        FitError: The data is empty or not of a supported kind, or a batch differs from the first.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        unpack: Unpack | None,
        device: torch.device,
        *,
        explained: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._device, self._explained, self._shared_out = device, explained, shard[1] > 1
        if isinstance(data, Tensor):
            data = (data,)
        if isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data):
            self._check_kind(data, "the data cannot be fitted on")
            starts = range(0, len(data[0]), batch_size)
            data, unpack = (
                [(tuple(t[i : i + batch_size] for t in data), None) for i in starts],
                None,
            )
        elif isinstance(data, Dataset):
            # with its own generator, because the default would change torch's global random state
            data = DataLoader(data, batch_size=batch_size, generator=torch.Generator())
        elif isinstance(data, Iterator):
            data = list(data)  # an iterator yields its items once, but each layer needs them
        unfit = isinstance(data, (str, bytes, Mapping, np.ndarray, nn.Module))
        if unfit or not isinstance(data, Iterable):
            raise FitError(
                f"cannot fit on {type_of(data)}, expected a tensor, a tuple of tensors, a Dataset, "
                f"a DataLoader or an iterable of batches: {for_inputs(data)}"
            )
        if unpack is not None and not callable(unpack):
            raise FitError(f"unpack= is {type_of(unpack)}, expected a function: {_unpacking(None)}")
        if (
            self._shared_out
            and isinstance(data, DataLoader)
            and not isinstance(data.dataset, IterableDataset)
        ):
            data = data if isinstance(data.sampler, DistributedSampler) else _shard(data, *shard)
            shard = (0, 1)
        self._data, self._unpack, self._shard = data, unpack or _unpack, shard
        self._kind: list[tuple[Any, ...]] = []
        self.scale = Scale()

    def __iter__(self) -> Iterator[tuple[Inputs, Extras]]:
        empty, (rank, count) = True, self._shard
        for index, batch in enumerate(islice(self._data, rank, None, count)):
            unpacked = self._unpack(batch)
            if not isinstance(unpacked, (tuple, list)) or len(unpacked) != 2:
                count = f" of {len(unpacked)}" if isinstance(unpacked, (tuple, list)) else ""
                raise FitError(
                    f"unpack= returned {type_of(unpacked)}{count} for batch {index}, "
                    f"expected a pair (inputs, additional_forward_args): {_unpacking(batch)}"
                )
            inputs, extras = unpacked
            inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            extras = () if extras is None else extras if isinstance(extras, tuple) else (extras,)
            self._check(inputs, index)
            self.scale.add(inputs, index)
            extras = tuple(self._moved(e) if isinstance(e, Tensor) else e for e in extras)
            yield plain((tuple(map(self._moved, inputs)), extras))
            empty = False
        if empty and not self._shared_out:
            raise FitError(
                "the data yields no batch, expected at least one: pass more data. An iterator that "
                "was used up yields nothing: pass a new one"
            )

    def _moved(self, x: Tensor) -> Tensor:
        """Return ``x`` on the model's device.

        Copies to a GPU use pinned memory, so that the CPU does not wait for them.
        """
        if self._device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
            x = x.pin_memory()
        return x.to(self._device, non_blocking=True)

    def _check_kind(self, inputs: Inputs, where: str) -> None:
        """Raise FitError unless ``inputs`` are valid tensors; its text begins with ``where``."""
        try:
            check_inputs(inputs, self._explained)
        except InputError as error:
            raise FitError(f"{where}: {error}") from error

    def _check(self, inputs: Inputs, index: int) -> None:
        """Raise FitError unless a batch is finite and has the shapes and dtypes of the first."""
        self._check_kind(inputs, f"batch {index}")
        kind = [(tuple(x.shape[1:]), x.dtype) for x in inputs]
        self._kind = self._kind or kind
        if kind != self._kind:
            raise FitError(
                f"batch {index} has inputs of shape and dtype {kind}, expected {self._kind} as in "
                "the first batch: convert the batches, or fit on them separately"
            )
        for number, x in enumerate(inputs):
            if not finite(x):
                raise FitError(
                    f"batch {index}: input {number} contains NaN or Inf, expected finite numbers: "
                    "remove or repair these examples"
                )


class Activations:
    """A store of the values at the start of a model's inverted part, in memory or in a folder.

    Args:
        folder: Path of an empty folder, or of a folder to create; None to store in memory.
        room: Maximum number of bytes to store in memory.

    Attributes:
        count: Number of stored batches.
        bytes: Number of bytes of their tensors.

    Raises:
        InputError: The path is not a folder, or the folder is not empty.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, room: int) -> None:
        if not isinstance(folder, str | os.PathLike | None) or (folder and Path(folder).is_file()):
            raise InputError(f"keep={folder!r} is not a folder: pass the path of an empty folder")
        self._folder, self._room = None if folder is None else Path(folder).absolute(), room
        self._batches: list[Values] = []
        self._digests: list[str] = []
        self._devices: dict[str, torch.device] = {}
        self._made = False
        self.count = self.bytes = 0
        if self._folder is not None:
            self._made = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            if any(self._folder.iterdir()):
                raise InputError(
                    f"keep={os.fspath(self._folder)!r} is not empty: pass an empty folder"
                )

    def add(self, values: Values) -> Values:
        """Store a copy of the values of one batch, and return the copy.

        Raises:
            FitError: The tensors take more bytes than ``room``.
        """
        tensors = {name: value.clone() for name, value in values.items() if _is_tensor(value)}
        sizes = {name: value for name, value in values.items() if not _is_tensor(value)}
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is not None:
            self._devices = {name: tensor.device for name, tensor in tensors.items()}
            content = {"batch": self.count, "sizes": sizes}
            self._digests.append(files.save(self._file(self.count), tensors, content))
        elif self.bytes > self._room:
            raise FitError(
                "the activations that lazy=True stores take more than "
                f"memory={self._room:,} bytes: raise memory=, or store them on disk with "
                "keep=folder"
            )
        else:
            self._batches.append({**sizes, **tensors})
        self.count += 1
        return {**sizes, **tensors}

    def __iter__(self) -> Iterator[Values]:
        yield from self._batches
        for index, digest in enumerate(self._digests):
            tensors, content = files.load(self._file(index), digest)
            moved = {name: tensor.to(self._devices[name]) for name, tensor in tensors.items()}
            yield {**content["sizes"], **moved}

    def clear(self) -> None:
        """Remove the files, and also the folder if this object created it."""
        for index in range(len(self._digests)):
            self._file(index).unlink(missing_ok=True)
        if self._folder is not None and self._made:
            with suppress(OSError):  # the folder is not empty: it contains files of the user
                self._folder.rmdir()

    def _file(self, index: int) -> Path:
        assert self._folder is not None  # for mypy: files exist only in a folder
        return self._folder / f"{index:06d}.safetensors"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _shard(loader: "DataLoader[Any]", rank: int, count: int) -> "DataLoader[Any]":
    """Return a loader of the examples of one process among several."""
    if loader.batch_size is None or not isinstance(
        loader.sampler, (SequentialSampler, RandomSampler)
    ):
        raise FitError(
            f"the DataLoader draws by a {type(loader.batch_sampler or loader.sampler).__name__}, "
            "and each process would draw for itself, expected a sampler that divides the examples: "
            "give it a torch.utils.data.DistributedSampler"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]  # these samplers need a length
    own = Subset(loader.dataset, range(rank, size, count))
    return DataLoader(
        own, batch_size=loader.batch_size, num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, generator=torch.Generator(),
    )  # fmt: skip


def _unpack(batch: Any) -> tuple[Any, Any]:
    """Return (inputs of a batch, None), that is without further arguments."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    parts = first if isinstance(first, (tuple, list)) else (first,)
    if all(map(_is_tensor, parts)):
        return first, None
    several = isinstance(batch, (Mapping, tuple, list)) and not _is_number(first)
    raise FitError(
        f"a batch is {type_of(batch)}, expected a tensor or a tuple whose first element is the "
        f"input: {'' if several else f'{for_inputs(batch)}. For batches of another kind '}"
        f"{_unpacking(batch)}"
    )


def _unpacking(batch: Any) -> str:
    """Return advice on ``unpack=`` for a batch that needs it."""
    key = repr(next(iter(batch))) if isinstance(batch, Mapping) and batch else "0"
    return (
        f"pass for example unpack=lambda batch: (batch[{key}], None), a function that returns a "
        "pair (inputs, additional_forward_args) of tensors"
    )


def check_independent(
    outputs: Sequence[Tensor],
    inputs: Inputs,
    extras: Extras,
    shared: bool,
    run: Callable[[Inputs, Extras], Sequence[Tensor]],
) -> None:
    """Raise FitError if the model mixes the examples of a batch, or is random.

    This runs half of the examples again, at most eight, in another order, and compares the outputs.
    The check of the rules, which reads only the graph, misses cases that this check finds.

    Args:
        outputs: Results of ``run`` for the batch: tensors (batch, ...).
        inputs: The inputs of the batch.
        extras: The further arguments of the batch.
        shared: True if all examples share the tensors among ``extras``, even a tensor whose length
            is that of the batch.
        run: Function (inputs, extras) → outputs of the model.
    """
    rows = len(inputs[0])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    # a single example is doubled: half of it would be an empty batch
    index = (order[: min(rows // 2, 8)] if rows > 1 else order.repeat(2)).to(inputs[0].device)
    for before, after in zip(outputs, run(*pick(inputs, extras, index, shared)), strict=True):
        tolerance = float(before.abs().max()) * torch.finfo(before.dtype).eps ** 0.5
        expected = before[index]
        if after.shape != expected.shape or float((after - expected).abs().max()) > tolerance:
            raise FitError(
                "the model's output for an example changes with the other examples of its batch, "
                "or at random, expected an output that depends on the example alone: remove "
                "operations that mix the batch or draw random numbers"
            )
