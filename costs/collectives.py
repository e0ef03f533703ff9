"""Collectives: where devices talk in a compiled program, how often and how much, from its text.

Read from `compiled.as_text()`, as XLA writes it for CPU, GPU and TPU.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

NAMES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,<=]*)\]")
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


@dataclass(frozen=True)
class _Instruction:
    name: str
    result: str  # its type
    operation: str
    rest: str  # operands and attributes


def collectives(text: str) -> list[Collective]:
    """Every collective that one run of the program reaches, in the order of its text.

    A loop whose number of rounds is not in the text counts once; of a conditional, each branch. A
    group of one device, along a mesh axis of size 1, has nobody to talk with and is left out.
    """
    entry, computations = _computations(text)
    chains: set[tuple[str, ...]] = set()

    def reached(name: str, times: int) -> Iterator[Collective]:
        own = computations.get(name, [])
        done = {_operand(i): i.result for i in own if i.operation.endswith("-done")}
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
                    yield _collective(kind, done.get(one.name, one.result), one.rest, times)
                continue
            rounds = _rounds(one, computations) if one.operation == "while" else 1
            for called in _callees(one.rest):
                found = reached(called, times * rounds)
                # A TPU's reduce-scatter, which its program writes as an all-reduce in a fusion.
                scatter = called.startswith("all-reduce-scatter")
                yield from (_scattered(each, one.result) if scatter else each for each in found)

    return [one for one in reached(entry, 1) if one.group != 1]


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """(how often, bytes on one device) of each kind in one run; kinds that do not occur are 0."""
    sums = dict.fromkeys(NAMES, (0, 0))
    for one in found:
        times, size = sums[one.name]
        sums[one.name] = times + one.times, size + one.times * one.bytes
    return sums


def _computations(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """The name of the entry, and the instructions of each computation."""
    entry, found, own = "", {}, []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line[:1].isspace():
            if match := _LINE.match(line):
                own.append(_Instruction(*match.groups()))
        elif match := _HEAD.match(line):
            own = found[match[2]] = []
            entry = match[2] if match[1] else entry
    return entry, found


def _rounds(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """How often a loop's body runs: as XLA says, or else up to what its counter is compared with.

    1 where neither is in the text.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    own = computations.get(condition[1], []) if condition else []
    constants = {i.name: i.rest.partition(")")[0] for i in own if i.operation == "constant"}
    for one in own:
        if one.operation == "compare" and "direction=LT" in one.rest:
            last = re.findall(r"%([\w.\-]+)", one.rest.partition(")")[0])[-1]
            if constants.get(last, "").isdigit():
                return int(constants[last])
    return 1


def _operand(one: _Instruction) -> str:
    match = re.search(r"%([\w.\-]+)", one.rest)
    return match[1] if match else ""


def _callees(rest: str) -> list[str]:
    branches = _BRANCHES.search(rest)
    several = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return [*_CALLED.findall(rest), *several]


def _collective(kind: str, result: str, rest: str, times: int) -> Collective:
    shapes, size = [], 0
    for letters, bits, dims in _ARRAY.findall(result):
        shape = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        shapes.append(shape)
        size += math.prod(shape) * (8 if letters == "pred" else int(bits or 0)) // 8
    group = _group(rest)
    size *= group if kind == "reduce-scatter" else 1
    return Collective(kind, tuple(shapes), size, group, times)


def _scattered(inside: Collective, result: str) -> Collective:
    """The all-reduce of a fusion that keeps only the device's own part, of type `result`."""
    if inside.name != "all-reduce":
        return inside
    shapes = _collective("reduce-scatter", result, "", 1).shapes
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
