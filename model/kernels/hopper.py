"""Products of 8-bit matrices on a Hopper GPU, rescaled before they leave the registers.

Written in Pallas for Mosaic GPU. A block of threads works on one tile of the result at a time: a
warpgroup fetches slices of both matrices, two more multiply them, each its half of the rows.

Shapes: R rows of x, N rows of w, K numbers of each row, contracted, in groups of which each has
scales of its own; G such groups.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUPS = 2  # that multiply
PATCH = 64  # rows that are written at once


@dataclass(frozen=True)
class Tile:
    """What one block of threads works on."""

    rows: int = 128  # of x, for each warpgroup
    columns: int = 128  # rows of w
    depth: int = 128  # of K at a time
    steps: int = 4  # slices on their way
    width: int = 16  # tiles of rows that run side by side, so that they share w in the cache
    written: int = 128  # bytes of each row that are written at once

    def pads(self, rows: int, columns: int, depth: int) -> tuple[int, int, int]:
        """How much R, N and K lack of whole tiles."""
        return -rows % (WARPGROUPS * self.rows), -columns % self.columns, -depth % self.depth


WHOLE = Tile()
# Sums in float32 beside those in int32 need as many registers again.
GROUPED = Tile(rows=64, depth=256, steps=3, written=64)
KINDS = "H100", "H200", "H800", "H20"  # and GH200, in how devices name themselves
LEAST = 256  # rows of both below which most of a tile would be padding


def not_here() -> str:
    """Why the kernels for Hopper GPUs do not run here; "" if they do."""
    if jax.__version_info__ < (0, 11):
        return f"the kernel is written for jax 0.11, this is {jax.__version__}"
    if not any(name in kind() for name in KINDS):
        return f"the kernel is written for Hopper GPUs, this is {kind()}"
    return ""


def why_not(x_RK: jax.Array, w_NK: jax.Array, group: int = 0) -> str:
    """Why this kernel does not apply; "" if it does. `group`: of K, 0: all."""
    if reason := not_here():
        return reason
    if min(len(x_RK), len(w_NK)) < LEAST:
        return f"products of {len(x_RK)} and {len(w_NK)} rows; the kernel needs {LEAST} of both"
    if group % GROUPED.depth or (group and x_RK.shape[1] % group):
        return (
            f"groups of {group} of {x_RK.shape[1]}: the kernel needs multiples of {GROUPED.depth}"
        )
    return ""


def matmul(
    x_RK: jax.Array,
    w_NK: jax.Array,
    sx: jax.Array,
    sw: jax.Array,
    dtype: str,
    tile: Tile | None = None,
) -> jax.Array:
    """[R, N] `dtype`: x w', for int8 or float8 x and w, times the scales sx [R] and sw [N].

    With scales [G, R] and [G, N] each of G groups of K has its own; a group is a multiple of 256.
    Sums in int32 or float32, of groups in float32. What tiles do not divide is padded with zeros.
    """
    R, N = x_RK.shape[0], w_NK.shape[0]
    tile = tile or (WHOLE if sx.ndim == 1 else GROUPED)
    more_R, more_N, more_K = tile.pads(R, N, x_RK.shape[1])
    if more_R or more_N or more_K:
        x_RK, w_NK = (
            jnp.pad(a, ((0, more), (0, more_K))) for a, more in ((x_RK, more_R), (w_NK, more_N))
        )
        ends = [(0, 0)] * (sx.ndim - 1)
        sx, sw = jnp.pad(sx, (*ends, (0, more_R))), jnp.pad(sw, (*ends, (0, more_N)))
    return whole_tiles(x_RK, w_NK, sx, sw, dtype, tile)[:R, :N]


def staged(rows: int, columns: int, dtype: str) -> tuple:
    """How a slice lies in shared memory: as the tensor cores read it without conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def whole_tiles(x_RK, w_NK, sx, sw, dtype, tile):
    """`matmul` of sizes that the tiles divide."""
    (R, K), N = x_RK.shape, w_NK.shape[0]
    product = Product(R, N, K, len(sx) if sx.ndim == 2 else 0, x_RK.dtype.name, dtype, tile)

    def matmul_8bit(*refs):  # the kernel's name in a trace
        product.kernel(*refs)

    kind = jax.typeof(x_RK).manual_axis_type  # inside a shard_map: that of x, the rows'
    return plgpu.kernel(
        matmul_8bit,
        out_type=jax.ShapeDtypeStruct((R, N), dtype, manual_axis_type=kind),
        grid=(min(blocks(), product.tiles[0] * product.tiles[1]),),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x_RK, w_NK, sx, sw)


