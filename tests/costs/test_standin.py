"""What counts in the place of kernels that a count cannot look into."""

import jax
import jax.numpy as jnp
import pytest

from costs import kernels, program, standin
from costs.devices import H100
from costs.roofline import GPU, seconds
from model.kernels import hopper, hopper_round, int8, quantize
from sharding import mesh as meshes
from tests.meshes import hybrid


def scheduled(function, *args):
    """The kernels of a function of arrays of these shapes and dtypes, as on a Hopper GPU."""
    mesh = meshes.make(hybrid(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh), standin.in_place("gpu"):
        args = [
            jax.ShapeDtypeStruct(*arg, sharding=jax.NamedSharding(mesh, jax.P())) for arg in args
        ]
        found = program.read(jax.make_jaxpr(jax.shard_map(function, out_specs=jax.P()))(*args),
                             dict(mesh.shape))  # fmt: skip
    return kernels.schedule(found, kernels.COMPILERS["gpu"])


X, W = ((512, 1024), jnp.int8), ((256, 1024), jnp.int8)


@pytest.mark.parametrize(("block", "name"), [(0, "whole"), (256, "groups")])
def test_an_8_bit_product_is_one_kernel_of_its_bytes_and_flops(block, name):
    n = 1024 // block if block else 1
    scales = [((size, n) if block else (size,), jnp.float32) for size in (512, 256)]

    def product(x, w, sx, sw):
        return int8.matmul(x, w, sx, sw, jnp.bfloat16, block=block)

    [*_, kernel] = [k for k in scheduled(product, X, W, *scales).kernels if k.flops]
    assert kernel.name == f"matmul_8bit_{name}" and kernel.dtype == "int8"
    assert kernel.flops == 2 * 512 * 256 * 1024 and kernel.written == 2 * 512 * 256
    assert sum(kernel.reads.values()) == (512 + 256) * (1024 + 4 * n)


def test_an_array_is_rounded_both_ways_from_one_reading():
    def both(x, by_R, by_K):
        rows, turned = quantize.both(x, ("int8", "float8_e5m2"), (by_R, by_K))
        return *rows, *turned

    vectors = [((size,), jnp.float32) for size in (512, 1024)]
    plan = scheduled(both, ((512, 1024), jnp.bfloat16), *vectors)
    [kernel] = [kernel for kernel in plan.kernels if kernel.name == "round_8bit"]
    assert [(b.value.shape, str(b.value.dtype)) for b in kernel.writes] == [
        ((512, 1024), "int8"), ((1024, 512), "float8_e5m2"),
    ]  # fmt: skip
    assert sum(kernel.reads.values()) == 2 * 512 * 1024 + 4 * (512 + 1024)
    took = 4 * 512 * 1024 / (H100.bandwidth * GPU.memory * GPU.rounds)
    assert seconds(kernels.Schedule([kernel], set()), H100, GPU, {}, 64).memory >= took


def test_what_the_kernels_cannot_take_is_counted_as_xla_does_it():
    def product(x, w, sx, sw):
        return int8.matmul(x, w, sx, sw, jnp.bfloat16)

    few = ((8, 1024), jnp.int8)  # rows of a tile
    plan = scheduled(product, few, W, ((8,), jnp.float32), ((256,), jnp.float32))
    assert "dot_general" in [kernel.name for kernel in plan.kernels]


def test_kernels_are_themselves_again_afterwards():
    before = hopper.matmul, hopper_round.both, hopper.not_here
    with standin.in_place("gpu"):
        assert hopper.not_here() == "" and hopper.matmul is standin.matmul
    with standin.in_place("tpu"):
        assert hopper.matmul is before[0]
    assert before == (hopper.matmul, hopper_round.both, hopper.not_here)
