"""Collectives: where devices talk in a compiled program, how often and how much, from its text.

Read from `compiled.as_text()`, as XLA writes it for CPU, GPU and TPU.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from costs import hlo

NAMES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

_CHAIN = re.compile(r'chain_id="(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as each device sees it."""

    name: str  # of NAMES
    shapes: tuple[tuple[int, ...], ...]  # dims of each result
    # Each time, on one device: what an all-gather, an all-reduce, a permute or an all-to-all hands
    # out, and what a reduce-scatter takes in. A ring moves (group - 1) / group of them, an
    # all-reduce's twice.
    bytes: int
    group: int  # devices that talk with one another; 0 where the text does not say
    times: int  # in one run of the program, loops counted


def collectives(text: str) -> list[Collective]:
    """Every collective that one run of the program reaches, in the order of its text.

    A loop whose number of rounds is not in the text counts once; of a conditional, each branch. A
    group of one device, along a mesh axis of size 1, has nobody to talk with and is left out.
    """
    module = hlo.parse(text)
    chains: set[tuple[str, ...]] = set()

    def reached(name: str, times: int) -> Iterator[Collective]:
        own = module.computations.get(name, [])
        done = {i.operands[0]: i for i in own if i.operation.endswith("-done") and i.operands}
        for one in own:
            kind = one.operation.removesuffix("-start").removeprefix("ragged-")
            if one.operation.endswith(("-done", "-update")):
                continue  # of one that has begun, and was counted there
            if kind in NAMES:
                # A TPU's program repeats a gather in each fusion that a part of it hides behind.
                chain = _CHAIN.search(one.rest)
                key = (kind, chain[1] if chain else one.name)
                if key not in chains:
                    chains.update([key] if chain else [])
                    yield _collective(kind, done.get(one.name, one), one.rest, times)
                continue
            rounds = module.rounds(one) if one.operation == "while" else 1
            for called in one.called:
                found = reached(called, times * rounds)
                # A TPU's reduce-scatter, which its program writes as an all-reduce in a fusion.
                scatter = called.startswith("all-reduce-scatter")
                yield from (_scattered(each, one) if scatter else each for each in found)

    return [one for one in reached(module.entry, 1) if one.group != 1]


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """(how often, bytes on one device) of each kind in one run; kinds that do not occur are 0."""
    sums = dict.fromkeys(NAMES, (0, 0))
    for one in found:
        times, size = sums[one.name]
        sums[one.name] = times + one.times, size + one.times * one.bytes
    return sums


def _collective(kind: str, result: hlo.Instruction, rest: str, times: int) -> Collective:
    group = _group(rest)
    size = result.bytes * (group if kind == "reduce-scatter" else 1)
    return Collective(kind, tuple(dims for dims, _ in result.arrays), size, group, times)


def _scattered(inside: Collective, result: hlo.Instruction) -> Collective:
    """The all-reduce of a fusion that keeps only the device's own part, which is its `result`."""
    if inside.name != "all-reduce":
        return inside
    shapes = tuple(dims for dims, _ in result.arrays)
    return dataclasses.replace(inside, name="reduce-scatter", shapes=shapes)


def _group(rest: str) -> int:
    """Devices in one group: of {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'a'}."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 0