@dataclass(frozen=True)
class Product:
    """What a kernel is made for."""

    R: int
    N: int
    K: int
    groups: int  # of K; 0: one, whose scales come after all sums
    form: str  # of x; that of w has as many bits
    dtype: str  # of the result
    tile: Tile

    @property
    def block(self) -> int:
        """Rows of a tile of the result."""
        return WARPGROUPS * self.tile.rows

    @property
    def tiles(self) -> tuple[int, int]:
        """Of the result, along R and N."""
        return self.R // self.block, self.N // self.tile.columns

    @property
    def steps(self) -> int:
        """Slices of K."""
        return self.K // self.tile.depth

    @property
    def sums(self) -> tuple[tuple[int, int], jnp.dtype]:
        """The shape of what a warpgroup sums up, and in what."""
        return (self.tile.rows, self.tile.columns), (
            jnp.int32 if self.form == "int8" else jnp.float32
        )

    def pipeline(self, multiply, around, state):
        """The loop over slices of K: one warpgroup fetches them while others `multiply`."""
        tile = self.tile

        def slices(size: int) -> plgpu.BlockSpec:
            how = {"transforms": staged(size, tile.depth, self.form), "memory_space": plgpu.SMEM}
            return plgpu.BlockSpec((size, tile.depth), lambda k: (0, k), **how)

        def scales(size: int) -> plgpu.BlockSpec:
            steps = self.steps // self.groups
            return plgpu.BlockSpec((1, size), lambda k: (k // steps, 0), memory_space=plgpu.SMEM)

        kinds = (slices, scales) if self.groups else (slices,)
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(self.steps,),
            in_specs=[kind(size) for kind in kinds for size in (self.block, tile.columns)],
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=tile.steps,
            memory_registers=40,
            compute_context=around,
            pipeline_state=state,
        )

    def kernel(self, *refs):
        """What a block of threads does: tile after tile."""
        patch = PATCH, self.tile.written // jnp.dtype(self.dtype).itemsize
        how = {"transforms": staged(*patch, self.dtype)}
        nothing = self.pipeline(lambda *_: None, lambda *_: None, None)

        @functools.partial(
            pl.run_scoped,
            buffers=nothing.get_allocations(*(refs[:-1] if self.groups else refs[:2])),
            patches=plgpu.SMEM((WARPGROUPS, 2, *patch), self.dtype, **how),
            collective_axes="warpgroup",
        )
        def _(buffers, patches):
            @plgpu.nd_loop((self.tiles[0] * self.tiles[1],), collective_axes="block")
            def _(loop):
                self.one_tile(loop, refs, buffers, patches)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def one_tile(self, loop, refs, buffers, patches):
        """Its slices multiplied, summed, scaled and written."""
        tile, (shape, dtype) = self.tile, self.sums
        x_hbm, w_hbm, sx_hbm, sw_hbm, y_hbm = refs
        own = lax.axis_index("warpgroup")
        own_rows = pl.ds(own * tile.rows, tile.rows)
        at_R, at_N = plgpu.planar_snake(loop.index[0], self.tiles, 1, tile.width)
        rows = pl.ds(at_R * self.block, self.block)
        columns = pl.ds(at_N * tile.columns, tile.columns)

        def finish(y):
            part = y_hbm.at[rows, columns].at[own_rows]
            write(y.astype(self.dtype), part, patches.at[own])

        def sum_all(multiply_all):
            @functools.partial(pl.run_scoped, sum_ref=plgpu.ACC(shape, dtype))
            def _(sum_ref):
                multiply_all(sum_ref)
                first = pl.ds(at_R * self.block + own * tile.rows, tile.rows)
                finish(scaled(sum_ref[...], sx_hbm.at[first], sw_hbm.at[columns]))

        def multiply(_, x_smem, w_smem, sum_ref):
            plgpu.wgmma(sum_ref, x_smem.at[own_rows], w_smem.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return sum_ref

        def sum_groups(multiply_all):
            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            finish(multiply_all(zeros))

        def multiply_group(_, x_smem, w_smem, sx_smem, sw_smem, total):
            def part(sum_ref):
                plgpu.wgmma(sum_ref, x_smem.at[own_rows], w_smem.transpose((1, 0)))
                return sum_ref[...]

            sums = pl.run_scoped(part, plgpu.ACC(shape, dtype))
            return total + scaled(sums, sx_smem.at[0, own_rows], sw_smem.at[0])

        state = None
        if self.steps % tile.steps == 0:  # slices of the next tile come while this one is written
            stages = plgpu.PipelinePipeline
            state = jnp.where(loop.local_index > 0, stages.STEADY, stages.START)
        parts = [x_hbm.at[rows, :], w_hbm.at[columns, :]]
        how = multiply, sum_all
        if self.groups:
            parts += [sx_hbm.at[:, rows], sw_hbm.at[:, columns]]
            how = multiply_group, sum_groups
        self.pipeline(*how, state)(*parts, allocations=buffers)


def scaled(x, by_rows, by_columns):
    """x as float32, times the scale of each row and of each column; None: of none."""
    y = x.astype(jnp.float32)
    for kept, ref in enumerate((by_rows, by_columns)):
        if ref is not None:
            layout = plgpu.Layout.WGMMA.reduce(1 - kept)
            scale = plgpu.load(ref, layout=layout, optimized=False)
            y *= lax.broadcast_in_dim(scale, y.shape, (kept,))
    return y


def write(y, y_hbm, patches):
    """A warpgroup's part of a tile to memory, patch by patch; two are on their way."""
    _, rows, columns = patches.shape
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for r in range(0, y.shape[0], rows):
        for number, c in enumerate(range(0, y.shape[1], columns)):
            part, patch = (slice(r, r + rows), slice(c, c + columns)), patches.at[number % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            patch[...] = y[part]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(patch, y_hbm.at[part])


def kind() -> str:
    """The name of the devices of the mesh in use."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind


def blocks() -> int:
    """As many blocks of threads as a device has multiprocessors: each takes tile after tile."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    cores = device.num_cores if device else getattr(jax.devices()[0], "core_count", None)
    return cores or 132
