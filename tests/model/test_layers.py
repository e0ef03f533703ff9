"""The stack of layers: what is kept and unrolled changes no value; one body for any number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import transformer
from model.attention import Context
from model.config import REMATS, Arch, Attention, Head
from model.rope import rotation
from model.transformer import by_layer, run_layers
from tests.model import reference
from tests.model.tiny import TINY, WHOLE, decoder, random_params
from tests.tolerance import assert_same

FOUR = dataclasses.replace(TINY, layers=4)
PATTERN = dataclasses.replace(
    TINY, layers=5, arch=Arch(attention=Attention(windows=(3, 0)), head=Head(chunk=5))
)


def rows():
    ids = np.random.default_rng(0).integers(0, TINY.vocab, (2, 2, 8))
    where = np.tile(np.arange(8), (2, 1))
    return (*map(jnp.asarray, (*ids, where)), jnp.ones((2, 8), jnp.int32), jnp.ones((2, 8)))


def step_of(cfg):
    """Parameters to the loss of `rows` and its gradient."""
    graph, _, _ = transformer.abstract(cfg, WHOLE)
    return jax.value_and_grad(lambda params: nnx.merge(graph, params).loss(*rows())[0])


@pytest.fixture(scope="module")
def kept_all(mesh):
    """Loss and gradients of a pattern with a remainder, nothing recomputed or unrolled."""
    with jax.set_mesh(mesh):
        params = random_params(PATTERN, std=0.1)
        return params, jax.jit(step_of(PATTERN))(params)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        *(pytest.param(remat, 1, marks=pytest.mark.slow) for remat in REMATS),
        pytest.param("none", 2, marks=pytest.mark.slow),
        ("dots", 2),
    ],
)
def test_what_is_recomputed_or_unrolled_changes_no_value(one_device, kept_all, remat, unroll):
    params, right = kept_all
    cfg = dataclasses.replace(PATTERN, remat=remat, unroll=unroll)
    assert_same(jax.jit(step_of(cfg))(params), right)


@pytest.mark.slow
def test_bfloat16_gradients_point_where_the_float32_ones_do(one_device, kept_all):
    params, (loss, right) = kept_all
    cfg = dataclasses.replace(PATTERN, dtype="bfloat16")
    rough, ours = jax.jit(step_of(cfg))(params)
    assert float(rough) == pytest.approx(float(loss), rel=2**-6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        assert a.dtype == np.float32
        a, b = np.ravel(a), np.ravel(b)
        assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


def work(remat):
    """(matmuls, exponentials) in the program of the loss and its gradient, one layer long."""
    cfg = dataclasses.replace(FOUR, remat=remat)
    text = str(jax.make_jaxpr(step_of(cfg))(transformer.abstract(cfg, WHOLE)[1]))
    return text.count("dot_general["), text.count(" exp ")


def test_each_policy_recomputes_what_it_says(one_device):
    # A layer has seven matmuls (qkv, two of attention, out, gate, up, down) and the exponential
    # of its softmax; the head and its loss have three and one, kept whatever the policy.
    kept = 7 + 14 + 3
    assert work("none") == (kept, 2)
    # The backward pass of attention itself needs its weights, so one matmul and the exponential.
    assert work("dots") == (kept + 1, 3)
    assert work("mlp") == (kept + 3, 3)  # and gate and up
    # "attention" repeats the matmuls before and after attention, but not weights times values.
    assert work("attention") == (kept + 5, 3)
    assert work("full") == (kept + 6, 3)  # all but down: nothing in the backward pass asks for it


@pytest.mark.parametrize(
    ("windows", "layers"),
    [((3, 0), 1), ((3, 0), 3), pytest.param((3, 0), 5, marks=pytest.mark.slow), ((3, 2, 0), 5)],
)
def test_a_pattern_is_its_blocks_one_by_one(one_device, windows, layers):
    cfg = dataclasses.replace(TINY, layers=layers, arch=Arch(attention=Attention(windows=windows)))
    params = random_params(cfg)
    ids, _, positions, segments, _ = rows()

    def one_by_one(params):
        context = Context(segments, {"global": rotation(positions, cfg.head_dim, 1e4)})
        x = params["embedding"]["table"][ids]
        for i, weights in enumerate(reference.layers(params, cfg)):
            block = transformer.Block(cfg, i % cfg.places, WHOLE, nnx.Rngs(0))
            nnx.update(block, weights)
            x, _ = block(x, context)
        return decoder(cfg, params).norm(x)

    def scanned(params):
        return decoder(cfg, params)(ids, positions, segments)

    assert_same(jax.jit(scanned)(params), jax.jit(one_by_one)(params))


def test_extras_come_back_in_parts_as_the_weights_are():
    def layer(own, x, context):
        return x + own, {"before": x, "weight": own * context}

    weights = ([jnp.array([1.0, 3.0]), jnp.array([2.0, 4.0])], [jnp.array(5.0)])
    x, extras = run_layers([layer, layer], weights, jnp.array(0.0), 10.0)
    (first, second), (last,) = extras
    assert float(x) == 15
    np.testing.assert_array_equal(first["weight"], [10, 30])
    np.testing.assert_array_equal(second["weight"], [20, 40])
    np.testing.assert_array_equal(first["before"], [0, 3])
    np.testing.assert_array_equal(second["before"], [1, 6])
    assert (float(last["before"]), float(last["weight"])) == (10, 50)
    assert [float(extra["before"]) for extra in by_layer(extras)] == [0, 1, 3, 6, 10]


def test_a_program_of_eighty_layers_is_as_long_as_one_of_eight(one_device):
    def lines(layers):
        cfg = dataclasses.replace(TINY, layers=layers, remat="dots")
        _, shapes, _ = transformer.abstract(cfg, WHOLE)
        return jax.jit(step_of(cfg)).lower(shapes).as_text().count("\n")

    assert lines(8) == lines(80)
