"""A compiled program, read from its text: `compiled.as_text()`, for CPU, GPU or TPU."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,<=]*)\]")
_NUMBERS = re.compile(r"(\w+)=(\d+)")
TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    result: str  # its type
    operation: str
    rest: str  # operands and attributes
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        inside, depth = self.rest, 1
        for i, letter in enumerate(self.rest):
            depth += (letter in "({[") - (letter in ")}]")
            if depth == 0:
                inside = self.rest[:i]
                break
        return re.findall(r"%([\w.\-]+)", inside)

    @cached_property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        branches = _BRANCHES.search(self.rest)
        several = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        return [*_CALLED.findall(self.rest), *several]

    @cached_property
    def arrays(self) -> list[tuple[tuple[int, ...], int]]:
        """(dims, bytes) of each array of the result, tuples flattened."""
        return list(arrays(self.result))

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(size for _, size in self.arrays)

    def attribute(self, name: str) -> str:
        """What stands after `name=`, "" if nothing does."""
        found = re.search(rf"\b{name}=%?\"?([^\s,\"}}]+)", self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Module:
    """A program: computations by name, and the source that its instructions come from."""

    entry: str
    computations: dict[str, list[Instruction]]
    tables: dict[str, dict[int, str]] = field(default_factory=dict)

    def rounds(self, loop: Instruction) -> int:
        """How often a loop's body runs: as XLA says, or else what its counter is compared with.

        1 where neither is in the text.
        """
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        own = self.computations.get(loop.attribute("condition"), [])
        constants = {i.name: i.rest.partition(")")[0] for i in own if i.operation == "constant"}
        for one in own:
            if one.operation == "compare" and "direction=LT" in one.rest:
                last = one.operands[-1]
                if constants.get(last, "").isdigit():
                    return int(constants[last])
        return 1

    def place(self, one: Instruction) -> str:
        """FILE:LINE of the innermost line of Python that it comes from; "" if unknown."""
        if line := one.attribute("source_line"):
            return f"{one.attribute('source_file')}:{line}"
        frame = self._row("StackFrames", one.attribute("stack_frame_id"))
        where = self._row("FileLocations", frame.get("file_location_id", ""))
        file = self.tables.get("FileNames", {}).get(int(where.get("file_name_id", 0)), "")
        return f"{file.strip(chr(34))}:{where['line']}" if file else ""

    def _row(self, table: str, number: str) -> dict[str, str]:
        row = self.tables.get(table, {}).get(int(number or 0), "")
        return dict(_NUMBERS.findall(row))


def parse(text: str) -> Module:
    """The program of a text."""
    entry, found, own, table = "", {}, [], None
    tables: dict[str, dict[int, str]] = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line[:1].isspace():
            if match := _LINE.match(line):
                root, name, result, operation, rest = match.groups()
                own.append(Instruction(name, result, operation, rest, bool(root)))
        elif line in TABLES:
            table = tables.setdefault(line, {})
        elif line[:1].isdigit() and table is not None:
            number, _, row = line.partition(" ")
            table[int(number)] = row
        elif match := _HEAD.match(line):
            own = found[match[2]] = []
            entry = match[2] if match[1] else entry
    return Module(entry, found, tables)


def arrays(result: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """(dims, bytes) of each array of a type."""
    for letters, bits, dims in _ARRAY.findall(result):
        shape = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        width = 8 if letters == "pred" else int(bits or 0)
        yield shape, math.prod(shape) * width // 8
