"""Products of rounded operands: within what the scales allow of the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import int8, quantize
from model.matmul import einsum
from model.matmul.rounded import block_of, tokens_together
from model.precision import BF16, INT8, Format, Passes

SPEC = "BTD,FD->BTF"
B, T, D, F = 2, 6, 40, 24
FLOAT = 1e-5  # what sums in float32 add, of the largest value


def ranges(kind):
    """x [B, T, D], w [F, D] and dy [B, T, F] in a hard range."""
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=size).astype(np.float32) for size in ((B, T, D), (F, D), (B, T, F))]
    for a in arrays:
        if kind == "outliers":
            a.ravel()[draw.integers(0, a.size, 4)] *= 1000
        elif kind == "zeros":
            a[:] = 0
        elif kind == "channel":
            a[..., 3] *= 1e6
        elif kind == "small":
            a *= 1e-30
    return arrays


RANGES = ("normal", "outliers", "zeros", "channel", "small")


@functools.cache
def step(passes):
    """x, w, dy to y, dx, dw; compiled once for each of the passes."""

    def run(x, w, dy):
        out = jax.P(None, None, None)
        y, back = jax.vjp(lambda x, w: einsum(SPEC, x, w, out=out, passes=passes), x, w)
        return y, *back(dy)

    return jax.jit(run)


def scale(a, axis):
    return np.abs(a).max(axis, keepdims=True) / 127


def close(ours, right, bound):
    right = right.reshape(ours.shape)
    extra = FLOAT * np.abs(right).max(initial=0)
    np.testing.assert_array_less(np.abs(ours - right), bound.reshape(ours.shape) + extra + 1e-38)


@pytest.mark.parametrize("kind", RANGES)
def test_each_pass_is_as_near_its_formula_as_its_scales_are_fine(one_device, kind):
    x, w, dy = ranges(kind)
    y, dx, dw = map(np.asarray, step(INT8)(x, w, dy))
    x, w, dy = (a.astype(np.float64).reshape(-1, a.shape[-1]) for a in (x, w, dy))
    # A number is at most half a scale from what it is rounded to.
    ex, ew = (np.broadcast_to(scale(a, -1) / 2, a.shape) * (1 + 1e-5) for a in (x, w))
    close(y, x @ w.T, np.abs(x) @ ew.T + ex @ np.abs(w).T + ex @ ew.T)
    g = dy * scale(w, -1).T  # what is rounded of dy
    eg = np.broadcast_to(scale(g, -1) / 2, g.shape) * (1 + 1e-5)
    w8 = np.abs(w / np.where(scale(w, -1), scale(w, -1), 1))
    close(dx, dy @ w, np.abs(dy) @ ew + eg @ (w8 + 0.5))
    # A channel's scale is of all tokens, the magnitudes of dy shared with x.
    root = np.sqrt(np.abs(g).max(-1, keepdims=True))
    x, dy = x * root, dy / np.where(root > 0, root, 1)
    ex, eg = (np.broadcast_to(scale(a, 0) / 2, a.shape) * (1 + 1e-5) for a in (x, dy))
    close(dw, dy.T @ x, np.abs(dy).T @ ex + eg.T @ np.abs(x) + eg.T @ ex)


def test_random_operands_lose_less_than_two_per_cent(one_device):
    right = step(BF16)(*ranges("normal"))
    for ours, exact in zip(step(INT8)(*ranges("normal")), right, strict=True):
        assert np.linalg.norm(ours - exact) < 0.02 * np.linalg.norm(exact)


def test_tokens_of_very_unlike_gradients_are_as_near(one_device):
    draw = np.random.default_rng(1)
    x, w, dy = (np.float32(draw.normal(size=s)) for s in ((4, 512, D), (F, D), (4, 512, F)))
    dy *= np.exp(2 * draw.normal(size=(4, 512, 1)))
    dy[:, 400:] = 0  # padding, whose x would have no root to be small by
    (_, _, dw), (_, _, exact) = step(INT8)(x, w, dy), step(BF16)(x, w, dy)
    # Without shared roots 3.7 %.
    assert np.linalg.norm(dw - exact) < 0.015 * np.linalg.norm(exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_so_that_the_guard_can_see_it(one_device, bad, which):
    arrays = ranges("normal")
    arrays[which][..., 1, 5] = bad
    y, dx, dw = step(INT8)(*arrays)
    sees = {0: (y, dw), 1: (y, dx), 2: (dx, dw)}[which]
    assert not any(np.isfinite(a).all() for a in sees)
    row = {0: np.isfinite(y)[:, 1], 1: np.isfinite(y)[..., 1], 2: np.isfinite(dx)[:, 1]}[which]
    assert not row.any()


def test_a_pass_that_is_not_rounded_is_the_one_without_rounding(one_device):
    arrays = ranges("normal")
    exact = step(BF16)(*arrays)
    for passes, same in [(Passes(forward="int8"), 2), (Passes(dgrad="int8"), 0)]:
        found = step(passes)(*arrays)
        np.testing.assert_allclose(found[same], exact[same], rtol=1e-5, atol=1e-5)
        other = 0 if same else 1
        assert np.abs(found[other] - exact[other]).max() > 1e-3
    # The gradient is that of the weight which the forward pass saw.
    dx = step(Passes(forward="int8"))(*arrays)[1]
    values, scales = jax.jit(quantize.rows)(arrays[1])
    np.testing.assert_allclose(
        dx, arrays[2] @ np.asarray(values * scales[:, None]), rtol=1e-5, atol=1e-5
    )


def test_a_huge_channel_spoils_its_own_block_only():
    x, w, _ = ranges("channel")
    x, w[:, 3] = x.reshape(-1, D), 0  # what is left is what the other channels give
    exact = x.astype(np.float64) @ w.T.astype(np.float64)

    @functools.partial(jax.jit, static_argnums=2)
    def rounded(x, w, block):
        (x8, sx), (w8, sw) = (quantize.rows(a, block=block) for a in (x, w))
        y = int8.matmul(x8, w8, sx, sw, jnp.float32, block=block)
        return y, (x8, sx), quantize.columns(x.T, block=block)

    error = {}
    for block in (0, 16):
        y, by_row, by_column = rounded(x, w, block)
        for a, b in zip(by_row, by_column, strict=True):
            np.testing.assert_array_equal(a, b)
        error[block] = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert by_row[1].shape == (B * T, 3)  # 40 is no multiple of 16: the last block is short
    assert error[0] > 0.9  # nothing but the channel survives
    assert error[16] < 0.7  # the 15 channels beside it are lost, of 39


def test_tokens_share_a_scale_within_a_row_where_that_divides():
    few = Format("int8", 512)
    assert tokens_together(8192, 8 * 8192, few) == 512
    assert tokens_together(1020, 8 * 1020, few) == 510
    assert tokens_together(12, 96, few) == 12
    assert tokens_together(1021, 8 * 1021, few) == 512  # a prime number: across rows
    assert tokens_together(512, 512, few) == 0
    assert tokens_together(1 << 18, 1 << 18, Format("int8")) == 1 << 17  # whose sums are exact


def test_inputs_share_a_scale_in_equal_blocks():
    assert [block_of(256, group) for group in (0, 64, 100, 256, 1000)] == [0, 64, 64, 256, 256]
    assert block_of(257, 64) == 257  # a prime number: no blocks


# Of random operands, relative: of an even step of 1/127 of the largest of 40 numbers, or less; of
# a mantissa with three bits, and two for gradients.
FORMATS = {
    Passes("int8g16", "int8g16", "int8g16"): (0.012, 0.012, 0.012),
    Passes("fp8", "fp8", "fp8"): (0.05, 0.08, 0.08),
    Passes("fp8g16", "fp8g16", "fp8g16"): (0.05, 0.08, 0.08),
    Passes("w8"): (0.01, 0.01, 1e-6),
    Passes("w4g16"): (0.15, 0.15, 1e-6),
    Passes("w4g16", "int8", "int8"): (0.15, 0.02, 0.02),
    Passes("int8", "int8", "int8", "stochastic"): (0.015, 0.03, 0.03),
}


@pytest.mark.parametrize(
    "passes",
    [*list(FORMATS)[:1], *(pytest.param(p, marks=pytest.mark.slow) for p in list(FORMATS)[1:])],
    ids=str,
)
def test_each_format_loses_no_more_than_its_numbers_are_apart(one_device, passes):
    right = step(BF16)(*ranges("normal"))
    found = step(passes)(*ranges("normal"))
    for ours, exact, most in zip(found, right, FORMATS[passes], strict=True):
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert most / 5 < error < most or error < most == 1e-6


def test_rounding_by_chance_is_right_on_average():
    draw = np.random.default_rng(0)
    x = draw.uniform(0.2, 0.3, (1, 1 << 16)).astype(np.float32)
    x[0, 0] = 127  # so the scale is one, and all others lie between zero and one
    values, scales = jax.jit(functools.partial(quantize.rows, stochastic=True))(x)
    values = np.asarray(values, np.float64)[0, 1:]
    assert float(scales[0]) == 1
    assert set(values) == {0, 1}
    spread = 5 * np.sqrt(0.25 * 0.75 / values.size)
    assert abs(values.mean() - x[0, 1:].mean()) < spread
    # Neighbours fall apart: there is no pattern along the row.
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / np.sqrt(values.size)
