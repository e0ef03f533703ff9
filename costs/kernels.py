"""What XLA makes of a program: kernels in order, and the buffers that each reads and writes.

Rules, each seen in the buffers of programs compiled for H100s and TPUs (LOG.md):
- An elementwise operation, a slice, a transpose or a concatenation is no kernel of its own: whoever
  needs its result computes it from what it was made of. A matmul or a collective needs its operands
  in memory, so there it becomes a buffer.
- A loop writes its stacks in place and keeps them, and what it reads, until it ends. Its body does
  first what the next round waits for; gradients of weights come last. What it carries and writes
  parts of stays where it is, in the state that the step was given if it came from there.
- A result that several read is computed anew by each if that moves fewer bytes than writing it once
  and reading it from there.
- A kernel may write over an operand that nobody reads again, if that has as many bytes.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from costs.program import WHOLE, Op, Program, Value
from costs.talk import Talk, talk_of
from costs.work import flops_of


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = names(
    "reshape squeeze expand_dims copy copy_p name stop_gradient pvary pcast preduced mesh_cast "
    "bitcast_convert_type reduce_precision vary_unreduced_cast "
    "reduced_vary_cast unreduced_vary_cast sharding_constraint"
)
# Their results are smaller than what they read, so they read it through whatever made it.
REDUCES = names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin")
# Take part of what they read.
SLICES = names("slice split dynamic_slice gather")
FUSED = SLICES | names(
    "abs add add_any sub mul div rem max min neg sign exp exp2 log log1p expm1 tanh logistic sqrt "
    "rsqrt cbrt square pow integer_pow sin cos tan erf erf_inv floor ceil round clamp select_n eq "
    "ne lt le gt ge and or not xor is_finite convert_element_type broadcast_in_dim iota pad "
    "transpose rev concatenate stack shift_left shift_right_logical shift_right_arithmetic atan2 "
    "axis_index"
)
IN_PLACE = names("scatter scatter-add scatter_add dynamic_update_slice while")
GATHERS = names("all_gather all_gather_reduced all_gather_invariant")
SUMS = names("reduce_scatter unreduced_reduce_scatter psum psum_invariant unreduced_psum")
MANY = 2**20  # readers
SMALL = 2**16  # bytes that no plan depends on


@dataclass(frozen=True)
class Compiler:
    """What XLA does on a platform beyond the rules above."""

    # GPU: NCCL joins and splits along the outermost dim in memory. A weight that is gathered along
    # another dim is turned first, the whole stack of layers once and for all rounds; so is a
    # gradient before it is scattered.
    turns: bool = False
    # Sums over devices start late; those that only a loop's stacks ask for, during the next round.
    late: bool = False
    # GPU: what cuBLAS takes while a matmul runs, on a Hopper card.
    matmul: int = 0
    # GPU: a product whose rows meet one expert each becomes a dense one, with copies of its rows,
    # one for each expert, zero where a row is another's. LOG.md, "What XLA makes of a ragged dot".
    dense_experts: bool = False
    # GPU: kernels that read the same run as one: costs/siblings.py.
    joins: bool = False
    # GPU: what takes so long to compute that, asked for by several, it is written once.
    dear: frozenset[str] = frozenset()
    # TPU: a matmul computes its operands from what they are made of.
    dots_fuse: bool = False


COMPILERS = {
    "gpu": Compiler(
        turns=True, late=True, matmul=2**25, dense_experts=True, joins=True, dear=names("tanh")
    ),
    "tpu": Compiler(late=True, dots_fuse=True),
    "cpu": Compiler(),
}


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory that one array takes from a first kernel to a last."""

    bytes: int  # 0: it belongs to who called
    value: Value
    kind: str = ""  # "stack" or "carry" of a loop, else who made it


@dataclass(eq=False, slots=True)
class Kernel:
    """Something that runs: it reads, computes, writes, or talks to other devices."""

    name: str
    reads: dict[Buffer, int]  # bytes of each
    writes: list[Buffer] = field(default_factory=list)
    written: int = 0  # bytes; more than the new buffers' where it writes into one that exists
    flops: float = 0.0
    dtype: str = ""  # of the matmul
    talk: list[Talk] = field(default_factory=list)
    inner: list["Schedule"] = field(default_factory=list)
    rounds: int = 1
    link: int = 0  # bytes that it copies to the host's memory or from there
    in_place: int = (
        0  # how many results, the first, may lie over an operand that nobody reads again
    )
    phase: str = ""


