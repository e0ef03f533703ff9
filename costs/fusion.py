"""What XLA made of a program: its kernels, the bytes they move, what fusion saved and left.

A kernel is what runs as one: a fusion, a matmul of a library, a copy. It reads its operands from
memory and writes its results there. Counted per run of the program, on one device, from the text:

- A kernel that only slices, or gathers from, an operand reads that part; one that updates a slice
  in place moves the slice.
- Fused, an operation's result stays in registers. What that saved is what all operations inside
  fusions would move if each were a kernel, less what the fusions do.
- What is left: a buffer that one memory-bound kernel writes and others only read could stay in
  registers if they were one. A bound, not a promise: sums over rows end before what needs them.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from costs import hlo
from costs.collectives import NAMES as COLLECTIVES

# No kernels: names for memory, or computed where they are read.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain",
    "opt-barrier", "partition-id", "replica-id", "add-dependency", "get-dimension-size",
)  # fmt: skip
ALIASES = ("bitcast", "opt-barrier", "add-dependency", "reshape")
MADE = ("broadcast", "iota", "constant")  # their result costs no reading of that size
SLICES = ("dynamic-slice", "slice", "gather")
MATMUL = r"matmul|gemm|\bdot\b|convolution|conv\$|cublas|nvjet|__triton"
ATTENTION = r"fmha|flash|sdpa|splash"
MATMULS, ATTENDS, TALKS = "matmul", "attention", "communication"
BOUND = ("elementwise", "reduction", "copy", "scatter and sort")  # by memory


@dataclass(eq=False)
class Kernel:
    """What runs as one."""

    name: str
    kind: str
    place: str  # FILE:LINE
    reads: dict[str, int]  # bytes by buffer
    writes: dict[str, int]
    times: int  # in one run of the program
    operations: int  # that are more than a name for memory
    apart: int  # bytes that its operations would move, each a kernel

    @property
    def bytes(self) -> int:
        """Each time."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass(frozen=True)
class Left:
    """Buffers between kernels of the same places in the source."""

    writer: str
    readers: tuple[str, ...]
    shape: tuple[int, ...]
    bytes: int  # written and read again, in one run
    count: int


@dataclass
class Fusion:
    """What became of a program."""

    kernels: list[Kernel] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)  # between memory-bound kernels, most bytes first
    beside: int = 0  # bytes between memory-bound kernels and matmuls, in one run

    @property
    def launches(self) -> int:
        """Kernels of one run."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def fused(self) -> int:
        """Operations of one run inside kernels that hold more than one."""
        return sum(k.times * k.operations for k in self.kernels if k.operations > 1)

    @property
    def moved(self) -> int:
        """Bytes."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels)

    @property
    def saved(self) -> int:
        """Bytes that stayed in registers."""
        return sum(k.times * max(0, k.apart - k.bytes) for k in self.kernels)

    @property
    def least(self) -> int:
        """Bytes if no memory-bound kernel wrote what only such kernels read."""
        return self.moved - sum(left.bytes for left in self.left)

    def kinds(self) -> dict[str, tuple[int, int]]:
        """(kernels, bytes) of each kind, most bytes first."""
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for kernel in self.kernels:
            count[kernel.kind] += kernel.times
            size[kernel.kind] += kernel.times * kernel.bytes
        return {kind: (count[kind], total) for kind, total in size.most_common()}


def analyse(text: str, root: str = "") -> Fusion:
    """What became of the program of a text; places are told from the folder `root`."""
    return _Walk(hlo.parse(text), root.rstrip("/") + "/").run()


