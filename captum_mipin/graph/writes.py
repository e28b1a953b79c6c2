"""The restoration of weights and other tensors that calls of a model write to in place.

Their memory is saved before the first operation that writes to it, so that nothing is copied for
the models that write to none. A write by ``x.data`` or under ``torch.no_grad()`` is one as well.
An assignment ``x.data = y`` writes to no memory, but gives the tensor another. It is noticed
afterwards, as are another ``grad`` and ``requires_grad``.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from captum_mipin.graph.modules import parts_of, tensor_bytes

#: Names by which code may reach the memory of a tensor, to write to it without an operation.
_ARRAYS = frozenset(
    {"numpy", "array", "asarray", "__array__", "from_dlpack", "to_dlpack", "__dlpack__",
     "data_ptr", "untyped_storage", "storage", "_typed_storage", "set_"}
)  # fmt: skip


class Fields(NamedTuple):
    """What a tensor has in those fields that code may assign to.

    Attributes:
        name: Its name.
        tensor: The tensor.
        data: Another tensor with the same memory, which keeps it alive; None if it has none.
        grad: Its gradient.
        requires_grad: Whether it requires one.
    """

    name: str
    tensor: Tensor
    data: Tensor | None
    grad: Tensor | None
    requires_grad: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Fields":
        """Return the present fields of a tensor."""
        data = tensor.detach() if _place(tensor) else None
        grad = tensor.grad if tensor.is_leaf else None
        return cls(name.lstrip("."), tensor, data, grad, tensor.requires_grad)

    @property
    def exchanged(self) -> bool:
        """Return True if the tensor has other memory than before."""
        return self.data is not None and _layout(self.tensor) != _layout(self.data)

    @property
    def differs(self) -> bool:
        """Return True if the tensor has other memory, and in it other values."""
        if self.data is None or not self.exchanged:
            return False
        try:
            same = self.tensor.shape == self.data.shape and self.tensor.dtype == self.data.dtype
            return not same or tensor_bytes(self.tensor) != tensor_bytes(self.data)
        except RuntimeError:  # there are no values, as in an export
            return True

    @property
    def has_other_grad(self) -> bool:
        """Return True if the tensor has another gradient than before."""
        return self.tensor.is_leaf and self.tensor.grad is not self.grad

    def put_back(self) -> None:
        """Assign the fields again."""
        if self.data is not None and self.exchanged:
            self.tensor.data = self.data
        if self.has_other_grad:
            self.tensor.grad = self.grad
        if self.tensor.is_leaf and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)


class Saved:
    """The memory of tensors, saved where calls of a model write to it.

    Args:
        tensors: The tensors, with their names.
        words: The names in the code that is called.

    Attributes:
        written: The names of those that operations have written to.
        exchanged: The names of those that calls have given other memory → whether the values in it
            have differed.
        graded: The names of those whose gradients calls have written to.

    Examples:
        >>> weight = torch.ones(2)
        >>> saved = Saved([("weight", weight)], ["data", "mul_"])
        >>> with saved.watched():
        ...     _ = weight.data.mul_(3)
        >>> weight
        tensor([3., 3.])
        >>> saved.put_back()
        >>> weight, saved.written
        (tensor([1., 1.]), {'weight'})
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], words: Iterable[str]) -> None:
        self._tensors: dict[int, list[tuple[str, Tensor]]] = {}
        self._fields: dict[int, Fields] = {}
        for name, tensor in tensors:
            if id(tensor) in self._fields:
                continue
            self._fields[id(tensor)] = fields = Fields.of(name, tensor)
            self._add(name, tensor)
            if fields.grad is not None:
                self._add(f"{fields.name}.grad", fields.grad)
        self._arrays = not _ARRAYS.isdisjoint(words)
        self._memory: dict[int, tuple[Any, list[int]]] = {}
        self.written, self.graded = set[str](), set[str]()
        self.exchanged: dict[str, bool] = {}

    def _add(self, name: str, tensor: Tensor) -> None:
        """Note where the memory of a tensor is, to be saved before a write to it."""
        for _, part in parts_of(name, tensor):
            place = _place(part)
            if place and all(part is not one for _, one in self._tensors.get(place, ())):
                self._tensors.setdefault(place, []).append((name, part))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Save the memory of each tensor before something in the block writes to it."""
        with ExitStack() as stack:
            if self._arrays:
                stack.enter_context(_Functions(self))
            stack.enter_context(_Operations(self))
            yield

    def save(self, values: Any, writes: bool = True) -> None:
        """Save the memory of the tensors in some values, if it is not saved yet.

        Args:
            values: The values.
            writes: Whether it is known that something writes to them.
        """
        for leaf in pytree.tree_leaves(values):
            place = _place(leaf) if isinstance(leaf, Tensor) else None
            if place not in self._tensors:
                continue
            named = self._tensors[place]
            if writes:
                self.written.add(named[0][0])
            if place not in self._memory:
                versions = [-1 if x.is_inference() else x._version for _, x in named]
                self._memory[place] = leaf.untyped_storage().clone(), versions

    def save_written(self) -> None:
        """Save the memory of all tensors that operations have written to before."""
        for named in self._tensors.values():
            self.save([tensor for name, tensor in named if name in self.written], False)

    def altered(self) -> dict[str, bytes]:
        """Return the present memory of the tensors that calls have changed, by name."""
        found = {}
        for place, (values, _) in self._memory.items():
            name, tensor = self._tensors[place][0]
            before, now = (_content(x) for x in (values, tensor.untyped_storage()))
            if before != now:
                found[name] = now
        return found

    def note(self, fields: Iterable[Fields]) -> None:
        """Note the names of tensors whose fields have been assigned to."""
        for one in fields:
            if one.exchanged:
                self.exchanged[one.name] = one.differs or self.exchanged.get(one.name, False)
            if one.has_other_grad:
                self.graded.add(one.name)

    def put_back(self) -> None:
        """Write the saved memory back, so that tensors and their versions are as they were."""
        self.note(self._fields.values())
        self.graded |= {
            one.name for one in self._fields.values() if f"{one.name}.grad" in self.written
        }
        for one in self._fields.values():  # first, since the memory is written by these tensors
            one.put_back()
        memory, self._memory = self._memory, {}
        for place, (values, versions) in memory.items():
            tensors = self._tensors[place]
            tensors[0][1].untyped_storage().copy_(values)
            for (_, tensor), version in zip(tensors, versions, strict=True):
                if version >= 0:
                    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def _place(tensor: Tensor) -> int | None:
    """Return where the memory of a tensor begins; None if it has none of its own."""
    with suppress(RuntimeError, NotImplementedError):
        return tensor.untyped_storage().data_ptr() or None
    return None


def _layout(tensor: Tensor) -> Any:
    """Return what differs for tensors that do not lie at one place; None if it has no memory."""
    with suppress(RuntimeError, NotImplementedError):
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return None


def _content(memory: torch.UntypedStorage) -> bytes:
    """Return the bytes of a tensor's memory."""
    flat = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
    return flat.cpu().numpy().tobytes()


class _Operations(TorchDispatchMode):
    """A context in which each operation's targets are saved before it runs."""

    supports_higher_order_operators = True

    def __init__(self, saved: Saved) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saved = saved

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Save what an operation writes to, and run it."""
        kwargs = kwargs or {}
        schema = getattr(function, "_schema", None)
        if schema is None:  # a part of the model as one operation
            self._saved.save((args, kwargs), False)
        elif schema.is_mutable:
            for at, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._saved.save(args[at] if at < len(args) else kwargs.get(argument.name))
        return function(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """A context in which tensors are saved before their memory is handed to other code."""

    def __init__(self, saved: Saved) -> None:
        super().__init__()
        self._saved = saved

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Save a tensor whose memory a function returns, and run the function."""
        if getattr(function, "__name__", None) in _ARRAYS:
            self._saved.save(args, False)
        return function(*args, **(kwargs or {}))
