"""The cache of decoding: keys and values of the tokens that every row already has.

Shapes: L layers of a place in the pattern, B rows, S tokens at most, T tokens that come,
K kv heads, H head size.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from model.config import ModelConfig
from sharding.layout import Layout

# [B, K, H, S] and [B, K, S, H]: each as the right side of a product of matrices wants to lie.
KeysValues = tuple[jax.Array, jax.Array]


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
        return (self.layers or self.rest)[0][0].shape[-1]


def empty(cfg: ModelConfig, layout: Layout, rows: int, size: int) -> Cache:
    """A cache of `size` tokens for each of `rows` rows, in the compute dtype, on the mesh."""
    repeats, rest = divmod(cfg.layers, cfg.places)

    def zeros(*stacked: int) -> KeysValues:
        where = layout.spec(*(None for _ in stacked), "batch", "heads", None, None)
        zero = functools.partial(jnp.zeros, dtype=cfg.dtype, out_sharding=where)
        heads = (*stacked, rows, cfg.kv_heads)
        return zero((*heads, cfg.head_dim, size)), zero((*heads, size, cfg.head_dim))

    return Cache(
        tuple(zeros(repeats) for _ in range(cfg.places)),
        tuple(zeros() for _ in range(rest)),
        jnp.zeros((rows,), jnp.int32, out_sharding=layout.spec("batch")),
    )


def append(
    cache: Cache,
    layers: Sequence[KeysValues],
    rest: Sequence[KeysValues],
    counts_B: jax.Array,
    *,
    fresh: bool = False,
) -> Cache:
    """The cache with T more tokens for each row, of which the first `counts_B` are its own.

    `layers` and `rest` are shaped as the cache's, with T in the place of S. What comes after a
    row's own tokens is written too, and overwritten by the next; beyond S nothing is written.
    `fresh` promises that the cache is empty.
    """

    def row(dim: int, held: jax.Array, more: jax.Array, at: jax.Array) -> jax.Array:
        """One row of a layer; its tokens lie along `dim`."""
        if fresh:
            most = min(cache.size, more.shape[dim])
            first = lax.slice_in_dim(more, 0, most, axis=dim)
            return lax.dynamic_update_slice(held, first, (0, 0, 0))
        where = (slice(None),) * dim + (at + jnp.arange(more.shape[dim]),)
        return held.at[where].set(more, mode="drop", unique_indices=True)

    def write(dim: int, held: jax.Array, more: jax.Array) -> jax.Array:
        rows = jax.vmap(functools.partial(row, dim))
        local = jax.vmap(rows, in_axes=(0, 0, None)) if held.ndim == 5 else rows
        # Each device writes its own rows and heads.
        spec = jax.typeof(held).sharding.spec
        return jax.shard_map(local, out_specs=spec)(held, more, cache.lengths)

    def part(held: Sequence[KeysValues], more: Sequence[KeysValues]) -> tuple[KeysValues, ...]:
        return tuple(
            (write(2, *keys), write(1, *values))
            for keys, values in (zip(*both, strict=True) for both in zip(held, more, strict=True))
        )

    lengths_B = cache.lengths + counts_B
    return Cache(part(cache.layers, layers), part(cache.rest, rest), lengths_B)
