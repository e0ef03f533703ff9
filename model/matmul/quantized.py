"""The einsum with operands rounded to 8 bits: dynamic scales, symmetric, exact sums.

Each device multiplies matrices of its own in a `shard_map`; what crosses devices is named here.
A scale belongs to all of a contracted dim, so where that is split the devices agree on the largest
magnitude first: the values are those of one device, on every mesh.

- forward: x by token, w by output, y = s_x s_w (x w').
- dgrad: the weight that the forward pass saw. dx = dy w = (dy s_w) w8: the weight's scales belong
  to the contracted dim here, so they go to dy before that is rounded, by token.
- wgrad: dy and x by channel, over a group of tokens each, as one scale for all tokens would have
  to cover the largest of them.

Gradients pass through the rounding as if there was none (straight-through estimate, Bengio et al.
2013, arXiv:1308.3432). 8-bit training with dynamic scales: Xi et al. 2024, arXiv:2403.12422.

Shapes: R rows, I contracted, O outputs of one device; leading dims as the spec of the einsum.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels import int8, quantize
from model.matmul.plan import Plan
from model.precision import Format, Passes
from sharding.gather import Axes, axes_of, gathered, scattered

EXACT = 1 << 17  # products of two int8 numbers whose sum int32 holds


class Rounded(NamedTuple):
    """A matrix of 8-bit values; scales by row, or by row and block of columns."""

    values: jax.Array
    scales: jax.Array
    block: int = 0


class Way(NamedTuple):
    """What the devices need to know beside the arrays."""

    plan: Plan
    passes: Passes
    inputs: int  # contracted dims, the last of x and w
    batch: int  # leading dims that x, w and y share: of one number on a device
    w: jax.P  # where weights lie
    out: jax.P  # where results end up

    @property
    def outer(self) -> tuple:
        """The entries of `w` for the outputs."""
        return tuple(self.w)[self.batch : len(self.w) - self.inputs]

    @property
    def outputs(self) -> Axes:
        """The mesh axes that split the outputs while matrices are multiplied."""
        every = (axis for dim in self.outer for axis in axes_of(dim))
        return tuple(axis for axis in every if axis not in self.plan.rows)

    @property
    def contracted(self) -> Axes:
        """The mesh axes that split a weight's contracted dims where it lies."""
        return tuple(axis for dim in tuple(self.w)[-self.inputs :] for axis in axes_of(dim))

    @property
    def sums(self) -> Axes:
        """Those of them that still do while matrices are multiplied."""
        return tuple(axis for axis in self.contracted if axis not in self.plan.rows)


