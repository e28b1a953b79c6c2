"""The memory that a fit takes, for regressions and for batches, and the memory that is free."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from captum_mipin.errors import FitError
from captum_mipin.regression.dual import bytes_by_rows, bytes_of_table
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import solving_bytes
from captum_mipin.rules import Inverter
from captum_mipin.rules.linear import Convolution, Dense

#: Files of a control group: its limit, its use, and the entry of ``memory.stat`` for the part of
#: its use that the system takes back when memory is short.
_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_VERSION_2 = "memory.max", "memory.current", "inactive_file"


class Plan(NamedTuple):
    """How the inverses of one step are fitted, and the bytes that the fit takes.

    Attributes:
        solver: "moments" (eq. 6), "rows" (its dual), or "sgd" (gradient descent).
        stored: Bytes of one class until its regression is solved.
        further: Bytes that solving one regression takes in addition.
        signals: Number of signals of one regression.
        descends: Whether ``solver="sgd"`` can fit this step.
        thins: Whether fewer ``positions=`` take less memory.
        batch: Bytes that the values of a batch take, and what is computed from them on the way.
    """

    solver: Literal["moments", "rows", "sgd"]
    stored: int
    further: int
    signals: int
    descends: bool
    thins: bool
    batch: int = 0

    @classmethod
    def of(
        cls, inverter: Inverter, rows: int | None, sgd: bool, *, whole: bool = False, width: int = 4
    ) -> "Plan":
        """Return the plan of a step.

        Args:
            inverter: The family of its inverse.
            rows: Number of rows of the regression; None if the dual cannot be used.
            sgd: True to fit single convolutions by gradient descent.
            whole: True for one Gram matrix of all signals, as the pseudo-inverse without λ and
                drawn positions need it; False for one of each part, if there are parts.
            width: Bytes of one number of the data.
        """
        _, features, signals, own = inverter.size
        descends = isinstance(inverter, Convolution) and inverter.plain
        thins = rows is not None and isinstance(inverter, Convolution) and inverter.by_rows(1)
        ways = signals, descends, thins
        if sgd and descends:
            return cls("sgd", 0, 0, *ways)
        # With fewer rows than signals, the Gram matrix of the rows is smaller: dual of eq. 6.
        if (
            rows is not None
            and isinstance(inverter, (Dense, Convolution))
            and inverter.by_rows(rows)
        ):
            table = own > 0 or isinstance(inverter, Convolution)
            count = bytes_of_table if table else bytes_by_rows
            stored, further = count(rows, features * (1 + own), signals, width)
            return cls("rows", stored, further, *ways)
        size = *inverter.size, () if whole else inverter.blocks
        return cls("moments", Moments.bytes_needed(*size), solving_bytes(*size), *ways)

    def needed(self, classes: int = 1) -> int:
        """Return the bytes that the fit of some classes takes at its peak.

        Regressions are solved when no batch is at hand. The moments of a batch are added to those
        of the batches before.
        """
        one = self.stored if self.solver == "moments" else 0
        return classes * self.stored + max(self.further, self.batch + one)

    def classes(self, memory: int) -> int:
        """Return the number of classes, at least 1, that ``memory`` bytes can store together."""
        return max(1, memory // max(self.stored, 1))


def check_memory(
    plans: Mapping[str, Plan], classes: int, memory: int, device: torch.device, values: int = 0
) -> None:
    """Raise FitError if a fit needs more memory than is free.

    Args:
        plans: Key of a step → its plan.
        classes: Number of classes that are fitted.
        memory: Bytes that the moments of several classes may take together.
        device: The device of the fit.
        values: Bytes of the values and signals of all batches that are still to be stored.
    """
    free = free_memory(device)
    large = {}
    for key, plan in plans.items():
        needed = plan.needed(min(classes, plan.classes(memory))) + values
        if needed > free:
            large[key] = f"  {key}: {_shown(needed)}, for {plan.signals:,} signals"
    if not large:
        return
    place = "this machine" if device.type == "cpu" else f"device {device}"
    ways = ["stop at a layer closer to the output, with InverseNetwork(model, layer=...)"]
    descends = [key for key in large if plans[key].descends]
    if descends:
        ways.append(f'fit {", ".join(descends)} with solver="sgd", which stores no such matrices')
    thins = [key for key in large if plans[key].thins]
    if thins:
        ways.append(f"fit {', '.join(thins)} on fewer places of each map, with positions=")
    if any(plans[key].needed() <= free for key in large):
        ways.append("lower memory=, so that fewer classes are fitted and values kept at a time")
    if any(2 * plans[key].batch > free for key in large):
        ways.append("pass smaller batches, with batch_size= or a loader of such batches")
    raise FitError(
        "\n".join(
            [
                f"{place} has {_shown(free)} of free memory, and the fit needs more:",
                *large.values(),
                f"Change one of these: {'; '.join(ways)}",
            ]
        )
    )


def _shown(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Return the number of bytes that can still be allocated on a device.

    For a CPU this is the smallest of what the system and the process's control groups have left.

    Args:
        device: The device.
        root: Folder that contains ``proc`` and ``sys``.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([_free_of_system(root), *_free_of_groups(root)])


def _free_of_system(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    known = hasattr(os, "sysconf")  # not on Windows
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else sys.maxsize


def _free_of_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of this process that has a limit."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files, mount = (_VERSION_1, "memory") if controllers else (_VERSION_2, "")
        top = root / "sys/fs/cgroup" / mount
        group = top / path.lstrip("/")
        # A limit holds for all groups below it. In a container, the path may exist only outside.
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(top):
                break
            limit, used = (_number(folder / name) for name in files[:2])
            if limit is not None and used is not None:
                stat = dict(line.split()[:2] for line in _lines(folder / "memory.stat"))
                yield max(0, limit - used + int(stat.get(files[2], 0)))


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no such file, or it contains "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
