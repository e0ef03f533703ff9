"""Rounding by chance: up or down so that the mean is right, and the same on every mesh.

The chance of a number is a hash of the seed, the step and the number's place in the whole array,
never of the device that holds it: placement changes no value. A hash costs ten operations on
integers and no memory, where drawing bits for all parameters would write them out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Shape = tuple[int, ...]


def mix(x: jax.Array) -> jax.Array:
    """Scrambles uint32, one to one: the finalizer of MurmurHash3. Appleby 2011, public domain."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def key(*numbers: int | jax.Array) -> jax.Array:
    """A uint32 of these numbers, in this order, such as seed, step and number of the array."""
    made = jnp.uint32(0)
    for number in numbers:
        number = np.uint32(number) if isinstance(number, int) else number.astype(jnp.uint32)
        made = mix(made + number + jnp.uint32(0x9E3779B9))
    return made


def bits(
    key: jax.Array, whole: Shape, spec: jax.P, inputs: int, start: jax.typing.ArrayLike, count: int
) -> jax.Array:
    """32 random bits for each of `count` rows of a device's part of an array, [count, columns].

    Call it in a `shard_map`. A row is the last `inputs` dims together, of which only the first may
    be split; `whole` is the shape of the whole array, `spec` says what splits it.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    first, own = [], []
    for size, axes in zip(whole, tuple(spec) + (None,) * (len(whole) - len(spec)), strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        own.append(size // math.prod(sizes[axis] for axis in axes))
        first.append(lax.axis_index(axes) * own[-1] if axes else 0)
    leads = len(whole) - inputs
    left = start + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    row, stride = jnp.uint32(0), 1
    for dim in reversed(range(leads)):
        row += jnp.uint32(stride) * (left % own[dim] + first[dim]).astype(jnp.uint32)
        left, stride = left // own[dim], stride * whole[dim]
    after = math.prod(whole[leads + 1 :])
    column = lax.broadcasted_iota(jnp.int32, (1, own[leads] * after), 1) + first[leads] * after
    seeds = mix(key + row * jnp.uint32(0x9E3779B9))
    return mix(seeds + column.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 as bfloat16, whose mean over the low 16 bits of `bits` is x exactly.

    What is added to the half that bfloat16 leaves out carries over as often as that half is large.
    To the nearest instead, a weight would never move by less than 1/512 of itself. Gupta et al.
    2015, arXiv:1502.02551; of weights in bfloat16: Zamirai et al. 2020, arXiv:2010.06192.
    """
    raw = lax.bitcast_convert_type(x, jnp.uint32) + (bits & jnp.uint32(0xFFFF))
    kept = lax.bitcast_convert_type(raw & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)
