"""The kernels for Hopper GPUs compute what the plain products and roundings do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import hopper, hopper_round, quantize

new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels are for jax 0.11")


def drawn(rows, columns, form, seed=0):
    """8-bit values and scales of rows, with an outlier, a row of zeros and a large scale."""
    draw = np.random.default_rng(seed)
    values = draw.integers(-127, 128, (rows, columns)).astype(np.float32)
    values = values if form == "int8" else values / 32
    values[1] = 0
    scales = draw.uniform(0.5, 2, rows).astype(np.float32)
    scales[2] = 1e4
    return jnp.asarray(values).astype(form), jnp.asarray(scales)


@pytest.mark.parametrize(
    ("rows", "group", "reason"),
    [((512, 512), 0, ""), ((512, 128), 0, "128 rows"), ((512, 512), 384, "groups of 384")],
)
@new_jax
def test_the_kernel_says_where_it_does_not_apply(monkeypatch, rows, group, reason):
    monkeypatch.setattr(hopper, "kind", lambda: "NVIDIA H100 80GB HBM3")
    x, w = (jnp.zeros((n, 768), jnp.int8) for n in rows)
    found = hopper.why_not(x, w, group)
    assert reason in found and bool(reason) == bool(found)


@new_jax
def test_other_devices_are_named():
    x = jnp.zeros((512, 768), jnp.int8)
    assert jax.devices()[0].device_kind in hopper.why_not(x, x)


@pytest.mark.slow
@new_jax
@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("form", ["int8", "float8_e4m3fn"])
def test_the_kernel_is_made_for_cuda(form, groups):
    """As far as that goes without one: to the code of Mosaic GPU."""
    (x, sx), (w, sw) = drawn(500, 1536, form), drawn(300, 1536, form)
    if groups:
        sx, sw = (jnp.tile(s, (groups, 1)) for s in (sx, sw))
    product = jax.jit(functools.partial(hopper.matmul, dtype="bfloat16"))
    text = product.trace(x, w, sx, sw).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "matmul_8bit" in text


@pytest.mark.slow
@new_jax
@pytest.mark.parametrize("form", ["", "int8"])
@pytest.mark.parametrize("turned", ["int8", "float8_e5m2"])
def test_so_is_the_rounding(form, turned):
    levels = hopper_round.Levels(form, jnp.ones(256), jnp.ones(384)) if form else None
    round_both = jax.jit(
        lambda x: hopper_round.both(x, levels, hopper_round.Levels(turned, None, jnp.ones(384)))
    )
    x = jax.ShapeDtypeStruct((256, 384), jnp.bfloat16)
    assert "round_8bit" in round_both.trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(512, 384, 1024), (500, 300, 777), (4096, 256, 512)])
@pytest.mark.parametrize("form", ["int8", "float8_e4m3fn", "mixed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_are_those_of_the_plain_one(sizes, form, dtype):
    R, N, K = sizes
    first, second = ("float8_e5m2", "float8_e4m3fn") if form == "mixed" else (form, form)
    (x, sx), (w, sw) = drawn(R, K, first), drawn(N, K, second, seed=1)
    ours = hopper.matmul(x, w, sx, sw, dtype)
    assert ours.shape == (R, N) and ours.dtype == dtype
    x, w = (np.float64(a) * np.float64(s)[:, None] for a, s in ((x, sx), (w, sw)))
    right, terms = x @ w.T, np.abs(x) @ np.abs(w).T
    # Hopper keeps about 14 bits of a sum of float8 products, whenever it adds 32 more.
    bound = (1e-6 if form == "int8" else K / 32 * 2**-14) * terms
    bound += (dtype == "bfloat16") * 2**-8 * np.abs(right)
    assert (np.abs(np.float64(ours) - right) <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("group", [256, 768])
def test_groups_have_scales_of_their_own(group):
    R, N, K = 300, 260, 1536
    (x, _), (w, _) = drawn(R, K, "int8"), drawn(N, K, "int8", seed=1)
    draw = np.random.default_rng(2)
    sx, sw = (jnp.asarray(draw.uniform(0.1, 9, (n, K // group)), jnp.float32) for n in (R, N))
    ours = hopper.matmul(x, w, sx.T, sw.T, "float32")
    xs, ws = (np.float64(a) * np.repeat(np.float64(s), group, 1) for a, s in ((x, sx), (w, sw)))
    right = xs @ ws.T
    assert np.linalg.norm(ours - right) < 1e-5 * np.linalg.norm(right)


@pytest.mark.gpu
def test_what_is_not_finite_stays_so():
    (x, sx), (w, sw) = drawn(512, 512, "int8"), drawn(512, 512, "int8", seed=1)
    y = hopper.matmul(x, w, sx.at[7].set(jnp.inf), sw, "bfloat16")
    assert not np.isfinite(np.float32(y[7])).any() and np.isfinite(np.float32(y[8:])).all()


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["", "int8", "float8_e5m2"])
@pytest.mark.parametrize("turned", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_both_ways_is_rounding_each(form, turned):
    """An outlier, zeros and a number that is not finite included."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(384, 640)).astype(np.float32)
    x[5, 7], x[9], x[:, 11], x[20, 30] = 1e3, 0, 0, np.inf
    x, times = jnp.bfloat16(x), jnp.asarray(draw.uniform(0.5, 2, 640), jnp.float32)
    x32 = x.astype(jnp.float32)
    largest = quantize.magnitudes(x32 * times[None]), quantize.magnitudes(x32.T)
    assert not hopper_round.why_not(x)
    by_row, by_column = jax.jit(
        lambda x: quantize.both(x, (form, turned), largest, times if form else None)
    )(x)
    columns = functools.partial(quantize.columns, form=turned, largest=largest[1])
    pairs = [(by_column, jax.jit(columns)(x))]
    if form:
        rows = functools.partial(quantize.rows, form=form, largest=largest[0], times=times)
        pairs.append((by_row, jax.jit(rows)(x)))
    for (values, scales), (right, right_scales) in pairs:
        assert values.dtype == right.dtype and values.shape == right.shape
        np.testing.assert_allclose(scales, right_scales, rtol=1e-6)
        finite = np.isfinite(np.float32(right_scales))  # elsewhere values mean nothing
        values, right = (np.float32(a)[finite] for a in (values, right))
        assert np.mean(values != right) < 1e-3, "but for products that fall on a border"
        np.testing.assert_allclose(values, right, atol=1, rtol=0.25)
