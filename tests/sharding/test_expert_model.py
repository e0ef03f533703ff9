"""Experts on other devices give the values and gradients of experts on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from model.config import Arch, ModelConfig, Moe
from model.moe import MoeMlp
from model.remat import policy
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from tests.tolerance import assert_same

B, T, D, E = 8, 6, 16, 8
MESHES = {
    "expert=8": MeshConfig(data=1, expert=8),
    "expert=2,fsdp=2,tensor=2": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
    "expert=4,tensor=2": MeshConfig(data=1, expert=4, tensor=2),
    "expert=4,data=2": MeshConfig(data=2, expert=4),
    "expert=2,fsdp=4": MeshConfig(data=1, expert=2, fsdp=4),
    "expert=2": MeshConfig(data=1, expert=2),
}
QUICK = ["expert=2,fsdp=2,tensor=2"]
# What each expert's router adds for every token: with 2 active experts of 8.
LOADS = {
    "as it comes": np.zeros(E),
    "all to one expert": np.eye(E)[3] * 40,
    "all to one device": np.array([30.0, 20] + [0] * (E - 2)),
    "none to one device": np.array([-40.0] * (E // 2) + [0] * (E // 2)),
    "none to another": np.array([0.0] * (E // 2) + [-40] * (E // 2)),
}


def config(active=2):
    moe = Moe(experts=E, active=active, mlp=8, normalize=active < 4)
    return ModelConfig(embed=D, mlp=24, dtype="float32", arch=Arch(moe=moe))


@functools.cache
def programs(mesh_config, active=2):
    """(mesh, where the weights live, step): loss, (y, statistics) and gradients of a MoeMlp."""
    count = int(np.prod(list(vars(mesh_config).values())))
    mesh = meshes.make(mesh_config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        graph, state = nnx.split(
            jax.eval_shape(lambda: MoeMlp(config(active), Layout(), nnx.Rngs(0)))
        )
        shapes = nnx.to_pure_dict(state)

    def total(params, x_BTD, segments_BT):
        y_BTD, stats = nnx.merge(graph, params)(x_BTD, segments_BT)
        return jnp.sum(jnp.sin(y_BTD)) + stats["balance"] + stats["z"], (y_BTD, stats)

    return mesh, shapes, jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def results(mesh_config, load, active=2):
    """Everything that a program tells, as NumPy arrays."""
    mesh, shapes, step = programs(mesh_config, active)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.5 * draw.normal(size=leaf.shape), shapes)
    x_BTD = draw.normal(size=(B, T, D))
    x_BTD[..., 0] = 1
    params["router"]["weight"][:, 0] += LOADS[load]
    segments_BT = (np.arange(T)[None] < draw.integers(2, T + 1, (B, 1))).astype(np.int32)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda value, leaf: jax.device_put(
                value.astype(np.float32), NamedSharding(mesh, leaf.sharding.spec)
            ),
            params,
            shapes,
        )
        rows = NamedSharding(mesh, Layout().spec("batch", "sequence"))
        args = jax.device_put((x_BTD.astype(np.float32), segments_BT), rows)
        return jax.device_get(step(params, *args))


ONE = MeshConfig(data=1)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MESHES],
)
def test_values_statistics_and_gradients_are_those_of_one_device(name, load):
    assert_same(results(MESHES[name], load), results(ONE, load))


@pytest.mark.slow
@pytest.mark.parametrize("active", [1, 6, 8])
def test_few_and_many_choices_give_the_values_of_one_device(active):
    name = "expert=4,tensor=2"
    for load in "as it comes", "all to one expert":
        assert_same(results(MESHES[name], load, active), results(ONE, load, active))


def test_each_device_holds_its_own_experts():
    _, shapes, _ = programs(MESHES["expert=2,fsdp=2,tensor=2"])
    where = {name: leaf["weight"].sharding.spec for name, leaf in shapes.items()}
    assert where["gate_up"] == jax.P("expert", None, "tensor", "fsdp")
    assert where["down"] == jax.P("expert", "fsdp", "tensor")
    assert where["router"] == jax.P(None, "fsdp"), "whole: each token asks of all experts"


def test_no_array_kept_for_the_backward_pass_has_the_rows_of_other_devices():
    """R = 2 N rows may come to a device of two; what is kept has its own N at most."""
    mesh, shapes, _ = programs(MESHES["expert=2"])
    rows = B * T // 2
    with jax.set_mesh(mesh):
        graph, _ = nnx.split(jax.eval_shape(lambda: MoeMlp(config(), Layout(), nnx.Rngs(0))))
        where = NamedSharding(mesh, Layout().spec("batch", "sequence"))
        x_BTD = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=where)
        segments = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where)

        def kept(params, x_BTD, segments_BT):
            @functools.partial(jax.checkpoint, policy=policy("none"))
            def layer(params, x_BTD):
                return nnx.merge(graph, params)(x_BTD, segments_BT)[0]

            return jax.vjp(layer, params, x_BTD)[1]

        leaves = jax.tree.leaves(jax.eval_shape(kept, shapes, x_BTD, segments))
    weights = {leaf.shape for leaf in jax.tree.leaves(shapes)}
    sizes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves if leaf.shape not in weights]
    assert max(np.prod(size) for size in sizes) <= rows * D, sizes


@pytest.mark.parametrize(
    ("experts", "active", "senders", "pieces"),
    [
        (1, 2, 8, 2),  # Mixtral over 8: four devices' tokens want this expert at most once each
        (16, 8, 8, 4),  # Qwen3-MoE over 8
        (4, 2, 2, 1),
        (64, 1, 4, 2),
        (1, 8, 64, 4),
    ],
)
def test_a_piece_has_room_for_twice_the_pairs_of_ones_own_tokens(experts, active, senders, pieces):
    module = object.__new__(MoeMlp)
    object.__setattr__(module, "moe", Moe(experts=experts * senders, active=active))
    assert module.pieces(senders, experts) == pieces
    assert senders // pieces * min(active, experts) <= 2 * active
