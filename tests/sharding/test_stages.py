"""A layer over rows in flight does to each stage's rows what that stage's weights do alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import Arch, Attention, Moe, Norm
from model.transformer import Block, Context, pure
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from tests.sharding.tiny import MODEL, TOKENS
from tests.tolerance import assert_same

STAGES, ROWS = 2, 4
IN_FLIGHT = Layout(batch=("stage", "data", "fsdp"), vocab=None)
EXPERTS = dataclasses.replace(
    MODEL,
    arch=Arch(
        moe=Moe(experts=4, mlp=8),
        attention=Attention(qk_norm="all"),
        norm=Norm(offset=1.0, placement="sandwich"),
    ),
)


def weights_of(cfg):
    """Different ones for each stage, [STAGES, ...]; none is one or zero. With them their specs."""
    shapes = nnx.to_pure_dict(nnx.state(jax.eval_shape(lambda: block_of(cfg, Layout()))))
    draw = np.random.default_rng(0)
    leaves = jax.tree.map(
        lambda leaf: draw.normal(size=(STAGES, *leaf.shape)).astype(np.float32) / 3, shapes
    )
    return leaves, jax.tree.map(lambda leaf: leaf.sharding.spec, shapes)


def block_of(cfg, layout):
    return Block(cfg, 0, layout, nnx.Rngs(0))


def outcome(cfg, layout, weights, x, segments):
    """(y, the router's statistics, gradients of the weights and of x) of one layer."""
    layer = pure(nnx.split(jax.eval_shape(lambda: block_of(cfg, layout)))[0])

    def loss(weights, x):
        y, extras = layer(weights, x, Context(segments, {}))
        router = extras.get("router", {})
        waves = jnp.sin(y) * (segments > 0)[..., None]
        return jnp.sum(waves) + sum(jnp.sum(a**2) for a in jax.tree.leaves(router)), (y, router)

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, x)
    return out, grads


@pytest.mark.parametrize(
    "cfg", [MODEL, pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=["dense", "experts"]
)
def test_each_stages_rows_meet_its_own_weights_only(cfg):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(STAGES, ROWS, TOKENS, cfg.embed)).astype(np.float32)
    segments = draw.integers(0, 2, (STAGES, ROWS, TOKENS), np.int32)
    mesh = MeshConfig(data=1, stage=STAGES, fsdp=2, tensor=2)
    with jax.set_mesh(meshes.make(mesh, jax.devices())):
        weights, specs = weights_of(cfg)
        where = jax.tree.map(lambda spec: jax.P("stage", *spec), specs)
        rows = IN_FLIGHT.spec("batch")
        placed = [jax.device_put(a.reshape(-1, *a.shape[2:]), rows) for a in (x, segments)]
        run = jax.jit(lambda *args: outcome(cfg, IN_FLIGHT, *args))
        (y, router), (dweights, dx) = run(jax.device_put(weights, where), *placed)
    y, dx = (np.reshape(a, x.shape) for a in (y, dx))
    ours = jax.tree.map(np.asarray, ((y, router), (dweights, dx)))
    with jax.set_mesh(meshes.make(MeshConfig(), jax.devices()[:1])):
        run = jax.jit(lambda *args: outcome(cfg, Layout(), *args))
        for s in range(STAGES):
            own = [jax.tree.map(lambda a, s=s: a[s], a) for a in (weights, x, segments)]
            right = run(*jax.device_put(own, jax.P()))
            assert_same(jax.tree.map(lambda a, s=s: a[s], ours), right)
