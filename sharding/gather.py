"""FSDP: each layer's weights, whole for the moment of their use.

The backward pass of a gather is a reduce-scatter on every mesh. A plain `reshard` does not promise
that: on a (data, fsdp) mesh XLA turns its transpose into an all-reduce and a slice. So the
all-gather stands here by name, and so does what its transpose becomes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str, ...]


def axes_of(dim: Any) -> Axes:
    """The mesh axes that split one dim, from its entry in a partition spec."""
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, str) else tuple(dim)


def without(dim: Any, axes: Axes) -> Any:
    """A partition spec's entry after a gather over `axes`."""
    left = tuple(axis for axis in axes_of(dim) if axis not in axes)
    return left[0] if len(left) == 1 else left or None


def varying(weight: jax.Array, axes: Axes = ()) -> jax.Array:
    """Inside a shard_map: `weight`, to meet what differs along `axes`; nothing moves.

    Backward its gradients are summed over `axes`, but not over what it is `reduced` over.
    """
    reduced = tuple(jax.typeof(weight).mat.reduced)
    weight = lax.pcast(weight, reduced, to="varying")
    return lax.pcast(weight, tuple(axis for axis in axes if axis not in reduced), to="varying")


def gather(weight: Any, rows: Axes) -> Any:
    """`weight` whole along the mesh axes `rows`, over which the activations' rows are split.

    Forward: one all-gather for each dim that these axes split. Backward: a reduce-scatter there,
    then an all-reduce over the rest of `rows`, of what the reduce-scatter left. Splits over other
    axes (tensor) stay. The result is `reduced` over `rows`: it can only enter a matmul.

    The dim stands first while it is gathered: a TPU's compiler turns a reduce-scatter of less than
    256 numbers a device along the last dim into an all-reduce, twice the bytes. On a GPU the
    program is the same either way.

    `weight` may be a pytree of arrays, such as int8 values and their scales.
    """

    def gather_array(w: jax.Array) -> jax.Array:
        spec = jax.typeof(w).sharding.spec
        split = {axis for dim in spec.partitions for axis in axes_of(dim)} | spec.reduced
        copies = tuple(axis for axis in rows if axis not in split)

        def local(w: jax.Array) -> jax.Array:
            w = lax.pcast(w, copies, to="reduced") if copies else w
            return gathered(w, spec.partitions, rows, to="reduced")

        whole = jax.P(*(without(dim, rows) for dim in spec.partitions), reduced=set(rows))
        return jax.shard_map(local, in_specs=spec, out_specs=whole)(w)

    return jax.tree.map(gather_array, weight)


def gathered(w: jax.Array, spec: Sequence, rows: Axes, to: str = "varying") -> jax.Array:
    """A device's part of a weight that lies as `spec` says, whole along `rows`; in a shard_map."""
    for i, dim in enumerate(spec):
        axes = tuple(axis for axis in axes_of(dim) if axis in rows)
        if axes:
            w = jnp.moveaxis(w, i, 0)
            # Devices talk over `rows`: each takes the weight's other parts; the bytes of the whole.
            w = lax.all_gather(w, axes, axis=0, tiled=True, to=to)
            w = jnp.moveaxis(w, 0, i)
    return w


def scattered(dw: jax.Array, spec: Sequence, rows: Axes) -> jax.Array:
    """The sum over `rows` of a gradient, of which each device gets the part that `spec` gives it.

    In a shard_map; the transpose of `gather`.
    """
    split = [axis for dim in spec for axis in axes_of(dim)]
    for i, dim in enumerate(spec):
        axes = tuple(axis for axis in axes_of(dim) if axis in rows)
        if axes:
            dw = jnp.moveaxis(dw, i, 0)
            # Devices talk over `rows`: sums of a gradient; the bytes of the whole weight.
            dw = lax.psum_scatter(dw, axes, scatter_dimension=0, tiled=True)
            dw = jnp.moveaxis(dw, 0, i)
    copies = tuple(axis for axis in rows if axis not in split)
    # Devices talk over what is left of `rows`: the same sum, twice the bytes of a device's part.
    return lax.psum(dw, copies) if copies else dw
