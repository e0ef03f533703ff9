"""The one einsum that every weight of the model goes through."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from model.matmul import delayed, quantized, stored
from model.matmul.plan import Plan
from model.matmul.stored import QArray
from model.precision import BF16, Passes
from sharding import sequence, stages
from sharding.gather import axes_of, gather

FEW = 16  # rows below which the weight is the left operand: on CPU up to twice as fast


def einsum(
    spec: str,
    x: jax.Array,
    w: jax.Array,
    *,
    out: jax.P,
    passes: Passes = BF16,
    history: jax.Array | None = None,
) -> jax.Array:
    """`jnp.einsum(spec, x, w)` in x's dtype, for a weight that lies split on the mesh.

    `w` is cast to x's dtype, then gathered over the mesh axes that split x's rows (the dims of x
    that `w` does not have), so the gather moves compute precision. Where a contracted dim is split
    over devices, their sum crosses them. `out` says where the result lives: where it wants rows
    together that x has apart, they are gathered first; where apart, their sums are scattered.
    `passes` says to what the operands are rounded (`quantized`); with delayed scaling on scales of
    their `history` (`delayed`). A weight may be a QArray.

    For rows in flight `w` leads with the stages: each stage's rows meet its own.
    """
    return einsums(spec, x, [w], out=out, passes=passes, history=history)[0]


def einsums(
    spec: str,
    x: jax.Array,
    ws: Sequence[jax.Array],
    *,
    out: jax.P,
    passes: Passes = BF16,
    history: jax.Array | None = None,
) -> list[jax.Array]:
    """`einsum` for each of some weights that lie alike; x is gathered once."""
    x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
    if ws[0].ndim > len(w_dims):
        assert history is None, "micro-batches of a pipeline would add up what they have seen"
        spec, out = f"s{x_dims},s{w_dims}->s{y_dims}", stages.apart_spec(out)
        ys = einsums(spec, stages.apart(x), ws, out=out, passes=passes)
        return [stages.together(y) for y in ys]
    if isinstance(ws[0], QArray):
        plan = Plan.make(spec, jax.typeof(x).sharding.spec, ws[0].spec, out)
        return stored.einsums(spec, placed(x, plan.x), ws, plan, passes)
    x_sharding, w_spec = jax.typeof(x).sharding, jax.typeof(ws[0]).sharding.spec
    if passes.quantized:
        plan = Plan.make(spec, x_sharding.spec, w_spec, out)
        if passes.delayed:
            return delayed.einsums(spec, placed(x, plan.x), ws, plan, passes, history)
        return quantized.einsums(spec, placed(x, plan.x), ws, plan, passes)
    ws = [w.astype(x.dtype) for w in ws]
    if x_sharding.mesh.size == 1:
        inputs = sum(letter in x_dims for letter in w_dims)
        assert y_dims == x_dims[: x.ndim - inputs] + w_dims[: ws[0].ndim - inputs], spec
        x, *ws = (jax.reshard(a, jax.P()) for a in (x, *ws))  # reshapes may then join any dims
        return [jax.reshard(product(x, w, inputs), out) for w in ws]
    plan = Plan.make(spec, x_sharding.spec, w_spec, out)
    x = placed(x, plan.x)
    # Devices talk over the plan's axes: x comes together, weights are gathered, and sums over
    # contracted dims made or scattered; the bytes of each, in x's dtype.
    for dim, axes in plan.gathers:
        x = sequence.whole(x, dim, axes)
    ys = [jnp.einsum(spec, x, gather(w, plan.rows), out_sharding=plan.y) for w in ws]
    for dim, axes in plan.scatters:
        ys = [sequence.scattered(y, dim, axes) for y in ys]
    return ys


def placed(x: jax.Array, spec: jax.P) -> jax.Array:
    """`x` where `spec` says."""
    here = jax.typeof(x).sharding.spec
    same = all(axes_of(a) == axes_of(b) for a, b in zip(here, spec, strict=True))
    return x if same else jax.reshard(x, spec)


def product(x: jax.Array, w: jax.Array, inputs: int) -> jax.Array:
    """x times w over the last `inputs` dims of both: rows of x, then rows of w.

    As a product of two matrices: of more dims XLA makes a transposed copy of the weight on CPU,
    which at batch 1 takes twenty times as long as the product.
    """
    size = math.prod(w.shape[w.ndim - inputs :])
    x_RI, w_OI = x.reshape(-1, size), w.reshape(-1, size)
    if x_RI.shape[0] < FEW:
        y_RO = jnp.einsum("oi,ri->or", w_OI, x_RI).T
    else:
        y_RO = jnp.einsum("ri,oi->ro", x_RI, w_OI)
    return y_RO.reshape(*x.shape[: x.ndim - inputs], *w.shape[: w.ndim - inputs])
