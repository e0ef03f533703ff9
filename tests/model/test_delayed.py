"""fp8 on scales of the steps before: held against its formula in NumPy, and flax's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.linen import fp8_ops

from model.matmul import einsum
from model.matmul.delayed import FIRST, WINDOW, fresh, rounded, tops_of
from model.precision import BF16, Passes
from tests.tolerance import assert_formula

SPEC = "BTD,FD->BTF"
B, T, D, F = 2, 6, 40, 24
DELAYED = Passes.by_name("fp8_delayed")
TOPS = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def drawn():
    """x [B, T, D], w [F, D] and dy [B, T, F]."""
    draw = np.random.default_rng(0)
    return [draw.normal(size=size).astype(np.float32) for size in ((B, T, D), (F, D), (B, T, F))]


def remembering(*magnitudes):
    """A history whose largest magnitudes of x, w and dy these are, each of another step."""
    history = np.zeros((3, WINDOW), np.float32)
    for i, magnitude in enumerate(magnitudes):
        history[i] = magnitude / 2
        history[i, 4 * i] = magnitude
    return history


@functools.cache
def step(passes):
    """x, w, dy, history to y, dx, dw and what was seen; compiled once for each of the passes."""

    def run(x, w, dy, history):
        def forward(x, w, history):
            how = {"passes": passes, "history": history if passes.delayed else None}
            return einsum(SPEC, x, w, out=jax.P(None, None, None), **how)

        y, back = jax.vjp(forward, x, w, history)
        return y, *back(dy)

    return jax.jit(run)


def numbers(a, top, form):
    """What `a` is rounded to: float64 of the nearest in `form`, cut off at `top`."""
    scale = np.float32(top) / np.float32(TOPS[form])
    levels = np.clip(a.astype(np.float64) / scale, -TOPS[form], TOPS[form])
    return levels.astype(np.float32).astype(getattr(ml_dtypes, form)).astype(np.float64) * scale


def formula(x, w, dy, tops):
    """y, dx and dw of rounded operands, the same of each wherever it is used."""
    forms = "float8_e4m3fn", "float8_e4m3fn", "float8_e5m2"
    x, w, dy = (
        numbers(a, *how) for a, how in zip((x, w, dy), zip(tops, forms, strict=True), strict=True)
    )
    return x @ w.T, dy @ w, np.einsum("btf,btd->fd", dy, x)


def largest(*arrays):
    return [np.abs(a).max() for a in arrays]


@pytest.mark.parametrize("jump", [1.0, 1000.0, 1e-3])
def test_operands_are_rounded_on_the_largest_of_their_history_and_cut_off_there(one_device, jump):
    arrays = drawn()
    tops = np.float32(largest(*arrays))
    arrays = [jump * a for a in arrays]
    *found, seen = step(DELAYED)(*arrays, remembering(*tops))
    assert all(np.isfinite(a).all() for a in found)
    for ours, right in zip(found, formula(*arrays, tops), strict=True):
        assert_formula(ours, right)
    np.testing.assert_array_equal(
        seen, np.broadcast_to(np.float32(largest(*arrays))[:, None], seen.shape)
    )


def test_a_history_of_this_step_loses_what_current_scales_do(one_device):
    arrays = drawn()
    nothing, right = np.zeros((3, WINDOW), np.float32), step(BF16)(*arrays, remembering(1, 1, 1))
    current = step(Passes.by_name("fp8"))(*arrays, nothing)
    small = [arrays[0], 0.02 * arrays[1], 1e-5 * arrays[2]]  # as in a model
    first = step(DELAYED)(*small, nothing)
    sizes = 0.02, 0.02 * 1e-5, 1e-5
    for found, by in (
        (step(DELAYED)(*arrays, remembering(*largest(*arrays))), (1, 1, 1)),
        (first, sizes),
    ):
        for ours, theirs, exact, size in zip(found, current, right, by, strict=False):
            error, same = (np.linalg.norm(a - exact) for a in (ours / size, theirs))
            assert 0 < error < 1.25 * same < 0.08 * np.linalg.norm(exact)


def test_nothing_is_nothing_and_does_not_divide_by_itself(one_device):
    zeros = [np.zeros_like(a) for a in drawn()]
    for history in (np.zeros((3, WINDOW), np.float32), remembering(1e-44, 1e-44, 1e-44)):
        for found in step(DELAYED)(*zeros, history):
            np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_so_that_the_guard_can_see_it(one_device, bad, which):
    arrays = drawn()
    arrays[which][..., 1, 5] = bad
    y, dx, dw, seen = step(DELAYED)(*arrays, remembering(4, 4, 4))
    sees = {0: (y, dw), 1: (y, dx), 2: (dx, dw)}[which]
    assert not any(np.isfinite(a).all() for a in sees)
    assert np.isinf(seen[which]).all() and np.isfinite(np.delete(seen, which, axis=0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "dgrad", "wgrad"])
def test_passes_in_bf16_are_not_rounded(one_device, name):
    arrays, tops = drawn(), (4, 4, 4)
    passes = dataclasses.replace(DELAYED, **{name: "bf16"})
    found = step(passes)(*arrays, remembering(*tops))
    alike = formula(*arrays, tops)
    if name == "forward":  # dgrad's weight is the one that was rounded, as in all of fp8
        alike = arrays[0] @ arrays[1].T, *alike[1:]
    elif name == "dgrad":
        w = numbers(arrays[1], 4, "float8_e4m3fn")  # that the forward pass saw
        alike = alike[0], arrays[2] @ w, alike[2]
    else:
        alike = *alike[:2], np.einsum("btf,btd->fd", arrays[2], arrays[0])
    for ours, right in zip(found, alike, strict=False):
        assert_formula(ours, right)


@pytest.mark.slow
@pytest.mark.parametrize("form", TOPS)
def test_scales_and_values_are_those_of_flax(one_device, form):
    x = drawn()[0]
    history = remembering(1.5, 0.7, 3.0)
    for top, own in zip(tops_of(jnp.asarray(history)), history, strict=True):
        dtype, one = jnp.dtype(form), jnp.ones(1)
        scale, rolled = fp8_ops.update_fp8_meta(x, dtype, one, own[:, None])
        assert_formula(top / TOPS[form], scale[0])
        assert rolled[0] == np.abs(x).max()
        np.testing.assert_array_equal(
            np.asarray(rounded(x, top, form), np.float32),
            np.asarray(fp8_ops.quantize(x, dtype, scale, jnp.float32), np.float32),
        )


def test_a_fresh_history_is_of_nothing(one_device):
    np.testing.assert_array_equal(tops_of(fresh()), np.float32(FIRST))
