"""Rounding and products beside qwix, which is written by others to do the same."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from model.kernels import int8, quantize, weight_only
from tests.tolerance import assert_same

pytestmark = pytest.mark.parity
qwix = pytest.importorskip("qwix", reason="needs qwix")

DIMS = (((1,), (1,)), ((), ()))


def drawn():
    draw = np.random.default_rng(0)
    x, w = (draw.normal(size=size).astype(np.float32) for size in ((48, 128), (32, 128)))
    x[3, 5] *= 1000
    return jnp.asarray(x), jnp.asarray(w)


@pytest.mark.parametrize("block", [0, 32])
def test_the_product_of_the_same_values_and_scales_is_the_same(block):
    rounded = [quantize.rows(a, block=block) for a in drawn()]
    theirs = [qwix.QArray(v, s if block else s[:, None]) for v, s in rounded]
    (x8, sx), (w8, sw) = rounded
    ours = int8.matmul(x8, w8, sx, sw, jnp.float32, block=block)
    assert_same(ours, qwix.dot_general(*theirs, DIMS))
    x, _ = drawn()
    assert_same(
        weight_only.matmul(x, w8, sw, block=block),
        lax.dot_general(x, qwix.dequantize(theirs[1]), DIMS),
    )


@pytest.mark.parametrize(
    ("form", "qtype"), [("int8", jnp.int8), ("float8_e4m3fn", "float8_e4m3fn")]
)
def test_numbers_are_rounded_as_finely(form, qtype):
    for a in drawn():
        values, scales = quantize.rows(a, form=form)
        ours = values.astype(jnp.float32) * scales[:, None]
        theirs = qwix.dequantize(qwix.quantize(a, qtype, channelwise_axes=(0,)))
        step = jnp.max(jnp.abs(a), axis=1, keepdims=True) / (127 if form == "int8" else 16)
        assert jnp.all(jnp.abs(ours - theirs) <= step)
        errors = [jnp.linalg.norm(b - a) for b in (ours, theirs)]
        assert errors[0] < 1.02 * errors[1]
