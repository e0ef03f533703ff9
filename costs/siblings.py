"""Kernels that XLA for GPUs makes one, so that what they all read is read once.

Its multi-output fusion joins elementwise kernels and reductions that go over arrays of one size,
read the same, and do not wait for one another; and a reduction joins the kernel that writes what it
reads. A kernel has room for one shape of reduction: sums over rows and over columns go through the
array apart.
"""

import math
from dataclasses import dataclass, field

from costs.kernels import REDUCES, SMALL, Buffer, Kernel, Schedule

FUSION = ("fusion", "store")  # names of elementwise kernels


@dataclass
class Group:
    """Kernels that run as one, in the place of the first."""

    place: float
    read: set[Buffer]
    reduced: set[tuple[int, ...]] = field(default_factory=set)  # shapes of its sums


def join(plan: Schedule) -> None:
    """Takes what kernels that run as one would read again off their bytes."""
    made: dict[Buffer, float] = {}  # where it is there for others in the same kernel
    groups: dict[int, list[Group]] = {}  # by the size that they go over
    for place, kernel in enumerate(plan.kernels):
        for inner in kernel.inner:
            join(inner)
        reduces = kernel.name in REDUCES
        if not reduces and kernel.name not in FUSION:
            made.update(dict.fromkeys(kernel.writes, place + 0.5))
            continue
        sums = {b.value.shape for b in kernel.writes} if reduces else set()
        ready = max((made.get(b, -1.0) for b in kernel.reads), default=-1.0)
        alike = groups.setdefault(numbers(kernel), [])
        for group in alike:
            shared = [b for b in kernel.reads if b in group.read and kernel.reads[b] >= SMALL]
            if shared and ready <= group.place and len(group.reduced | sums) < 2:
                kernel.reads |= dict.fromkeys(shared, 0)
                break
        else:
            group = Group(float(place), set())
            alike.append(group)
        group.reduced |= sums
        group.read.update(kernel.reads, kernel.writes)
        # A sum is there when the kernel has ended, all else for the others of the kernel too.
        made.update(dict.fromkeys(kernel.writes, group.place + 0.5 * reduces))


def numbers(kernel: Kernel) -> int:
    """How many numbers the largest array has that a kernel goes over."""
    return max((math.prod(b.value.shape) for b in (*kernel.reads, *kernel.writes)), default=0)
