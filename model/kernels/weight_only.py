"""Activations times a weight of 8 or 4 bits with scales, in the activations' dtype.

Shapes: R rows, N outputs, K contracted, P bytes of K, G blocks of K; C outputs of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels import engine, weight_only_hopper
from model.kernels.nibbles import halves, unpacked
from model.kernels.quantize import in_blocks

CACHED = 1 << 17  # numbers of a chunk, in float32: what the cache of one core holds
FEWEST = 16  # outputs of a chunk


def matmul(
    x_RK: jax.Array,
    w_NK: jax.Array,
    sw: jax.Array,
    zeros: jax.Array | None = None,
    *,
    block: int = 0,
) -> jax.Array:
    """[R, N] in x's dtype: x w', times the scales sw [N], or [N, G] of blocks of K.

    w is int8 or float8; or uint8 [N, P], `nibbles.packed`. `zeros`, shaped as sw: the levels that
    stand for 0; without, that is level 0.

    Few rows on a Hopper GPU by a kernel of our own, where that applies; on a CPU by chunks.
    """
    where = engine.platform()
    reason = weight_only_hopper.why_not(x_RK, w_NK, block) if where == "gpu" else ""
    if where == "gpu" and not reason:
        y_RN = weight_only_hopper.matmul(x_RK, w_NK, sw, block)
    elif where == "cpu":
        y_RN = by_chunks(x_RK, w_NK, sw, block=block)
    else:
        if reason:
            engine.tell("weights of few bits by XLA", reason)
        return plain(x_RK, w_NK, sw, zeros, block=block)
    if zeros is not None:  # in float32: of two large numbers little may remain
        y_RN = y_RN.astype(jnp.float32) - beneath(x_RK, sw, zeros, block)
    return y_RN.astype(x_RK.dtype)


def plain(
    x_RK: jax.Array,
    w_NK: jax.Array,
    sw: jax.Array,
    zeros: jax.Array | None = None,
    *,
    block: int = 0,
) -> jax.Array:
    """`matmul` by XLA, anywhere."""
    dtype = x_RK.dtype
    if block or zeros is not None:
        w_NK = numbers(w_NK, sw, zeros, x_RK.shape[1], block=block).astype(dtype)
        return lax.dot_general(x_RK, w_NK, LAST, preferred_element_type=dtype)
    w_NK = levels(w_NK, x_RK.shape[1]).astype(dtype)
    y_RN = lax.dot_general(x_RK, w_NK, LAST, preferred_element_type=jnp.float32)
    return (y_RN * sw[None]).astype(dtype)


LAST = (((1,), (1,)), ((), ()))  # what dots contract: the last dims of both


def levels(w_NK: jax.Array, K: int) -> jax.Array:
    """[N, K]: those of a weight, packed or not."""
    return unpacked(w_NK, K) if w_NK.dtype == jnp.uint8 else w_NK


def numbers(
    w_NK: jax.Array, sw: jax.Array, zeros: jax.Array | None, K: int, *, block: int = 0
) -> jax.Array:
    """[N, K] float32: what a weight's levels stand for."""
    N, w_NK = len(w_NK), levels(w_NK, K)
    if jnp.issubdtype(w_NK.dtype, jnp.floating):
        w_NK = w_NK.astype(jnp.float16)  # holds float8; XLA on CPU then takes a quarter of the time
    parts = in_blocks(w_NK.astype(jnp.float32), block)
    if zeros is not None:
        parts = parts - zeros.reshape(N, -1)[..., None].astype(jnp.float32)
    return (parts * sw.reshape(N, -1)[..., None]).reshape(N, -1)[:, :K]


def beneath(x_RK: jax.Array, sw: jax.Array, zeros: jax.Array, block: int) -> jax.Array:
    """[R, N] float32: what `zeros` add to a product that takes level 0 for them."""
    x_RG = jnp.sum(in_blocks(x_RK.astype(jnp.float32), block), axis=-1)
    zeros_NG = (zeros.astype(jnp.float32) * sw).reshape(len(sw), -1)
    return lax.dot_general(x_RG, zeros_NG, LAST)


# ---- on a CPU ------------------------------------------------------------------------------------


def by_chunks(x_RK: jax.Array, w_NK: jax.Array, sw: jax.Array, *, block: int = 0) -> jax.Array:
    """`matmul` without zeros, float32, some outputs at a time, whose numbers never leave the cache.

    All at once, XLA writes them to memory in float32 and reads them back: seven times as long as
    float32 weights take, where chunks take half.
    """
    if w_NK.dtype == jnp.uint8 and block % 2:
        return plain(x_RK.astype(jnp.float32), w_NK, sw, block=block)
    (R, K), N = x_RK.shape, len(w_NK)
    C = min(N, max(FEWEST, 1 << (CACHED // K).bit_length() >> 1))
    chunks = -(-N // C)
    x_RK = x_RK.astype(jnp.float32)
    if w_NK.dtype == jnp.uint8:  # the two levels of a byte apart: each meets every second input
        x_RK = jnp.pad(x_RK, ((0, 0), (0, K % 2)))
        parts = [x_RK[:, ::2], x_RK[:, 1::2]]
    else:
        parts = [x_RK]

    def one(start: jax.Array) -> jax.Array:
        """[C, R]: the outputs from `start` on."""
        own = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=C)
        w_C, s = own(w_NK), own(sw)
        each = zip(halves(w_C) if len(parts) > 1 else [w_C], parts, strict=True)
        size = block // len(parts)
        return sum(
            lax.dot_general(numbers(w, s, None, x.shape[1], block=size), x, LAST) for w, x in each
        )

    # The last chunk may begin with outputs of the one before.
    starts = jnp.minimum(jnp.arange(chunks) * C, N - C)
    y_NR = lax.map(one, starts)
    last = y_NR[-1, chunks * C - N :]
    y_NR = jnp.concatenate([y_NR[:-1].reshape(-1, R), last])
    return y_NR.T
