"""Blocks by cuDNN are the plain blocks: with cuDNN's masks spelled out on a CPU, and on a GPU."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import blocks, cudnn, cudnn_blocks
from tests.tolerance import assert_same

SCALE = 0.3
KINDS = {
    "own chunk": {"causal": True, "window": 0},
    "own chunk, window": {"causal": True, "window": 5},
    "earlier chunk": {"causal": False, "window": 0},
    "corner of an earlier chunk": {"causal": False, "window": 1},
}


def drawn(tokens, documents, size=4):
    """q, k, v, the output's gradient, segments of the queries and of the keys."""
    draw = np.random.default_rng(0)
    shapes = (3, size), (size,), (size,), (3, size)
    arrays = [np.float32(draw.normal(size=(3, tokens, 2, *s))) for s in shapes]
    # Documents that end within a chunk; at its end, with padding; one over both chunks.
    segments = np.ones((3, 2 * tokens), np.int32)
    segments[0] += np.arange(2 * tokens) * documents // (2 * tokens)
    segments[1, tokens:] = min(2, documents)
    segments[1, tokens + tokens // 2 :] = 0
    return *arrays, segments[:, tokens:], segments[:, :tokens]


def spelled_out(shape, k_tokens, mask_type, window=None, lengths=(), offsets=()):
    """([B, T, S] whether query t sees key s; [B, T] run and place in it), as cuDNN documents it."""
    rows, tokens = shape[:2]
    seen = np.zeros((rows, tokens, k_tokens), bool)
    kept = np.full((2, rows, tokens), -1)
    causal = "CAUSAL" in mask_type.name
    number = 0
    for b in range(rows):
        if offsets:
            starts, sizes = (np.asarray(a)[b] for a in (offsets[0], lengths[0]))
            runs = [(s, s, n, n) for s, n in zip(starts, sizes, strict=False) if n >= 0]
        elif lengths:
            runs = [(0, 0, *(int(np.asarray(a)[b]) for a in lengths))]
        else:
            runs = [(0, 0, tokens, k_tokens)]
        for t0, s0, n, m in runs:
            back = np.arange(n)[:, None] - np.arange(m)[None]
            near = (back >= 0) | (not causal)
            near &= back < (window or tokens + k_tokens)
            seen[b, t0 : t0 + n, s0 : s0 + m] = near
            kept[0, b, t0 : t0 + n], kept[1, b, t0 : t0 + n] = number, np.arange(n)
            number += 1
    return seen, kept


def fake():
    """cuDNN's attention and its gradients, in float32; what it leaves open is NaN."""

    def weights(q, k, seen, scale):
        z = np.einsum("BTKGH,BSKH->BKGTS", q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]), k)
        return np.where(seen[:, None, None], z * scale, -np.inf)

    def attention(q, k, v, *, scale, return_residual, mask_type, sliding_window_length=None, **at):
        assert return_residual
        lengths = [at[n] for n in ("q_seqlen", "kv_seqlen") if n in at]
        offsets = [at[n] for n in ("q_offsets", "kv_offsets") if n in at]
        q, k, v = map(np.asarray, (q, k, v))
        how = (q.shape, k.shape[1], mask_type, sliding_window_length, lengths, offsets)
        seen, (run, place) = spelled_out(*how)
        z = weights(q, k, seen, scale)
        with np.errstate(all="ignore"):
            total = np.exp(z).sum(axis=-1)
            o = np.einsum("BKGTS,BSKH->BTKGH", np.exp(z) / total[..., None], v)
            lse = np.log(total).reshape(q.shape[0], -1, q.shape[1])
        if offsets:
            runs = offsets[0].shape[0] * (offsets[0].shape[1] - 1)
            stats = np.full((runs, *lse.shape[1:]), np.nan)
            b, t = np.nonzero(run >= 0)
            stats[run[b, t], :, place[b, t]] = lse[b, :, t]
            lse = stats
        return jnp.float32(o.reshape(q.shape)), jnp.float32(lse)

    def gradients(scale, seed, rate, variadic, kind, layout, window, training, twice, kept, do):
        q, k, v, none, *at, _, _, lse, o = map(np.asarray, kept)
        assert not none.size and layout == 0 and not twice
        lengths, offsets = ([a for a in part if a.size] for part in (at[:2], at[2:]))
        seen, (run, place) = spelled_out(q.shape, k.shape[1], kind, window, lengths, offsets)
        if offsets:
            lse = np.moveaxis(lse[run, :, place], 2, 1)
        K = k.shape[2]
        lse = lse.reshape(lse.shape[0], K, -1, lse.shape[2], 1)
        p = np.exp(weights(q, k, seen, scale) - lse)
        heads = (a.reshape(*a.shape[:2], K, -1, a.shape[3]) for a in (q, o, np.asarray(do)))
        q5, o5, do5 = heads
        dp = np.einsum("BTKGH,BSKH->BKGTS", do5, v)
        dz = p * (dp - np.einsum("BTKGH,BTKGH->BKGT", o5, do5)[..., None]) * scale
        dq = np.einsum("BKGTS,BSKH->BTKGH", dz, k).reshape(q.shape)
        dk = np.einsum("BKGTS,BTKGH->BSKH", dz, q5)
        dv = np.einsum("BKGTS,BTKGH->BSKH", p, do5)
        return tuple(map(jnp.float32, (dq, dk, dv))) + (None,) * 7

    names = ("MaskType", "AttentionLayout")
    real = {name: getattr(cudnn.sdpa, name) for name in names}
    return types.SimpleNamespace(
        dot_product_attention=attention, _dot_product_attention_bwd_rule=gradients, **real
    )


