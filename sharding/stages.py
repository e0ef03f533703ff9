"""Rows in flight: those of all pipeline stages in one array, each stage's with weights of its own.

While a pipeline runs, the rows that its stages work on are one batch, [S B, ...], split over
`stage` before any other axis, and each weight of the layer that they go through leads with S, split
over `stage` too. A layer is then what it is without stages: the devices of a stage talk among
themselves. Only what brings rows and weights together has to pair them, by what stands here.
Below it: how stages take from what they hold, and where they talk with one another.

Shapes: S stages, B rows of each, V chunks of a stage, R layers of a chunk, L = R S V layers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.gather import axes_of, without

STAGE = "stage"


def stage_count() -> int:
    """Stages of the mesh in use."""
    return jax.sharding.get_abstract_mesh().shape.get(STAGE, 1)


def in_flight(x: jax.Array) -> bool:
    """Whether the rows of x, its first dim, are split over stages."""
    return STAGE in axes_of(jax.typeof(x).sharding.spec[0])


# ---- rows and weights ----------------------------------------------------------------------------


def apart_spec(spec: jax.P) -> jax.P:
    """The partition of [S, B, ...] from that of [S B, ...]."""
    return jax.P(STAGE, without(spec[0], (STAGE,)), *spec[1:])


def apart(x: jax.Array) -> jax.Array:
    """[S B, ...] as [S, B, ...]. Nothing moves."""
    spec = jax.typeof(x).sharding.spec
    return jax.shard_map(lambda x: x.reshape(1, *x.shape), out_specs=apart_spec(spec))(x)


def together(x: jax.Array) -> jax.Array:
    """[S, B, ...] as [S B, ...]. Nothing moves."""
    stage, rows, *rest = jax.typeof(x).sharding.spec
    spec = jax.P((*axes_of(stage), *axes_of(rows)), *rest)
    return jax.shard_map(lambda x: x.reshape(x.shape[1:]), out_specs=spec)(x)


def for_rows(w: jax.Array, x: jax.Array) -> jax.Array:
    """[S, ...] as [S B, ...]: for each row of x what `w` holds for its stage. Nothing moves."""
    rows = jax.typeof(x).sharding.spec[0]
    spec = jax.P(rows, *jax.typeof(w).sharding.spec[1:])

    def local(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(w, (len(x), *w.shape[1:]))

    return jax.shard_map(local, out_specs=spec)(w, x)


# ---- each stage for itself: nothing moves --------------------------------------------------------


def flight_spec(spec: jax.P) -> jax.P:
    """The partition of rows in flight from that of a micro-batch's."""
    return jax.P((STAGE, *axes_of(spec[0])), *spec[1:])


def along(values: np.ndarray) -> jax.Array:
    """[..., S], a number for each stage, split over them."""
    return jax.reshard(jnp.asarray(values), jax.P(*[None] * (values.ndim - 1), STAGE))


def pick(tree: Any, index_S: jax.Array) -> Any:
    """[N, ...] to [...]: each stage takes the one that its index names. Of rows: [S B, ...]."""

    def spec(a: jax.Array) -> jax.P:
        own = jax.P(*jax.typeof(a).sharding.spec[1:])
        return own if STAGE in sum(map(axes_of, own), ()) else flight_spec(own)

    def local(tree: Any, index: jax.Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index[0], keepdims=False), tree)

    return jax.shard_map(local, out_specs=jax.tree.map(spec, tree))(tree, index_S)


def put(tree: Any, values: Any, index_S: jax.Array) -> Any:
    """[N, ...] with [...] at the index of each stage."""

    def local(tree: Any, values: Any, index: jax.Array) -> Any:
        return jax.tree.map(
            lambda a, value: lax.dynamic_update_index_in_dim(a, value, index[0], 0), tree, values
        )

    return jax.shard_map(local, out_specs=_specs(tree))(tree, values, index_S)


def chunk(layers: Any, index_S: jax.Array, repeats: int) -> Any:
    """[V R, S, ...] to [R, S, ...]: each stage takes the chunk that its index names."""

    def local(layers: Any, index: jax.Array) -> Any:
        def one(a: jax.Array) -> jax.Array:
            R = len(a) // repeats
            return lax.dynamic_slice_in_dim(a, index[0] * R, R)

        return jax.tree.map(one, layers)

    return jax.shard_map(local, out_specs=_specs(layers))(layers, index_S)


