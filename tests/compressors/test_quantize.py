"""One Linear in fewer bits: against the formulas in float64, on ordinary and on hostile weights."""

import numpy as np
import pytest

from checkpoint.quantized import FP8, Form, packed, unpacked
from compressors import quantize
from compressors.quantize import SCHEMES, Inputs, Scheme

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


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("group", [0, 8, 7])  # 24 is three groups of 8, and of 7 a short fourth
def test_a_stored_weight_is_levels_times_scales_of_their_group(kind, group, linear):
    weight, _ = linear
    scheme, shape = Scheme(kind, group), (2, 8, 4, 6)
    levels = quantize.absmax(weight, scheme)
    form = Form(kind, group, 2)
    parts = form.write(levels.values_OI, levels.scales_OG, shape)
    for name, (own, dtype) in form.shapes(shape).items():
        assert parts[name].shape == own and parts[name].dtype == dtype
    back = form.read(parts["values"], parts["scales"], shape)
    np.testing.assert_array_equal(back.reshape(16, 24), levels.weight())
    for row, own in zip(weight, back.reshape(16, 24), strict=True):
        for start in range(0, 24, group or 24):
            part = slice(start, start + (group or 24))
            top = np.abs(row[part]).max()
            step = top / quantize.TOP[kind]
            off = np.abs(own[part] - row[part])
            # fp8 has four bits of every number: half a sixteenth of it at most.
            most = np.maximum(np.abs(row[part]) / 16, step * 2**-9) if kind == "fp8" else step / 2
            assert (off <= most * 1.0001).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_rounding_stands_hostile_weights(kind):
    hostile = np.zeros((4, 64), np.float32)
    hostile[1] = 1e-38
    hostile[2, 7] = 1e6
    hostile[3, ::2], hostile[3, 3] = 1e-3, -1000
    for group in (0, 48):
        found = quantize.absmax(hostile, Scheme(kind, group)).weight()
        assert np.isfinite(found).all()
        assert (found[0] == 0).all()
        np.testing.assert_allclose(found[2, 7], 1e6, rtol=1e-6)
        np.testing.assert_allclose(found[3, 3], -1000, rtol=1e-6)


def test_the_loss_is_the_squared_error_of_the_outputs(linear):
    weight, x = linear
    levels = quantize.absmax(weight, SCHEMES["w4g64"])
    found = quantize.loss(levels.weight() - weight, inputs_of(x))
    np.testing.assert_allclose(found, error(levels, weight, x), rtol=1e-4)
    share = np.sqrt(error(levels, weight, x) / np.sum((x @ weight.T.astype(np.float64)) ** 2))
    np.testing.assert_allclose(quantize.relative(levels, weight, inputs_of(x)), share, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_search_for_scales_finds_none_worse_than_the_absmax(kind, linear):
    weight, _ = linear
    matters = np.linspace(0.1, 3, 24).astype(np.float32)
    scheme = Scheme(kind, 7)

    def felt(scales):
        off = quantize.rounded(weight, scales, scheme).weight() - weight
        return np.add.reduceat(off**2 * matters, np.arange(0, 24, 7), axis=1)

    before, after = (
        felt(quantize.largest(weight, scheme)),
        felt(quantize.searched(weight, scheme, matters)),
    )
    assert (after <= before * (1 + 1e-5)).all()
    if kind == "int4":
        assert (after < 0.9 * before).mean() > 0.3


@pytest.mark.parametrize("scheme", [Scheme("int4", 7), Scheme("int8"), Scheme("fp8")])
def test_gptq_is_optimal_brain_quantization_in_one_order(scheme, linear):
    """The paper's equations 2 and 3, the inverse updated input by input, in float64."""
    weight, x = linear
    H = quantize.damped(inputs_of(x).second_II)
    order = np.argsort(-np.diag(H), kind="stable")
    scales = quantize.largest(weight, scheme)
    factor = np.linalg.cholesky(np.linalg.inv(H[order][:, order])).T.astype(np.float32)
    found = quantize.in_order(weight, scales, scheme, order, factor)
    inverse, left = np.linalg.inv(H), weight.astype(np.float64)
    scales = np.repeat(scales, scheme.group or 24, axis=1)[:, :24].astype(np.float64)
    wanted = np.empty_like(left)
    for i in order:
        ratio = (left[:, i] / scales[:, i]).astype(np.float32)
        wanted[:, i] = quantize.levels(ratio, scheme.kind)
        off = (left[:, i] - wanted[:, i] * scales[:, i]) / inverse[i, i]
        left -= np.outer(off, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert np.mean(found == wanted) > 0.99


@pytest.mark.parametrize("scheme", [Scheme("int4", 7), Scheme("int8"), Scheme("fp8")])
def test_scales_and_levels_once_more_leave_less_error(scheme, linear):
    weight, x = linear
    inputs = inputs_of(x)
    H = quantize.damped(inputs.second_II).astype(np.float32)

    def felt(values, scales):
        return quantize.loss(
            quantize.kept(values, scales, scheme).weight() - weight, Inputs(H, x[0], x[0], 1)
        )

    scales = quantize.largest(weight, scheme)
    values = quantize.rounded(weight, scales, scheme).values_OI.astype(np.float32)
    fitted = quantize.refitted(values, scales, scheme, weight, H)
    again = quantize.once_more(values, fitted, scheme, weight, H)
    assert felt(again, fitted) < 0.9 * felt(values, fitted) < 0.9 * felt(values, scales)
    part = slice(0, scheme.group or 24)  # least squares: no scale of a group can be better
    for factor in (0.99, 1.01):
        other = fitted.copy()
        other[:, 0] *= factor
        assert felt(values, other) > felt(values, fitted), part


@pytest.mark.parametrize("dead", [False, True])
def test_gptq_beats_rounding_to_nearest_by_half(dead, linear):
    weight, x = linear
    x = x.copy()
    x[:, 3] *= not dead  # an input that the text never has
    scheme, inputs = Scheme("int4", 8), inputs_of(x)
    near = error(quantize.absmax(weight, scheme), weight, x)
    assert error(quantize.gptq(weight, scheme, inputs), weight, x) < 0.5 * near


def test_awq_keeps_what_large_inputs_meet(linear):
    weight, x = linear
    scheme = Scheme("int4", 8)
    factor = quantize.aware(weight, scheme, inputs_of(x), WHOLE)
    assert np.argmax(factor) == 5
    scaled = quantize.absmax(weight * factor, scheme).weight() / factor
    off = np.sum((x @ (scaled - weight).T) ** 2)
    assert off < 0.9 * error(quantize.absmax(weight, scheme), weight, x)


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
    np.testing.assert_array_equal(quantize.levels(far, "int8"), [-127, -127, 127, 127])
    np.testing.assert_array_equal(quantize.levels(far, "int4"), [-8, -8, 7, 7])
    np.testing.assert_array_equal(quantize.levels(far, "fp8"), [-448, -448, 448, 448])
    assert np.isfinite(quantize.levels(far, "fp8").astype(FP8).astype(np.float32)).all()
