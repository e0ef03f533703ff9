"""The one einsum that every weight of the model goes through."""

import functools
import math

import jax
import jax.numpy as jnp

from sharding import stages
from sharding.gather import axes_of, gather

FEW = 16  # rows below which the weight is the left operand: on CPU up to twice as fast


def einsum(spec: str, x: jax.Array, w: jax.Array, *, out: jax.P) -> jax.Array:
    """`jnp.einsum(spec, x, w)` in x's dtype, for a weight that lies split on the mesh.

    `w` is cast to x's dtype, then gathered over the mesh axes that split x's rows (the dims of x
    that `w` does not have), so the gather moves compute precision. Where a contracted dim is split
    over devices, their sum crosses them; `out` says where the result lives.

    For rows in flight `w` leads with the stages. Then the backward pass casts and gathers it again:
    otherwise a stage keeps a copy of its weights for every micro-batch that is on its way.
    """
    x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
    if w.ndim > len(w_dims):
        of_stages = functools.partial(
            einsum, f"s{x_dims},s{w_dims}->s{y_dims}", out=stages.apart_spec(out)
        )
        return stages.together(jax.checkpoint(of_stages, prevent_cse=False)(stages.apart(x), w))
    x_sharding = jax.typeof(x).sharding
    w = w.astype(x.dtype)
    if x_sharding.mesh.size == 1:
        inputs = sum(letter in x_dims for letter in w_dims)
        assert y_dims == x_dims[: x.ndim - inputs] + w_dims[: w.ndim - inputs], spec
        whole = (jax.reshard(a, jax.P()) for a in (x, w))  # reshapes may then join any dims
        return jax.reshard(product(*whole, inputs), out)
    rows = [
        axis
        for letter, dim in zip(x_dims, x_sharding.spec, strict=True)
        if letter not in w_dims
        for axis in axes_of(dim)
    ]
    return jnp.einsum(spec, x, gather(w, tuple(rows)), out_sharding=out)


def product(x: jax.Array, w: jax.Array, inputs: int) -> jax.Array:
    """x times w over the last `inputs` dims of both: rows of x, then rows of w.

    As a product of two matrices: of more dims XLA makes a transposed copy of the weight on CPU,
    which at batch 1 takes twenty times as long as the product.
    """
    size = math.prod(w.shape[w.ndim - inputs :])
    x_RI, w_OI = x.reshape(-1, size), w.reshape(-1, size)
    if x_RI.shape[0] < FEW:
        y_RO = jnp.einsum("oi,ri->or", w_OI, x_RI).T
    else:
        y_RO = jnp.einsum("ri,oi->ro", x_RI, w_OI)
    return y_RO.reshape(*x.shape[: x.ndim - inputs], *w.shape[: w.ndim - inputs])