@dataclass(eq=False, slots=True)
class Schedule:
    """Kernels in order; `kept` buffers are the results."""

    kernels: list[Kernel]
    kept: set[Buffer]
    always: list[Buffer] = field(default_factory=list)  # alive from before the first to the end


class Cell:
    """Where a value is: in a buffer, or yet to be computed from other cells by its readers."""

    __slots__ = ("buffer", "dear", "late", "readers", "sources", "value")

    def __init__(self, value, sources=(), buffer=None, late=None, readers=1, dear=False):
        self.value, self.sources, self.buffer, self.late = value, sources, buffer, late
        self.readers, self.dear = readers, dear


def schedule(program: Program, compiler: Compiler) -> Schedule:
    """The kernels of a whole program; its inputs lie in memory that is not counted here."""
    return _Scheduler(program, compiler, top=True).run()


class _Scheduler:
    def __init__(
        self, program: Program, compiler: Compiler, *, top: bool = False, carried: int = 0
    ):
        self.program, self.compiler, self.top = program, compiler, top
        self.carried = carried  # how many results, the first, go to the next round
        self.cells: dict[int, Cell] = {}
        self.kernels: list[Kernel] = []
        self.zeros: dict[tuple, Kernel] = {}
        self.turned: dict[int, Cell] = {}
        self.masked: dict[int, Buffer] = {}  # of rows: a copy for each expert
        self.always: list[Buffer] = []
        self.early: dict[int, dict[Buffer, int]] = {}  # of a sum yet to come: its operand, turned
        self.readers = readers(program)
        self.waiting = waiting(program) if top and compiler.late else frozenset()
        self.stacked = stacked(program, carried) if compiler.late and not top else frozenset()
        for value in program.ins:
            self.cells[id(value)] = Cell(value, buffer=Buffer(0, value))

    # ---- cells -----------------------------------------------------------------------------------

    def cell(self, value: Value) -> Cell:
        if id(value) not in self.cells:  # a literal, or an empty result
            self.cells[id(value)] = Cell(value)
        return self.cells[id(value)]

    def origins(self, cell: Cell, asked: dict[int, dict] | None = None) -> dict[Buffer, int]:
        """The buffers that computing this value reads, with the bytes of each.

        `asked`: of cells that were asked on the way here, since paths to one may be many.
        """
        asked = {} if asked is None else asked
        if id(cell) not in asked:
            asked[id(cell)] = self._origins(cell, asked)
        return asked[id(cell)]

    def _origins(self, cell: Cell, asked: dict[int, dict]) -> dict[Buffer, int]:
        if cell.late is not None:
            self.emit(cell.late)
        if cell.buffer is not None:
            return {cell.buffer: cell.buffer.value.bytes}
        found: dict[Buffer, int] = {}
        own = cell.value.bytes
        most = own if cell.value.made in SLICES else math.inf
        for source in cell.sources:
            for buffer, size in self.origins(source, asked).items():
                found[buffer] = max(found.get(buffer, 0), min(size, most))
        again, once = cell.readers * sum(found.values()), (cell.readers + 1) * own
        dear = cell.dear or again > sum(found.values()) + once
        several = cell.readers >= MANY or (cell.readers > 1 and dear)
        if found and own >= SMALL and several:
            return self.write(cell, found)
        return found

    def solid(self, value: Value) -> dict[Buffer, int]:
        """The value in a buffer of its own, which a kernel writes if there is none."""
        cell = self.cell(value)
        reads = self.origins(cell)
        if cell.buffer is not None:
            return reads
        if not reads:
            return self.constant(cell) if cell.value.bytes >= SMALL else {}
        return self.write(cell, reads)

    def write(self, cell: Cell, reads: dict[Buffer, int]) -> dict[Buffer, int]:
        """The value in a buffer, computed from what it reads."""
        size = cell.value.bytes
        cell.buffer = Buffer(size, cell.value, "fused")
        self.kernels.append(
            Kernel("fusion", reads, [cell.buffer], size, in_place=0, phase=cell.value.phase)
        )
        return {cell.buffer: size}

    def operand(self, value: Value) -> dict[Buffer, int]:
        """The value in a buffer for a matmul, which reads it with its dims in any order."""
        cell = self.cell(value)
        while cell.buffer is None and cell.value.made == "transpose":
            [cell] = cell.sources
        return self.solid(cell.value)

    def constant(self, cell: Cell) -> dict[Buffer, int]:
        """Zeros and the like. Equal ones are made together, by the first who needs one."""
        buffer = Buffer(cell.value.bytes, cell.value, "constant")
        key = (cell.value.shape, str(cell.value.dtype))
        if key not in self.zeros:
            self.zeros[key] = Kernel("constant", {})
            self.kernels.append(self.zeros[key])
        self.zeros[key].writes.append(buffer)
        self.zeros[key].written += buffer.bytes
        return {buffer: buffer.bytes}

    def result(self, op: Op, kind: str = "") -> list[Buffer]:
        buffers = [Buffer(out.bytes, out, kind or op.name) for out in op.outs]
        for out, buffer in zip(op.outs, buffers, strict=True):
            cell = self.cell(out)
            cell.buffer, cell.late = buffer, None
        return buffers

    # ---- operations ------------------------------------------------------------------------------

    def run(self) -> Schedule:
        for op in self.program.ops if self.top else from_results(self.program):
            self.take(op)
        return self.finish()

    def take(self, op: Op) -> None:
        if op.name in VIEWS or self.nothing(op):
            for a, b in zip(op.ins, op.outs, strict=False):
                self.cells[id(b)] = self.cell(a)
        elif op.name == "optimization_barrier":
            for a, b in zip(op.ins, op.outs, strict=True):
                self.solid(a)
                self.cells[id(b)] = self.cell(a)
        elif op.name in FUSED:
            sources = [self.cell(value) for value in op.ins]
            dear = op.name in self.compiler.dear
            dear = dear or any(one.dear and one.buffer is None for one in sources)
            for out in op.outs:
                asked = self.readers.get(id(out), 0)
                self.cells[id(out)] = Cell(out, sources, readers=asked, dear=dear)
        elif id(op) in self.waiting:
            if self.compiler.turns and op.params.get("scatter_dimension"):
                self.early[id(op)] = self.turn(self.solid(op.ins[0]))
            for out in op.outs:
                self.cells[id(out)] = Cell(out, late=op)
        else:
            self.emit(op)

    def nothing(self, op: Op) -> bool:
        """Whether an operation leaves what it is given as it is."""
        if op.name == "convert_element_type":
            return op.ins[0].dtype == op.outs[0].dtype
        return (
            op.name == "reshard"
            and op.ins[0].shape == op.outs[0].shape
            and not talk_of(op, self.program.sizes)
        )

    def emit(self, op: Op) -> None:
        """The kernels of an operation that is one."""
        if op.name in REDUCES or (self.compiler.dots_fuse and op.name == "dot_general"):
            reads: dict[Buffer, int] = {}
            for value in op.ins:
                reads |= self.origins(self.cell(value))
        elif op.name == "scan":
            self.loop(op)
            return
        elif op.name == "dynamic_update_slice":
            self.update(op)
            return
        else:
            reads, of = {}, self.operand if op.name == "dot_general" else self.solid
            for value in op.ins:
                reads |= of(value)
        if self.compiler.turns and op.name in SUMS and op.params.get("scatter_dimension"):
            reads = self.early.get(id(op)) or self.turn(reads)
        inner = [_Scheduler(body, self.compiler, carried=op.carried).run() for body in op.bodies]
        writes = self.result(op)
        flops, dtype = flops_of(op)
        written = sum(b.bytes for b in writes)
        name = op.name
        if self.compiler.dense_experts and name.startswith("ragged"):
            name, (flops, reads) = "dot_general", self.dense(op, flops)
        if flops and self.compiler.matmul and not op.name.startswith(WHOLE):
            space = Value((self.compiler.matmul,), np.dtype("int8"), made="cuBLAS")
            writes.append(Buffer(space.bytes, space))
        self.kernels.append(
            Kernel(
                name, reads, writes, written, flops, dtype,
                talk_of(op, self.program.sizes), inner,
                in_place=len(writes) * (op.name in IN_PLACE or op.name in SUMS), phase=op.phase,
                link=linked(op),
            )
        )  # fmt: skip
        if op.name in SUMS and any(id(out) in self.stacked for out in op.outs):
            self.always += [Buffer(value.bytes, value, "late") for value in op.ins]

    def update(self, op: Op) -> None:
        """Writes a part of an array, computed on the way, where the array lies."""
        whole, part = op.ins[:2]
        own = self.solid(whole)
        reads = dict.fromkeys(own, 0) | self.origins(self.cell(part))
        writes: list[Buffer] = []
        if own and not self.top and not any(buffer.bytes for buffer in own):
            self.cells[id(op.outs[0])] = self.cell(whole)  # what a loop carries
        else:
            writes = self.result(op)
        self.kernels.append(
            Kernel(op.name, reads, writes, part.bytes, in_place=len(writes), phase=op.phase)
        )

    def dense(self, op: Op, flops: float) -> tuple[float, dict[Buffer, int]]:
        """(FLOPs, bytes read) of a product of experts' rows that is computed for every expert.

        The copies stay for the gradient of the weights; where rows and experts are summed together,
        they are laid out once more.
        """
        [experts] = op.ins[2].shape
        reads: dict[Buffer, int] = {}
        for value in op.ins[:2]:
            own = self.solid(value)
            if len(value.shape) == 2 and experts > 1:  # [rows, .], not the experts' weights
                cell = self.cell(value)
                copy = Value((experts, *value.shape), value.dtype, made="experts")
                if id(cell) not in self.masked:
                    self.masked[id(cell)] = Buffer(copy.bytes, copy)
                    self.kernels.append(Kernel("fusion", own, [self.masked[id(cell)]], copy.bytes))
                own = {self.masked[id(cell)]: copy.bytes}
                if len(op.ins[1].shape) == 3:
                    own = self.turn(own)
            reads |= own
        return flops * experts, reads

    def turn(self, reads: dict[Buffer, int]) -> dict[Buffer, int]:
        """A copy of what is read, laid out anew."""
        [(buffer, size)] = reads.items()
        copy = Buffer(size, buffer.value, "turned")
        self.kernels.append(Kernel("transpose", reads, [copy], size))
        return {copy: size, buffer: 0}

    def loop(self, op: Op) -> None:
        body, first = op.bodies[0], len(op.ins) - op.sliced
        consts, state = op.ins[: first - op.carried], op.ins[first - op.carried : first]
        reads: dict[Buffer, int] = {}
        for value in consts:
            reads |= self.solid(value)
        for value, inside in zip(op.ins[first:], body.ins[first:], strict=True):
            if self.compiler.turns and gathered_inside(body, inside):
                reads |= self.stack_turned(value)
            else:
                reads |= self.solid(value)
        given = [self.solid(value) for value in state]
        for own in given:
            reads |= own
        inner = _Scheduler(body, self.compiler, carried=op.carried).run()
        writes = self.result(op, "stack")
        for buffer, own in zip(writes, given, strict=False):
            buffer.kind = "carry"
            if self.top and own and not any(b.bytes for b in own):
                buffer.bytes = 0  # of the state, which the step was given for good
        how = {"rounds": op.rounds, "in_place": op.carried, "phase": op.phase}
        self.kernels.append(Kernel("loop", reads, writes, inner=[inner], **how))

    def stack_turned(self, value: Value) -> dict[Buffer, int]:
        cell = self.cell(value)
        if id(cell) not in self.turned:
            reads = self.origins(cell)
            copy = Buffer(value.bytes, value, "turned")
            self.kernels.append(Kernel("transpose", reads, [copy], value.bytes))
            self.turned[id(cell)] = Cell(value, buffer=copy)
        return {self.turned[id(cell)].buffer: value.bytes}

    def finish(self) -> Schedule:
        kept: set[Buffer] = set()
        for i, value in enumerate(self.program.outs):
            cell = self.cell(value)
            if i < self.carried:
                kept |= self.solid(value).keys()
            elif cell.buffer is None or not self.top:
                # Written where it goes: into the state that the step was given, or a loop's stack.
                self.kernels.append(Kernel("store", self.origins(cell), written=value.bytes))
            else:
                kept.add(cell.buffer)
        return Schedule(self.kernels, kept, self.always)


