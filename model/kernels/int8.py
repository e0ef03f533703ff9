"""The product of two int8 matrices with scales, both contracted over their last dim.

Shapes: R rows, N outputs, K contracted.
"""

import jax
import jax.numpy as jnp
from jax import lax

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
    """[R, N] in `dtype`: x w' with exact int32 sums, times the scales sx [R] and sw [N].

    With a `block` the scales are [R, ceil(K / block)] and [N, ceil(K / block)]: each block of K has
    its own, and the sums of the blocks add up in float32.
    """
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
    sums = lax.dot_general(x_RK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * sx_R[:, None] * sw_N[None]
