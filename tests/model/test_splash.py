"""The splash kernel, interpreted on a CPU, against the plain attention; which of them serves."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos

from configs.run import Run
from data.config import DataConfig
from model.config import Arch, Attention, ModelConfig
from model.kernels import engine, splash
from model.kernels.attention import plain
from optim.config import OptimConfig
from tests.tolerance import assert_same
from tools import parity


@pytest.fixture
def small_blocks(monkeypatch):
    """So that some are seen in part, some whole, some not at all."""
    monkeypatch.setattr(splash, "QUERIES", 128)
    monkeypatch.setattr(splash, "KEYS", 128)
    splash.visible.cache_clear()
    yield
    splash.visible.cache_clear()


def drawn(tokens, heads, groups, size, dtype):
    draw = np.random.default_rng(0)
    shapes = (groups, size), (size,), (size,), (groups, size)
    made = [jnp.asarray(draw.normal(size=(2, tokens, heads, *s)), dtype) for s in shapes]
    segments = np.sort(draw.integers(1, 4, (2, tokens))).astype(np.int32)
    segments[1, -20:] = 0
    return made, jnp.asarray(segments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "size", "dtype", "how"),
    [
        (300, 1, 3, 96, "float32", {"window": 70}),
        (256, 2, 1, 64, "float32", {"softcap": 1.5}),
        (384, 1, 1, 128, "bfloat16", {"causal": False}),
        (384, 2, 2, 256, "float32", {"window": 200}),
    ],
)
def test_splash_is_the_plain_attention(small_blocks, tokens, heads, groups, size, dtype, how):
    (q, k, v, do), segments = drawn(tokens, heads, groups, size, dtype)

    def both(attend):
        def outputs(q, k, v, do):
            attended = functools.partial(attend, segments_BT=segments, scale=0.2, **how)
            o, back = jax.vjp(attended, q, k, v)
            return o, *back(do)

        return jax.jit(outputs)(q, k, v, do)

    ours, right = both(functools.partial(splash.attention, interpret=True)), both(plain)
    within = 1e-2 if dtype == "bfloat16" else 1e-5
    for a, b in zip(ours, right, strict=True):
        a, b = np.float64(a), np.float64(b)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) < within * np.linalg.norm(b)


@pytest.mark.parametrize("window", [0, 1, 100, 128, 129, 300, 1024])
def test_blocks_are_those_of_jaxs_own_masks(small_blocks, window):
    tokens = 1024
    *ours, seen = splash.visible(tokens, window, True)
    mask = masks.LocalMask((tokens, tokens), (window - 1 if window else None, 0), 0)
    mask = masks.MultiHeadMask((mask,))
    forward, function = infos.process_mask(mask, (128, 128))
    right = [forward, forward, infos.process_mask_dkv(mask, (128, 128))[0]]
    for own, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(own, wanted)
    places = np.indices((40, tokens)) + np.array([500, 0])[:, None, None]
    np.testing.assert_array_equal(seen(*places), function(*places))


def test_long_rows_have_their_blocks_at_once():
    """JAX's own masks take two minutes: they look at each of 17 billion pairs, four times."""
    before = time.process_time()
    forward, _, dkv, _ = splash.visible(131072, 4096, True)
    assert time.process_time() - before < 10
    assert sum(leaf.nbytes for leaf in jax.tree.leaves((forward, dkv))) < 2**21


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((2, 100, 2, 3, 64), "bfloat16", "rows of 100 tokens"),
        ((2, 256, 2, 3, 60), "bfloat16", "not 60"),
        ((2, 256, 2, 3, 512), "bfloat16", "not 512"),
        ((2, 256, 2, 3, 64), "float16", "not float16"),
    ],
)
def test_what_splash_does_not_compute_has_a_reason(shape, dtype, why):
    assert why in splash.why_not(jax.ShapeDtypeStruct(shape, dtype))
    right = jax.ShapeDtypeStruct((2, 256, 2, 3, 64), "bfloat16")
    assert splash.why_not(right) == ""


@pytest.mark.parametrize(("tokens", "kernels", "serves"), [
    (256, "fastest", True), (256, "plain", False), (100, "fastest", False),
])  # fmt: skip
def test_on_a_tpu_splash_serves_where_it_applies(monkeypatch, tokens, kernels, serves):
    (q, k, v, _), segments = drawn(tokens, 1, 1, 8, "float32")
    called, told = [], []
    monkeypatch.setattr(engine, "platform", lambda: "tpu")
    monkeypatch.setattr(engine, "tell", lambda *words: told.append(words))
    monkeypatch.setattr(splash, "attention", lambda *a, **how: called.append(how))
    ours = engine.attention(q, k, v, segments, documents=1, kernels=kernels, scale=0.3, window=50)
    if serves:
        assert called == [{"scale": 0.3, "window": 50, "softcap": 0.0, "causal": True}]
    else:
        assert_same(ours, plain(q, k, v, segments, scale=0.3, window=50))
    assert bool(told) == (tokens == 100)


@pytest.mark.slow
def test_devices_share_its_rows_and_heads(small_blocks, monkeypatch):
    """A model of windows on four devices, its attention by splash, is that of one by the plain."""
    model = ModelConfig(
        layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=64, dtype="float32",
        remat="dots", arch=Arch(attention=Attention(windows=(0, 70))),
    )  # fmt: skip
    optim = OptimConfig(name="sgd", lr=1e-2, warmup=1)
    run = Run(steps=1, model=model, data=DataConfig(batch=4, seq=128), optim=optim)
    devices, options = jax.devices()[:4], parity.CPU_OPTIONS
    right = parity.refer(run, devices, options)
    calls, attend = [], functools.partial(splash.attention, interpret=True)
    monkeypatch.setattr(engine, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "attention", lambda *a, **how: calls.append(a) or attend(*a, **how))
    row = parity.compare(run, parity.mesh_of({"data": 2, "tensor": 2}), devices, right, options)
    assert [q.shape for q, *_ in calls] == 2 * [(2, 128, 1, 2, 8)]
    assert row.passed and row.differences["gradients"] > 0
