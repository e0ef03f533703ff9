"""One Linear in fewer bits: against the formulas in float64, on ordinary and on hostile weights."""

import dataclasses

import numpy as np
import pytest

from checkpoint.quantized import FP8, ZEROS, Form, packed, unpacked
from compressors import grids, quantize
from compressors.grids import Levels, Scheme
from compressors.quantize import SCHEMES, Inputs

WHOLE = (1, 1, 24)


def inputs_of(x_NI):
    size_NI = np.abs(x_NI)
    H = x_NI.T @ x_NI
    return Inputs(H, size_NI.max(axis=0), size_NI.sum(axis=0), len(x_NI))


@pytest.fixture(scope="module")
def linear():
    """(weight [16, 24], correlated inputs [200, 24], some of them large)."""
    draw = np.random.default_rng(0)
    mixed = draw.standard_normal((200, 24)) @ draw.standard_normal((24, 24))
    mixed[:, 5] *= 30
    return draw.standard_normal((16, 24)).astype(np.float32), mixed


def error(levels, weight_OI, x_NI):
    return float(np.sum((x_NI @ (levels.weight() - weight_OI).T.astype(np.float64)) ** 2))


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_four_bits_come_back_from_half_a_byte(width):
    levels = np.random.default_rng(0).integers(-8, 8, (5, width)).astype(np.int8)
    stored = packed(levels)
    assert stored.shape == (5, (width + 1) // 2) and stored.dtype == np.uint8
    np.testing.assert_array_equal(unpacked(stored, width), levels)


@pytest.mark.parametrize(
    ("kind", "zeros"), [("int8", False), ("int4", False), ("int4", True), ("fp8", False)]
)
@pytest.mark.parametrize("group", [0, 8, 7])  # 24 is three groups of 8, and of 7 a short fourth
def test_a_stored_weight_is_levels_times_scales_of_their_group(kind, zeros, group, linear):
    weight, _ = linear
    scheme, shape = Scheme(kind, group, zeros), (2, 8, 4, 6)
    levels = grids.absmax(weight, scheme)
    form = Form(kind, group, 2, zeros)
    parts = form.write(levels.values_OI, levels.grid.scales_OG, levels.grid.zeros_OG, shape)
    assert set(parts) == {"values", "scales", "zeros"} - ({"zeros"} if not zeros else set())
    for name, (own, dtype) in form.shapes(shape).items():
        assert parts[name].shape == own and parts[name].dtype == dtype
    back = form.read(parts, shape)
    np.testing.assert_array_equal(back.reshape(16, 24), levels.weight())
    for row, own in zip(weight, back.reshape(16, 24), strict=True):
        for start in range(0, 24, group or 24):
            part = slice(start, start + (group or 24))
            step = np.abs(row[part]).max() / grids.TOP[kind]
            if zeros:
                step = np.ptp(row[part]) / 15
            off = np.abs(own[part] - row[part])
            # fp8 has four bits of every number: half a sixteenth of it at most.
            most = np.maximum(np.abs(row[part]) / 16, step * 2**-9) if kind == "fp8" else step / 2
            # A zero is a float16 of at most 8, so it may be 2^-8 off.
            assert (off <= most * (1.0001 + zeros * 2**-7)).all()


@pytest.mark.parametrize(
    ("kind", "zeros"), [("int8", False), ("int4", False), ("int4", True), ("fp8", False)]
)
def test_rounding_stands_hostile_weights(kind, zeros):
    hostile = np.zeros((4, 64), np.float32)
    hostile[1] = 1e-38
    hostile[2, 7] = 1e6
    hostile[3, ::2], hostile[3, 3] = 1e-3, -1000
    for group in (0, 48):
        found = grids.absmax(hostile, Scheme(kind, group, zeros)).weight()
        assert np.isfinite(found).all()
        assert (found[0] == 0).all()
        np.testing.assert_allclose(found[2, 7], 1e6, rtol=2e-6)
        np.testing.assert_allclose(found[3, 3], -1000, rtol=2e-6)


def test_zeros_reach_numbers_far_from_zero():
    """A group whose numbers are much alike; all alike; and alike beyond what float16 could say."""
    for middle, most in ((20.0, 1 / 30), (0.0, 1 / 30), (1e5, 80.0)):
        draw = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 64)).astype(np.float32)
        draw[2] = draw[2, 0]
        found = grids.absmax(draw + middle, SCHEMES["w4g64"])
        assert np.abs(found.weight() - (draw + middle)).max() < 1.3 * most
        np.testing.assert_array_equal(
            found.grid.zeros_OG, found.grid.zeros_OG.astype(ZEROS).astype(np.float32)
        )


