"""Several processes that fit together over ``torch.distributed``.

If one process fails, all processes raise an error, so that none waits forever for the failed one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed

from captum_mipin.errors import FitError, InputError


class Processes:
    """The processes of torch's default group, or this process alone.

    All processes have to make the same calls in the same order.

    Args:
        together: True if this process is one of a group.

    Raises:
        InputError: There is no process group.

    Examples:
        >>> alone = Processes(False)
        >>> alone.rank, alone.count, alone.gather("mine")
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
    def fail_together(self) -> Iterator[None]:
        """Run a block of code in each process; if it fails in one process, raise in all.

        Raises:
            FitError: Another process failed. An error of this process is raised unchanged.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        reason = None if failure is None else f"{type(failure).__name__}: {failure}"
        reasons = self.gather(reason, failure)
        if failure is not None:
            raise failure
        for rank, text in enumerate(reasons):
            if text is not None:
                raise FitError(f"the fit failed in process {rank} of {self.count}: {text}")

    def gather(self, value: Any, failure: BaseException | None = None) -> list[Any]:
        """Return the value of each process, in the order of their ranks.

        Args:
            value: The value of this process; any object that can be pickled.
            failure: Exception to raise instead of FitError if another process has ended.

        Raises:
            FitError: Another process has ended.
        """
        values = [value] * self.count
        self._call(distributed.all_gather_object, values, value, failure=failure)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes.

        Raises:
            FitError: Another process has ended.
        """
        tensor = tensor.contiguous()
        self._call(distributed.all_reduce, tensor)
        return tensor

    def first(self, value: Any) -> Any:
        """Return the first value, in order of rank, that is not None; None if all are None."""
        return next((known for known in self.gather(value) if known is not None), None)

    def check_same(self, name: str, value: Any) -> None:
        """Raise FitError unless all processes have the same value; ``name`` describes it."""
        if any(other != value for other in self.gather(value)):
            raise FitError(
                f"the processes cannot fit together: their {name} differ, expected the same in "
                "all. Start all processes with the same arguments"
            )

    def _call(
        self, collective: Callable[..., Any], *args: Any, failure: BaseException | None = None
    ) -> None:
        """Call a function of torch.distributed.

        If another process has ended, raise ``failure``, or FitError if ``failure`` is None.
        """
        if self.count > 1:
            try:
                collective(*args)
            except RuntimeError as error:
                raise (
                    failure
                    or FitError(f"another process has ended, start all processes again: {error}")
                ) from error
