"""The grouped product of experts: each has its own run of the rows.

Shapes: M rows sorted by expert, K contracted, N outputs, E experts; rows behind the last run are
nobody's.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from model.matmul.rounded import EXACT, OF_VALUES, Rounding, of_gradients, roots
from model.precision import Format, Passes
from sharding.gather import Axes

# [M, K] times [E, N, K], where each expert has its own run of the M rows: [M, N].
BY_EXPERT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
# [M, N] times [M, K]: of each expert's run of rows [N, K].
BY_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def grouped(
    x_MK: jax.Array,
    w_ENK: jax.Array,
    counts_E: jax.Array,
    passes: Passes,
    inner: Axes = (),
    outer: Axes = (),
) -> jax.Array:
    """[M, N]: each expert's rows times its weight, in a `shard_map`.

    `inner` and `outer` are the mesh axes that split K and N. Rows and outputs have scales of their
    own, as in `quantized`; of wgrad, channels have, over the rows of this device. Weights come
    gathered.
    """
    if not passes.quantized:
        return exactly(x_MK, w_ENK, counts_E)
    varies = [jax.typeof(a).mat.varying for a in (x_MK, w_ENK)]
    x_MK = lax.pcast(x_MK, tuple(varies[1] - varies[0]), to="varying")
    w_ENK = lax.pcast(w_ENK, tuple(varies[0] - varies[1]), to="varying")
    return rounded(passes, inner, outer, x_MK, w_ENK, counts_E)


def exactly(x_MK: jax.Array, w_ENK: jax.Array, counts_E: jax.Array) -> jax.Array:
    """`grouped` in x's dtype."""
    return lax.ragged_dot_general(x_MK, w_ENK, counts_E, BY_EXPERT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def rounded(passes, inner, outer, x_MK, w_ENK, counts_E):
    form = Format.parse(passes.forward)
    if form.exact:
        return exactly(x_MK, w_ENK, counts_E)
    rounding = Rounding(OF_VALUES[form.kind], over=inner)
    w8_ENK, sw_EN = by_output(w_ENK, rounding)
    x8_MK, sx_M, _ = rounding.by_row(x_MK)
    y_MN = sums(x8_MK, w8_ENK, counts_E) * sx_M[:, None] * of_rows(sw_EN, counts_E, len(x_MK))
    return y_MN.astype(x_MK.dtype)


def _rounded_fwd(passes, inner, outer, x_MK, w_ENK, counts_E):
    return rounded(passes, inner, outer, x_MK, w_ENK, counts_E), (x_MK, w_ENK, counts_E)


def _rounded_bwd(passes, inner, outer, residuals, dy_MN):
    x_MK, w_ENK, counts_E = residuals
    _, back = jax.vjp(lambda x, w: exactly(x, w, counts_E), x_MK, w_ENK)
    dx_MK, dw_ENK = back(dy_MN)
    dgrad, wgrad = Format.parse(passes.dgrad), Format.parse(passes.wgrad)
    if not dgrad.exact:
        # The weight that the forward pass saw; its scales go to dy, as they belong to outputs.
        w8_ENK, sw_EN = by_output(w_ENK, Rounding(OF_VALUES[dgrad.kind], over=inner))
        scaled_MN = dy_MN * of_rows(sw_EN, counts_E, len(dy_MN))
        dy8_MN, sdy_M, _ = of_gradients(dgrad, passes, over=outer).by_row(scaled_MN)
        dx_MK = sums(dy8_MN, jnp.swapaxes(w8_ENK, 1, 2), counts_E) * sdy_M[:, None]
    if not wgrad.exact and len(x_MK) <= EXACT:
        root_M, inverse_M = roots(Rounding("int8", over=outer).largest(dy_MN))
        dyT_NM, sdy_N, _ = of_gradients(wgrad, passes).by_column(dy_MN, inverse_M)
        xT_KM, sx_K, _ = Rounding(OF_VALUES[wgrad.kind]).by_column(x_MK, root_M)
        dw_ENK = sums(dyT_NM.T, xT_KM.T, counts_E, BY_ROWS)
        dw_ENK = dw_ENK * sdy_N[None, :, None] * sx_K[None, None]
    return dx_MK.astype(x_MK.dtype), dw_ENK.astype(w_ENK.dtype), None


rounded.defvjp(_rounded_fwd, _rounded_bwd)


def sums(
    a: jax.Array, b: jax.Array, counts_E: jax.Array, dims: lax.RaggedDotDimensionNumbers = BY_EXPERT
) -> jax.Array:
    """float32 of exact sums: [M, N] of [M, K] and [E, N, K]."""
    return lax.ragged_dot_general(a, b, counts_E, dims, preferred_element_type=jnp.int32).astype(
        jnp.float32
    )


def by_output(w_ENK: jax.Array, rounding: Rounding) -> tuple[jax.Array, jax.Array]:
    """(levels [E, N, K], scales [E, N])."""
    E, N, K = w_ENK.shape
    values, scales, _ = rounding.by_row(w_ENK.reshape(E * N, K))
    return values.reshape(E, N, K), scales.reshape(E, N)


def of_rows(a_EN: jax.Array, counts_E: jax.Array, M: int) -> jax.Array:
    """[M, N]: each row's expert's."""
    ends_E = jnp.cumsum(counts_E)
    expert_M = jnp.sum(jnp.arange(M)[:, None] >= ends_E[None], axis=1)
    return a_EN[jnp.minimum(expert_M, len(counts_E) - 1)]
