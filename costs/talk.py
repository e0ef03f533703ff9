"""Where the devices of a program talk: its collectives, by kind, mesh axes and bytes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from costs.program import Op, Value
from sharding.gather import Axes

KINDS = {
    "all_gather": "all-gather",
    "all_gather_reduced": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "unreduced_psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
}


@dataclass(frozen=True)
class Talk:
    """One collective. Bytes as `costs.collectives` has them: those that it hands to a device, of a
    reduce-scatter those that it takes."""

    kind: str
    axes: Axes
    bytes: int
    ways: int  # devices that talk with one another


def talk_of(op: Op, sizes: dict[str, int]) -> list[Talk]:
    """The collectives of an operation."""
    found = []
    for kind, axes, size in _found(op):
        axes = tuple(axis for axis in sizes if axis in axes and sizes[axis] > 1)
        ways = math.prod(sizes[axis] for axis in axes)
        if ways > 1 and size:
            found.append(Talk(kind, axes, size * (ways if kind == "reduce-scatter" else 1), ways))
    return found


def _found(op: Op) -> Iterator[tuple[str, Axes, int]]:
    """(kind, axes, bytes of the result) of each."""
    size = sum(out.bytes for out in op.outs)
    if op.name in KINDS:
        axes = op.params.get("axis_name", op.params.get("axes", ()))
        axes = (axes,) if isinstance(axes, str) else tuple(a for a in axes if isinstance(a, str))
        yield KINDS[op.name], axes, size
    elif op.alone:
        return  # what comes in is split as outside, but here it is each device's own
    elif op.name == "dot_general":
        (sums, _), _ = op.params["dimension_numbers"]
        yield from _summed(op, [axis for i in sums for axis in dim(op.ins[0], i)])
    elif op.name.startswith("reduce_") and "axes" in op.params:
        yield from _summed(op, [axis for i in op.params["axes"] for axis in dim(op.ins[0], i)])
    elif op.name == "reshard":
        yield from _resharded(op.ins[0], op.outs[0])


def dim(value: Value, i: int) -> Axes:
    return value.axes[i] if i < len(value.axes) else ()


def _summed(op: Op, axes: list[str]) -> Iterator[tuple[str, Axes, int]]:
    """A sum over dims that are split crosses devices, unless it is left for later."""
    out = op.outs[0]
    left = [axis for axis in axes if axis not in out.unreduced]
    scattered = tuple(axis for axis in left if any(axis in own for own in out.axes))
    summed = tuple(axis for axis in left if axis not in scattered)
    if scattered:
        yield "reduce-scatter", scattered, out.bytes
    if summed:
        yield "all-reduce", summed, out.bytes


def _resharded(a: Value, b: Value) -> Iterator[tuple[str, Axes, int]]:
    rank = len(b.shape)
    before = {axis: i for i in range(rank) for axis in dim(a, i)}
    after = {axis: i for i in range(rank) for axis in dim(b, i)}
    gathered = tuple(axis for axis in before if axis not in after)
    moved = tuple(axis for axis in before if axis in after and before[axis] != after[axis])
    summed = a.unreduced - b.unreduced
    scattered = tuple(sorted(axis for axis in summed if axis in after))
    if gathered:
        yield "all-gather", gathered, b.bytes
    if moved:
        yield "all-to-all", moved, b.bytes
    if scattered:
        yield "reduce-scatter", scattered, b.bytes
    if summed - set(scattered):
        yield "all-reduce", tuple(sorted(summed - set(scattered))), b.bytes
