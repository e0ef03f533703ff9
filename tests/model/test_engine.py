"""Which engine computes attention; cuDNN against the plain one, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import cudnn, engine
from model.kernels.attention import plain
from tests.model.tiny import TINY

BF16 = jax.ShapeDtypeStruct((2, 64, 2, 3, 64), jnp.bfloat16)
CAN = {"causal": True, "softcap": 0.0, "documents": 4}


def segments_of(rows, tokens, documents, padding):
    draw, found = np.random.default_rng(2), np.ones((rows, tokens), np.int32)
    for row in found:
        cuts = np.sort(draw.choice(np.arange(1, tokens), documents - 1, replace=False))
        row += np.searchsorted(cuts, np.arange(tokens), side="right").astype(np.int32)
    found[-1, tokens - padding :] = 0
    return found


@pytest.mark.parametrize("padding", [0, 3])
def test_spans_are_the_runs_of_each_row(padding):
    segments = segments_of(3, 17, 4, padding)
    starts, lengths = map(np.asarray, cudnn.spans(jnp.asarray(segments), 6))
    assert starts.shape == (3, 7) and lengths.shape == (3, 6)
    for row, first, length in zip(segments, starts, lengths, strict=True):
        runs = np.flatnonzero(np.diff(row, prepend=-1))
        n = len(runs)
        assert first.tolist() == [*runs, *[-1] * (7 - n)]
        assert length.tolist() == [*np.diff([*runs, 17]), *[-1] * (6 - n)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"softcap": 30.0}, "no soft-cap"),
        ({"causal": False}, "both directions"),
        ({"documents": 0}, "data.documents bounds them"),
    ],
)
def test_what_cudnn_does_not_compute_has_a_reason(change, why):
    assert why in cudnn.why_not(BF16, **CAN | change)
    wide = jax.ShapeDtypeStruct((2, 64, 2, 3, 60), jnp.bfloat16)
    assert "not 60" in cudnn.why_not(wide, **CAN)
    assert "not float32" in cudnn.why_not(jax.ShapeDtypeStruct(BF16.shape, jnp.float32), **CAN)


def test_on_a_cpu_the_plain_one_serves(one_device):
    draw = np.random.default_rng(0)
    q, k, v = (jnp.float32(draw.normal(size=(1, 5, 2, *s))) for s in ((3, 8), (8,), (8,)))
    segments = jnp.ones((1, 5), jnp.int32)
    assert engine.platform() == "cpu"
    ours = engine.attention(q, k, v, segments, documents=1, scale=0.3, window=2)
    np.testing.assert_array_equal(ours, plain(q, k, v, segments, scale=0.3, window=2))
    assert TINY.arch.attention.causal


@pytest.mark.parametrize(
    ("flags", "room", "shapes"),
    [
        ("", 0, [(3, 17, 6, 8)]),
        ("--xla_gpu_deterministic_ops=true", 2 * 3 * 5 * 6 * 17**2 - 1, [(1, 17, 3, 8)]),
        ("--xla_gpu_deterministic_ops=true", 2 * 3 * 5 * 6 * 17**2, [(3, 17, 6, 8)]),
    ],
)
def test_for_the_same_bits_cudnn_takes_one_head_of_a_row_where_all_take_too_much(
    flags, room, shapes, monkeypatch
):
    found = []

    def stand_in(q_BTNH, k_BTKH, v_BTKH, **how):
        found.append(q_BTNH.shape)
        k_BTNH, v_BTNH = (jnp.repeat(a, 3, axis=2) for a in (k_BTKH, v_BTKH))
        return q_BTNH * k_BTNH + v_BTNH + how["q_seqlen"][:, None, :1, None]

    monkeypatch.setattr(cudnn.sdpa, "dot_product_attention", stand_in)
    monkeypatch.setattr(cudnn, "WORKSPACE", room)
    monkeypatch.setenv("XLA_FLAGS", flags)
    draw = np.random.default_rng(0)
    q, k, v = (jnp.float32(draw.normal(size=(3, 17, 2, *s))) for s in ((3, 8), (8,), (8,)))
    segments = jnp.asarray(segments_of(3, 17, 4, 3))
    ours = cudnn.attention(q, k, v, segments, scale=0.1, documents=4)
    first = cudnn.spans(segments, 5)[1][:, :1, None, None, None]
    assert found == shapes
    np.testing.assert_allclose(ours, q * k[:, :, :, None] + v[:, :, :, None] + first, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize(
    ("documents", "most", "window", "padding"),
    [(1, 1, 0, 0), (1, 1, 0, 60), (1, 1, 33, 0), (5, 5, 0, 60), (5, 8, 0, 0), (5, 8, 33, 7)],
)
def test_cudnn_is_the_plain_attention(one_device, head, documents, most, window, padding):
    rows, tokens = 2, 512
    draw = np.random.default_rng(0)
    shapes = ((4, head), (head,), (head,), (4, head))
    q, k, v, slope = (jnp.bfloat16(draw.normal(size=(rows, tokens, 2, *s))) for s in shapes)
    segments = jnp.asarray(segments_of(rows, tokens, documents, padding))
    real = (segments > 0)[..., None, None, None]

    def both(attend):
        def loss(q, k, v):
            o = jnp.where(real, attend(q, k, v, segments, scale=0.1, window=window), 0)
            return jnp.sum((o * slope).astype(jnp.float32)), o

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    ours = both(functools.partial(cudnn.attention, documents=most))
    exact = both(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)
