"""The cache of decoding: keys and values of the tokens that every row already has.

Shapes: L layers of a place in the pattern, B rows, S tokens at most, T tokens that come,
K kv heads, H head size.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from sharding.layout import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of each place of the layer pattern, repetitions stacked, and the lengths."""

    layers: tuple[tuple[jax.Array, jax.Array], ...]  # per place [L, B, S, K, H], twice
    rest: tuple[tuple[jax.Array, jax.Array], ...]  # of the layers that remain, [B, S, K, H]
    lengths: jax.Array  # [B] int32, tokens of each row

    @property
    def size(self) -> int:
        """S: tokens that a row can hold."""
        return (self.layers or self.rest)[0][0].shape[-3]


def empty(cfg: ModelConfig, layout: Layout, rows: int, size: int) -> Cache:
    """A cache of `size` tokens for each of `rows` rows, in the compute dtype, on the mesh."""
    repeats, rest = divmod(cfg.layers, cfg.places)
    shape = (rows, size, cfg.kv_heads, cfg.head_dim)
    where = ("batch", None, "heads", None)

    def zeros(shape: tuple[int, ...], where: tuple[str | None, ...]) -> tuple[jax.Array, ...]:
        zero = jnp.zeros(shape, cfg.dtype, out_sharding=layout.spec(*where))
        return zero, jnp.zeros_like(zero)

    return Cache(
        tuple(zeros((repeats, *shape), (None, *where)) for _ in range(cfg.places)),
        tuple(zeros(shape, where) for _ in range(rest)),
        jnp.zeros((rows,), jnp.int32, out_sharding=layout.spec("batch")),
    )


def append(cache: Cache, layers: Any, rest: Any, counts_B: jax.Array) -> Cache:
    """The cache with T more tokens for each row, of which the first `counts_B` are its own.

    `layers` and `rest` are shaped as the cache's, with T in the place of S. What comes after a
    row's own tokens is written too, and overwritten by the next; beyond S nothing is written.
    """

    def write(held_SKH: jax.Array, more_TKH: jax.Array, at: jax.Array) -> jax.Array:
        where_T = at + jnp.arange(more_TKH.shape[0])
        return held_SKH.at[where_T].set(more_TKH, mode="drop", unique_indices=True)

    def rows(held_BSKH: jax.Array, more_BTKH: jax.Array, at_B: jax.Array) -> jax.Array:
        return jax.vmap(write)(held_BSKH, more_BTKH, at_B)

    def all_layers(held_LBSKH: jax.Array, more_LBTKH: jax.Array) -> jax.Array:
        stacked = held_LBSKH.ndim == 5
        local = jax.vmap(rows, in_axes=(0, 0, None)) if stacked else rows
        # Each device writes its own rows and heads.
        spec = jax.typeof(held_LBSKH).sharding.spec
        return jax.shard_map(local, out_specs=spec)(held_LBSKH, more_LBTKH, cache.lengths)

    return Cache(
        jax.tree.map(all_layers, cache.layers, layers),
        jax.tree.map(all_layers, cache.rest, rest),
        cache.lengths + counts_B,
    )
