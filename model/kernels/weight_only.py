"""Activations times a weight of 8 or 4 bits with scales, in the activations' dtype.

Shapes: R rows, N outputs, K contracted, P bytes of K.
"""

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels import engine, weight_only_hopper
from model.kernels.quantize import in_blocks


def matmul(x_RK: jax.Array, w_NK: jax.Array, sw: jax.Array, *, block: int = 0) -> jax.Array:
    """[R, N] in x's dtype: x w', times the scales sw [N], or [N, ceil(K / block)] of blocks of K.

    w is int8 or float8; or uint8 [N, P], two levels of 4 bits a byte, the first in its low half.

    Few rows on a Hopper GPU by a kernel of our own, where that applies.
    """
    if engine.platform() == "gpu":
        if not (reason := weight_only_hopper.why_not(x_RK, w_NK, block)):
            return weight_only_hopper.matmul(x_RK, w_NK, sw, block)
        engine.tell("weights of few bits by XLA", reason)
    return plain(x_RK, w_NK, sw, block=block)


def plain(x_RK: jax.Array, w_NK: jax.Array, sw: jax.Array, *, block: int = 0) -> jax.Array:
    """`matmul` by XLA, anywhere."""
    K, dtype = x_RK.shape[1], x_RK.dtype
    w_NK = unpacked(w_NK, K) if w_NK.dtype == jnp.uint8 else w_NK
    if block:
        parts = in_blocks(w_NK.astype(jnp.float32), block) * sw[..., None]
        w_NK = parts.reshape(len(w_NK), -1)[:, :K]
    sums = jnp.float32 if not block else dtype
    y_RN = lax.dot_general(
        x_RK, w_NK.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=sums
    )
    return y_RN if block else (y_RN * sw[None]).astype(dtype)


def packed(levels: jax.Array) -> jax.Array:
    """[..., K] levels -8 to 7 as [..., P] uint8; behind an odd K stands a zero."""
    nibbles = levels.astype(jnp.uint8) & 15
    nibbles = jnp.pad(nibbles, [(0, 0)] * (levels.ndim - 1) + [(0, levels.shape[-1] % 2)])
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpacked(w: jax.Array, K: int) -> jax.Array:
    """[..., K] int8 of `packed`."""
    both = jnp.stack([w << 4, w & 240], axis=-1).astype(jnp.int8) >> 4
    return both.reshape(*w.shape[:-1], -1)[..., :K]
