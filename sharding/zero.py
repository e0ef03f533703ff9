"""ZeRO-1: of what an optimizer keeps, each copy of a parameter holds and updates a part of its own.

Rajbhandari et al. 2019, arXiv:1910.02054. Parameters are whole on every device along `data`;
moments need not be. Each device takes its part of the gradient's sum over `data` and of the
parameter, updates that, and gathers the updates of all.
"""

import functools
from typing import Any

import jax

from sharding.gather import Axes, axes_of, scattered, without
from sharding.layout import divides


def apart_spec(shape: tuple[int, ...], spec: jax.P, axes: Axes) -> jax.P:
    """`spec` with each of `axes` added that it lacks, at the first dim that this divides, if any.

    Of stacked weights that is their layers: an optimizer for matrices then has whole ones.
    """
    dims = [axes_of(dim) for dim in (*spec.partitions, *[None] * (len(shape) - len(spec)))]
    for axis in axes:
        if any(axis in dim for dim in dims):
            continue
        longer = (
            [(*dim, axis) if i == at else dim for i, dim in enumerate(dims)]
            for at in range(len(dims))
        )
        dims = next((option for option in longer if divides(shape, jax.P(*option))), dims)
    return jax.P(*(without(dim, ()) for dim in dims))


def several(axes: Axes) -> Axes:
    """Those of `axes` with more than one device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def lent(weight: jax.Array, axes: Axes) -> jax.Array:
    """`weight` to differentiate by: its gradient will be each device's own part of a sum over those
    of `axes` that do not split it. It can only enter a matmul, or what takes `varying` weights.
    """
    spec = jax.typeof(weight).sharding.spec
    split = {axis for dim in spec for axis in axes_of(dim)}
    more = set(several(axes)) - split
    return jax.reshard(weight, jax.P(*spec, reduced=more)) if more else weight


def own(tree: Any, axes: Axes) -> Any:
    """Each array as `apart_spec` splits it. Copies let go of what others keep, and nothing moves;
    a sum of which each device has a part is made, and each gets its own piece."""
    axes = several(axes)

    def part(a: jax.Array) -> jax.Array:
        spec = jax.typeof(a).sharding.spec
        if not (axes or spec.unreduced):
            return a
        apart = apart_spec(a.shape, spec, axes)
        if not spec.unreduced:
            return jax.reshard(a, apart)
        # Devices talk over what a sum is apart on: gradients, to where the optimizer's part lies;
        # the bytes of the parameter.
        local = functools.partial(scattered, spec=apart, rows=tuple(spec.unreduced))
        return jax.shard_map(local, out_specs=apart)(a)

    return jax.tree.map(part, tree)


def whole(tree: Any, like: Any) -> Any:
    """Each array as the one in its place in `like` lies: what `own` split is gathered."""

    def gathered(a: jax.Array, b: jax.Array) -> jax.Array:
        # Devices talk over `optimizer`: each copy tells of its part, the bytes of the parameter.
        return jax.reshard(a, jax.typeof(b).sharding.spec)

    return jax.tree.map(gathered, tree, like)
