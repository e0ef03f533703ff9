"""Each part of a block against its formula in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import kernels
from model.config import MLPS, Arch, ModelConfig, Norm, Scaling
from model.layers import make_norm
from model.mlp import make_mlp
from model.rope import frequencies, rotate, rotation
from tests.model import reference
from tests.model.tiny import WHOLE
from tests.tolerance import assert_formula

# Two documents, then padding; a row with one token; a row without any.
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0], [1] + [0] * 11, [0] * 12])


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def as_numpy(module):
    state = nnx.to_pure_dict(nnx.state(module))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 7.0])
def test_rope_turns_each_pair_by_its_angle(theta):
    x, positions = drawn(2, 6, 3, 8), np.array([[0, 1, 2, 0, 1, 9], [3, 1, 4, 1, 5, 100]])
    turned = rotate(jnp.float32(x), rotation(jnp.asarray(positions), 8, theta))
    for row, own, where in zip(turned, x, positions, strict=True):
        assert_formula(row, reference.rope(own, where, theta))


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling("linear", factor=8.0),
        Scaling("llama3", factor=32.0, trained=8192),
        Scaling("yarn", factor=4.0, trained=32_768),
        Scaling("yarn", factor=40.0, trained=4096),
    ],
)
@pytest.mark.parametrize("theta", [10_000.0, 1e6])
def test_a_stretched_rope_turns_as_published(scaling, theta):
    exact = reference.scaled(theta ** (-np.arange(32) / 32), scaling)
    assert_formula(frequencies(64, theta, scaling), exact)
    cos, _ = rotation(jnp.array([[3]]), 64, theta, scaling)
    size = 0.1 * np.log(scaling.factor) + 1 if scaling.kind == "yarn" else 1
    assert_formula(cos[0, 0], size * np.cos(3 * exact))


def test_rope_makes_products_depend_on_distance_alone():
    q, k = drawn(8), drawn(8, seed=1)

    def product(t, s):
        at = rotation(jnp.array([[t, s]]), 8, 100.0)
        turned = rotate(jnp.float32(np.stack([q, k])[None, :, None]), at)
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    assert product(5, 3) == pytest.approx(product(52, 50), rel=1e-4)
    assert product(5, 3) != pytest.approx(product(3, 5), rel=1e-2)


@pytest.mark.parametrize(
    ("norm", "formula"),
    [
        (Norm("rms", offset=1.0), lambda x, scale: reference.rms_norm(x, 1 + scale, 1e-5)),
        (Norm("rms", eps=1e-5), functools.partial(reference.rms_norm, eps=1e-5)),
        (Norm("rms", eps=0.1), functools.partial(reference.rms_norm, eps=0.1)),
        (Norm("layer"), functools.partial(reference.layer_norm, bias=0, eps=1e-5)),
        (Norm("layer", bias=True), functools.partial(reference.layer_norm, eps=1e-5)),
    ],
)
def test_norms_have_their_formula(norm, formula):
    x, module = 3 * drawn(2, 5, 16) + 1, make_norm(norm, 16, "float32")
    state = jax.tree.map(lambda leaf: jnp.float32(drawn(*leaf.shape)), nnx.state(module))
    nnx.update(module, state)
    assert_formula(module(jnp.float32(x)), formula(x, **as_numpy(module)))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_bfloat16_are_computed_in_float32(kind):
    module = make_norm(Norm(kind), 64, "bfloat16")
    x = jnp.bfloat16(drawn(4, 64) + 30)  # squares near 900 lose everything in 8 bits
    exact = module(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(module(x), exact)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "softcap", "scale"),
    [
        (4, 4, 0, 0, 0.5),
        (4, 2, 0, 0, 0.5),
        (6, 1, 0, 0, 0.3),
        (4, 2, 1, 0, 0.5),
        (4, 2, 3, 0, 0.5),
        (4, 2, 12, 0, 0.5),
        (4, 2, 0, 2.0, 0.5),
        (4, 2, 4, 1.5, 2.0),
    ],
)
def test_attention_has_its_formula(heads, kv_heads, window, softcap, scale):
    how = {"scale": scale, "window": window, "softcap": softcap}
    q = drawn(3, 12, heads, 4)
    k, v = drawn(2, 3, 12, kv_heads, 4, seed=1)
    out = jax.jit(functools.partial(kernels.attention.plain, **how))(
        jnp.float32(q.reshape(3, 12, kv_heads, -1, 4)),
        jnp.float32(k),
        jnp.float32(v),
        jnp.asarray(SEGMENTS),
    )
    for row in range(3):
        right = reference.attention(q[row], k[row], v[row], SEGMENTS[row], **how)
        assert_formula(np.reshape(out[row], right.shape), right)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", MLPS)
def test_feed_forward_has_its_formula(one_device, activation, bias):
    cfg = ModelConfig(embed=8, mlp=12, vocab=16, arch=Arch(activation=activation, mlp_bias=bias))
    module = make_mlp(cfg, WHOLE, nnx.Rngs(0))
    state = jax.tree.map(lambda leaf: leaf + jnp.float32(drawn(*leaf.shape)), nnx.state(module))
    nnx.update(module, state)
    x = drawn(1, 5, 8)
    assert_formula(module(jnp.float32(x))[0], reference.mlp(x[0], as_numpy(module), activation))
