"""Bytes that a tree of arrays, or a compiled program, takes on each device."""

import math
from typing import Any

import jax


def state_bytes(tree: Any) -> dict[str, int]:
    """Bytes per device of each top-level part of `tree`.

    Leaves are arrays or ShapeDtypeStructs; one without a sharding counts whole. The sum is what
    every device holds, since shards are of equal size.
    """
    total: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path[:1], simple=True) or "array"
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total[name] = total.get(name, 0) + math.prod(shape) * leaf.dtype.itemsize
    return total


def program_bytes(stats: Any) -> int:
    """Bytes of a program by its memory_analysis(); donated arguments count once."""
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + results


def human(count: float) -> str:
    """Bytes in binary units: 512 B, 1.50 KiB, 41.8 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 999.5 or unit == "TiB":
            break
        count /= 1024
    digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {unit}"
