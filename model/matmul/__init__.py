"""The one einsum that every weight of the model goes through."""

import jax
import jax.numpy as jnp

from sharding.gather import axes_of, gather


def einsum(spec: str, x: jax.Array, w: jax.Array, *, out: jax.P) -> jax.Array:
    """`jnp.einsum(spec, x, w)` in x's dtype, for a weight that lies split on the mesh.

    `w` is cast to x's dtype, then gathered over the mesh axes that split x's rows (the dims of x
    that `w` does not have), so the gather moves compute precision. Where a contracted dim is split
    over devices, their sum crosses them; `out` says where the result lives.
    """
    x_dims, w_dims = spec.split("->")[0].split(",")
    x_spec = jax.typeof(x).sharding.spec
    rows = [
        axis
        for letter, dim in zip(x_dims, x_spec, strict=True)
        if letter not in w_dims
        for axis in axes_of(dim)
    ]
    return jnp.einsum(spec, x, gather(w.astype(x.dtype), tuple(rows)), out_sharding=out)
