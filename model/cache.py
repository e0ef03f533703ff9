"""The cache of decoding: keys and values of the tokens that every row already has.

Shapes: L layers of a place in the pattern, B rows, S tokens at most, T tokens that come,
K kv heads, H head size.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from model.config import ModelConfig
from sharding.layout import Layout

KeysValues = tuple[jax.Array, jax.Array]  # [B, K, S, H] each: a head's tokens lie together


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of each place of the layer pattern, repetitions stacked, and the lengths."""

    layers: tuple[KeysValues, ...]  # of each place, leading with L
    rest: tuple[KeysValues, ...]  # of the layers that remain
    lengths: jax.Array  # [B] int32, tokens of each row

    @property
    def size(self) -> int:
        """S: tokens that a row can hold."""
        return (self.layers or self.rest)[0][0].shape[-2]


def empty(cfg: ModelConfig, layout: Layout, rows: int, size: int) -> Cache:
    """A cache of `size` tokens for each of `rows` rows, in the compute dtype, on the mesh."""
    repeats, rest = divmod(cfg.layers, cfg.places)
    shape = (rows, cfg.kv_heads, size, cfg.head_dim)
    where = ("batch", "heads", None, None)

    def zeros(shape: tuple[int, ...], where: tuple[str | None, ...]) -> tuple[jax.Array, ...]:
        zero = jnp.zeros(shape, cfg.dtype, out_sharding=layout.spec(*where))
        return zero, jnp.zeros_like(zero)

    return Cache(
        tuple(zeros((repeats, *shape), (None, *where)) for _ in range(cfg.places)),
        tuple(zeros(shape, where) for _ in range(rest)),
        jnp.zeros((rows,), jnp.int32, out_sharding=layout.spec("batch")),
    )


def append(
    cache: Cache, layers: Any, rest: Any, counts_B: jax.Array, *, fresh: bool = False
) -> Cache:
    """The cache with T more tokens for each row, of which the first `counts_B` are its own.

    `layers` and `rest` are shaped as the cache's, with T in the place of S. What comes after a
    row's own tokens is written too, and overwritten by the next; beyond S nothing is written.
    `fresh` promises that the cache is empty.
    """

    def row(held_KSH: jax.Array, more_KTH: jax.Array, at: jax.Array) -> jax.Array:
        if fresh:
            return lax.dynamic_update_slice(held_KSH, more_KTH[:, : held_KSH.shape[1]], (0, 0, 0))
        where_T = at + jnp.arange(more_KTH.shape[1])
        return held_KSH.at[:, where_T].set(more_KTH, mode="drop", unique_indices=True)

    def all_layers(held: jax.Array, more: jax.Array) -> jax.Array:
        rows = jax.vmap(row)
        local = jax.vmap(rows, in_axes=(0, 0, None)) if held.ndim == 5 else rows
        # Each device writes its own rows and heads.
        spec = jax.typeof(held).sharding.spec
        return jax.shard_map(local, out_specs=spec)(held, more, cache.lengths)

    return Cache(
        jax.tree.map(all_layers, cache.layers, layers),
        jax.tree.map(all_layers, cache.rest, rest),
        cache.lengths + counts_B,
    )
