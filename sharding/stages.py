"""Rows in flight: those of all pipeline stages in one array, each stage's with weights of its own.

While a pipeline runs, the rows that its stages work on are one batch, [S B, ...], split over
`stage` before any other axis, and each weight of the layer that they go through leads with S, split
over `stage` too. A layer is then what it is without stages: the devices of a stage talk among
themselves. Only what brings rows and weights together has to pair them, by what stands here.

Shapes: S stages, B rows of each.
"""

import jax
import jax.numpy as jnp

from sharding.gather import axes_of, without

STAGE = "stage"


def in_flight(x: jax.Array) -> bool:
    """Whether the rows of x, its first dim, are split over stages."""
    return STAGE in axes_of(jax.typeof(x).sharding.spec[0])


def apart_spec(spec: jax.P) -> jax.P:
    """The partition of [S, B, ...] from that of [S B, ...]."""
    return jax.P(STAGE, without(spec[0], (STAGE,)), *spec[1:])


def apart(x: jax.Array) -> jax.Array:
    """[S B, ...] as [S, B, ...]. Nothing moves."""
    spec = jax.typeof(x).sharding.spec
    return jax.shard_map(lambda x: x[None], out_specs=apart_spec(spec))(x)


def together(x: jax.Array) -> jax.Array:
    """[S, B, ...] as [S B, ...]. Nothing moves."""
    stage, rows, *rest = jax.typeof(x).sharding.spec
    spec = jax.P((*axes_of(stage), *axes_of(rows)), *rest)
    return jax.shard_map(lambda x: x[0], out_specs=spec)(x)


def for_rows(w: jax.Array, x: jax.Array) -> jax.Array:
    """[S, ...] as [S B, ...]: for each row of x what `w` holds for its stage. Nothing moves."""
    rows = jax.typeof(x).sharding.spec[0]
    spec = jax.P(rows, *jax.typeof(w).sharding.spec[1:])

    def local(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(w, (len(x), *w.shape[1:]))

    return jax.shard_map(local, out_specs=spec)(w, x)
