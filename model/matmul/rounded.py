"""Matrices rounded to few bits, and their products, on one device.

Shapes: R rows, K contracted columns, N rows of the other operand.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels import int8, quantize
from model.precision import Format, Passes
from sharding.gather import Axes

EXACT = 1 << 17  # products of two int8 numbers whose sum int32 holds
OF_VALUES = {"int8": "int8", "fp8": "float8_e4m3fn", "w8": "int8", "w4": "int4"}
OF_GRADIENTS = {"int8": "int8", "fp8": "float8_e5m2"}


class Rounded(NamedTuple):
    """A matrix as values and scales: of rows, or of rows and `block` columns each."""

    values: jax.Array
    scales: jax.Array
    block: int = 0


Operand = Rounded | jax.Array


class Rounding(NamedTuple):
    """What a matrix is rounded to, and what shares a scale."""

    form: str  # of quantize.TOPS
    block: int = 0  # columns; 0: all
    over: Axes = ()  # mesh axes along which others have the rest of these columns
    stochastic: bool = False
    alike: Axes | None = None  # mesh axes of other rows with the same scale; None: each its own

    def by_row(self, x_RK: jax.Array, times: jax.Array | None = None) -> Rounded:
        """[R, K]; each column of x multiplied by its own of `times` before."""
        shared = (self.over or self.alike is not None) and not self.block
        largest = self.largest(x_RK, times) if shared else None
        how = {"form": self.form, "block": self.block, "stochastic": self.stochastic}
        return Rounded(*quantize.rows(x_RK, largest=largest, times=times, **how), self.block)

    def by_column(self, x_KR: jax.Array, times: jax.Array | None = None) -> Rounded:
        """[R, K], of x transposed; each row of x multiplied by its own of `times` before."""
        if self.block or self.stochastic:
            return self.by_row(x_KR.T, times)
        largest = self.largest(x_KR.T, times)
        _, turned = quantize.both(x_KR, ("", self.form), (None, largest), (None, times))
        return Rounded(*turned)

    def largest(self, x_RK: jax.Array, times: jax.Array | None = None) -> jax.Array:
        """[R]: the magnitudes that scales are made of."""
        x_RK = x_RK.astype(jnp.float32)
        largest_R = quantize.magnitudes(x_RK if times is None else x_RK * times[None])
        if self.alike is not None:
            largest_R = jnp.broadcast_to(jnp.max(largest_R), largest_R.shape)
        over = (*self.over, *(self.alike or ()))
        # Devices talk over `over`: they agree on scales, 4 bytes a row.
        return lax.pmax(largest_R, over) if over else largest_R


class Columns(NamedTuple):
    """How a matrix is rounded by column."""

    rounding: Rounding
    times_R: jax.Array | None = None  # what its rows are multiplied by before


def both(
    x_RK: jax.Array, rows: Rounding, columns: Columns, times: jax.Array
) -> tuple[Rounded, Rounded]:
    """(x by row, each column multiplied by its own of `times` before; x by column)."""
    by_column, times = columns.rounding, (times, columns.times_R)
    if rows.block or by_column.block or rows.stochastic or by_column.stochastic:
        return rows.by_row(x_RK, times[0]), by_column.by_column(x_RK, times[1])
    largest = rows.largest(x_RK, times[0]), by_column.largest(x_RK.T, times[1])
    each = quantize.both(x_RK, (rows.form, by_column.form), largest, times)
    return tuple(Rounded(*one) for one in each)


def of_gradients(form: Format, passes: Passes, block: int = 0, over: Axes = ()) -> Rounding | None:
    """How dy is rounded to a format; None: not at all."""
    if form.exact:
        return None
    return Rounding(OF_GRADIENTS[form.kind], block, over, passes.rounding == "stochastic")


def roots(largest_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the square root, one over it), both nothing of nothing: such a token has no gradient."""
    root_R = jnp.sqrt(largest_R)
    return root_R, jnp.where(root_R > 0, 1 / root_R, 0)


def turned_back(
    dy_RN: jax.Array, w_NK: Operand, rounding: Rounding | None, wgrad: Columns | None = None
) -> tuple[jax.Array, Operand]:
    """([R, K]: dy w, of a weight with scales of its outputs, one each if dy is rounded;
    [N, R]: dy transposed, as `wgrad` has it).

    The weight's scales belong to the contracted dim here: they go to dy before that is rounded.
    """
    if rounding is None:
        dx_RK = multiplied(dy_RN, exact(w_NK, dy_RN.dtype).T, dy_RN.dtype)
        return dx_RK, turned(dy_RN, wgrad)
    if wgrad is None:
        by_token, dyT_NR = rounding.by_row(dy_RN, times=w_NK.scales), dy_RN.T
    else:
        by_token, dyT_NR = both(dy_RN, rounding, wgrad, w_NK.scales)
    ones_K = jnp.ones_like(w_NK.values[0], jnp.float32)
    return multiplied(by_token, Rounded(w_NK.values.T, ones_K), dy_RN.dtype), dyT_NR


def turned(x_RK: jax.Array, how: Columns | None) -> Operand:
    """[K, R]: x transposed, and rounded if it is to be."""
    return x_RK.T if how is None else how.rounding.by_column(x_RK, how.times_R)


def multiplied(x_RK: Operand, w_NK: Operand, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[R, N] in `dtype`: x w'. Of two rounded operands in 8 bits, else in `dtype` too."""
    if isinstance(x_RK, Rounded) and isinstance(w_NK, Rounded):
        x, w = x_RK, w_NK
        assert x.block == w.block, (x.block, w.block)
        return int8.matmul(x.values, w.values, x.scales, w.scales, dtype, block=x.block)
    x_RK, w_NK = exact(x_RK, dtype), exact(w_NK, dtype)
    return lax.dot_general(x_RK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def exact(x: Operand, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The numbers that an operand means."""
    if not isinstance(x, Rounded):
        return x
    scales = x.scales if x.block else x.scales[:, None]
    parts = quantize.in_blocks(x.values.astype(jnp.float32), x.block) * scales[..., None]
    return parts.reshape(len(x.values), -1)[:, : x.values.shape[1]].astype(dtype)


def block_of(size: int, group: int) -> int:
    """Columns that share a scale, of `size`: at most `group`, in equal blocks; 0 if all may.

    All do too where no equal blocks are at least half as large as they may be.
    """
    if not group:
        return 0
    least = math.ceil(size / group)
    return size // next((n for n in range(least, 2 * least + 1) if size % n == 0), 1)


def tokens_together(tokens: int, rows: int, form: Format) -> int:
    """Tokens that share a channel's scale, of rows of so many, in `rows` tokens altogether; 0: all.

    With groups, at most `form.group`, and of one row of the batch if that divides into such groups,
    so that they are the same on a mesh that has part of the rows. Never more than int32 can sum.
    """
    if not form.group and rows <= EXACT:
        return 0
    group = min(form.group or EXACT, EXACT)
    least = math.ceil(tokens / group)
    parts = [n for n in range(least, 2 * least + 1) if tokens % n == 0]
    group = tokens // parts[0] if parts else group
    return group if group < rows else 0
