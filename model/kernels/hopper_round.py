"""A matrix rounded to 8 bits on a Hopper GPU, transposed, and as it lies too: read once.

Tensor cores take 8-bit matrices only with the contracted dim last. The backward pass contracts the
gradient of a result once with the weight, over its columns, and once with x, over its rows.

In Pallas for Mosaic GPU. Shapes: R rows, K columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.kernels import hopper

TILE = 128
HALF = 64  # columns that are in registers at a time


class Levels(NamedTuple):
    """What a matrix is rounded to, and by what its rows and columns are multiplied before."""

    form: str  # int8, float8_e4m3fn or float8_e5m2
    by_R: jax.Array | None
    by_K: jax.Array | None


def why_not(x_RK: jax.Array) -> str:
    """Why this kernel does not apply; "" if it does."""
    if reason := hopper.not_here():
        return reason
    if x_RK.shape[0] % TILE or x_RK.shape[1] % TILE:
        return f"a matrix of {x_RK.shape}; the kernel needs multiples of {TILE}"
    return "" if x_RK.dtype == jnp.bfloat16 else f"the kernel rounds bfloat16, not {x_RK.dtype}"


def both(
    x_RK: jax.Array, rows: Levels | None, turned: Levels
) -> tuple[jax.Array | None, jax.Array]:
    """(x as `rows` says [R, K], or None; x as `turned` says, transposed [K, R]).

    To the nearest; of int8 halves go to the nearest even, and products must be -127 to 127.
    """
    R, K = x_RK.shape
    ways = [way for way in (rows, turned) if way is not None]
    scales = [by for way in ways for by in (way.by_R, way.by_K) if by is not None]

    def round_8bit(x_hbm, *refs):
        left = iter(refs)
        pairs = [[by if by is None else next(left) for by in way[1:]] for way in ways]
        outs = [next(left) for _ in ways]
        x_smem, *tiles, arrived = left
        at_R, at_K = (lax.axis_index(axis) * TILE for axis in ("rows", "columns"))
        whole = pl.ds(at_R, TILE), pl.ds(at_K, TILE)
        plgpu.copy_gmem_to_smem(x_hbm.at[whole], x_smem, arrived)
        plgpu.barrier_wait(arrived)
        for first in range(0, TILE, HALF):
            part, places = pl.ds(first, HALF), (whole[0], pl.ds(at_K + first, HALF))
            wgmma = plgpu.Layout.WGMMA
            x = plgpu.load(x_smem.at[:, part], layout=wgmma, optimized=False).astype(jnp.float32)
            for way, pair, tile in zip(ways, pairs, tiles, strict=True):
                own = (by if by is None else by.at[at] for by, at in zip(pair, places, strict=True))
                y = hopper.scaled(x, *own)
                if way is turned:
                    y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                    tile.at[part, :].transpose((1, 0))[...] = nearest(y, way.form)
                else:
                    tile.at[:, part][...] = nearest(y, way.form)
        plgpu.commit_smem()
        for way, tile, out in zip(ways, tiles, outs, strict=True):
            plgpu.copy_smem_to_gmem(tile, out.at[whole[::-1] if way is turned else whole])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kind = jax.typeof(x_RK).manual_axis_type
    shapes = [(K, R) if way is turned else (R, K) for way in ways]
    made = plgpu.kernel(
        round_8bit,
        out_type=[
            jax.ShapeDtypeStruct(shape, way.form, manual_axis_type=kind)
            for shape, way in zip(shapes, ways, strict=True)
        ],
        grid=(R // TILE, K // TILE),
        grid_names=("rows", "columns"),
        scratch_types=[
            *(plgpu.SMEM((TILE, TILE), form) for form in (x_RK.dtype, *(w.form for w in ways))),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x_RK, *scales)
    return (None if rows is None else made[0]), made[-1]


def nearest(x: jax.Array, form: str) -> jax.Array:
    """float32 to 8 bits."""
    if form != "int8":
        return x.astype(form)
    ones = jnp.float32(1.5 * 2**23)  # of this size, the last bit of a float32 is worth one
    return lax.bitcast_convert_type(x + ones, jnp.int32).astype(jnp.int8)
