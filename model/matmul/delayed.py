"""The einsum in fp8 with delayed scaling: scales are made of the steps before.

An operand has one scale for all of its numbers, of the largest magnitude that it had in the last
WINDOW steps. So it is known before the operand is: nothing is read once to find a scale and again
to round, no pass of a matmul waits for devices to agree, x and dy are rounded alike wherever they
are used, and a weight's scale need not enter dy. Numbers above the scale's are cut off there.

What a step sees is the "gradient" of the history, so it comes out of any transformation that a
gradient comes out of; optim/histories.py puts it in front of what the history remembers. Delayed
scaling: Micikevicius et al. 2022, arXiv:2209.05433; by way of a gradient: flax's fp8_ops.

Shapes: R rows, I contracted, O outputs of one device; N steps that are remembered.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels import quantize
from model.matmul.plan import Plan
from model.matmul.quantized import Way, matrix, outputs_of, summed, together
from model.matmul.rounded import OF_GRADIENTS, OF_VALUES, Operand, Rounded, exact, multiplied
from model.precision import Format, Passes
from sharding.gather import scattered, varying

WINDOW = 16  # steps
# Of x, w and dy, the magnitudes that scales are made of as long as nothing was seen. An exact scale
# would take a look at the operand before it is rounded, and a program that can do so does it in
# each step, or asks the host. It need not be exact: a float8_e4m3 has all its bits over a range of
# 29,000, a float8_e5m2 of 9e8. So x has from 0.016 to 448, w from 0.00014 to 4, and dy, whose size
# is one over the tokens of a batch, from 7e-11 to 0.06. What is smaller loses bits, what is larger
# is cut off, for one step.
FIRST = (448.0, 4.0, 2**-4)
LEAST = 2**-100  # magnitude to make a scale of, so that one over it is a number


def fresh() -> jax.Array:
    """[3, N] float32: a history of nothing, for x, w and dy of a layer."""
    return jnp.zeros((len(FIRST), WINDOW), jnp.float32, out_sharding=jax.P(None, None))


def einsums(
    spec: str, x: jax.Array, ws: Sequence[jax.Array], plan: Plan, passes: Passes, history: jax.Array
) -> list[jax.Array]:
    """`matmul.einsums` of an x that lies as the plan has it; the weights share the history."""
    way = Way.make(spec, jax.typeof(ws[0]).sharding.spec, plan, passes)
    return list(products(way, x, tuple(ws), history))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(
    way: Way, x: jax.Array, ws: tuple[jax.Array, ...], history: jax.Array
) -> tuple[jax.Array, ...]:
    """x times each of the weights."""
    local = functools.partial(_forward, way)
    return jax.shard_map(local, out_specs=(way.out,) * len(ws))(x, ws, tops_of(history))


def _products_fwd(way, x, ws, history):
    saw = largest(x), largest(*ws)
    return products(way, x, ws, history), (x, ws, history, saw)


def _products_bwd(way, residuals, dys):
    x, ws, history, saw = residuals
    apart = jax.typeof(ws[0]).sharding.spec.reduced  # whose sums are for others to make
    lies = jax.P(*way.w, unreduced=apart)
    out = (jax.typeof(x).sharding.spec, (lies,) * len(ws))
    local = functools.partial(_backward, way)
    dx, dws = jax.shard_map(local, out_specs=out)(x, ws, dys, tops_of(history))
    seen = jnp.stack([*saw, largest(*dys)])
    return dx, dws, jnp.broadcast_to(seen[:, None], history.shape)


products.defvjp(_products_fwd, _products_bwd)


def tops_of(history: jax.Array) -> jax.Array:
    """[3]: the magnitudes that scales are made of. Of a history of zeros there is none to make."""
    seen = jnp.max(history, axis=1)
    return jnp.where(seen > 0, jnp.maximum(seen, LEAST), jnp.array(FIRST, jnp.float32))


def largest(*arrays: jax.Array) -> jax.Array:
    """The largest magnitude of some arrays, on all devices; infinite where one is not finite."""

    def local(*parts: jax.Array) -> jax.Array:
        each = [quantize.magnitudes(varying(part).reshape(-1)) for part in parts]
        own = functools.reduce(jnp.maximum, each)
        over = tuple(jax.typeof(own).mat.varying)
        # Devices talk over all axes that split an operand: its largest magnitude, 4 bytes.
        return lax.pmax(own, over) if over else own

    return jax.shard_map(local, out_specs=jax.P())(*arrays)


# ---- on a device ---------------------------------------------------------------------------------


def rounded(x: jax.Array, top: jax.Array, form: str) -> jax.Array:
    """x in a form of quantize.TOPS, that `top` is the largest number of; larger ones are cut off.
    What is not finite is NaN, so that the guard can see it."""
    most = quantize.TOPS[form]
    levels = jnp.clip(x.astype(jnp.float32) * (most / top), -most, most)
    return jnp.where(jnp.isfinite(x), levels, jnp.nan).astype(form)


def scaled(values_RK: jax.Array, top: jax.Array) -> Rounded:
    """`rounded` values with their scale, one for all, as each row's own."""
    scale = top / quantize.TOPS[values_RK.dtype.name]
    return Rounded(values_RK, jnp.broadcast_to(scale, values_RK.shape[:1]))


