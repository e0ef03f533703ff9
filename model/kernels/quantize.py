"""Symmetric rounding to 8 bits: values times a scale for each row, or each block of a row.

A scale is the largest magnitude of what shares it, over the largest 8-bit value. Where a number is
not finite the scale is not either, and so is all that is made with it.

Shapes: R rows, K columns.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rows(
    x_RK: jax.Array, *, block: int = 0, largest: jax.Array | None = None, times: jax.Array = None
) -> tuple[jax.Array, jax.Array]:
    """(int8 [R, K], float32 scales [R]), or [R, ceil(K / block)] of blocks of columns.

    `largest`, shaped as the scales: the magnitudes, where x is part of what shares them. `times`,
    [K], multiplies the columns of x before anything else.
    """
    x_RK = x_RK.astype(jnp.float32)
    x_RK = x_RK if times is None else x_RK * times[None]
    parts = in_blocks(x_RK, block)
    largest = magnitudes(parts) if largest is None else largest.reshape(parts.shape[:-1])
    scales = largest / np.float32(127)
    inverse = jnp.where(scales > 0, 1 / scales, 0)
    values = jnp.round(jnp.clip(parts * inverse[..., None], -127, 127)).astype(jnp.int8)
    values = values.reshape(len(x_RK), -1)[:, : x_RK.shape[1]]
    return values, scales if block else scales[:, 0]


def columns(x_RK: jax.Array, *, block: int = 0) -> tuple[jax.Array, jax.Array]:
    """`rows` of x transposed: (int8 [K, R], float32 [K] or [K, ceil(R / block)])."""
    return rows(x_RK.T, block=block)


def magnitudes(x: jax.Array) -> jax.Array:
    """The largest magnitude along the last dim; infinite where a number is not finite.

    Not NaN: a maximum over devices may lose that.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    return jnp.where(jnp.isnan(largest), jnp.inf, largest).astype(jnp.float32)


def in_blocks(x_RK: jax.Array, block: int) -> jax.Array:
    """[R, blocks, block], the last filled with zeros; one block of all if `block` is 0."""
    K = x_RK.shape[1]
    block = block or K
    return jnp.pad(x_RK, ((0, 0), (0, -K % block))).reshape(len(x_RK), -1, block)
