"""Digests: one number for all bits that a device holds, made on that device.

Devices do not talk for it, so a number belongs to the device that it came from. Any change of one
value changes it; of several, all but one in 2**32.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from sharding import offload

WORDS = {1: jnp.uint8, 2: jnp.uint16}  # by bytes of a value; longer ones are words of 4

Axes = tuple[str, ...]


def digests(tree: Any, mesh: Mesh) -> dict[Axes, np.ndarray]:
    """Of the arrays that each set of mesh axes splits, every device's number: uint32, in the
    mesh's shape. The arrays lie on all of the mesh.

    Where a set lacks an axis, the devices along it hold copies, and have the same number.
    """
    leaves = jax.tree.leaves(tree)
    groups: dict[Axes, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(split_by(leaf.sharding.spec, mesh), []).append(i)

    specs = tuple(leaf.sharding.spec for leaf in leaves)
    found = _table(leaves, tuple(map(tuple, groups.values())), specs, mesh)
    table = _told(found)
    shape = mesh.devices.shape
    return {axes: table[:, i].reshape(shape) for i, axes in enumerate(groups)}


def _told(numbers: jax.Array) -> np.ndarray:
    """The numbers of all devices, on every host."""
    # Devices talk over the whole mesh: their numbers, 4 bytes for each set of axes.
    return np.asarray(multihost_utils.process_allgather(numbers, tiled=True))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _table(leaves: list, groups: tuple, specs: tuple, mesh: Mesh) -> jax.Array:
    """[devices, groups], a row made by each device."""

    def own(*parts: jax.Array) -> jax.Array:
        return jnp.stack([digest([parts[i] for i in members]) for members in groups])[None]

    rows = jax.P(mesh.axis_names)
    whole = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return whole(*offload.fetch(leaves))


def probe(mesh: Mesh, size: int = 2048, rounds: int = 10) -> np.ndarray:
    """The number of what each device makes by itself of the same matrix, in the mesh's shape:
    matmuls and curves."""

    def own(x: jax.Array) -> jax.Array:
        def once(a: jax.Array, _: None) -> tuple[jax.Array, None]:
            half = a.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)
            return jnp.tanh(half + a @ x), None

        return digest([lax.scan(once, x, length=rounds)[0]])[None]

    rows = jax.P(mesh.axis_names)
    each = jax.shard_map(own, mesh=mesh, in_specs=jax.P(), out_specs=rows, check_vma=False)
    waves = np.sin(np.arange(size * size, dtype=np.float32)).reshape(size, size)
    x = jax.device_put(waves / np.sqrt(size / 4), NamedSharding(mesh, jax.P()))
    return _told(jax.jit(each)(x)).reshape(mesh.devices.shape)


def split_by(spec: jax.P, mesh: Mesh) -> Axes:
    """The axes, of more than one device, that split an array of this spec."""
    dims = [dim if isinstance(dim, tuple) else (dim,) for dim in spec]
    named = {axis for dim in dims for axis in dim}
    return tuple(axis for axis, size in mesh.shape.items() if axis in named and size > 1)


def digest(parts: list[jax.Array]) -> jax.Array:
    """One uint32 of the bits of these arrays."""
    whole = jnp.uint32(0)
    for part in parts:
        words = words_of(part)
        places = lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B1)
        whole = mixed(whole ^ jnp.sum(mixed(words + places), dtype=jnp.uint32))
    return whole


def words_of(a: jax.Array) -> jax.Array:
    """The bits of an array as uint32 [N]."""
    a = a.astype(jnp.uint8) if a.dtype == bool else a
    kind = WORDS.get(a.dtype.itemsize, jnp.uint32)
    words = lax.bitcast_convert_type(a, kind).astype(jnp.uint32)
    return words.reshape(math.prod(words.shape))


def mixed(x: jax.Array) -> jax.Array:
    """Another uint32 for each: the last steps of MurmurHash3, by Appleby."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def differing(first: dict[Axes, np.ndarray], again: dict[Axes, np.ndarray]) -> np.ndarray:
    """The devices, as booleans in the mesh's shape, of which a number differs."""
    return np.any([first[axes] != again[axes] for axes in first], axis=0)


def odd_copies(found: dict[Axes, np.ndarray], mesh: Mesh) -> np.ndarray:
    """The devices, as booleans in the mesh's shape, whose copies are not those of most devices
    that hold the same; of two that differ, both."""
    odd = np.zeros(mesh.devices.shape, bool)
    for axes, numbers in found.items():
        copies = [i for i, axis in enumerate(mesh.axis_names) if axis not in axes]
        order = [i for i in range(odd.ndim) if i not in copies] + copies
        count = math.prod(odd.shape[i] for i in copies)
        rows = numbers.transpose(order).reshape(-1, count)
        alike = np.sum(rows[:, :, None] == rows[:, None, :], axis=2)
        wrong = (2 * alike <= count).reshape([odd.shape[i] for i in order])
        odd |= wrong.transpose(np.argsort(order))
    return odd
