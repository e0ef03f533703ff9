"""Models over stages: the values of one device, what they tell, what a stage keeps."""

import dataclasses
import math
import types

import jax
import pytest

import train
from configs.run import Run
from model.config import Arch, Attention, Embeddings, Moe, Norm
from model.families import FAMILIES
from sharding import mesh as meshes
from sharding import pipeline
from sharding.schedule import PipelineConfig, Table
from tests.tolerance import assert_same
from tools import parity
from training import shrunk
from training.second_pass import SecondPass

SIZES = {family.name: next(iter(family.sizes.values())) for family in FAMILIES}
EXPERTS = Arch(
    moe=Moe(experts=4, every=2, mlp=8, balance=0.1, z_loss=0.01),
    attention=Attention(qk_norm="all", windows=(0, 8)),
    embeddings=Embeddings(positions=99),
    norm=Norm(offset=1.0, placement="sandwich"),
)


def run_of(cfg, ways, how, stages, accumulate=1, steps=2):
    """A tiny run."""
    run = Run(model=cfg, pipeline=how)
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, accumulate=accumulate))
    return shrunk.shrunk_run(run, ways, steps, stages=stages)


def metrics_of(run, sizes):
    """(what the first step tells, the held-out loss before it) on a mesh."""
    devices = jax.devices()[: math.prod(sizes.values())]
    run = dataclasses.replace(run, mesh=parity.mesh_of(sizes))
    with jax.set_mesh(meshes.make(run.mesh, devices)):
        program = train.build(run)
        roles = train.transformer.abstract(run.model, run.layout)[2]
        start = shrunk.parameters(run.model, program.state.params, roles)
        where = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
        state = program.begin(jax.device_put(start, where))
        batch = program.place(next(shrunk.batches(run)))
        held_out = jax.device_get(program.evaluation()(state.params, batch))
        _, told = program.compile()(state, batch)
        return jax.device_get(told), held_out


@pytest.mark.slow
def test_a_pattern_with_a_tied_table_over_stages_gives_the_values_of_one_device():
    cfg, sizes = dataclasses.replace(SIZES["gemma2"], remat="dots"), {"data": 2, "stage": 2}
    run = run_of(cfg, 4, PipelineConfig("interleaved", 2), 2, accumulate=4)
    right = parity.refer(run, jax.devices(), parity.CPU_OPTIONS)
    row = parity.compare(run, parity.mesh_of(sizes), jax.devices()[:4], right, parity.CPU_OPTIONS)
    assert row.passed, row.differences


@pytest.mark.slow
def test_routers_over_stages_tell_what_they_tell_on_one_device():
    cfg = dataclasses.replace(SIZES["mixtral"], layers=4, arch=EXPERTS)
    run = run_of(cfg, 2, PipelineConfig("gpipe"), 2, accumulate=3)  # least to compile
    ours, right = (metrics_of(run, sizes) for sizes in ({"stage": 2}, {"data": 1}))
    assert right[0]["router_balance"] > 1 and right[0]["router_load"] > 1
    assert_same(ours, right)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "dots"])
def test_a_stage_keeps_no_weights_for_the_micro_batches_on_their_way(remat):
    cfg = dataclasses.replace(SIZES["llama"], remat=remat)
    run = run_of(cfg, 4, PipelineConfig(), 2, accumulate=4)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="bfloat16", vocab=64))
    mesh = parity.mesh_of({"stage": 2, "fsdp": 2})
    with jax.set_mesh(meshes.make(mesh, jax.devices()[:4])):
        program = train.build(dataclasses.replace(run, mesh=mesh))

        def begin(params, batch):
            cut, layers, ends = train.nnx.merge(program.graph, params).cut()
            rows = train.micro_batches(batch | {"weights": batch["inputs"] * 0.0}, 4)
            table = Table.make(run.pipeline, 2, 4)
            return pipeline._Engine(cut, table, layers, ends, rows, gradients=True).begin()

        state = jax.eval_shape(begin, program.state.params, program.batch())
    weights = [leaf.shape[1:] for leaf in jax.tree.leaves(program.state.params["blocks"])]
    matrices = {wide(shape) for shape in weights if len(shape) > 1}
    matrices |= {shape[1:] for shape in matrices if shape[0] == 2}  # gate and up, each
    assert len(state.stash) > 5 and state.waiting.shape[0] == 1
    for leaf in state.stash:  # slots, layers, then stages of a weight, or stages x rows
        assert leaf.shape[0] == 3
        assert leaf.shape[2:3] != (2,) or wide(leaf.shape[3:]) not in matrices, leaf


def test_a_second_pass_over_stages_sends_to_one_device():
    program = types.SimpleNamespace(jit=lambda step: step)
    with (
        jax.set_mesh(meshes.make(parity.mesh_of({"stage": 2}), jax.devices()[:2])),
        pytest.raises(NotImplementedError, match=r"tools\.replay does on one device"),
    ):
        SecondPass(program).first_bad({}, {})


def wide(shape):
    return tuple(n for n in shape if n > 1)