def einsums(
    spec: str, x: jax.Array, ws: Sequence[jax.Array], plan: Plan, passes: Passes
) -> list[jax.Array]:
    """`matmul.einsums` of an x that lies as the plan has it."""
    x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
    inputs = sum(letter not in y_dims for letter in w_dims)
    batch = sum(letter in x_dims and letter in y_dims for letter in w_dims)
    assert y_dims == x_dims[: x.ndim - inputs] + w_dims[batch : ws[0].ndim - inputs], spec
    out = list(plan.y.partitions if plan.scatters else plan.y)
    for dim, axes in plan.scatters:
        out[dim] = (*axes_of(out[dim]), *axes)
    way = Way(plan, passes, inputs, batch, jax.typeof(ws[0]).sharding.spec, jax.P(*out))
    return list(products(way, x, tuple(ws)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(way: Way, x: jax.Array, ws: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x times each of the weights."""
    local = functools.partial(_forward, way)
    return jax.shard_map(local, out_specs=(way.out,) * len(ws))(x, *ws)


def _products_fwd(way, x, ws):
    return products(way, x, ws), (x, ws)


def _products_bwd(way, residuals, dys):
    x, ws = residuals
    local = functools.partial(_backward, way)
    out = (jax.typeof(x).sharding.spec, (way.w,) * len(ws))
    return jax.shard_map(local, out_specs=out)(x, ws, dys)


products.defvjp(_products_fwd, _products_bwd)


# ---- on a device ---------------------------------------------------------------------------------


def _forward(way: Way, x: jax.Array, *ws: jax.Array) -> tuple[jax.Array, ...]:
    """The parts of the results."""
    x, ys = together(x, way.plan.gathers), []
    form = Format.parse(way.passes.forward)
    operand = by_row(matrix(x, way.inputs), form, way.sums)
    for w in ws:
        y_RO = multiplied(operand, weight(way, w, form, x.dtype), x.dtype)
        y = y_RO.reshape(*x.shape[: x.ndim - way.inputs], *outputs_of(way, w))
        ys.append(summed(y, way.sums, way.plan.scatters))
    return tuple(ys)


def _backward(
    way: Way, x: jax.Array, ws: tuple[jax.Array, ...], dys: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The parts of the gradients of x and of the weights."""
    x = together(x, way.plan.gathers)
    x_RI = matrix(x, way.inputs)
    dys_RO = [together(dy, way.plan.scatters).reshape(len(x_RI), -1) for dy in dys]
    dx_RI = sum(dgrad(way, dy_RO, w) for dy_RO, w in zip(dys_RO, ws, strict=True))
    dx = summed(dx_RI.reshape(x.shape), way.outputs, way.plan.gathers)
    group, block = Format.parse(way.passes.wgrad), 0
    if group.kind != "bf16":
        block = tokens_together(x.shape[-way.inputs - 1], len(x_RI), group.group)
    xT_IR = by_column(x_RI, group, block)
    dws = []
    for dy_RO, w in zip(dys_RO, ws, strict=True):
        dw_OI = multiplied(by_column(dy_RO, group, block), xT_IR, x.dtype)
        dw = dw_OI.reshape(*w.shape[: way.batch], *outputs_of(way, w), *x.shape[-way.inputs :])
        # Devices talk: gradients are reduce-scattered to where weights lie, in compute precision.
        dws.append(scattered(dw, way.w, way.plan.rows).astype(w.dtype))
    return dx, tuple(dws)


def dgrad(way: Way, dy_RO: jax.Array, w: jax.Array) -> jax.Array:
    """[R, I]: dy times the weight that the forward pass saw."""
    form, seen = Format.parse(way.passes.dgrad), Format.parse(way.passes.forward)
    w_OI = weight(way, w, seen if form.kind == "bf16" else form, dy_RO.dtype)
    if form.kind == "bf16":
        w_OI = w_OI if seen.kind == "bf16" else dequantized(w_OI, dy_RO.dtype)
        return multiplied(dy_RO, w_OI.T, dy_RO.dtype)
    operand = by_row(dy_RO, form, way.outputs, times=w_OI.scales)
    ones = jnp.ones_like(w_OI.values[0], jnp.float32)
    return multiplied(operand, Rounded(w_OI.values.T, ones), dy_RO.dtype)


def matrix(x: jax.Array, inputs: int) -> jax.Array:
    """x with its last `inputs` dims as columns and all others as rows."""
    return x.reshape(-1, math.prod(x.shape[x.ndim - inputs :]))


def outputs_of(way: Way, w: jax.Array) -> tuple[int, ...]:
    """The sizes of a weight's outputs on a device, gathered."""
    ways = (
        math.prod(lax.axis_size(axis) for axis in axes_of(dim) if axis in way.plan.rows)
        for dim in way.outer
    )
    sizes = w.shape[way.batch : w.ndim - way.inputs]
    return tuple(size * n for size, n in zip(sizes, ways, strict=True))


def weight(way: Way, w: jax.Array, form: Format, dtype: jax.typing.DTypeLike) -> Rounded:
    """[O, I]: a weight, gathered as what it is rounded to."""
    if form.kind == "bf16":
        # Devices talk: weights are gathered, in compute precision.
        return matrix(gathered(w.astype(dtype), way.w, way.plan.rows), way.inputs)
    values, scales, _ = by_row(matrix(w, way.inputs), form, way.contracted)
    # Devices talk: weights are gathered, as int8 values and the scales of their outputs.
    values = gathered(values.reshape(w.shape), way.w, way.plan.rows)
    scales = scales.reshape(w.shape[: w.ndim - way.inputs])
    scales = gathered(scales, tuple(way.w)[: scales.ndim], way.plan.rows)
    return Rounded(matrix(values, way.inputs), scales.reshape(-1))


def by_row(
    x_RK: jax.Array, form: Format, over: Axes, times: jax.Array | None = None
) -> Rounded | jax.Array:
    """x rounded with a scale for each row, of which these mesh axes hold parts."""
    if form.kind == "bf16":
        return x_RK
    largest = None
    if over:
        x32 = x_RK.astype(jnp.float32)
        largest = quantize.magnitudes(x32 if times is None else x32 * times[None])
        # Devices talk: they agree on a scale.
        largest = lax.pmax(largest, over)
    return Rounded(*quantize.rows(x_RK, largest=largest, times=times))


def by_column(x_RK: jax.Array, form: Format, block: int) -> Rounded | jax.Array:
    """x transposed, rounded with a scale for each column and block of rows."""
    if form.kind == "bf16":
        return x_RK.T
    return Rounded(*quantize.columns(x_RK, block=block), block)


def multiplied(
    x: Rounded | jax.Array, w: Rounded | jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """x w', of two matrices of one kind."""
    if isinstance(x, Rounded):
        return int8.matmul(x.values, w.values, x.scales, w.scales, dtype, block=x.block)
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def dequantized(x: Rounded, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The numbers that values and scales mean."""
    return (x.values * x.scales[:, None]).astype(dtype)


def tokens_together(tokens: int, rows: int, group: int) -> int:
    """Tokens that share a channel's scale, of rows of so many: at most `group`; 0: all.

    Of one row of the batch if that divides into such groups, so that they are the same on a mesh
    that has part of the rows.
    """
    group = min(group or EXACT, EXACT)
    least = math.ceil(tokens / group)
    parts = [n for n in range(least, 2 * least + 1) if tokens % n == 0]
    group = tokens // parts[0] if parts else group
    return group if group < rows else 0


def together(x: jax.Array, dims: Sequence[tuple[int, Axes]]) -> jax.Array:
    """x whole along these dims."""
    for dim, axes in dims:
        # Devices talk: rows that lie apart between matmuls come together.
        x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def summed(y: jax.Array, axes: Axes, scatters: Sequence[tuple[int, Axes]]) -> jax.Array:
    """The sum of y over mesh axes, split over those of `scatters`."""
    apart = [axis for _, some in scatters for axis in some]
    rest = tuple(axis for axis in axes if axis not in apart)
    # Devices talk: each has part of the contracted dim.
    for dim, some in scatters:
        y = lax.psum_scatter(y, some, scatter_dimension=dim, tiled=True)
    return lax.psum(y, rest) if rest else y
