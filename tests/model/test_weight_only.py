"""The kernel for weights of few bits computes what the plain product does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import hopper, int8, nibbles, weight_only
from model.kernels import weight_only_hopper as kernel

new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel is for jax 0.11")
FORMS = [(8, 0), (8, 128), (4, 64), (4, 128)]  # bits, group


def drawn(R, N, K, bits, group, seed=0):
    """x with an outlier and a row of zeros; levels; scales with an outlier."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(R, K)).astype(np.float32)
    x[0, 3] *= 1000
    x[R // 2, : K // 2] = 0
    top = 2 ** (bits - 1)
    levels = draw.integers(-top, top, (N, K)).astype(np.int8)
    levels[1] = 0
    scales = draw.uniform(0.5, 2, (N, K // group) if group else N).astype(np.float32)
    scales[2] *= 1000
    w = nibbles.packed(jnp.asarray(levels)) if bits == 4 else jnp.asarray(levels)
    return jnp.bfloat16(x), w, jnp.asarray(scales), levels


def right(x, levels, scales, group):
    """(The product, the sum of the magnitudes of its terms), float64."""
    by = np.repeat(np.float64(scales), group, 1) if group else np.float64(scales)[:, None]
    x, w = np.float64(x), levels * by
    return x @ w.T, np.abs(x) @ np.abs(w).T


def check(y, x, levels, scales, group):
    product, terms = right(x, levels, scales, group)
    assert y.dtype == jnp.bfloat16 and y.shape == product.shape
    assert (np.abs(np.float64(y) - product) <= 2**-8 * np.abs(product) + 1e-5 * terms).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("R", "N", "K", "group"), [(1, 300, 1536, 0), (3, 130, 200, 64)])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_cpu_computes_what_levels_zeros_and_scales_mean(R, N, K, group, bits, zeros):
    """In chunks of outputs that divide neither, with a short last group."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(R, K)).astype(np.float32)
    levels = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, K)).astype(np.int8)
    size = (N, -(-K // group)) if group else (N,)
    scales = draw.uniform(0.5, 2, size).astype(np.float32)
    zero = draw.uniform(-9, 9, size).astype(np.float16) if zeros else None
    wide = lambda a: np.repeat(np.float64(a).reshape(N, -1), group or K, axis=1)[:, :K]  # noqa: E731
    w = (levels - (wide(zero) if zeros else 0)) * wide(scales)
    held = nibbles.packed(jnp.asarray(levels)) if bits == 4 else jnp.asarray(levels)
    for dtype, half in ((jnp.float32, 0), (jnp.bfloat16, 2**-8)):
        x_RK = jnp.asarray(x, dtype)
        y = weight_only.matmul(x_RK, held, jnp.asarray(scales), zero, block=group)
        product, terms = np.float64(x_RK) @ w.T, np.abs(np.float64(x_RK)) @ np.abs(w).T
        off = np.abs(np.float64(y) - product)
        assert y.dtype == dtype and (off <= half * np.abs(product) + 3e-6 * terms).all()


def test_every_float8_is_read_as_the_number_that_it_is():
    each = jnp.arange(256, dtype=jnp.uint8)
    w = jax.lax.bitcast_convert_type(each, jnp.float8_e4m3fn)[None]
    found = np.asarray(weight_only.numbers(w, jnp.ones(1), None, 256))
    np.testing.assert_array_equal(found, np.asarray(w).astype(np.float32))


@pytest.mark.parametrize("R", [1, 2, 5])
def test_sums_of_int8_are_exact_for_any_number_of_rows(R):
    draw = np.random.default_rng(0)
    x, w = (draw.integers(-127, 128, (n, 5000)).astype(np.int8) for n in (R, 48))
    x[0], w[0] = 127, 127
    ones = (jnp.ones(R), jnp.ones(48))
    y = int8.matmul(jnp.asarray(x), jnp.asarray(w), *ones, jnp.float32)
    np.testing.assert_array_equal(np.asarray(y), np.float32(x.astype(np.int64) @ w.T))


@pytest.mark.parametrize(
    ("sizes", "dtype", "group", "reason"),
    [
        ((16, 512, 768), "bfloat16", 0, ""),
        ((16, 512, 768), "bfloat16", 64, ""),
        ((65, 512, 768), "bfloat16", 0, "65 rows"),
        ((16, 510, 768), "bfloat16", 0, "510 outputs"),
        ((16, 512, 736), "bfloat16", 0, "of 736"),
        ((16, 512, 768), "bfloat16", 96, "groups of 96"),
        ((16, 512, 768), "float32", 0, "float32 times"),
    ],
)
@new_jax
def test_the_kernel_says_where_it_does_not_apply(monkeypatch, sizes, dtype, group, reason):
    monkeypatch.setattr(hopper, "kind", lambda: "NVIDIA H100 80GB HBM3")
    R, N, K = sizes
    found = kernel.why_not(jnp.zeros((R, K), dtype), jnp.zeros((N, K // 2), jnp.uint8), group)
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.slow
@new_jax
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 64)])
def test_the_kernel_is_made_for_cuda(bits, group):
    """As far as that goes without one: to the code of Mosaic GPU."""
    x, w, scales, _ = drawn(3, 136, 512, bits, group)
    product = jax.jit(functools.partial(kernel.matmul, group=group))
    text = product.trace(x, w, scales).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "matmul_weight_only" in text


@pytest.mark.gpu
@pytest.mark.parametrize("R", [1, 4, 7, 16, 33])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_products_are_those_of_levels_and_scales(R, bits, group):
    x, w, scales, levels = drawn(R, 512, 1024, bits, group)
    check(kernel.matmul(x, w, scales, group), x, levels, scales, group)
    assert group == 128 or not kernel.why_not(x, w, group)


@pytest.mark.gpu
@pytest.mark.parametrize("R", [1, 5, 16])
def test_zeros_are_taken_off_the_product(R):
    """Of which the kernel rounds what level 0 would give."""
    x, w, scales, levels = drawn(R, 512, 1024, 4, 64)
    zeros = np.random.default_rng(1).uniform(-9, 9, scales.shape).astype(np.float16)
    y = jax.jit(functools.partial(weight_only.matmul, block=64))(x, w, scales, zeros)
    above, terms = right(x, levels, scales, 64)
    product, more = right(x, levels - np.repeat(np.float64(zeros), 64, 1), scales, 64)
    rounded = 2**-8 * (np.abs(above) + np.abs(product))
    assert y.dtype == jnp.bfloat16
    assert (np.abs(np.float64(y) - product) <= rounded + 1e-5 * (terms + more)).all()
    twin = weight_only.plain(x, w, scales, jnp.asarray(zeros), block=64)
    # The plain product rounds each number of the weight.
    assert (np.abs(np.float64(twin) - product) <= rounded + 2**-8 * more).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(8, 64), (136, 192), (1000, 640), (576, 1536), (64, 14336)])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 64)])
def test_sizes_need_not_be_those_of_tiles(N, K, bits, group):
    x, w, scales, levels = drawn(3, N, K, bits, group)
    check(kernel.matmul(x, w, scales, group), x, levels, scales, group)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile", [(64, 64, 5, 2), (64, 256, 2, 4), (128, 128, 3, 8), (128, 256, 2, 1)]
)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 64)])
def test_tiles_change_no_value(tile, bits, group):
    x, w, scales, levels = drawn(5, 320, 2048, bits, group)
    tile = kernel.Tile(*tile)
    check(kernel.matmul(x, w, scales, group, tile), x, levels, scales, group)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 64)])
def test_what_is_not_finite_stays_where_it_is(bits, group):
    x, w, scales, _ = drawn(4, 256, 512, bits, group)
    y = kernel.matmul(x.at[1, 5].set(jnp.nan), w, scales.at[7].set(jnp.inf), group)
    finite = np.isfinite(np.float32(y))
    assert not finite[1].any() and not finite[:, 7].any()
    finite[1], finite[:, 7] = True, True
    assert finite.all()