def both(module, args, segments, **how):
    """(o and log-sum-exp of the block, its gradients for those of a larger set of keys)."""
    q, k, v, do = args
    o, lse = module.forward(q, k, v, *segments, scale=SCALE, **how)
    larger = lse + jnp.where(lse > -1e29, 0.3, -lse)  # as if other keys were seen too
    grads = module.backward(q, k, v, *segments, 0.7 * o, larger, do, scale=SCALE, **how)
    return (o, lse), grads


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_the_masks_show_what_the_plain_block_shows(name, documents, monkeypatch):
    monkeypatch.setattr(cudnn, "sdpa", fake())
    *args, queries, keys = map(jnp.asarray, drawn(12, documents))
    if documents == 1:
        queries, keys = jnp.ones_like(queries), jnp.ones_like(keys)
    segments = queries, queries if KINDS[name]["causal"] else keys
    assert not cudnn_blocks.why_not(documents=documents, **KINDS[name])
    (o, lse), grads = both(cudnn_blocks, args, segments, documents=documents, **KINDS[name])
    (right, right_lse), right_grads = both(blocks, args, segments, **KINDS[name])
    seen = right_lse > -1e29
    assert seen.all() == (documents == 1 or KINDS[name]["causal"])
    np.testing.assert_array_equal(lse > -1e29, seen)
    assert_same(*(jnp.where(seen[..., None], a, 0) for a in (o, right)))
    assert_same(*(jnp.where(seen, a, 0) for a in (lse, right_lse)))
    assert np.isfinite(o).all()
    assert_same(grads, right_grads)


def test_what_has_no_mask_has_a_reason():
    assert "data.documents" in cudnn_blocks.why_not(causal=True, window=0, documents=0)
    assert "begins there too" in cudnn_blocks.why_not(causal=False, window=2, documents=1)
    assert not cudnn_blocks.why_not(causal=False, window=0, documents=0), "the last one counts only"


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_cudnn_computes_the_plain_block(one_device, name, documents):
    *args, queries, keys = drawn(512, documents, size=64)
    args = [jnp.bfloat16(a) for a in args]
    queries, keys = map(jnp.asarray, (queries, keys))
    if documents == 1:
        queries, keys = jnp.ones_like(queries), jnp.ones_like(keys)
    segments = queries, queries if KINDS[name]["causal"] else keys
    how = KINDS[name]
    ours = jax.jit(functools.partial(both, cudnn_blocks, documents=documents, **how))
    plain = jax.jit(functools.partial(both, blocks, **how))
    (o, lse), grads = ours(args, segments)
    (right, right_lse), right_grads = plain(args, segments)
    seen = right_lse > -1e29
    pairs = [(jnp.where(seen[..., None], a, 0) for a in (o, right))]
    pairs.append(jnp.where(seen, a, 0) for a in (lse, right_lse))
    for a, b in [*pairs, *zip(grads, right_grads, strict=True)]:
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)
