"""How XLA splits what the types leave to it: as the inputs are, dim by dim."""

from collections.abc import Sequence
from typing import Any

from sharding.gather import Axes


class Like:
    """Carries the axes of each dim."""

    def __init__(self, axes: Sequence[Axes]):
        self.axes = tuple(axes)


def like(name: str, params: dict, ins: Sequence[Any], shape: tuple[int, ...], sizes: dict) -> Like:
    """How the result of an operation is split, by how its inputs are."""
    split = [value for value in ins if any(value.axes)]
    if not split:
        return Like(())
    if name == "dot_general":
        return Like(of_product(params["dimension_numbers"], *ins))
    one = split[0]
    rank = len(one.shape)
    axes = (*one.axes, *((),) * (rank - len(one.axes)))
    if name == "transpose":
        return Like(axes[i] for i in params["permutation"])
    if name == "broadcast_in_dim":
        there = dict(zip(params["broadcast_dimensions"], axes, strict=True))
        return Like(there.get(i, ()) for i in range(len(shape)))
    if name in ("squeeze",):
        gone = {i % rank for i in params["dimensions"]}
        return Like(dim for i, dim in enumerate(axes) if i not in gone)
    if name.startswith("reduce_") and "axes" in params:
        return Like(dim for i, dim in enumerate(axes) if i not in params["axes"])
    if name == "reshape":
        return Like(of_reshape(one, axes, shape, sizes))
    return Like(axes if rank == len(shape) else ())


def of_product(dims: tuple, a: Any, b: Any) -> list[Axes]:
    """Batch dims, then those of either side that are left; an axis splits one dim only."""
    (a_sum, b_sum), (a_batch, b_batch) = dims
    found: list[Axes] = []
    seen: set[str] = set()

    def add(value: Any, i: int) -> None:
        dim = value.axes[i] if i < len(value.axes) else ()
        free = tuple(axis for axis in dim if axis not in seen)
        seen.update(free)
        found.append(free)

    for i in a_batch:
        add(a, i)
    for value, gone in ((a, {*a_sum, *a_batch}), (b, {*b_sum, *b_batch})):
        for i in range(len(value.shape)):
            if i not in gone:
                add(value, i)
    return found


def of_reshape(value: Any, axes: Sequence[Axes], shape: tuple[int, ...], sizes: dict) -> list[Axes]:
    """A dim that begins a group of joined or parted dims keeps its axes."""
    ways = [1] * len(axes)
    for i, dim in enumerate(axes):
        for axis in dim:
            ways[i] *= sizes[axis]
    whole = [size * n for size, n in zip(value.shape, ways, strict=True)]
    found: list[Axes] = []
    i, before, after = 0, 1, 1
    for size in shape:
        dim: Axes = ()
        while i < len(whole) and before <= after:
            if before == after and axes[i] and size % ways[i] == 0:
                dim = axes[i]
            before *= whole[i]
            i += 1
        after *= size
        found.append(dim)
    return found
