"""Several processes that fit together, over ``torch.distributed``: none goes on alone, and none waits for one that failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed

from captum_mipin.errors import FitError, InputError


class Processes:
    """The processes of the default group, or this one alone.

    All of them have to make the same calls in the same order.

    Args:
        together: Whether this process is one of several.

    Raises:
        InputError: There is no process group.

    Examples:
        >>> alone = Processes(False)
        >>> alone.rank, alone.count, alone.gathered("mine")
        (0, 1, ['mine'])
    """

    def __init__(self, together: bool) -> None:
        if together and not (distributed.is_available() and distributed.is_initialized()):
            raise InputError(
                "distributed=True needs a process group: start the script with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        self.rank = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """What each process does on its own: if one fails, all end with an error.

        Raises:
            FitError: Another process failed.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        if self.count > 1:
            reasons = self.gathered(
                None if failure is None else f"{type(failure).__name__}: {failure}", failure
            )
            failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
            if failure is None and failed:
                raise FitError(
                    f"the fit failed in process {failed[0][0]} of {self.count}: {failed[0][1]}"
                )
        if failure is not None:
            raise failure

    def gathered(self, mine: Any, failure: BaseException | None = None) -> list[Any]:
        """What each process has, in the order of their ranks.

        Raises:
            FitError: A process is gone.
        """
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(found, mine)
        except RuntimeError as error:
            raise (failure or FitError(f"another process of the fit is gone: {error}")) from error
        return found

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes.

        Raises:
            FitError: A process is gone.
        """
        if self.count > 1:
            tensor = tensor.contiguous()
            try:
                distributed.all_reduce(tensor)
            except RuntimeError as error:
                raise FitError(f"another process of the fit is gone: {error}") from error
        return tensor

    def agree(self, what: str, mine: Any) -> None:
        """Make sure that all processes have the same.

        Raises:
            FitError: They have not.
        """
        if any(other != mine for other in self.gathered(mine)):
            raise FitError(f"the processes cannot fit together: their {what} differ")

    def first(self, mine: Any) -> Any:
        """What the first process that has anything has."""
        return next((found for found in self.gathered(mine) if found is not None), None)
