"""A traced step as a flat list of operations on the parts of arrays that one device holds.

Read from its jaxpr: whatever the step does, on whatever mesh, is what gets counted. An array's type
says which mesh axes split it, so shapes here are those of one device's part, and collectives stand
where the step has them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import AxisType

from costs import spread
from sharding.gather import Axes, axes_of

# A function whose name begins so stays one operation: costs/standin.py.
WHOLE = ("attention_forward", "attention_backward", "matmul_8bit", "round_8bit")


@dataclass(eq=False, slots=True)
class Value:
    """An array, as far as one device holds it."""

    shape: tuple[int, ...]  # of one device's part
    dtype: Any
    axes: tuple[Axes, ...] = ()  # that split each dim
    unreduced: frozenset[str] = frozenset()  # axes over whose devices it is yet to be summed
    made: str = ""  # by which operation; "": it came in
    phase: str = ""  # "forward" or "backward", where autodiff says so
    host: bool = False  # it lies in the host's memory

    @property
    def size(self) -> int:
        """Bytes, wherever they lie."""
        return math.prod(self.shape) * getattr(self.dtype, "itemsize", 4)

    @property
    def bytes(self) -> int:
        """Of the device's memory."""
        return 0 if self.host else self.size


@dataclass(eq=False, slots=True)
class Op:
    """One operation; a loop or a conditional with the programs inside it."""

    name: str
    ins: list[Value]
    outs: list[Value]
    params: dict[str, Any] = field(default_factory=dict)
    bodies: list["Program"] = field(default_factory=list)  # a loop's one, a conditional's branches
    rounds: int = 1  # of a loop
    carried: int = 0  # how many outputs, the first, go from round to round
    sliced: int = 0  # how many inputs, the last, are stacks of which each round takes its own
    phase: str = ""
    alone: bool = False  # in a shard_map, where devices talk by name only


@dataclass(eq=False, slots=True)
class Program:
    """What comes in, what is done in order, what comes out."""

    ins: list[Value]
    ops: list[Op]
    outs: list[Value]
    sizes: dict[str, int]  # devices along each mesh axis


def read(closed: core.ClosedJaxpr, sizes: dict[str, int]) -> Program:
    """The program of a traced function, on a mesh of these sizes."""
    return _Reader(sizes).program(closed.jaxpr, None, "")


def trimmed(program: Program) -> Program:
    """`program` without operations whose results nobody uses."""
    used, kept = {id(value) for value in program.outs}, []
    for op in reversed(program.ops):
        if any(id(out) in used for out in op.outs):
            used.update(id(value) for value in op.ins)
            kept.append(op)
    return Program(program.ins, kept[::-1], program.outs, program.sizes)


def on_host(program: Program) -> int:
    """Bytes of the host's memory in which what the forward pass made waits for the backward."""
    size = 0
    for op in program.ops:
        if op.phase == "forward" and op.name == "device_put":
            size += sum(out.size for out in op.outs if out.host)
        rounds = op.rounds if op.phase == "forward" else 1  # else each round has both passes
        size += rounds * max(map(on_host, op.bodies), default=0)
    return size


