"""A lookup's gradient in an order of its own is that of the plain lookup."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import lookup
from sharding import mesh as meshes
from sharding.mesh import MeshConfig

V, D = 11, 6


def gradient(look, table_VD, ids_BT, weights_BTD):
    table_VD, ids_BT, weights_BTD = map(jnp.asarray, (table_VD, ids_BT, weights_BTD))
    return jax.grad(lambda table: jnp.sum(look(table, ids_BT, "float32") * weights_BTD))(table_VD)


@pytest.mark.parametrize(("tokens", "chunk"), [(12, 24), (12, 8), (13, 7)])
def test_rows_met_again_in_and_between_chunks_are_summed_and_numbers_of_no_row_are_not(
    tokens, chunk, monkeypatch
):
    monkeypatch.setattr(lookup, "CHUNK", chunk)
    draw = np.random.default_rng(tokens)
    table_VD = draw.standard_normal((V, D), np.float32)
    ids_BT = draw.integers(-2, V + 2, (2, tokens)).astype(np.int32)
    weights_BTD = draw.standard_normal((2, tokens, D), np.float32)
    assert len(np.unique(ids_BT)) < ids_BT.size and ids_BT.min() < 0 and ids_BT.max() >= V
    expected = np.zeros((V, D))
    for i, weight in zip(ids_BT.flat, weights_BTD.reshape(-1, D), strict=True):
        if 0 <= i < V:
            expected[i] += weight
    found = gradient(lookup.in_order, table_VD, ids_BT, weights_BTD)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_sums_of_bfloat16_gradients_are_float32():
    """300 ones: bfloat16 would stop at 256."""
    table_VD, ids_BT = jnp.zeros((3, 2)), jnp.ones((1, 300), jnp.int32)

    def total(table):
        return jnp.sum(lookup.in_order(table, ids_BT, "bfloat16").astype(jnp.float32))

    np.testing.assert_array_equal(jax.grad(total)(table_VD), [[0, 0], [300, 300], [0, 0]])


@pytest.mark.parametrize(("flags", "same"), [("", False), ("--xla_gpu_deterministic_ops", True)])
def test_only_a_run_that_asks_for_the_same_bits_pays_for_the_order(flags, same, monkeypatch):
    monkeypatch.setattr(lookup, "platform", lambda: "gpu")
    monkeypatch.setattr(lookup, "in_order", lambda *_: "in order")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_deterministic_ops=false {flags}")
    with jax.set_mesh(meshes.make(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])):
        look = jax.shard_map(
            lambda *args: jnp.int32(lookup.lookup(*args, "float32") == "in order"),
            in_specs=jax.P(), out_specs=jax.P(), check_vma=False,
        )  # fmt: skip
        told = look(jnp.zeros((V, D)), jnp.zeros((1, 2), jnp.int32))
    assert np.all(np.asarray(told) == same)


@pytest.mark.parametrize("rows", [("data",), ("data", "fsdp")])
def test_over_devices_what_their_ids_ask_of_a_row_is_summed(rows, monkeypatch):
    monkeypatch.setattr(lookup, "platform", lambda: "gpu")
    monkeypatch.setattr(lookup.runtime, "same_bits", lambda: True)
    draw = np.random.default_rng(0)
    table_VD = draw.standard_normal((V, D), np.float32)
    ids_BT = draw.integers(0, V, (8, 5)).astype(np.int32)
    weights_BTD = draw.standard_normal((8, 5, D), np.float32)
    expected = gradient(lookup.plain, table_VD, ids_BT, weights_BTD)
    with jax.set_mesh(meshes.make(MeshConfig(data=4, fsdp=2, tensor=1))):
        look = jax.shard_map(
            functools.partial(lookup.lookup, dtype="float32"),
            in_specs=(jax.P(), jax.P(rows)), out_specs=jax.P(rows),
        )  # fmt: skip
        ids_BT, weights_BTD = (jax.device_put(a, jax.P(rows)) for a in (ids_BT, weights_BTD))
        table_VD = jax.device_put(table_VD, jax.P())
        found = jax.jit(functools.partial(gradient, lambda *a: look(*a[:2])))(
            table_VD, ids_BT, weights_BTD
        )
    np.testing.assert_allclose(found, expected, atol=1e-5)