def weight(way: Way, w: jax.Array, top: jax.Array, *, exactly: bool, dtype: str) -> Operand:
    """[O, I]: a weight, gathered."""
    w = varying(w)
    if exactly:
        # Devices talk over the plan's `rows`: a weight, its bytes in compute precision.
        return matrix(way.whole(w.astype(dtype), way.w), way.inputs)
    # Devices talk over the plan's `rows`: a weight's values, a byte each.
    values = way.whole(rounded(w, top, OF_VALUES["fp8"]), way.w)
    return scaled(matrix(values, way.inputs), top)


def _forward(
    way: Way, x: jax.Array, ws: tuple[jax.Array, ...], tops: jax.Array
) -> tuple[jax.Array, ...]:
    """The parts of the results."""
    x, ys, exactly = together(x, way.plan.gathers), [], Format.parse(way.passes.forward).exact
    x_RI = matrix(x, way.inputs)
    if not exactly:
        x_RI = scaled(rounded(x_RI, tops[0], OF_VALUES["fp8"]), tops[0])
    for w in ws:
        w_OI = weight(way, w, tops[1], exactly=exactly, dtype=x.dtype)
        y = multiplied(x_RI, w_OI, x.dtype)
        y = y.reshape(*x.shape[: x.ndim - way.inputs], *outputs_of(way, w))
        ys.append(summed(y, way.left(way.inner), way.plan.scatters))
    return tuple(ys)


def _backward(
    way: Way,
    x: jax.Array,
    ws: tuple[jax.Array, ...],
    dys: tuple[jax.Array, ...],
    tops: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The parts of the gradients of x and of the weights."""
    forward, dgrad, wgrad = (
        Format.parse(text).exact
        for text in (way.passes.forward, way.passes.dgrad, way.passes.wgrad)
    )
    x = together(x, way.plan.gathers)
    x_RI, apart = matrix(x, way.inputs), tuple(jax.typeof(ws[0]).mat.reduced)
    xT_IR = x_RI.T if wgrad else scaled(rounded(x_RI, tops[0], OF_VALUES["fp8"]).T, tops[0])
    rows, dxs, dws = tuple(axis for axis in way.plan.rows if axis not in apart), [], []
    for w, dy in zip(ws, dys, strict=True):
        dy_RO = together(dy, way.plan.scatters).reshape(len(x_RI), -1)
        dy8_RO = rounded(dy_RO, tops[2], OF_GRADIENTS["fp8"])
        w_OI = weight(way, w, tops[1], exactly=forward and dgrad, dtype=x.dtype)
        if dgrad:
            dxs.append(multiplied(dy_RO, exact(w_OI, x.dtype).T, x.dtype))
        else:
            w_IO = scaled(w_OI.values.T, tops[1])
            dxs.append(multiplied(scaled(dy8_RO, tops[2]), w_IO, x.dtype))
        dyT_OR = dy_RO.T if wgrad else scaled(dy8_RO.T, tops[2])
        dw = multiplied(dyT_OR, xT_IR, x.dtype)
        dw = dw.reshape(*w.shape[: way.batch], *outputs_of(way, w), *x.shape[-way.inputs :])
        # Devices talk over `rows`: gradients, to where weights lie, the weight's bytes in compute
        # precision.
        dw = scattered(dw, way.w, rows).astype(w.dtype)
        dws.append(lax.pcast(dw, apart, to="unreduced"))
    dx = summed(sum(dxs).reshape(x.shape), way.left(way.outer), way.plan.gathers)
    return dx, tuple(dws)
