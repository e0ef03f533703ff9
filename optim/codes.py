"""How a moment of Adam is kept: as it is, in bfloat16, or a byte a number.

A byte is a place on a curve between 0 and the largest number of its block. Blocks: Dettmers et al.
2021, arXiv:2110.02861. Curves instead of their table, since a power needs no look-up: they are fine
where most numbers are, near zero (companding; Ortiz et al. 2026, arXiv:2602.23349). The byte is
rounded by chance: to the nearest, an average that moves by less than half a step a time would
stand still (Topollai & Choromanska 2026, arXiv:2603.16731).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from optim import rounding

LEAST = 1e-30  # of a block's largest number: below, a float32 has no room for the smaller ones


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """An array in bytes.

    int8 of both signs: value = scale * sign(code) * (code / 127)^2.
    uint8 of positive numbers: value = scale * (code / 255)^4; a positive one is never 0, since a
    step divides by its root.
    """

    codes: jax.Array  # shaped like the array
    scale: jax.Array  # float32, one for each block; a row's blocks come last


Kept = jax.Array | Blocks


def widened(kept: Kept) -> jax.Array:
    """The numbers [rows, columns], float32."""
    if not isinstance(kept, Blocks):
        return kept.astype(jnp.float32)
    rows, columns = kept.codes.shape
    codes = kept.codes.reshape(rows, kept.scale.shape[1], -1).astype(jnp.float32)
    if kept.codes.dtype == jnp.int8:
        values = jnp.abs(codes) * codes / 127.0**2
    else:
        values = jnp.square(jnp.square(codes / 255))
    return (kept.scale[:, :, None] * values).reshape(rows, columns)


def narrowed(x: jax.Array, like: Any, bits: jax.Array) -> Kept:
    """The float32 numbers [rows, columns] kept as `like` is; `bits`: 32 random ones for each."""
    if not isinstance(like, Blocks):
        return rounding.to_bfloat16(x, bits) if like.dtype == jnp.bfloat16 else x
    rows, columns = x.shape
    x = x.reshape(rows, like.scale.shape[1], -1)
    chance = (bits >> 8).astype(jnp.float32).reshape(x.shape) / 2**24
    size = jnp.abs(x)
    scale = jnp.max(size, axis=-1)
    size = size / jnp.maximum(scale, LEAST)[:, :, None]
    if like.codes.dtype == jnp.int8:
        below = jnp.floor(127 * jnp.sqrt(size))
        up = chance * (2 * below + 1) < size * 127.0**2 - below**2
        codes = jnp.sign(x) * jnp.minimum(below + up, 127)
    else:
        below = jnp.floor(255 * jnp.sqrt(jnp.sqrt(size)))
        floor, above = below**4, (below + 1) ** 4
        up = (chance * (above - floor) < size * 255.0**4 - floor) | ((below == 0) & (x > 0))
        codes = jnp.minimum(below + up, 255)
    return Blocks(codes.astype(like.codes.dtype).reshape(rows, columns), scale)
