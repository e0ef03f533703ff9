"""The einsum with rounded operands: dynamic scales, symmetric, 8 bits or fewer.

Each device multiplies matrices of its own in a `shard_map`; what crosses devices is named here.
A scale belongs to all of a contracted dim, so where that is split the devices agree on the largest
magnitude first: the values are those of one device, on every mesh. Scales of groups (`int8g128`)
are of numbers on one device, so for them this holds where a group divides a device's part.

- forward: x by token, w by output, y = s_x s_w (x w').
- dgrad: the weight that the forward pass saw. dx = dy w = (dy s_w) w8: the weight's scales belong
  to the contracted dim here, so they go to dy before that is rounded, by token. Only where forward
  and dgrad have other formats, or groups, the weight is rounded again, by input.
- wgrad: dy and x by channel, over all tokens or groups of them. Gradients of tokens differ by
  orders of magnitude, and small ones would be rounded to nothing on a scale for the largest. So
  each token's are divided by the root of their magnitude m, and x is multiplied by it, which leaves
  dy' x as it is: of the range of m, each of the two has to cover the root.

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

from model.matmul.plan import Plan
from model.matmul.rounded import (
    OF_VALUES,
    Columns,
    Operand,
    Rounded,
    Rounding,
    block_of,
    multiplied,
    of_gradients,
    roots,
    tokens_together,
    turned,
    turned_back,
)
from model.precision import Format, Passes
from sharding.gather import Axes, axes_of, gathered, scattered, varying


class Way(NamedTuple):
    """What the devices need to know beside the arrays."""

    plan: Plan
    passes: Passes
    inputs: int  # contracted dims, the last of x and w
    batch: int  # leading dims that x, w and y share: of one number on a device
    w: tuple  # where weights lie: an entry for each dim
    out: jax.P  # where results end up

    @classmethod
    def make(cls, spec: str, w: jax.P, plan: Plan, passes: Passes) -> "Way":
        """Of the einsum `spec`, with weights that lie as `w` says."""
        x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
        inputs = sum(letter not in y_dims for letter in w_dims)
        batch = sum(letter in x_dims and letter in y_dims for letter in w_dims)
        assert y_dims == x_dims[: len(x_dims) - inputs] + w_dims[batch:-inputs], spec
        out = list(plan.y.partitions if plan.scatters else plan.y)
        for dim, axes in plan.scatters:
            out[dim] = (*axes_of(out[dim]), *axes)
        return cls(plan, passes, inputs, batch, w.partitions, jax.P(*out))

    @property
    def back(self) -> tuple[Format, bool]:
        """(of dgrad's weight, whether that is rounded by input, with scales of its own)."""
        form, seen = Format.parse(self.passes.dgrad), Format.parse(self.passes.forward)
        if form.exact:
            return seen, False
        saw = form if seen.exact else seen
        turns = bool(form.group or saw.group or form.fp8 != saw.fp8)
        return form if turns else saw, turns

    @property
    def outer(self) -> tuple:
        """The entries of `w` for the outputs."""
        return self.w[self.batch : len(self.w) - self.inputs]

    @property
    def inner(self) -> tuple:
        """The entries of `w` for the contracted dims."""
        return self.w[len(self.w) - self.inputs :]

    def left(self, dims: tuple) -> Axes:
        """The mesh axes that split these dims of a weight once it is gathered."""
        return tuple(axis for axis in every(dims) if axis not in self.plan.rows)

    def whole(self, part: jax.Array, dims: tuple) -> jax.Array:
        """A device's part of what lies as a weight's dims do, gathered as weights are."""
        return gathered(part, dims, self.plan.rows)


def every(dims: tuple) -> Axes:
    """The mesh axes of all of these dims."""
    return tuple(axis for dim in dims for axis in axes_of(dim))


def einsums(
    spec: str, x: jax.Array, ws: Sequence[jax.Array], plan: Plan, passes: Passes
) -> list[jax.Array]:
    """`matmul.einsums` of an x that lies as the plan has it."""
    way = Way.make(spec, jax.typeof(ws[0]).sharding.spec, plan, passes)
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
    apart = jax.typeof(ws[0]).sharding.spec.reduced  # whose sums are for others to make
    lies = jax.P(*way.w, unreduced=apart)
    out = (jax.typeof(x).sharding.spec, (lies,) * len(ws))
    return jax.shard_map(local, out_specs=out)(x, ws, dys)


products.defvjp(_products_fwd, _products_bwd)


# ---- on a device ---------------------------------------------------------------------------------


def _forward(way: Way, x: jax.Array, *ws: jax.Array) -> tuple[jax.Array, ...]:
    """The parts of the results."""
    x, form, ys = together(x, way.plan.gathers), Format.parse(way.passes.forward), []
    x_RI = matrix(x, way.inputs)
    if not (form.exact or form.weights_only):
        block = block_of(matrix(ws[0], way.inputs).shape[1], form.group)
        x_RI = Rounding(OF_VALUES[form.kind], block, way.left(way.inner)).by_row(x_RI)
    for w in ws:
        y_RO = multiplied(x_RI, weight(way, w, form, x.dtype), x.dtype)
        y = y_RO.reshape(*x.shape[: x.ndim - way.inputs], *outputs_of(way, w))
        ys.append(summed(y, way.left(way.inner), way.plan.scatters))
    return tuple(ys)


def _backward(
    way: Way, x: jax.Array, ws: tuple[jax.Array, ...], dys: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The parts of the gradients of x and of the weights."""
    x, form = together(x, way.plan.gathers), Format.parse(way.passes.wgrad)
    x_RI = matrix(x, way.inputs)
    dys_RO = [together(dy, way.plan.scatters).reshape(len(x_RI), -1) for dy in dys]
    saw = [dgrad_weight(way, w, x.dtype) for w in ws]
    of_x, of_dy = wgrad_roundings(way, form, x.shape[-way.inputs - 1], len(x_RI))
    if form.kind == "int8":
        each = [of_tokens(way, dy_RO, w) for dy_RO, w in zip(dys_RO, saw, strict=True)]
        root_R, inverse_R = roots(functools.reduce(jnp.maximum, each))
        of_x, of_dy = of_x._replace(times_R=root_R), of_dy._replace(times_R=inverse_R)
    pairs = [dgrad(way, dy_RO, w, of_dy) for dy_RO, w in zip(dys_RO, saw, strict=True)]
    dx_RI = sum(dx_RI for dx_RI, _ in pairs)
    dx = summed(dx_RI.reshape(x.shape), way.left(way.outer), way.plan.gathers)
    xT_IR = turned(x_RI, of_x)
    apart = tuple(jax.typeof(ws[0]).mat.reduced)
    rows, dws = tuple(axis for axis in way.plan.rows if axis not in apart), []
    for (_, dyT_OR), w in zip(pairs, ws, strict=True):
        dw_OI = multiplied(dyT_OR, xT_IR, x.dtype)
        dw = dw_OI.reshape(*w.shape[: way.batch], *outputs_of(way, w), *x.shape[-way.inputs :])
        # Devices talk over `rows`: gradients, to where weights lie, the weight's bytes in compute
        # precision.
        dw = scattered(dw, way.w, rows).astype(w.dtype)
        dws.append(lax.pcast(dw, apart, to="unreduced"))
    return dx, tuple(dws)


def wgrad_roundings(
    way: Way, form: Format, tokens: int, rows: int
) -> tuple[Columns | None, Columns | None]:
    """How x and dy are rounded, of rows of so many tokens: by channel, or all of fp8 alike."""
    if form.exact:
        return None, None
    block = tokens_together(tokens, rows, form)
    over = () if form.group else way.plan.rows  # a device may have one group of tokens only
    of_x = Rounding(OF_VALUES[form.kind], block, over)
    of_dy = of_gradients(form, way.passes, block, over)
    if form.fp8 and not form.group:
        of_x = of_x._replace(alike=way.left(way.inner))
        of_dy = of_dy._replace(alike=way.left(way.outer))
    return Columns(of_x), Columns(of_dy)


def dgrad_weight(way: Way, w: jax.Array, dtype: jax.typing.DTypeLike) -> Operand:
    """What dgrad multiplies by: a weight as the forward pass saw it [O, I], or turned [I, O]."""
    form, turns = way.back
    return weight_turned(way, w, form) if turns else weight(way, w, form, dtype)


def dgrad(
    way: Way, dy_RO: jax.Array, saw: Operand, wgrad: Columns | None
) -> tuple[jax.Array, Operand]:
    """([R, I]: dy times the weight that dgrad sees; [O, R]: dy as `wgrad` has it)."""
    rounding = of_gradients(Format.parse(way.passes.dgrad), way.passes, over=way.left(way.outer))
    if not way.back[1]:
        return turned_back(dy_RO, saw, rounding, wgrad)
    by_token = rounding._replace(block=saw.block).by_row(dy_RO)
    return multiplied(by_token, saw, dy_RO.dtype), turned(dy_RO, wgrad)


def of_tokens(way: Way, dy_RO: jax.Array, saw: Operand) -> jax.Array:
    """[R]: the largest magnitude of each token's gradient, where dgrad has it in dgrad's way."""
    over = way.left(way.outer)
    rounding = of_gradients(Format.parse(way.passes.dgrad), way.passes, over=over)
    if rounding is None or way.back[1]:
        return Rounding("int8", over=over).largest(dy_RO)
    return rounding.largest(dy_RO, saw.scales)


def matrix(x: jax.Array, inputs: int) -> jax.Array:
    """x with its last `inputs` dims as columns and all others as rows."""
    return x.reshape(-1, math.prod(x.shape[x.ndim - inputs :]))


def outputs_of(way: Way, w: jax.Array) -> tuple[int, ...]:
    """The sizes of a weight's outputs on a device, gathered."""
    sizes = w.shape[way.batch : w.ndim - way.inputs]
    rows = way.plan.rows
    ways = ([lax.axis_size(a) for a in axes_of(dim) if a in rows] for dim in way.outer)
    return tuple(size * math.prod(n) for size, n in zip(sizes, ways, strict=True))


def weight(way: Way, w: jax.Array, form: Format, dtype: jax.typing.DTypeLike) -> Operand:
    """[O, I]: a weight, gathered as what it is rounded to, with scales of its outputs."""
    w = varying(w)
    if form.exact:
        # Devices talk over the plan's `rows`: a weight, its bytes in compute precision.
        return matrix(way.whole(w.astype(dtype), way.w), way.inputs)
    w_OI, outer = matrix(w, way.inputs), way.w[: len(way.w) - way.inputs]
    block = block_of(w_OI.shape[1], form.group)
    values, scales, _ = Rounding(OF_VALUES[form.kind], block, every(way.inner)).by_row(w_OI)
    # Devices talk over the plan's `rows`: a weight's values, a byte each, and their scales, 4.
    values = matrix(way.whole(values.reshape(w.shape), way.w), way.inputs)
    scales = scales.reshape(*w.shape[: len(outer)], -1)
    scales = way.whole(scales, (*outer, every(way.inner) if block else None))
    return Rounded(values, scales.reshape(len(values), -1) if block else scales.reshape(-1), block)


def weight_turned(way: Way, w: jax.Array, form: Format) -> Rounded:
    """[I, O]: a weight, gathered as what it is rounded to, with scales of its inputs."""
    w_OI, inner = matrix(varying(w), way.inputs), w.shape[w.ndim - way.inputs :]
    block = block_of(len(w_OI), form.group)
    rounding = Rounding(OF_VALUES[form.kind], block, every(way.outer))
    values, scales, _ = rounding.by_column(w_OI)
    # Devices talk over the plan's `rows`: a weight's values, a byte each, and their scales, 4.
    values = values.reshape(*inner, *w.shape[way.batch : w.ndim - way.inputs])
    values = way.whole(values, (*way.inner, *way.outer))
    values = values.reshape(math.prod(values.shape[: way.inputs]), -1)
    scales = way.whole(
        scales.reshape(*inner, -1), (*way.inner, every(way.outer) if block else None)
    )
    return Rounded(values, scales.reshape(len(values), -1) if block else scales.reshape(-1), block)


def together(x: jax.Array, dims: Sequence[tuple[int, Axes]]) -> jax.Array:
    """x whole along these dims."""
    for dim, axes in dims:
        # Devices talk over these axes: rows that lie apart come together, the bytes of x whole.
        x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def summed(y: jax.Array, axes: Axes, scatters: Sequence[tuple[int, Axes]]) -> jax.Array:
    """The sum of y over mesh axes, split over those of `scatters`."""
    apart = [axis for _, some in scatters for axis in some]
    rest = tuple(axis for axis in axes if axis not in apart)
    # Devices talk over `axes`: each has part of the contracted dim; the bytes of y, or twice.
    for dim, some in scatters:
        y = lax.psum_scatter(y, some, scatter_dimension=dim, tiled=True)
    return lax.psum(y, rest) if rest else y
