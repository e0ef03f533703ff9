"""What the router's statistics and losses are; that no token is dropped; its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import Arch, Moe
from model.moe import MoeMlp
from tests.model import reference
from tests.model.tiny import TINY, WHOLE, decoder, random_params
from tests.tolerance import assert_formula, assert_same

MOE = Moe(experts=4, active=2, balance=0.5, z_loss=0.25)
CFG = dataclasses.replace(TINY, layers=1, arch=Arch(moe=MOE))
SEGMENTS = np.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 10])


def rows(seed=0):
    ids = np.random.default_rng(seed).integers(0, CFG.vocab, (3, *SEGMENTS.shape))
    return [jnp.asarray(row, jnp.int32) for row in (ids[0], ids[1], ids[2] % 5, SEGMENTS)]


def routing(params, x_TD):
    """Probabilities and log(Z) of each token, and who is chosen, in NumPy."""
    z_TE = x_TD @ np.asarray(params["router"]["weight"], np.float64).T
    e_TE = np.exp(z_TE)
    return e_TE / e_TE.sum(-1, keepdims=True), np.log(e_TE.sum(-1)), np.argsort(-z_TE)[:, :2]


def test_statistics_are_those_of_the_tokens_that_are_no_padding(one_device):
    params = random_params(CFG)
    mlp = params["blocks"][0]["mlp"]
    module = MoeMlp(CFG, WHOLE, nnx.Rngs(0))
    x_BTD = np.random.default_rng(3).normal(size=(*SEGMENTS.shape, CFG.embed))
    own = jax.tree.map(lambda leaf: leaf[0], mlp)
    nnx.update(module, own)
    y_BTD, stats = jax.jit(module.__call__)(jnp.float32(x_BTD), jnp.asarray(SEGMENTS))

    real = x_BTD[SEGMENTS > 0]
    p_TE, log_Z, chosen = routing(own, real)
    load = np.bincount(chosen.ravel(), minlength=4) / chosen.size * 4
    assert_formula(stats["load"], load)
    assert_formula(stats["balance"], np.sum(load * p_TE.mean(0)))
    assert_formula(stats["z"], np.mean(log_Z**2))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), own)
    flat = x_BTD.reshape(-1, CFG.embed)
    assert_formula(y_BTD.reshape(flat.shape), reference.experts(flat, exact, MOE, "swiglu"))


def test_a_router_that_prefers_one_expert_drops_no_token(one_device):
    params = random_params(CFG)
    weight = params["blocks"][0]["mlp"]["router"]["weight"]
    params["blocks"][0]["mlp"]["router"]["weight"] = weight.at[:, 1].set(50 * weight[:, 1])
    inputs, _, positions, segments = rows()
    ours = jax.jit(decoder(CFG, params).logits)(inputs, positions, segments)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row in range(2):
        own = (np.asarray(a[row]) for a in (inputs, positions, segments))
        assert_formula(ours[row], reference.logits(exact, CFG, *own))


def test_the_loss_holds_the_routers_losses_and_tells_them(one_device):
    weights = jnp.asarray(SEGMENTS > 0, jnp.float32) / 18
    plain = dataclasses.replace(CFG, arch=Arch(moe=dataclasses.replace(MOE, balance=0, z_loss=0)))
    loss, told = jax.jit(decoder(CFG).loss)(*rows(), weights)
    without, same = jax.jit(decoder(plain).loss)(*rows(), weights)
    assert_same(told, same)
    assert_same(without, told["nats"])
    assert_same(loss, without + 0.5 * told["router_balance"] + 0.25 * told["router_z"])
    assert float(told["router_load"]) > 1
    doubled, _ = jax.jit(decoder(CFG).loss)(*rows(), 2 * weights)
    assert_same(doubled, 2 * loss)


def test_gradients_are_the_slopes_of_the_loss(one_device):
    params, weights = random_params(CFG), jnp.asarray(SEGMENTS > 0, jnp.float32) / 18

    @jax.jit
    def loss(params):
        return decoder(CFG, params).loss(*rows(), weights)[0]

    grads = jax.jit(jax.grad(loss))(params)
    draw = np.random.default_rng(5)
    for name in ("router", "gate_up", "down"):
        own = grads["blocks"][0]["mlp"][name]["weight"]
        assert np.all(np.any(np.asarray(own) != 0, axis=-1)), name
        way = jnp.asarray(draw.normal(size=own.shape), jnp.float32)

        def along(step, name=name, way=way):
            moved = jax.tree.map(lambda leaf: leaf, params)
            moved["blocks"][0]["mlp"][name]["weight"] += step * way
            return float(loss(moved))

        slope = (along(1e-3) - along(-1e-3)) / 2e-3
        assert slope == pytest.approx(float(jnp.sum(own * way)), rel=2e-2, abs=2e-3), name
