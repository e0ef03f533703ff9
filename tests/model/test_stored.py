"""Weights that are stored rounded: a model with them is the model of the numbers they mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from checkpoint import store as saves
from model import transformer
from model.config import Arch, Moe
from model.kernels import nibbles
from model.matmul.stored import QArray, store, store_all
from model.precision import Format, Passes, Precision
from sharding.layout import Layout
from tests.model.tiny import TINY, WHOLE, random_params
from tests.sharding.tiny import mesh_of
from tests.tolerance import assert_same

IDS = np.random.default_rng(0).integers(0, TINY.vocab, (8, 6), np.int32)
W8A8 = Precision(*[Passes(forward="int8")] * 2)


def logits(cfg, params, layout=WHOLE):
    """Of IDS, and the parameters as they were taken."""
    graph, _, _ = transformer.abstract(cfg, layout)
    place = np.broadcast_to(np.arange(IDS.shape[1], dtype=np.int32), IDS.shape)

    def run(params, *rows):
        return nnx.merge(graph, params).logits(*rows)

    rows = [IDS, place, np.ones_like(IDS)]
    where = NamedSharding(jax.sharding.get_mesh(), layout.spec("batch", None))
    return jax.jit(run)(params, *(jax.device_put(row, where) for row in rows))


def stored(cfg, params, form, layout=WHOLE):
    _, _, roles = transformer.abstract(cfg, layout)
    return jax.jit(lambda params: store_all(params, roles, form))(params)


def numbers(params):
    """The same parameters as arrays."""
    is_stored = lambda leaf: isinstance(leaf, QArray)  # noqa: E731
    dense = lambda w: w.astype(jnp.float32) if is_stored(w) else w  # noqa: E731
    return jax.jit(lambda params: jax.tree.map(dense, params, is_leaf=is_stored))(params)


FORMS = [Format("w4", 6), Format("w8"), Format("fp8"), Format("w8", 8), Format("w4")]


@pytest.mark.parametrize(
    "form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])], ids=str
)
def test_a_model_of_stored_weights_is_the_model_of_their_numbers(one_device, form):
    params = random_params(TINY)
    few = stored(TINY, params, form)
    dense = numbers(few)
    assert_same(logits(TINY, few), logits(TINY, dense))
    up, own = params["blocks"][0]["mlp"]["gate_up"]["weight"], few["blocks"][0]["mlp"]["gate_up"]
    own, rough = own["weight"], dense["blocks"][0]["mlp"]["gate_up"]["weight"]
    # Groups of 6 of 16 inputs: the last is short. Levels to 7, or 127, or three bits of mantissa.
    groups = -(-TINY.embed // (form.group or TINY.embed))
    assert own.scales.shape == (*up.shape[:-1], groups)
    assert own.values.nbytes == up.size // (2 if form.kind == "w4" else 1)
    step = {"w4": 1 / 14, "w8": 1 / 254, "fp8": 1 / 16}[form.kind]
    assert 0 < np.abs(rough - up).max() <= step * 1.001 * np.abs(up).max()


@pytest.mark.slow
def test_stored_weights_of_eight_bits_meet_rounded_activations(one_device):
    exact = stored(TINY, random_params(TINY), Format("w8"))
    rounding = dataclasses.replace(TINY, precision=W8A8)
    plain, ours = logits(TINY, exact), logits(rounding, exact)
    assert 1e-4 < np.linalg.norm(ours - plain) / np.linalg.norm(plain) < 0.03
    # As a weight that is rounded when it is used: the two ways are one.
    assert_same(ours, logits(rounding, random_params(TINY)))


@pytest.mark.slow
@pytest.mark.parametrize("passes", [Precision(), W8A8])
def test_stored_weights_lie_split_on_a_mesh_and_mean_the_same(passes, tmp_path):
    cfg = dataclasses.replace(TINY, precision=passes)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        params = jax.device_get(random_params(cfg))
        right = logits(cfg, stored(cfg, params, Format("w8")))
    with jax.set_mesh(mesh_of((2, 2, 2))):
        layout = Layout()
        _, shapes, _ = transformer.abstract(cfg, layout)
        mesh = jax.sharding.get_mesh()
        where = jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.sharding.spec), shapes)
        few = stored(cfg, jax.device_put(params, where), Format("w8"), layout)
        up = few["blocks"][0]["mlp"]["gate_up"]["weight"]
        assert up.values.sharding.spec == up.spec == jax.P(None, None, "tensor", "fsdp")
        assert up.scales.sharding.spec == jax.P(None, None, "tensor", None)
        assert_same(logits(cfg, few, layout), right)
        kept = saves.Store(tmp_path)
        kept.save(1, {"params": few}, {}, {})
        kept.wait()
        kept.close()
        there = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), few
        )
        back = saves.Saved.open(tmp_path).restore({"params": there})["params"]
        jax.tree.map(np.testing.assert_array_equal, back, few)


@pytest.mark.slow
def test_experts_may_be_stored_and_routers_stay(one_device):
    cfg = dataclasses.replace(TINY, arch=Arch(moe=Moe(experts=4, active=2)))
    few = stored(cfg, random_params(cfg), Format("w8"))
    mlp = few["blocks"][0]["mlp"]
    assert isinstance(mlp["gate_up"]["weight"], QArray)
    assert not isinstance(mlp["router"]["weight"], QArray)
    assert_same(logits(cfg, few), logits(cfg, numbers(few)))


def test_two_levels_share_a_byte():
    levels = np.random.default_rng(0).integers(-8, 8, (3, 7), np.int8)
    held = jax.jit(nibbles.packed)(levels)
    assert (held.dtype, held.shape) == (np.uint8, (3, 4))
    np.testing.assert_array_equal(nibbles.unpacked(held, 7), levels)
    assert held[0, 0] == (levels[0, 0] & 15) + 16 * (levels[0, 1] & 15)


def test_groups_that_a_device_has_parts_of_are_refused():
    with jax.set_mesh(mesh_of((1, 8, 1))):
        w = jax.reshard(jnp.ones((4, 48)), jax.P(None, "fsdp"))
        with pytest.raises(
            ValueError, match="groups of 16 do not divide the 6 inputs that one of 8"
        ):
            store(w, 1, Format("w4", 16))
