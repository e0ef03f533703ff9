"""The product of two matrices of 8-bit values with scales, both contracted over their last dim.

Shapes: R rows, N outputs, K contracted.
"""

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels import engine, hopper
from model.kernels.quantize import in_blocks


def matmul(
    x_RK: jax.Array,
    w_NK: jax.Array,
    sx: jax.Array,
    sw: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    block: int = 0,
) -> jax.Array:
    """[R, N] in `dtype`: x w' times the scales sx [R] and sw [N]. Of int8, sums are exact int32.

    With a `block` the scales are [R, ceil(K / block)] and [N, ceil(K / block)]: each block of K has
    its own, and the sums of the blocks add up in float32.

    On a Hopper GPU by a kernel of our own, where that applies.
    """
    if sx.ndim > 1 and sx.shape[1] == 1:
        block, sx, sw = 0, sx[:, 0], sw[:, 0]
    if engine.platform() == "gpu":
        if not (reason := hopper.why_not(x_RK, w_NK, block)):
            return hopper.matmul(x_RK, w_NK, sx.T, sw.T, jnp.dtype(dtype).name)
        engine.tell("8-bit products by XLA", reason)
    if not block:
        return _scaled(x_RK, w_NK, sx, sw).astype(dtype)
    parts = [in_blocks(x_RK, block), in_blocks(w_NK, block), sx, sw]
    parts = [jnp.moveaxis(part, 1, 0) for part in parts]
    first = _scaled(*(part[0] for part in parts))
    add = lambda total, part: (total + _scaled(*part), None)  # noqa: E731
    total, _ = lax.scan(add, first, [part[1:] for part in parts])
    return total.astype(dtype)


def _scaled(x_RK: jax.Array, w_NK: jax.Array, sx_R: jax.Array, sw_N: jax.Array) -> jax.Array:
    """[R, N] float32."""
    return _sums(x_RK, w_NK).astype(jnp.float32) * sx_R[:, None] * sw_N[None]


def _sums(x_RK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """[R, N]: int32 of int8, float32 of float8."""
    sums = jnp.int32 if x_RK.dtype == jnp.int8 else jnp.float32
    last = (((1,), (1,)), ((), ()))
    if len(x_RK) == 1 and sums == jnp.int32 and engine.platform() == "cpu":
        # A lone row XLA multiplies number by number, five times as long as two rows take.
        two_RK = jnp.pad(x_RK, ((0, 1), (0, 0)))
        return lax.dot_general(w_NK, two_RK, last, preferred_element_type=sums)[:, :1].T
    return lax.dot_general(x_RK, w_NK, last, preferred_element_type=sums)