def add(layers: Any, more: Any, index_S: jax.Array, on_S: jax.Array) -> Any:
    """[V R, S, ...] with [R, S, ...] added to the chunk of each stage that is on."""

    def local(layers: Any, more: Any, index: jax.Array, on: jax.Array) -> Any:
        def one(a: jax.Array, b: jax.Array) -> jax.Array:
            start = index[0] * len(b)
            total = lax.dynamic_slice_in_dim(a, start, len(b)) + jnp.where(on[0], b, 0)
            return lax.dynamic_update_slice_in_dim(a, total, start, 0)

        return jax.tree.map(one, layers, more)

    # Unchecked, because a part of a sum that others make is a number like any other here.
    over = jax.shard_map(local, out_specs=_specs(layers), check_vma=False)
    return over(layers, more, index_S, on_S)


def where(on_S: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Rows in flight: at the stages that are on `new`, [B, ...] of a micro-batch, else `old`."""

    def local(on: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(on[0], new, old)

    return jax.shard_map(local, out_specs=jax.typeof(old).sharding.spec)(on_S, new, old)


# ---- stages talk ---------------------------------------------------------------------------------


def send(x: jax.Array, by: int, *, around: bool) -> jax.Array:
    """Rows in flight, `by` stages on; from end to end if they go `around`, or zeros there."""
    stages = stage_count()
    ways = [(s, (s + by) % stages) for s in range(stages) if around or 0 <= s + by < stages]
    # Devices talk over `stage`: each with the next, the bytes of its rows in flight.
    local = lambda x: lax.ppermute(x, STAGE, ways)  # noqa: E731
    return jax.shard_map(local, out_specs=jax.typeof(x).sharding.spec)(x)


def take(x: jax.Array, on_S: jax.Array) -> jax.Array:
    """[S B, ...] to [B, ...]: the rows of the one stage that is on, for all; zeros if none is."""

    def local(x: jax.Array, on: jax.Array) -> jax.Array:
        # Devices talk over `stage`: one tells the others, twice the bytes of its rows.
        return lax.psum(jnp.where(on[0], x, 0), STAGE)

    rows, *rest = jax.typeof(x).sharding.spec
    return jax.shard_map(local, out_specs=jax.P(without(rows, (STAGE,)), *rest))(x, on_S)


def deal(stack: jax.Array, repeats: int) -> jax.Array:
    """[L, ...] to [V R, S, ...]: layers as a pipeline takes them, from the order that they have.

    A stage holds L / S neighbours. With V = 1 they are what it works on; otherwise it works on
    pieces of the line that lie S pieces apart, and V - V / S of its V pieces move.
    """
    spec = jax.typeof(stack).sharding.spec
    apart = jax.P(None, *spec.partitions, reduced=spec.reduced)
    lines = jax.shard_map(lambda own: own[:, None], out_specs=apart)(stack)
    return lines if repeats == 1 else _dealt(repeats, lines)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dealt(repeats: int, lines: jax.Array) -> jax.Array:
    """[V R, S, ...], each stage's own pieces of the line for those that it works on."""
    return _change_places(lines, repeats, back=False)


_dealt.defvjp(
    lambda repeats, lines: (_dealt(repeats, lines), None),
    lambda repeats, _, g: (_change_places(g, repeats, back=True),),
)


def _change_places(lines: jax.Array, V: int, *, back: bool) -> jax.Array:
    """In V turns, in each of which every stage sends one piece and gets one; `back` undoes it."""
    stages = stage_count()
    share = math.gcd(stages, V)

    def local(own: jax.Array) -> jax.Array:
        pieces = own.reshape(V, -1, *own.shape[1:])
        me, moved = lax.axis_index(STAGE), jnp.zeros_like(pieces)
        for turn in range(V):
            # With the same piece of each, those that are S / share apart would send to the same
            # stage: so they begin at other pieces.
            which = [(turn + s * share // stages) % V for s in range(stages)]
            goes = [divmod(s * V + which[s], stages) for s in range(stages)]  # its chunk, its stage
            lands = {stage: chunk for chunk, stage in goes}
            ways = [(s, stage) for s, (_, stage) in enumerate(goes)]
            takes, puts = jnp.array(which)[me], jnp.array([lands[s] for s in range(stages)])[me]
            if back:
                ways, takes, puts = [way[::-1] for way in ways], puts, takes
            piece = lax.dynamic_index_in_dim(pieces, takes, keepdims=False)
            # Devices talk over `stage`: layers change places, the bytes of one of V pieces.
            piece = lax.ppermute(piece, STAGE, ways)
            moved = lax.dynamic_update_index_in_dim(moved, piece, puts, 0)
        return moved.reshape(own.shape)

    # Unchecked, as in `add`.
    return jax.shard_map(local, out_specs=jax.typeof(lines).sharding.spec, check_vma=False)(lines)


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)