class _Walk:
    """Through all computations that run, as often as they do."""

    def __init__(self, module: hlo.Module, root: str):
        self.module, self.root = module, root
        self.found = Fusion()
        self.left: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])

    def run(self) -> Fusion:
        self.computation(self.module.entry, 1)
        self.found.left = sorted(
            (Left(*key, *value) for key, value in self.left.items()), key=lambda left: -left.bytes
        )
        return self.found

    def computation(self, name: str, times: int) -> None:
        """The kernels of one computation, and of those that it calls."""
        own = self.module.computations.get(name, [])
        names = _Names(own)
        shapes: dict[str, tuple[int, ...]] = {}
        kept: set[str] = set()  # buffers that something else than a kernel needs
        kernels = []
        for one in own:
            if one.root:
                kept.update(names.of(one.name) if one.operation in FREE else names.written(one))
            if one.operation in FREE or one.operation.endswith(("-done", "-update")):
                continue
            if one.operation in ("while", "conditional", "call"):
                rounds = self.module.rounds(one) if one.operation == "while" else 1
                kept.update(buffer for operand in one.operands for buffer in names.of(operand))
                conditions = (one.attribute("condition"),)
                for called in one.called:
                    if called not in conditions:
                        self.computation(called, times * rounds)
                continue
            kernel = self.kernel(one, names, times)
            kernels.append(kernel)
            shapes.update(zip(kernel.writes, (dims for dims, _ in names.arrays(one)), strict=True))
        self.found.kernels += kernels
        self.between(kernels, kept, shapes)

    def kernel(self, one: hlo.Instruction, names: "_Names", times: int) -> Kernel:
        """An instruction that runs by itself."""
        called = one.attribute("calls")
        inside = _Inside(self.module, called) if called else None
        reads: dict[str, int] = {}
        for i, operand in enumerate(one.operands):
            for buffer, size in names.sizes(operand).items():
                part = inside.read(i, size) if inside else _part(one, i, size)
                if part:
                    reads[buffer] = max(reads.get(buffer, 0), part)
        sizes = [size for _, size in names.arrays(one)]
        if one.operation == "dynamic-update-slice":
            sizes = [sum(names.sizes(one.operands[1]).values())]
        elif inside:
            sizes = inside.written(sizes)
        if "custom-call" in (inside.names if inside else {one.operation}):
            # Bytes in a row are what a library works in.
            arrays = zip(names.arrays(one), sizes, strict=True)
            sizes = [0 if dims == (whole,) else size for (dims, whole), size in arrays]
        writes = dict(zip(names.written(one), sizes, strict=True))
        kind = self.kind(one, inside)
        size = sum(reads.values()) + sum(writes.values())
        return Kernel(
            one.name, kind, self.place(one, inside), reads, writes, times,
            inside.operations if inside else 1, inside.apart if inside else size,
        )  # fmt: skip

    def kind(self, one: hlo.Instruction, inside: "_Inside | None") -> str:
        """Of matmul, attention, communication, those of BOUND, or a custom call."""
        operation = one.operation.removesuffix("-start")
        inner = inside.names if inside else {operation}
        target = one.attribute("custom_call_target")
        text = " ".join((operation, target, *inner, one.attribute("kind")))
        if any(name in inner for name in COLLECTIVES) or operation in COLLECTIVES:
            return TALKS
        if re.search(ATTENTION, text):
            return ATTENDS
        if re.search(MATMUL, text) or "__triton_nested_gemm" in one.rest:
            return MATMULS
        if operation == "custom-call":
            return f"custom call {target}"
        if inner & {"scatter", "sort", "select-and-scatter", "topk"}:
            return "scatter and sort"
        if inner & {"reduce", "reduce-window"}:
            return "reduction"
        plain = {"copy", "transpose", "concatenate", "slice", "dynamic-slice", "pad", "reverse",
                 "dynamic-update-slice", "broadcast", "iota", "gather", "convert"}  # fmt: skip
        return "copy" if inner <= plain else "elementwise"

    def place(self, one: hlo.Instruction, inside: "_Inside | None") -> str:
        """FILE:LINE of an instruction, or else of the last one inside it that has one."""
        for each in (one, *reversed(inside.own if inside else [])):
            if place := self.module.place(each):
                return place.removeprefix(self.root)
        return "made by XLA"

    def between(
        self, kernels: list[Kernel], kept: set[str], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """What lies between the kernels of one computation."""
        readers: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in kernels:
            for buffer in kernel.reads:
                readers[buffer].append(kernel)
        for writer in kernels:
            for buffer, size in writer.writes.items():
                own = readers[buffer]
                near = [reader for reader in own if reader.kind in BOUND]
                read = sum(reader.reads[buffer] for reader in near)
                alone = len(near) == len(own) and buffer not in kept
                if not near:
                    continue
                if writer.kind in BOUND:
                    key = (writer.place, tuple(sorted({k.place for k in near})), shapes[buffer])
                    saving = (read + size * alone) * writer.times
                    entry = self.left[key]
                    entry[0] += saving
                    entry[1] += writer.times
                elif writer.kind in (MATMULS, ATTENDS):
                    self.found.beside += read * writer.times


class _Names:
    """Which buffers the names of a computation stand for."""

    def __init__(self, own: list[hlo.Instruction]):
        self._by_name = {one.name: one for one in own}
        self._known: dict[str, dict[str, int]] = {}
        self._done = {
            one.operands[0]: one for one in own if one.operation.endswith("-done") and one.operands
        }

    def arrays(self, one: hlo.Instruction) -> list[tuple[tuple[int, ...], int]]:
        """(dims, bytes) of a kernel's results: of one that runs beside others, when it is done."""
        return self._done.get(one.name, one).arrays

    def written(self, one: hlo.Instruction) -> list[str]:
        """The buffers of a kernel's results."""
        return [f"{one.name}/{i}" for i in range(len(self.arrays(one)))]

    def of(self, name: str) -> list[str]:
        """The buffers behind a name."""
        return list(self.sizes(name))

    def sizes(self, name: str) -> dict[str, int]:
        """The buffers behind a name, with their bytes."""
        if name not in self._known:
            one = self._by_name.get(name)
            self._known[name] = self._find(one) if one else {}
        return self._known[name]

    def _find(self, one: hlo.Instruction) -> dict[str, int]:
        own = dict(zip(self.written(one), (size for _, size in self.arrays(one)), strict=True))
        if one.operation in ALIASES or one.operation.endswith(("-done", "-update")):
            return self.sizes(one.operands[0]) if one.operands else own
        if one.operation == "tuple":
            return {k: v for operand in one.operands for k, v in self.sizes(operand).items()}
        if one.operation == "get-tuple-element":
            behind = list(self.sizes(one.operands[0]).items())
            index = int(one.attribute("index") or 0)
            source = self._by_name.get(one.operands[0])
            whole = source and len(behind) == len(source.arrays)
            return dict([behind[index]]) if whole and index < len(behind) else own
        if one.operation == "constant":
            return {}
        return own


class _Inside:
    """A computation that runs as one kernel."""

    def __init__(self, module: hlo.Module, name: str):
        self.own = list(_flat(module, name))
        self.names = {one.operation for one in self.own if one.operation not in FREE}
        self.names |= {one.attribute("custom_call_target") for one in self.own} - {""}
        self._by_name = {one.name: one for one in module.computations.get(name, [])}
        self._users: dict[str, list[hlo.Instruction]] = defaultdict(list)
        for one in self._by_name.values():
            for operand in one.operands:
                self._users[operand].append(one)
        self._parameters = {
            int(one.rest.partition(")")[0]): one
            for one in self._by_name.values()
            if one.operation == "parameter"
        }
        root = next((one for one in self._by_name.values() if one.root), None)
        results = (
            root.operands if root and root.operation == "tuple" else [root.name if root else ""]
        )
        self._results = [self._behind(name) for name in results]

    @property
    def operations(self) -> int:
        """That compute or move something."""
        return sum(one.operation not in (*FREE, *MADE) for one in self.own)

    @property
    def apart(self) -> int:
        """Bytes that the operations would move, each a kernel of its own."""
        sizes = {one.name: one for one in self.own}
        total = 0
        for one in self.own:
            if one.operation in (*FREE, *MADE, *ALIASES):
                continue
            total += 2 * one.bytes if one.operation in SLICES else one.bytes
            if one.operation in SLICES:
                continue
            for operand in one.operands:
                source = sizes.get(operand)
                while source is not None and source.operation in (*ALIASES, "broadcast"):
                    source = sizes.get(source.operands[0]) if source.operands else None
                if source is not None and source.operation not in MADE:
                    total += source.bytes
        return total

    def read(self, number: int, size: int) -> int:
        """Bytes of operand `number`, which has `size`, that are read."""
        parameter = self._parameters.get(number)
        return size if parameter is None else min(size, self._read(parameter, size))

    def _read(self, one: hlo.Instruction, size: int) -> int:
        total = 0
        for user in self._users[one.name]:
            at = user.operands.index(one.name)
            if user.operation in (*ALIASES, "convert"):  # what is read of the copy is read of it
                total += self._read(user, user.bytes) * one.bytes // max(1, user.bytes)
            elif user.operation in SLICES and at == 0:
                total += user.bytes
            elif not (user.operation == "dynamic-update-slice" and at == 0):
                return size
        return total

    def written(self, sizes: list[int]) -> list[int]:
        """Bytes written of results of these sizes."""
        found = []
        for size, one in zip(sizes, self._results, strict=False):
            if one and one.operation == "dynamic-update-slice":
                update = self._by_name.get(one.operands[1])
                size = update.bytes if update else size
            found.append(size)
        return found + sizes[len(found) :]

    def _behind(self, name: str) -> hlo.Instruction | None:
        one = self._by_name.get(name)
        while one is not None and one.operation in ALIASES and one.operands:
            one = self._by_name.get(one.operands[0])
        return one


def _part(one: hlo.Instruction, number: int, size: int) -> int:
    """Bytes of operand `number` that a kernel which is one operation reads."""
    if one.operation in SLICES and number == 0:
        return min(size, one.bytes)
    if one.operation == "dynamic-update-slice" and number == 0:
        return 0
    return size


def _flat(module: hlo.Module, name: str) -> Iterator[hlo.Instruction]:
    """The instructions of a computation and of the fusions in it, without those of reducers."""
    for one in module.computations.get(name, []):
        if one.operation == "fusion":
            yield from _flat(module, one.attribute("calls"))
            yield dataclasses.replace(one, operation="bitcast")
        else:
            yield one
