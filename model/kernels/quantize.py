"""Symmetric rounding to few bits: values times a scale for each row, or each block of a row.

A scale is the largest magnitude of what shares it, over the largest number of the format. Where a
number is not finite the scale is not either, and so is all that is made with it.

Shapes: R rows, K columns.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.kernels import engine, hopper_round

TOPS = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def rows(
    x_RK: jax.Array,
    *,
    form: str = "int8",
    block: int = 0,
    largest: jax.Array | None = None,
    times: jax.Array | None = None,
    stochastic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(values [R, K] of a form of TOPS, float32 scales [R]), or scales [R, ceil(K / block)].

    int4 comes as int8. `largest`, shaped as the scales: the magnitudes, where x is only part of
    what shares them. `times`, [K], multiplies the columns of x before anything else. To the
    nearest, halves to even; or `stochastic`, for int8.
    """
    x_RK = x_RK.astype(jnp.float32)
    x_RK = x_RK if times is None else x_RK * times[None]
    parts, top = in_blocks(x_RK, block), np.float32(TOPS[form])
    largest = magnitudes(parts) if largest is None else largest.reshape(parts.shape[:-1])
    scales, inverse = scales_of(largest, form)
    levels = parts * inverse[..., None]
    if stochastic:
        levels = jnp.floor(levels + chance(parts, scales))
    elif form.startswith("int"):
        levels = jnp.round(levels)
    values = jnp.clip(levels, -top, top).astype("int8" if form == "int4" else form)
    values = values.reshape(len(x_RK), -1)[:, : x_RK.shape[1]]
    return values, scales if block else scales[:, 0]


def columns(x_RK: jax.Array, **how) -> tuple[jax.Array, jax.Array]:
    """`rows` of x transposed: (values [K, R], scales [K] or [K, ceil(R / block)])."""
    return rows(x_RK.T, **how)


def both(
    x_RK: jax.Array,
    forms: tuple[str, str],
    largest: tuple[jax.Array, jax.Array],
    times: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> tuple[tuple[jax.Array, jax.Array] | None, tuple[jax.Array, jax.Array]]:
    """(`rows` of x, `columns` of x), of forms, magnitudes and `times` [K], [R] for each.

    No rows if the first form is "". On a Hopper GPU x is read once.
    """
    form, turned = forms
    if engine.platform() == "gpu":
        if not (reason := hopper_round.why_not(x_RK)):
            levels, every = [], []
            for name, own in zip(forms, largest, strict=True):
                scales, inverse = scales_of(own, name) if name else (None, None)
                every.append(scales)
                levels.append(inverse)
            rows_of = hopper_round.Levels(form, levels[0], times[0]) if form else None
            by_row, by_column = hopper_round.both(
                x_RK, rows_of, hopper_round.Levels(turned, times[1], levels[1])
            )
            return (by_row, every[0]) if form else None, (by_column, every[1])
        engine.tell("transposed and rounded by XLA", reason)
    by_row = rows(x_RK, form=form, largest=largest[0], times=times[0]) if form else None
    return by_row, columns(x_RK, form=turned, largest=largest[1], times=times[1])


def scales_of(largest: jax.Array, form: str) -> tuple[jax.Array, jax.Array]:
    """(scales, what to multiply by: one over them, or nothing where all is nothing)."""
    scales = largest / np.float32(TOPS[form])
    return scales, jnp.where(scales > 0, 1 / scales, 0)


def magnitudes(x: jax.Array) -> jax.Array:
    """The largest magnitude along the last dim; infinite where a number is not finite.

    Not NaN: a maximum over devices may lose that.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    return jnp.where(jnp.isnan(largest), jnp.inf, largest).astype(jnp.float32)


def in_blocks(x_RK: jax.Array, block: int) -> jax.Array:
    """[R, blocks, block], the last filled with zeros; one block of all if `block` is 0."""
    K = x_RK.shape[1]
    block = block or K
    return jnp.pad(x_RK, ((0, 0), (0, -K % block))).reshape(len(x_RK), -1, block)


def chance(x: jax.Array, scales: jax.Array) -> jax.Array:
    """[..., K] in [0, 1), as if by chance: a hash of each number, its place and its scale.

    It needs no key, and the same numbers are rounded the same way again. The hash is the end of
    MurmurHash3 (Appleby 2011, public domain).
    """
    own = lax.bitcast_convert_type(x, jnp.uint32)
    row = lax.bitcast_convert_type(scales, jnp.uint32)[..., None] * np.uint32(0x9E3779B1)
    place = lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1) * np.uint32(0x85EBCA77)
    h = own ^ (row + place)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return ((h ^ (h >> 16)) >> 8).astype(jnp.float32) * np.float32(2**-24)
