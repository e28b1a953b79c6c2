"""The data of a fit: any kind of it as batches, shared out or kept, and whether its examples stand alone."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
from captum_mipin.graph.capture import Extras, Inputs, check_inputs, finite, pick, plain
from captum_mipin.storage import files

Unpack = Callable[[Any], tuple[Any, Any]]
#: Of one batch what the part of a model that is inverted starts from: tensors, and sizes.
Values = Mapping[str, Any]


class Batches:
    """Any kind of data as batches of inputs and extra arguments that can be gone through more than once.

    Args:
        data: Tensor, tuple of tensors (the inputs of the model), ``Dataset``, ``DataLoader`` or iterable of batches.
            A batch is a tensor, or a tuple or list whose first element is the input (or a tuple of inputs).
        batch_size: For data that is not batched yet.
        unpack: Batch → (inputs, additional_forward_args), where a batch is anything else.
        device: Where the model is.
        explained: See :func:`captum_mipin.graph.capture.check_inputs`.
        shard: (this process, all processes): every so many batches belong to this one, of a ``DataLoader`` every so many
            examples; with a ``DistributedSampler`` it is taken as it is. There may be none.

    Raises:
        FitError: The data is of no known kind, empty, or a batch does not fit those before it.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        unpack: Unpack | None,
        device: torch.device,
        explained: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if isinstance(data, Tensor) or (
            isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data)
        ):
            tensors = data if isinstance(data, tuple) else (data,)
            try:
                check_inputs(tensors, explained)
            except InputError as error:
                raise FitError(f"the data cannot be fitted on: {error}") from error
            rows = range(0, len(tensors[0]), batch_size)
            data = [(tuple(t[i : i + batch_size] for t in tensors), None) for i in rows]
            unpack = _as_it_is
        elif isinstance(data, Dataset):
            data = DataLoader(
                data,
                batch_size=batch_size,
                generator=torch.Generator(),
                pin_memory=device.type == "cuda",
            )
        elif isinstance(data, Iterator):
            data = list(data)  # each layer takes a pass of its own
        if not isinstance(data, Iterable) or isinstance(data, (str, dict)):
            raise FitError(
                f"cannot fit on a {type(data).__name__}: expected a tensor, a tuple of tensors, a Dataset, a DataLoader "
                "or an iterable of batches"
            )
        self._several = shard[1] > 1
        if (
            isinstance(data, DataLoader)
            and self._several
            and not isinstance(data.dataset, IterableDataset)
        ):
            data = data if isinstance(data.sampler, DistributedSampler) else _part_of(data, *shard)
            shard = (0, 1)
        self._data, self._unpack, self._device, self._explained = (
            data,
            unpack or _unpack,
            device,
            explained,
        )
        self._shard = shard
        self._like: Inputs | None = None

    def __iter__(self) -> Iterator[tuple[Inputs, Extras]]:
        found = False
        for index, batch in enumerate(islice(self._data, self._shard[0], None, self._shard[1])):
            inputs, extras = self._unpack(batch)
            inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            extras = () if extras is None else extras if isinstance(extras, tuple) else (extras,)
            self._check(inputs, index)
            extras = tuple(self._moved(e) if isinstance(e, Tensor) else e for e in extras)
            yield plain((tuple(map(self._moved, inputs)), extras))
            found = True
        if not found and not self._several:
            raise FitError(
                "the data yields no batch: nothing to fit on (an iterator that is used up?)"
            )

    def _moved(self, x: Tensor) -> Tensor:
        """``x`` on the model's device; to a GPU from pinned memory, so that nothing waits for it."""
        if self._device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
            x = x.pin_memory()
        return x.to(self._device, non_blocking=True)

    def _check(self, inputs: Inputs, index: int) -> None:
        try:
            check_inputs(inputs, self._explained)
        except InputError as error:
            raise FitError(f"batch {index}: {error}") from error
        self._like = self._like or inputs
        found, expected = (
            [(tuple(x.shape[1:]), x.dtype) for x in xs] for xs in (inputs, self._like)
        )
        if found != expected:
            raise FitError(
                f"batch {index} has inputs of shape and dtype {found}, the first batch had {expected}"
            )
        for number, x in enumerate(inputs):
            if not finite(x):
                raise FitError(f"batch {index}: input {number} contains NaN or Inf")


