"""Expert parallelism: tokens travel to the devices that hold their experts, and back.

A token goes once to each device that holds any of its experts, however many these are, and comes
back once: at most min(A, P) rows of N that a device sends, whatever the router prefers. Nothing is
dropped, so a device has room for the N tokens of all P, should all of them want its experts. All of
this runs inside a `shard_map`; `axes` are the mesh axes that split the experts.

Shapes: N tokens of a device, A choices of a token, P devices along `axes`, S = N min(A, P) rows to
send, R = P N rows that may arrive; M any rows, K rows that repeat one; further dims are a row's.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Copies:
    """Which row of an array each row of another repeats; a number beyond the array means none."""

    source: jax.Array  # [M] of N rows
    places: jax.Array  # [N, K] of M rows: where row n is repeated


@jax.custom_vjp
def spread(x: jax.Array, copies: Copies) -> jax.Array:
    """[N, ...] to [M, ...]: row m is x's row `source[m]`, or zeros. The transpose of `collect`."""
    return x.at[copies.source].get(mode="fill", fill_value=0)


@jax.custom_vjp
def collect(y: jax.Array, copies: Copies) -> jax.Array:
    """[M, ...] to [N, ...]: row n is the sum of y's rows `places[n]`. The transpose of `spread`.

    Read, not scattered, so the order of each sum is the same every time.
    """
    return jnp.sum(y.at[copies.places].get(mode="fill", fill_value=0), axis=1)


spread.defvjp(
    lambda x, copies: (spread(x, copies), copies), lambda copies, g: (collect(g, copies), None)
)
collect.defvjp(
    lambda y, copies: (collect(y, copies), copies), lambda copies, g: (spread(g, copies), None)
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trip:
    """What a device sends: to device p its rows `start[p]`, `start[p]` + 1, ..., `size[p]` of them.

    There they lie from row `landing[p]` on. All [P], int32.
    """

    start: jax.Array
    size: jax.Array
    landing: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Exchange:
    """The way of a device's tokens to their experts, and of what these make of them back home."""

    sent: Copies  # the rows to send, in the order of the devices that they go to: S of N
    there: Trip
    back: Trip
    axes: Axes = field(metadata={"static": True})

    @classmethod
    def plan(cls, device_NA: jax.Array, axes: Axes) -> "Exchange":
        """The exchange that brings each token to the devices along `axes` that it chose."""
        N, A = device_NA.shape
        P, me = lax.axis_size(axes), lax.axis_index(axes)
        K = min(A, P)
        chosen_NAP = device_NA[:, :, None] == jnp.arange(P)[None, None]
        goes_NP = jnp.any(chosen_NAP, axis=1).astype(jnp.int32)
        size = jnp.sum(goes_NP, axis=0)
        start = jnp.cumsum(size) - size
        row_NP = start[None] + jnp.cumsum(goes_NP, axis=0) - 1
        goes_NK, device_NK = lax.top_k(goes_NP, K)
        row_NK = jnp.take_along_axis(row_NP, device_NK, axis=1)
        row_NK = jnp.where(goes_NK > 0, row_NK, N * K)
        token_NK = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[:, None], (N, K))
        source = jnp.full(N * K, N, jnp.int32).at[row_NK].set(token_NK, mode="drop")
        # Devices talk over `axes`: how many rows go where, and where they come back to; 8 P bytes.
        arriving, home = lax.all_to_all(jnp.stack([size, start]), axes, 1, 1, tiled=True)
        slots = N * jnp.arange(P, dtype=jnp.int32)  # whoever sends has N rows of its own
        there = Trip(start, size, jnp.full(P, N, jnp.int32) * me)
        return cls(Copies(source, row_NK), there, Trip(slots, arriving, home), axes)

    @property
    def arrived(self) -> jax.Array:
        """[R] of those rows that are a token, bool."""
        N = self.sent.places.shape[0]
        return (jnp.arange(N)[None] < self.back.size[:, None]).reshape(-1)

    def send(self, x: jax.Array) -> jax.Array:
        """[N, ...] of this device's tokens to [R, ...] of those that came, N for each sender."""
        rows = x.shape[0] * self.there.size.shape[0]
        return move(spread(x, self.sent), rows, self.there, self.back, self.axes)

    def bring(self, y: jax.Array) -> jax.Array:
        """[R, ...] of the tokens that came to [N, ...]: of each own token the sum of its rows."""
        rows = self.sent.source.shape[0]
        return collect(move(y, rows, self.back, self.there, self.axes), self.sent)


def move(rows: jax.Array, length: int, trip: Trip, back: Trip, axes: Axes) -> jax.Array:
    """What arrives when each device sends its rows on this trip, in an array of `length` rows.

    `back` is the trip of the answers: what came from device p lies at `back.start[p]`. What lies
    between is no one's, and must not be read.
    """
    most = max(length, rows.shape[0]) // lax.axis_size(axes)  # R / P = N, of one device to another

    def carried(rows: jax.Array, length: int, trip: Trip, back: Trip) -> jax.Array:
        return lax.platform_dependent(
            rows, trip, back, cpu=lambda *a: _dense(*a, length, most, axes),
            default=lambda *a: _ragged(*a, length, axes),
        )  # fmt: skip

    @jax.custom_vjp
    def there(rows: jax.Array, trips: tuple[Trip, Trip]) -> jax.Array:
        return carried(rows, length, *trips)

    def backward(trips: tuple[Trip, Trip], g: jax.Array) -> tuple[jax.Array, None]:
        return carried(g, rows.shape[0], *trips[::-1]), None

    there.defvjp(lambda rows, trips: (there(rows, trips), trips), backward)
    return there(rows, (trip, back))


def _ragged(rows: jax.Array, trip: Trip, back: Trip, length: int, axes: Axes) -> jax.Array:
    """`move` of those rows only that the trip has."""
    # Zeros, but XLA cannot know it: a constant would be copied from outside the loop over layers.
    zeros = jnp.where(back.size[0] < 0, rows[:1], jnp.zeros_like(rows[:1]))
    out = jnp.broadcast_to(zeros, (length, *rows.shape[1:]))
    # Devices talk over `axes`: tokens travel, the bytes of those rows that the trip has.
    return lax.ragged_all_to_all(
        rows, out, trip.start, trip.size, trip.landing, back.size, axis_name=axes
    )


def _dense(
    rows: jax.Array, trip: Trip, back: Trip, length: int, most: int, axes: Axes
) -> jax.Array:
    """`move` where there is no ragged all-to-all: `most` rows from each device to each other."""
    i = jnp.arange(most, dtype=jnp.int32)[None]

    def slots(trip: Trip, beyond: int) -> jax.Array:
        return jnp.where(i < trip.size[:, None], trip.start[:, None] + i, beyond)

    blocks = rows.at[slots(trip, len(rows))].get(mode="fill", fill_value=0)
    # Devices talk over `axes`: tokens travel, and as much padding as the worst case has room for;
    # the bytes of `most` rows to each.
    blocks = lax.all_to_all(blocks, axes, 0, 0, tiled=True)
    out = jnp.zeros((length, *rows.shape[1:]), rows.dtype)
    return out.at[slots(back, length)].set(blocks, mode="drop")
