"""Experts whose matmuls round: near the exact ones, by scales of each row and each output."""

import jax
import numpy as np
import pytest

from model.matmul.experts import grouped
from model.precision import BF16, Passes

COUNTS = np.array([5, 0, 9, 2], np.int32)  # of 20 rows: the last four are nobody's
INT8 = Passes("int8", "int8", "int8")


def step(passes):
    draw = np.random.default_rng(0)
    x, w, dy = (draw.normal(size=s).astype(np.float32) for s in ((20, 48), (4, 24, 48), (20, 24)))
    w *= np.array([1, 1, 100, 0.01], np.float32)[:, None, None]  # no expert's scale is another's
    dy[16:] = 0

    def body(x, w, dy):
        y, back = jax.vjp(lambda x, w: grouped(x, w, COUNTS, passes), x, w)
        return y[:16], *(a[:16] if len(a) == 20 else a for a in back(dy))

    over = jax.shard_map(body, in_specs=jax.P(), out_specs=jax.P())
    program = jax.jit(over)
    return program(x, w, dy), program.lower(x, w, dy).as_text()


@pytest.mark.slow
def test_experts_round_in_each_pass_by_scales_of_their_own(one_device):
    exact, _ = step(BF16)
    found, text = step(INT8)
    for ours, right in zip(found[:2], exact[:2], strict=True):
        for rows in (slice(0, 5), slice(5, 14), slice(14, 16)):
            error = np.linalg.norm(ours[rows] - right[rows]) / np.linalg.norm(right[rows])
            assert 1e-4 < error < 0.02
    for e in (0, 2, 3):
        error = np.linalg.norm(found[2][e] - exact[2][e]) / np.linalg.norm(exact[2][e])
        assert 1e-4 < error < 0.03
    assert not np.any(found[2][1])  # nobody asked for this one
    assert "xi8>" in text
    # The forward pass alone: gradients are those of the weights as they are.
    half, _ = step(Passes(forward="int8"))
    np.testing.assert_array_equal(half[0], found[0])
    for ours, right in zip(half[1:], exact[1:], strict=True):
        np.testing.assert_array_equal(ours, right)