def linked(op: Op) -> int:
    """Bytes that an operation copies between a device and its host."""
    if op.name != "device_put":
        return 0
    return sum(a.size for a, b in zip(op.ins, op.outs, strict=True) if a.host != b.host)


def readers(program: Program) -> dict[int, int]:
    """How many operations ask for each value, themselves or through views of it."""
    found: dict[int, int] = {id(value): 1 for value in program.outs}
    for op in reversed(program.ops):
        if op.name == "optimization_barrier":  # needs it in memory, so all others read it there
            found.update({id(value): MANY for value in op.ins})
            continue
        view = op.name in VIEWS
        asked = sum(found.get(id(out), 0) for out in op.outs) if view else 1
        for value in {id(value): value for value in op.ins}.values():
            found[id(value)] = found.get(id(value), 0) + asked
    return found


def waiting(program: Program) -> frozenset[int]:
    """Of the loss' gradients, made in the forward pass: sums over devices, and matmuls that nothing
    but such a sum asks for."""
    users: dict[int, list[Op]] = {}
    for op in program.ops:
        for value in op.ins:
            users.setdefault(id(value), []).append(op)
    last = {id(value) for value in program.outs}
    late: set[int] = set()
    passed: set[int] = set()  # what hands on to such a sum
    for op in reversed(program.ops):
        own = [user for out in op.outs for user in users.get(id(out), [])]
        only = own and all(id(user) in late | passed for user in own)
        only = only and not any(id(out) in last for out in op.outs)
        if op.phase == "forward" and (op.name in SUMS or (only and op.name == "dot_general")):
            late.add(id(op))
        elif only and (op.name in VIEWS or op.name in FUSED):
            passed.add(id(op))
    return frozenset(late)


