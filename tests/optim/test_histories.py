"""Histories: rolled by the optimizer, out of reach of all else that it does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim import histories
from optim.config import OPTIMIZERS, OptimConfig
from optim.update import make_update
from sharding import mesh as meshes
from tests.meshes import hybrid
from tests.optim.test_optimizer import Role

N = 4
ROLES = {
    "layer": {"history": Role("vector"), "weight": Role("matrix", 1, 1)},
    "norm": Role("vector"),
}


@pytest.fixture(scope="module")
def one_mesh():
    mesh = meshes.make(hybrid(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield


def drawn(seed):
    draw = np.random.default_rng(seed)
    shapes = {"layer": {"history": (2, 3, N), "weight": (2, 8, 16)}, "norm": (8,)}
    return jax.tree.map(
        lambda shape: jnp.float32(np.abs(draw.normal(size=shape))),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def seeing(grads, seen):
    """Gradients with `seen` [2, 3] as what their history's is."""
    layer = grads["layer"] | {"history": jnp.broadcast_to(seen[..., None], (2, 3, N))}
    return {**grads, "layer": layer}


SLOW = [*(OptimConfig(name=name) for name in OPTIMIZERS if name != "sgd")]
SLOW += [OptimConfig(moments="int8", block=16)]


@pytest.mark.parametrize(
    "cfg", [OptimConfig(name="sgd"), *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in SLOW)]
)
def test_a_step_puts_what_it_saw_in_front_and_weights_go_as_without(one_mesh, cfg):
    cfg, params, grads = dataclasses.replace(cfg, warmup=0), drawn(0), drawn(1)
    seen = 1e6 * jnp.arange(1.0, 7).reshape(2, 3)
    alone = histories.weights(ROLES)
    found = []
    for roles, own, more in (
        (ROLES, params, seeing(grads, seen)),
        (alone, histories.weights(params), histories.weights(grads)),
    ):
        update = make_update(cfg, 10, roles, 0)
        state = update.init(own)
        step = jax.jit(update.step)
        found.append(step(jnp.int32(0), jnp.bool_(True), more, state, own))
    (with_history, state), (without, wanted) = found
    jax.tree.map(np.testing.assert_array_equal, histories.weights(with_history), without)
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    old = params["layer"]["history"]
    rolled = np.concatenate([seen[..., None], old[..., :-1]], axis=-1)
    np.testing.assert_array_equal(with_history["layer"]["history"], rolled)


def test_a_step_that_is_skipped_or_sees_what_is_not_finite_leaves_them(one_mesh):
    params, seen = drawn(0), jnp.ones((2, 3)).at[1, 2].set(jnp.inf)
    update = make_update(OptimConfig(name="sgd"), 10, ROLES, 0)
    state, old = update.init(params), params["layer"]["history"]
    for good in (True, False):
        made, _ = update.step(jnp.int32(0), jnp.bool_(good), seeing(drawn(1), seen), state, params)
        found = made["layer"]["history"]
        np.testing.assert_array_equal(found[1, 2], old[1, 2])
        changed = np.any(np.asarray(found != old), axis=-1)
        assert changed.sum() == (5 if good else 0)


def test_of_micro_batches_the_largest_counts_and_gradients_add_up():
    a, b = drawn(0), drawn(1)
    total, told = histories.added((a, {"loss": 1.0}), (b, {"loss": 2.0}))
    np.testing.assert_array_equal(
        total["layer"]["history"], np.maximum(a["layer"]["history"], b["layer"]["history"])
    )
    np.testing.assert_array_equal(total["norm"], a["norm"] + b["norm"])
    assert told == {"loss": 3.0}
    assert optax.tree.norm(histories.weights(a)) < optax.tree.norm(a)