def test_the_loss_is_the_squared_error_of_the_outputs(linear):
    weight, x = linear
    levels = grids.absmax(weight, SCHEMES["w4g64"])
    found = quantize.loss(levels.weight() - weight, inputs_of(x))
    np.testing.assert_allclose(found, error(levels, weight, x), rtol=1e-4)
    share = np.sqrt(error(levels, weight, x) / np.sum((x @ weight.T.astype(np.float64)) ** 2))
    np.testing.assert_allclose(quantize.relative(levels, weight, inputs_of(x)), share, rtol=1e-4)


GRIDS = [Scheme("int8", 7), Scheme("int4", 7), Scheme("int4", 7, zeros=True), Scheme("fp8", 7)]


@pytest.mark.parametrize("scheme", GRIDS)
def test_a_search_for_grids_finds_none_worse_than_the_absmax(scheme, linear):
    weight, _ = linear
    matters = np.linspace(0.1, 3, 24).astype(np.float32)

    def felt(grid):
        off = grid.rounded(weight).weight() - weight
        return np.add.reduceat(off**2 * matters, np.arange(0, 24, 7), axis=1)

    before = felt(grids.holding(weight, scheme))
    after = felt(grids.searched(weight, scheme, matters))
    assert (after <= before * (1 + 1e-5)).all()
    if scheme.kind == "int4":
        assert (after < 0.9 * before).mean() > (0.8 if scheme.zeros else 0.3)


def test_a_search_finds_a_grid_that_the_weight_lies_on():
    """As those that came out of blocks with a scale and a least value of their own."""
    draw = np.random.default_rng(0)
    levels = draw.integers(0, 16, (8, 128))
    levels[:, ::64], levels[:, 1::64] = 0, 15
    weight = (levels * np.float32(0.013) - 0.031 * draw.integers(2, 5, (8, 1))).astype(np.float32)
    grid = grids.searched(weight, SCHEMES["w4g64"], np.ones(128))
    np.testing.assert_allclose(grid.rounded(weight).weight(), weight, atol=0.013 * 2**-7)