def stacked(program: Program, carried: int) -> frozenset[int]:
    """Values that a loop's round puts into stacks, maybe changed on the way, and asks for nowhere
    else: what the round carries on, the next one waits for."""
    found = {id(value) for value in program.outs[carried:]}
    elsewhere = {id(value) for value in program.outs[:carried]}
    for op in reversed(program.ops):
        only = all(id(out) in found and id(out) not in elsewhere for out in op.outs)
        passes = only and (op.name in VIEWS or op.name in FUSED)
        (found if passes else elsewhere).update(id(value) for value in op.ins)
    return frozenset(found - elsewhere)


def gathered_inside(body: Program, value: Value) -> bool:
    """Whether the body gathers this input along a dim that is not its first."""
    ours, turned = {id(value)}, False
    for op in body.ops:
        if any(id(one) in ours for one in op.ins):
            if op.name in GATHERS:
                return turned or bool(op.params["all_gather_dimension"])
            if op.name == "transpose":
                turned = turned or op.params["permutation"][0] != 0
            if op.name in VIEWS or op.name in ("convert_element_type", "transpose", "slice"):
                ours.update(id(out) for out in op.outs)
    return False


def from_results(program: Program) -> list[Op]:
    """The operations, each just before the first that needs it, from the first result on."""
    makers = {id(out): op for op in program.ops for out in op.outs}
    order: list[Op] = []
    seen: set[int] = set()
    for result in program.outs:
        path = [(makers.get(id(result)), 0)]
        while path:
            op, i = path.pop()
            if op is None or (i == 0 and id(op) in seen):
                continue
            seen.add(id(op))
            if i < len(op.ins):
                path.append((op, i + 1))
                path.append((makers.get(id(op.ins[i])), 0))
            else:
                order.append(op)
    return order
