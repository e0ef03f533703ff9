"""Rotary position embedding. Su et al. 2021, arXiv:2104.09864.

Shapes: B rows, T tokens, N heads (any number of dims), H head size, h = H / 2.
"""

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, [B, T, h] float32


def rotation(positions_BT: jax.Array, head_dim: int, theta: float) -> Rotation:
    """The angles of each position: pair i of a head turns by position / theta^(2i / H)."""
    frequency_h = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_BTh = positions_BT[..., None].astype(jnp.float32) * frequency_h[None, None]
    return jnp.cos(angle_BTh), jnp.sin(angle_BTh)


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn the pairs (i, i + h) of each head; in float32, back in x's dtype."""
    heads = x_BTNH.ndim - 3
    cos, sin = (jnp.expand_dims(part, tuple(range(2, 2 + heads))) for part in rotation)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