@pytest.mark.parametrize("scheme", [*GRIDS[2:], Scheme("int8")])
def test_gptq_is_optimal_brain_quantization_in_one_order(scheme, linear):
    """The paper's equations 2 and 3, the inverse updated input by input, in float64."""
    weight, x = linear
    H = quantize.damped(inputs_of(x).second_II)
    order = np.argsort(-np.diag(H), kind="stable")
    grid = grids.holding(weight, scheme)
    factor = np.linalg.cholesky(np.linalg.inv(H[order][:, order])).T.astype(np.float32)
    found = quantize.in_order(weight, grid, order, factor).values_OI
    inverse, left = np.linalg.inv(H), weight.astype(np.float64)
    scales, zeros = (
        np.broadcast_to(part, weight.shape).astype(np.float64) for part in grid.spread(24)
    )
    wanted = np.empty_like(left)
    for i in order:
        ratio = (left[:, i] / scales[:, i] + zeros[:, i]).astype(np.float32)
        wanted[:, i] = grids.nearest(ratio, scheme.kind)
        off = (left[:, i] - (wanted[:, i] - zeros[:, i]) * scales[:, i]) / inverse[i, i]
        left -= np.outer(off, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert np.mean(found == wanted) > 0.99


@pytest.mark.parametrize("scheme", [*GRIDS[2:], Scheme("int8")])
def test_scales_and_levels_once_more_leave_less_error(scheme, linear):
    weight, x = linear
    H = quantize.damped(inputs_of(x).second_II).astype(np.float32)

    def felt(levels):
        return quantize.loss(levels.weight() - weight, Inputs(H, x[0], x[0], 1))

    levels = grids.absmax(weight, scheme)
    fitted = quantize.refitted(levels, weight, H)
    assert felt(quantize.once_more(fitted, weight, H)) < 0.95 * felt(fitted)
    assert felt(fitted) < 0.95 * felt(levels)
    for part in ("scales_OG", "zeros_OG")[: 1 + scheme.zeros]:
        for step in (-0.02, 0.02):  # least squares: no grid of a group can be better
            other = getattr(fitted.grid, part).copy()
            other[:, 0] += step * (1 if part == "zeros_OG" else other[:, 0])
            moved = dataclasses.replace(fitted.grid, **{part: other})
            assert felt(Levels(fitted.values_OI, moved)) > felt(fitted)


def test_rows_are_fitted_alike_however_many_at_one_time(linear, monkeypatch):
    weight, x = linear
    H = quantize.damped(inputs_of(x).second_II).astype(np.float32)
    levels = grids.absmax(weight, Scheme("int4", 7, zeros=True))
    whole = quantize.refitted(levels, weight, H)
    monkeypatch.setattr(quantize, "SOLVED", 5 * 64)
    np.testing.assert_allclose(
        quantize.refitted(levels, weight, H).weight(), whole.weight(), rtol=1e-4
    )


@pytest.mark.parametrize("dead", [False, True])
def test_gptq_beats_rounding_to_nearest_by_half(dead, linear):
    weight, x = linear
    x = x.copy()
    x[:, 3] *= not dead  # an input that the text never has
    scheme, inputs = Scheme("int4", 8), inputs_of(x)
    near = error(grids.absmax(weight, scheme), weight, x)
    assert error(quantize.gptq(weight, scheme, inputs), weight, x) < 0.5 * near


def test_awq_keeps_what_large_inputs_meet(linear):
    weight, x = linear
    scheme = Scheme("int4", 8)
    factor = quantize.aware(weight, scheme, inputs_of(x), WHOLE)
    assert np.argmax(factor) == 5
    scaled = grids.absmax(weight * factor, scheme).weight() / factor
    off = np.sum((x @ (scaled - weight).T) ** 2)
    assert off < 0.9 * error(grids.absmax(weight, scheme), weight, x)


def test_smoothquant_makes_inputs_and_weights_alike(linear):
    weight, x = linear
    factor = quantize.smooth(weight, inputs_of(x), WHOLE)
    tops = np.abs(x / factor).max(axis=0), np.abs(weight * factor).max(axis=0)
    np.testing.assert_allclose(tops[0] / tops[1], (tops[0] / tops[1])[0], rtol=1e-4)


def test_factors_are_one_over_what_shares_them():
    shared = quantize.tied(np.exp(np.arange(12.0)), (2, 3, 2)).reshape(2, 3, 2)
    np.testing.assert_allclose(shared, np.broadcast_to(shared[:, :1], shared.shape))
    np.testing.assert_allclose(np.log(shared[:, 0]), [[2, 3], [8, 9]])


def test_levels_end_where_they_end():
    far = np.array([-1e9, -449.0, 449.0, 1e9], np.float32)
    np.testing.assert_array_equal(grids.nearest(far, "int8"), [-127, -127, 127, 127])
    np.testing.assert_array_equal(grids.nearest(far, "int4"), [-8, -8, 7, 7])
    np.testing.assert_array_equal(grids.nearest(far, "fp8"), [-448, -448, 448, 448])
    assert np.isfinite(grids.nearest(far, "fp8").astype(FP8).astype(np.float32)).all()
