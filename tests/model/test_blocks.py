"""Attention of some queries to some keys: joined over the keys it is attention over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import attention, blocks
from sharding.context import merge
from tests.tolerance import assert_same

HOW = [
    {"causal": True},
    {"causal": True, "window": 5},
    {"causal": False, "softcap": 1.5},
]


def drawn(tokens):
    draw = np.random.default_rng(0)
    shapes = (2, 4), (4,), (4,), (2, 4)
    q, k, v, w = (jnp.float32(draw.normal(size=(2, tokens, 2, *shape))) for shape in shapes)
    segments = jnp.asarray(np.sort(draw.integers(0, 3, (2, tokens))), jnp.int32)
    return q, k, v, w, segments


@pytest.mark.parametrize("how", HOW)
def test_a_block_over_all_keys_is_plain_attention(how, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE", 7)

    def both(q, k, v, w, s):
        o, lse = blocks.forward(q, k, v, s, s, scale=0.3, **how)
        grads = blocks.backward(q, k, v, s, s, o, lse, w, scale=0.3, **how)
        wanted, pull = jax.vjp(lambda *a: attention.plain(*a, s, scale=0.3, **how), q, k, v)
        return (o, *grads), (wanted, *pull(w))

    assert_same(*jax.jit(both)(*drawn(20)))


def test_blocks_of_keys_add_up_to_all_keys(monkeypatch):
    """Also for queries whose segment has no key in a block."""
    monkeypatch.setattr(blocks, "PIECE", 5)
    how = {"scale": 0.3, "causal": False}
    cuts = [slice(0, 2), slice(2, 9), slice(9, 12)]

    def both(q, k, v, w, s):
        parts = [blocks.forward(q, k[:, c], v[:, c], s, s[:, c], **how) for c in cuts]
        o, lse = functools.reduce(merge, parts)
        grads = [blocks.backward(q, k[:, c], v[:, c], s, s[:, c], o, lse, w, **how) for c in cuts]
        dq = sum(dq for dq, _, _ in grads)
        dk, dv = (jnp.concatenate([grad[i] for grad in grads], axis=1) for i in (1, 2))
        wanted, pull = jax.vjp(lambda *a: attention.plain(*a, s, **how), q, k, v)
        return (o, dq, dk, dv), (wanted, *pull(w)), parts[0][1]

    ours, plain, lse = jax.jit(both)(*drawn(12))
    assert_same(ours, plain)
    assert (lse < -1e29).any()


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_counts_from_the_first_of_both(window):
    q, k, v, _, _ = drawn(6)
    s = jnp.ones((2, 6), jnp.int32)
    o, _ = blocks.forward(q, k, v, s, s, scale=0.3, causal=False, window=window)
    back = np.arange(6)[:, None] - np.arange(6)[None]
    z = np.einsum("BTKGH,BSKH->BKGTS", q, k) * 0.3
    p = np.where(back < window, np.exp(z), 0)
    wanted = np.einsum("BKGTS,BSKH->BTKGH", p / p.sum(axis=-1, keepdims=True), v)
    assert_same(o, wanted)