def split_of(aval: Any) -> tuple[tuple[Axes, ...], frozenset[str]]:
    """(axes that split each dim, axes to sum over) by the type of an array."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return (), frozenset()
    dims = getattr(sharding.spec, "partitions", sharding.spec)
    axes = tuple(axes_of(dim) for dim in dims)
    return axes, frozenset(getattr(sharding.spec, "unreduced", None) or ())


def automatic(aval: Any) -> bool:
    """Whether XLA, not the type, says how an array of this type is split."""
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and AxisType.Auto in sharding.mesh.axis_types


def called(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """The jaxpr that an equation only wraps; None if it does something itself."""
    if eqn.primitive.name in ("pallas_call", "core_map", "run_state", "mosaic_gpu_kernel"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(eqn.invars):
            return inner
    return None


class _Reader:
    """Walks a jaxpr. What only wraps other equations is replaced by them."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.rows: dict[int, dict[int, Value]] = {}  # of stacks that unrolled loops write or read
        self.alone = False  # in a shard_map

    def program(self, jaxpr: core.Jaxpr, given: Sequence[Value] | None, scope: str) -> Program:
        """`jaxpr` as a program of its own; `given` values show how its inputs are split."""
        env: dict[Any, Value] = {}
        given = given or [None] * len(jaxpr.invars)
        ins = [self.bind(env, var, like=one) for var, one in zip(jaxpr.invars, given, strict=True)]
        self.constants(jaxpr, env)
        ops = list(self.ops(jaxpr, env, scope))
        outs = [self.value(env, out) for out in jaxpr.outvars]
        return trimmed(Program(ins, ops, outs, self.sizes))

    def bind(
        self, env: dict, var: Any, made: str = "", phase: str = "", like: Value | None = None
    ) -> Value:
        """A value for a variable; where types do not tell, it is split like `like`."""
        axes, unreduced = split_of(var.aval)
        if automatic(var.aval) and like is not None:
            axes = like.axes
        ways = (math.prod(self.sizes[axis] for axis in dim) for dim in axes)
        shape = itertools.zip_longest(var.aval.shape, ways, fillvalue=1)
        part = tuple(-(-size // n) for size, n in shape)
        host = getattr(var.aval, "memory_space", None) == jax.memory.Space.Host
        value = env[var] = Value(part, var.aval.dtype, axes, unreduced, made, phase, host)
        return value

    def constants(self, jaxpr: core.Jaxpr, env: dict) -> None:
        for var in jaxpr.constvars:
            self.bind(env, var, "literal")

    def value(self, env: dict, atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            return Value(np.shape(atom.val), atom.aval.dtype, made="literal")
        return env[atom]

    def ops(self, jaxpr: core.Jaxpr, env: dict, scope: str) -> Iterator[Op]:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            stack = f"{scope}/{eqn.source_info.name_stack}"
            phase = "backward" if "transpose(" in stack else "forward" if "jvp(" in stack else ""
            ins = [self.value(env, atom) for atom in eqn.invars]
            inner = called(eqn)
            if name == "scan":
                yield from self.scan(eqn, env, ins, stack, phase)
            elif name in ("while", "cond"):
                yield self.branches(eqn, env, ins, stack, phase)
            elif inner is not None and not eqn.params.get("name", "").startswith(WHOLE):
                if eqn.params.get("prevent_cse") and eqn.params.get("differentiated"):
                    # So that XLA does not find what the forward pass made instead of making it
                    # again: what goes in has to lie in memory.
                    made = [dataclasses.replace(value) for value in ins]
                    yield Op("optimization_barrier", ins, made, phase=phase)
                    ins = made
                own = dict(zip(inner.invars, ins, strict=True))
                self.constants(inner, own)
                before, self.alone = self.alone, self.alone or name == "shard_map"
                yield from self.ops(inner, own, stack)
                self.alone = before
                for var, atom in zip(eqn.outvars, inner.outvars, strict=True):
                    env[var] = self.value(own, atom)
            else:
                name = eqn.params["name"] if inner is not None else name
                outs = []
                for var in eqn.outvars:
                    like = spread.like(name, eqn.params, ins, var.aval.shape, self.sizes)
                    outs.append(self.bind(env, var, name, phase, like))
                yield Op(name, ins, outs, eqn.params, phase=phase, alone=self.alone)

    def scan(
        self, eqn: core.JaxprEqn, env: dict, ins: list[Value], stack: str, phase: str
    ) -> Iterator[Op]:
        jaxpr, rounds = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
        # A stack has a dim more outside than inside; the names of the counts change with jax.
        carried = sum(
            len(a.aval.shape) == len(b.aval.shape) for a, b in both(eqn.outvars, jaxpr.outvars)
        )
        sliced = sum(
            len(a.aval.shape) > len(b.aval.shape) for a, b in both(eqn.invars, jaxpr.invars)
        )
        if rounds <= eqn.params["unroll"]:
            yield from self.unrolled(eqn, env, ins, carried, sliced, (stack, phase))
            return
        first = len(ins) - sliced
        given = [*ins[:first], *(Value((), None, value.axes[1:]) for value in ins[first:])]
        body = self.program(jaxpr, given, stack)
        outs = [
            self.bind(env, var, "scan", phase, like)
            for var, like in zip(
                eqn.outvars,
                [
                    *body.outs[:carried],
                    *(Value((), None, ((), *v.axes)) for v in body.outs[carried:]),
                ],
                strict=True,
            )
        ]
        yield Op("scan", ins, outs, {}, [body], rounds, carried, sliced, phase)

    def unrolled(
        self,
        eqn: core.JaxprEqn,
        env: dict,
        ins: list[Value],
        carried: int,
        sliced: int,
        where: tuple,
    ) -> Iterator[Op]:
        """A loop whose rounds the compiler sees one by one."""
        (stack, phase), jaxpr = where, eqn.params["jaxpr"].jaxpr
        rounds, first = range(eqn.params["length"]), len(ins) - sliced
        consts, state, stacks = ins[: first - carried], ins[first - carried : first], ins[first:]
        made: list[list[Value]] = [[] for _ in eqn.outvars[carried:]]
        for i in reversed(rounds) if eqn.params["reverse"] else rounds:
            own: dict[Any, Value] = {}
            slices = []
            for source in stacks:
                rows = self.rows.setdefault(id(source), {})
                if i not in rows:  # else a loop before this one made it, or asked for it
                    shape, axes = source.shape[1:], source.axes[1:]
                    rows[i] = Value(shape, source.dtype, axes, made="slice", phase=phase)
                    yield Op("slice", [source], [rows[i]], phase=phase)
                slices.append(rows[i])
            own.update(zip(jaxpr.invars, [*consts, *state, *slices], strict=True))
            self.constants(jaxpr, own)
            yield from self.ops(jaxpr, own, stack)
            results = [self.value(own, out) for out in jaxpr.outvars]
            state = results[:carried]
            for rows, row in zip(made, results[carried:], strict=True):
                rows.append(row)
        env.update(zip(eqn.outvars[:carried], state, strict=True))
        for var, rows in zip(eqn.outvars[carried:], made, strict=True):
            rows = rows[::-1] if eqn.params["reverse"] else rows
            out = self.bind(env, var, "stack", phase, Value((), None, ((), *rows[0].axes)))
            self.rows[id(out)] = dict(enumerate(rows))
            yield Op("stack", rows, [out], phase=phase)

    def branches(
        self, eqn: core.JaxprEqn, env: dict, ins: list[Value], stack: str, phase: str
    ) -> Op:
        """A conditional, or a loop of unknown length, which counts as one round."""
        if eqn.primitive.name == "while":
            skip = eqn.params["cond_nconsts"]
            inner, ins = [eqn.params["body_jaxpr"]], ins[skip:]
        else:
            inner, ins = eqn.params["branches"], ins[1:]
        bodies = [self.program(one.jaxpr, ins, stack) for one in inner]
        outs = [
            self.bind(env, var, eqn.primitive.name, phase, like)
            for var, like in zip(eqn.outvars, bodies[0].outs, strict=True)
        ]
        carried = len(outs) if eqn.primitive.name == "while" else 0
        return Op(eqn.primitive.name, ins, outs, {}, bodies, 1, carried, 0, phase)


def both(a: Sequence, b: Sequence) -> Iterator[tuple]:
    return zip(a, b, strict=True)
