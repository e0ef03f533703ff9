"""Few rows times a weight of 8 or 4 bits on a Hopper GPU, which reads the weight once and fast.

Written in Pallas for Mosaic GPU. Blocks of threads take 64 outputs each; those of a cluster take
parts of K, which the first of them adds up. Slices of the weight stream into shared memory, many
on their way, become bfloat16 in registers, and go to the tensor cores as the side of 64 rows.

Shapes: R rows of x, N outputs, K contracted, B bytes of K, G groups of K with scales of their own.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from model.kernels import hopper

PART = 64  # numbers of K that the tensor cores take from shared memory at a time
MOST = 64  # rows, beyond which sums take too many registers
ROW = plgpu.Layout.WGMMA.reduce(1)  # a number of each row


@dataclass(frozen=True)
class Tile:
    """What one block of threads works on."""

    outputs: int = 64
    line: int = 128  # bytes of each output in a slice
    steps: int = 4  # slices on their way
    splits: int = 1  # parts of K, of blocks in a cluster


def tile_of(N: int, inner: int) -> Tile:
    """For N outputs of so many bytes: splits until all multiprocessors have work."""
    line = 128 if inner % 128 == 0 else inner & -inner
    slices, splits = inner // line, 1
    while splits < 8 and N // 64 * splits < 3 * hopper.blocks() and slices % (2 * splits) == 0:
        splits *= 2
    return Tile(line=line, splits=splits)


def why_not(x_RK: jax.Array, w_NB: jax.Array, group: int = 0) -> str:
    """Why this kernel does not apply; "" if it does. `group`: of K, 0: all."""
    if reason := hopper.not_here():
        return reason
    R, K = x_RK.shape
    if x_RK.dtype != jnp.bfloat16 or w_NB.dtype not in (jnp.int8, jnp.uint8):
        return f"{x_RK.dtype} times {w_NB.dtype}; the kernel multiplies bfloat16 by 8 or 4 bits"
    if R > MOST:
        return f"{R} rows; the kernel is for {MOST} at most"
    if K % PART or len(w_NB) % 8:
        return f"{len(w_NB)} outputs of {K}; the kernel needs multiples of 8 and {PART}"
    if group and (group != PART or K % group or K // group > 256):
        return f"groups of {group} of {K}: the kernel has run with groups of {PART}"
    return ""


def bits_of(w_NB: jax.Array) -> int:
    """Of a number of a weight."""
    return 4 if w_NB.dtype == jnp.uint8 else 8


def matmul(
    x_RK: jax.Array, w_NB: jax.Array, sw: jax.Array, group: int = 0, tile: Tile | None = None
) -> jax.Array:
    """[R, N] bfloat16: x w', times the scales sw [N], or [N, G] of groups of K.

    w is int8 [N, K], or uint8 [N, K / 2] as `nibbles.packed` makes it. Sums in float32.
    """
    R = len(x_RK)
    if R > 8:  # what is copied is one part of 8 rows, or whole parts
        x_RK = jnp.pad(x_RK, ((0, -R % 8), (0, 0)))
    product = Product(*x_RK.shape, len(w_NB), bits_of(w_NB), group, tile)
    if group:
        sw = jnp.pad(sw, ((0, 0), (0, -sw.shape[1] % 4)))  # what is copied is lines of 16 bytes
    else:
        sw = jnp.pad(sw, (0, -len(sw) % product.tile.outputs))
    kind = jax.typeof(x_RK).manual_axis_type

    def matmul_weight_only(*refs, **scratch):  # the kernel's name in a trace
        product.kernel(*refs, **scratch)

    return plgpu.kernel(
        matmul_weight_only,
        out_type=jax.ShapeDtypeStruct((product.R, product.N), jnp.bfloat16, manual_axis_type=kind),
        grid=(-(-product.N // product.tile.outputs),),
        grid_names=("outputs",),
        cluster=(product.tile.splits,),
        cluster_names=("split",),
        scratch_types=product.scratch(),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x_RK, w_NB, sw)[:R]


@dataclass(frozen=True)
class Product:
    """What a kernel is made for."""

    R: int
    K: int
    N: int
    bits: int
    group: int
    given: Tile | None = None

    @property
    def rows(self) -> int:
        """Of x, with those that lie beyond it and are zeros."""
        return -(-self.R // 8) * 8

    @property
    def depth(self) -> int:
        """Numbers of K in a slice."""
        return self.tile.line * 8 // self.bits

    @property
    def slices(self) -> int:
        return -(-self.K // self.depth)

    @property
    def tile(self) -> Tile:
        return self.given or tile_of(self.N, self.K * self.bits // 8)

    @property
    def own(self) -> int:
        """Slices of a block."""
        return -(-self.slices // self.tile.splits)

    @property
    def groups(self) -> int:
        """Groups of a block, and as many more as make lines of 16 bytes, from any on."""
        return -(-(self.own * self.depth // self.group + 4) // 4) * 4

    def scratch(self) -> dict:
        """What lies in shared memory beside the slices."""
        shape = self.tile.outputs, self.rows
        small = {"transforms": (plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32))}
        kinds = {"y_smem": plgpu.SMEM(shape[::-1], jnp.bfloat16)}
        if self.tile.splits > 1:
            kinds["parts"] = plgpu.SMEM((self.tile.splits, *shape), jnp.float32, **small)
            kinds["summed"] = plgpu.Barrier(num_arrivals=self.tile.splits)
        if self.group:
            kinds["scales"] = plgpu.SMEM((self.tile.outputs, self.groups), jnp.float32)
            kinds["scaled"] = plgpu.Barrier()
        return kinds

    def kernel(self, x_hbm, w_hbm, sw_hbm, y_hbm, *, y_smem, parts=None, summed=None, **scales):
        """What a block of threads does."""
        outputs, split = self.tile.outputs, lax.axis_index("split")
        at_N = pl.ds(lax.axis_index("outputs") * outputs, outputs)
        if self.group:
            first = split * self.own * self.depth // self.group
            columns = pl.ds(first // 4 * 4, self.groups)  # elsewhere a copy cannot begin
            plgpu.copy_gmem_to_smem(sw_hbm.at[at_N, columns], scales["scales"], scales["scaled"])
        y = self.products(x_hbm, w_hbm, at_N, split, **scales)
        if parts is not None:
            # Blocks of a cluster talk: each gives its sums to the first.
            plgpu.async_store_smem(
                y, parts.at[split], summed, cluster_idx=jnp.int32(0), cluster_dim="split"
            )

        @pl.when(split == 0)
        def _():
            total = y
            if parts is not None:
                plgpu.barrier_wait(summed)
                every = [
                    plgpu.load(parts.at[i], layout=plgpu.Layout.WGMMA)
                    for i in range(self.tile.splits)
                ]
                total = sum(every[1:], start=every[0])
            if not self.group:
                total = hopper.scaled(total, sw_hbm.at[at_N], None)
            total = plgpu.layout_cast(total.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
            y_smem.transpose((1, 0))[...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem, y_hbm.at[pl.ds(split, self.rows), at_N])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def products(self, x_hbm, w_hbm, at_N, split, scales=None, scaled=None):
        """[outputs, rows] float32: the sums of a block, of groups times their scales."""
        shape = self.tile.outputs, self.rows

        slices = self.pipeline(split)

        def whole(sum_ref):
            def multiply(_, x_smem, w_smem):
                plgpu.wgmma(sum_ref, numbers(w_smem, self.bits), x_smem.transpose((1, 0)))
                plgpu.wgmma_wait(0)

            slices(multiply)(x_hbm, w_hbm.at[at_N])
            return sum_ref[...]

        if not self.group:
            return pl.run_scoped(whole, plgpu.ACC(shape))
        plgpu.barrier_wait(scaled)
        before = split * self.own * self.depth // self.group % 4  # groups of other blocks
        wide = min(self.group, self.depth)

        def multiply_groups(indices, x_smem, w_smem, total):
            w = numbers(w_smem, self.bits)
            for first in range(0, self.depth, wide):
                part = pl.ds(first, wide)

                def multiply(sum_ref, part=part):
                    own = w[:, part.start : part.start + wide]
                    plgpu.wgmma(sum_ref, own, x_smem.at[:, part].transpose((1, 0)))
                    return sum_ref[...]

                sums = pl.run_scoped(multiply, plgpu.ACC(shape))
                at = (indices[0] * self.depth + first) // self.group + before
                by_row = plgpu.load(scales.at[:, at], layout=ROW, optimized=False)
                total += sums * lax.broadcast_in_dim(by_row, shape, (0,))
            return total

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        return slices(multiply_groups, zeros)(x_hbm, w_hbm.at[at_N])

    def pipeline(self, split):
        """The loop over a block's slices, which come while others are multiplied."""
        first = split * self.own

        def spec(size, depth, dtype):
            how = {"transforms": hopper.staged(size, depth, dtype), "memory_space": plgpu.SMEM}
            return plgpu.BlockSpec((size, depth), lambda k: (0, first + k), **how)

        w_spec = spec(self.tile.outputs, self.tile.line, "int8")
        specs = [spec(self.rows, self.depth, "bfloat16"), w_spec]

        def slices(body, carry=None):
            steps = min(self.tile.steps, self.own)
            return plgpu.emit_pipeline(
                body,
                grid=(self.own,),
                in_specs=specs,
                max_concurrent_steps=steps,
                init_carry=carry,
            )

        return slices


def numbers(w_smem, bits):
    """A slice of a weight, as the tensor cores take it: bfloat16."""
    if bits == 8:
        w = plgpu.load(w_smem, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        return plgpu.layout_cast(w, plgpu.Layout.WGMMA).astype(jnp.bfloat16)
    shape = w_smem.shape[0], w_smem.shape[1] * 2
    out = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_8BIT,), return_type=out)
    def of_nibbles(_, pairs):
        """4 bytes that a thread has are 8 numbers that lie in a line."""
        int4, registers = ir.IntegerType.get_signless(4), np.empty_like(pairs.registers)
        for at, four in np.ndenumerate(pairs.registers):
            registers[at] = mgpu.utils.bitcast(four, ir.VectorType.get((8,), int4))
        w = mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT_UPCAST_4X, _is_signed=True
        )
        return w.to_layout(mgpu.WGMMA_LAYOUT).astype(ir.BF16Type.get())

    return of_nibbles(plgpu.load(w_smem, layout=plgpu.Layout.WGMMA_8BIT))
