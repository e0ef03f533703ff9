"""How close is equal: one number for each kind of comparison, never widened to pass."""

import jax
import numpy as np

FORMULA = 1e-5  # float32 against the formula in float64
SAME = 1e-5  # the same values in another order: chunked, rematerialized, on another mesh


def assert_formula(ours, right):
    """An array equals its formula, within FORMULA of its largest value."""
    _assert_close(ours, right, FORMULA)


def assert_same(ours, right):
    """Trees of the same shape hold the same values, each within SAME of its largest."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        _assert_close(a, b, SAME)


def _assert_close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=0))
