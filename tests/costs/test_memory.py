"""Bytes per device, and how they are written."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from costs.memory import human, program_bytes, state_bytes

MESH = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)


def held(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, jax.P(*spec)))


def test_a_device_holds_one_shard_of_what_is_split_and_all_of_what_is_not():
    tree = {
        "params": {"a": held((16, 8), jnp.float32, "fsdp"), "b": held((8,), jnp.bfloat16)},
        "moments": [held((16, 8), jnp.float32, ("data", "fsdp"))] * 2,
        "step": jnp.zeros((), jnp.int32),
    }
    assert state_bytes(tree) == {
        "params": 16 * 8 * 4 // 4 + 8 * 2,
        "moments": 2 * 16 * 8 * 4 // 8,
        "step": 4,
    }


def test_the_bytes_of_real_arrays_are_those_of_their_shards():
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((4 * devices, 3)), NamedSharding(mesh, jax.P("fsdp")))
    assert state_bytes({"x": x}) == {"x": x.addressable_shards[0].data.nbytes}


def test_random_keys_and_bare_arrays_count():
    assert state_bytes({"key": jax.random.key(0)}) == {"key": 8}
    assert state_bytes(jnp.zeros(5)) == {"array": 20}
    assert state_bytes({}) == {}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (41.8 * 2**30, "41.8 GiB"),
        (640 * 2**20, "640 MiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes_are_written_in_three_digits(count, text):
    assert human(count) == text


def test_a_program_that_takes_over_its_argument_counts_it_once():
    def taken(**donated):
        step = jax.jit(lambda x: x + 1, **donated).lower(jnp.zeros(1024)).compile()
        return program_bytes(step.memory_analysis())

    assert taken() == 2 * 4096 and taken(donate_argnums=0) == 4096
