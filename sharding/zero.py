"""ZeRO-1: of what an optimizer keeps, each copy of a parameter holds and updates a part of its own.

Rajbhandari et al. 2019, arXiv:1910.02054. Parameters are whole on every device along `data`, and so
are their gradients; moments need not be. Each device takes its part of gradient and parameter,
updates that, and gathers the updates of all.
"""

from typing import Any

import jax

from sharding.gather import Axes, axes_of, without
from sharding.layout import divides


def apart_spec(shape: tuple[int, ...], spec: jax.P, axes: Axes) -> jax.P:
    """`spec` with each of `axes` added that it lacks, at the first dim that this divides, if any.

    Of stacked weights that is their layers: an optimizer for matrices then has whole ones.
    """
    dims = [axes_of(dim) for dim in (*spec, *[None] * (len(shape) - len(spec)))]
    for axis in axes:
        if any(axis in dim for dim in dims):
            continue
        longer = (
            [(*dim, axis) if i == at else dim for i, dim in enumerate(dims)]
            for at in range(len(dims))
        )
        dims = next((option for option in longer if divides(shape, jax.P(*option))), dims)
    return jax.P(*(without(dim, ()) for dim in dims))


def own(tree: Any, axes: Axes) -> Any:
    """Each array as `apart_spec` splits it: copies let go of what others keep. Nothing moves."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)

    def part(a: jax.Array) -> jax.Array:
        return jax.reshard(a, apart_spec(a.shape, jax.typeof(a).sharding.spec, axes))

    return jax.tree.map(part, tree) if axes else tree


def whole(tree: Any, like: Any) -> Any:
    """Each array as the one in its place in `like` lies: what `own` split is gathered."""

    def gathered(a: jax.Array, b: jax.Array) -> jax.Array:
        # Devices talk: each copy tells the others of its part.
        return jax.reshard(a, jax.typeof(b).sharding.spec)

    return jax.tree.map(gathered, tree, like)