class Activations:
    """Of every batch what the part of a model that is inverted starts from, for fits to come: in memory, or in a folder.

    Args:
        folder: Where to keep it; it is made, and has to be empty. None for memory.
        room: Bytes of memory that it may take.

    Raises:
        InputError: The folder is not empty, or none.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, room: int) -> None:
        if not isinstance(folder, str | os.PathLike | None) or (
            folder is not None and Path(folder).is_file()
        ):
            raise InputError(f"keep={folder!r} is no folder to keep activations in")
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
                    f"keep={os.fspath(self._folder)!r} is not empty: activations want a folder of their own"
                )

    def add(self, values: Values) -> Values:
        """Keep a copy of these; returns it.

        Raises:
            FitError: There is no room.
        """
        values = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is not None:
            sizes = {name: value for name, value in values.items() if name not in tensors}
            self._devices = {name: tensor.device for name, tensor in tensors.items()}
            self._digests.append(
                files.save(self._file(self.count), tensors, {"batch": self.count, "sizes": sizes})
            )
        elif self.bytes > self._room:
            raise FitError(
                f"the activations that classes are to be fitted from take more than memory={self._room:,} bytes: raise it, or "
                "keep them on disk, with keep=folder"
            )
        else:
            self._batches.append(values)
        self.count += 1
        return values

    def __iter__(self) -> Iterator[Values]:
        if self._folder is None:
            yield from self._batches
            return
        for index, digest in enumerate(self._digests):
            tensors, content = files.load(self._file(index), digest)
            moved = {name: tensor.to(self._devices[name]) for name, tensor in tensors.items()}
            yield {**content["sizes"], **moved}

    def clear(self) -> None:
        """Remove what was kept in a folder, and the folder if it was made for it."""
        for index in range(len(self._digests)):
            self._file(index).unlink(missing_ok=True)
        if self._folder is not None and self._made:
            with suppress(OSError):  # something else lies there
                self._folder.rmdir()

    def _file(self, index: int) -> Path:
        assert self._folder is not None  # for mypy: as in the callers
        return self._folder / f"{index:06d}.safetensors"


def _part_of(loader: "DataLoader[Any]", rank: int, count: int) -> "DataLoader[Any]":
    """The examples of a loader that belong to one of several processes."""
    if loader.batch_size is None or not isinstance(
        loader.sampler, (SequentialSampler, RandomSampler)
    ):
        raise FitError(
            f"the DataLoader draws by a {type(loader.batch_sampler or loader.sampler).__name__}, of which each process would "
            "draw for itself: give it a torch.utils.data.DistributedSampler"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]  # these samplers know it
    return DataLoader(
        Subset(loader.dataset, range(rank, size, count)), batch_size=loader.batch_size, num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, generator=torch.Generator(),
    )  # fmt: skip


def _as_it_is(batch: Any) -> Any:
    return batch


def _unpack(batch: Any) -> tuple[Any, Any]:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(first, Tensor) or (
        isinstance(first, (tuple, list)) and all(isinstance(x, Tensor) for x in first)
    ):
        return first, None
    raise FitError(
        f"a batch is a {type(batch).__name__}, expected a tensor or a tuple whose first element is the input; pass "
        "unpack=lambda batch: (inputs, additional_forward_args)"
    )


def check_apart(
    found: Sequence[Tensor],
    inputs: Inputs,
    extras: Extras,
    shared: bool,
    again: Callable[[Inputs, Extras], Sequence[Tensor]],
) -> None:
    """Whether examples give the same in other company and order: the last line of defence behind the rules.

    Args:
        found: What a batch gave, each (batch, ...).
        inputs, extras: The batch.
        shared: Whether a further tensor as long as the batch is shared.
        again: (inputs, extras) → the same for other examples.

    Raises:
        FitError: They do not.
    """
    rows = len(inputs[0])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    later = (order[: rows // 2] if rows > 1 else torch.tensor([0, 0])).to(
        inputs[0].device
    )  # one, beside itself
    for before, after in zip(found, again(*pick(inputs, extras, later, shared)), strict=True):
        scale = float(before.abs().max()) * torch.finfo(before.dtype).eps ** 0.5
        if after.shape != before[later].shape or float((after - before[later]).abs().max()) > scale:
            raise FitError(
                "the model's output for an example changes with the other examples of its batch, or at random, and so would "
                "its explanation: remove what reads or mixes the batch, or what is random"
            )
