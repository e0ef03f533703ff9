"""Sequence parallelism: between its matmuls each device of a tensor-parallel group has own tokens.

Korthikanti et al. 2022, arXiv:2205.05198. A block's first matmul needs all tokens of its rows and
gives part of the features; its last one gives part of a sum over features for all tokens. Instead
of an all-reduce after the last, tokens are gathered before the first and the sums are scattered
after the last: as many bytes, and all that stands between lies split.

XLA for CPU never makes a reduce-scatter from a reshard, and others not on every mesh; so both stand
here by name, and so does what their transposes become.
"""

import jax
from jax import lax

from sharding.gather import axes_of, without

Axes = tuple[str, ...]


def whole(x: jax.Array, dim: int, axes: Axes) -> jax.Array:
    """`x` with a dim whole that `axes` split, last.

    Forward: an all-gather. Backward: a reduce-scatter. The result is `reduced` over `axes`: it can
    only enter a matmul with a weight that they split.
    """
    spec = jax.typeof(x).sharding.spec
    out = (without(part, axes) if i == dim else part for i, part in enumerate(spec))

    def local(x: jax.Array) -> jax.Array:
        # Devices talk over `axes`: activations, the bytes of x whole along the dim.
        return lax.all_gather(x, axes, axis=dim, tiled=True, to="reduced")

    return jax.shard_map(local, out_specs=jax.P(*out, reduced=set(axes)))(x)


def scattered(y: jax.Array, dim: int, axes: Axes) -> jax.Array:
    """The sum over `axes` of y, `unreduced` over them, split over them along a dim.

    Forward: a reduce-scatter. Backward: an all-gather.
    """
    spec = jax.typeof(y).sharding.spec.partitions
    out = ((*axes_of(part), *axes) if i == dim else part for i, part in enumerate(spec))

    def local(y: jax.Array) -> jax.Array:
        # Devices talk over `axes`: parts of activations' sums, the bytes of y.
        return lax.psum_scatter(y, axes, scatter_dimension=dim, tiled=True)

    return jax.shard_map(local, out_specs=jax.P(*out))(y)
