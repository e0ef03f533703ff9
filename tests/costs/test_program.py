"""A traced program as operations on one device's parts: shapes, loops, collectives, FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from costs import kernels, program, roofline
from costs.collectives import collectives, totals
from costs.flops import flops_per_token, matmul_params
from costs.talk import talk_of
from model.config import ModelConfig
from sharding import mesh as meshes
from tests.meshes import hybrid
from tests.sharding.tiny import run_of
from tools import plan as tool

SIZES = {"dcn": 1, "data": 2, "stage": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}


def read(function, *shapes, specs=(), sizes=(1, 1, 1)):
    """The program of a function of arrays of these shapes, split by these specs."""
    mesh = meshes.make(hybrid(*sizes), jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    specs = specs or [jax.P()] * len(shapes)
    with jax.set_mesh(mesh):
        args = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        ]
        return program.read(jax.make_jaxpr(function)(*args), dict(mesh.shape))


def test_shapes_are_those_of_one_devices_part_and_unused_work_is_left_out():
    def function(x, w):
        jnp.sin(x)
        return jnp.einsum("bd,fd->bf", x, w, out_sharding=jax.P("data", "tensor"))

    specs = (jax.P("data", None), jax.P("tensor", None))
    found = read(function, (8, 6), (4, 6), specs=specs, sizes=(2, 2, 2))
    assert [op.name for op in found.ops] == ["dot_general"]
    assert found.outs[0].shape == (4, 2) and found.outs[0].axes == (("data",), ("tensor",))


def test_a_loop_is_one_operation_and_an_unrolled_one_its_rounds():
    def function(unroll):
        def step(carry, x):
            return jnp.tanh(carry @ x), carry

        return lambda c, xs: lax.scan(step, c, xs, unroll=unroll)

    loop = read(function(1), (3, 3), (5, 3, 3)).ops
    [scan] = [op for op in loop if op.name == "scan"]
    assert (scan.rounds, scan.carried, scan.sliced) == (5, 1, 1)
    assert [op.name for op in scan.bodies[0].ops] == ["dot_general", "tanh"]
    rounds = read(function(5), (3, 3), (5, 3, 3)).ops
    assert [op.name for op in rounds].count("dot_general") == 5


def test_a_split_sum_talks_once_and_says_over_what():
    def function(x, w):
        return jnp.einsum("bf,df->bd", x, w, out_sharding=jax.P("data", None))

    specs = (jax.P("data", "tensor"), jax.P(None, "tensor"))
    found = read(function, (8, 6), (4, 6), specs=specs, sizes=(2, 2, 2))
    [kernel] = [k for k in kernels.schedule(found, kernels.Compiler()).kernels if k.talk]
    [talk] = kernel.talk
    assert (talk.kind, talk.axes, talk.bytes, talk.ways) == ("all-reduce", ("tensor",), 64, 2)


def test_in_a_shard_map_a_sum_is_each_devices_own_unless_it_names_axes():
    def function(x):
        def local(x):
            return jnp.sum(x[None], axis=(0, 1)), lax.psum(jnp.sum(x, axis=0), "data")

        return jax.shard_map(local, out_specs=(jax.P("data"), jax.P()))(x)

    found = read(function, (8, 6), specs=(jax.P("data", None),), sizes=(2, 2, 2))
    talk = [one for op in found.ops for one in talk_of(op, found.sizes)]
    assert [(one.kind, one.axes, one.bytes) for one in talk] == [("all-reduce", ("data",), 24)]


def step_of(run, devices, platform="cpu"):
    return tool.tracer(platform)(run, devices)[1]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 4, 2)])
def test_collectives_are_those_of_the_compiled_program(sizes):
    run = run_of(sizes)
    step = step_of(run, jax.devices())
    mesh = dict(meshes.make(run.mesh).shape)
    plan = kernels.schedule(program.read(step.jaxpr, mesh), kernels.COMPILERS["cpu"])
    ours: dict[str, int] = {}
    for kernel, times in roofline.each(plan):
        for talk in kernel.talk:
            ours[talk.kind] = ours.get(talk.kind, 0) + times * talk.bytes
    theirs = totals(collectives(step.lower().compile().as_text()))
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert ours.get(kind, 0) == pytest.approx(theirs[kind][1], rel=0.03), kind
    # XLA sums some scalars, and gradients of norms, in another place than the program asks; over
    # two axes in one go or one after the other, which hands out twice the bytes.
    assert 0.65 <= theirs["all-reduce"][1] / ours["all-reduce"] <= 2


def test_matmul_flops_are_six_a_weight_and_attention_computes_its_weights_twice():
    model = ModelConfig(layers=3, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=256)
    run = run_of((1, 1, 1), model=model)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, documents=1))
    step = step_of(run, jax.devices()[:1], "gpu")
    plan = kernels.schedule(program.read(step.jaxpr, dict.fromkeys(SIZES, 1)), kernels.Compiler())
    tokens = run.data.batch * run.data.seq
    flops = {"attention": 0.0, "matmul": 0.0}
    for kernel, times in roofline.each(plan):
        name = "attention" if kernel.name.startswith("attention") else "matmul"
        flops[name] += times * kernel.flops
    assert flops["matmul"] == 6 * matmul_params(model) * tokens
    own = flops_per_token(model, run.data.seq) * tokens - flops["matmul"]
    assert flops["attention"] == pytest.approx(own * 14 / 12)
