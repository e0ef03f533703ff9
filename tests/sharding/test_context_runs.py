"""Runs whose rows are split along their tokens: the same values, and what devices say for it."""

import dataclasses
import functools
import math

import jax
import pytest

import train
from configs.run import Run, check_split
from model.families import FAMILIES
from sharding import mesh as meshes
from sharding.layout import Layout
from tools import parity
from training import shrunk

SIZES = {family.name: next(iter(family.sizes.values())) for family in FAMILIES}


def run_of(family, ways, steps=2, *, head="", remat="none", accumulate=1, layout=None):
    """A tiny run of a family, with another head if one is named."""
    cfg, run = dataclasses.replace(SIZES[family], remat=remat), Run()
    if head:
        arch = dataclasses.replace(cfg.arch, head=dataclasses.replace(cfg.arch.head, kind=head))
        cfg = dataclasses.replace(cfg, arch=arch)
    optim = dataclasses.replace(run.optim, accumulate=accumulate)
    run = dataclasses.replace(run, model=cfg, optim=optim, layout=layout or Layout())
    return shrunk.shrunk_run(run, ways, steps)


@pytest.fixture(scope="module")
def alone():
    """`alone(run)`: what one device makes of it, once."""
    return functools.cache(lambda run: parity.refer(run, jax.devices(), parity.CPU_OPTIONS))


def compared(alone, run, **sizes):
    """The run's row of the parity table on a mesh."""
    devices = jax.devices()[: math.prod(sizes.values())]
    row = parity.compare(run, parity.mesh_of(sizes), devices, alone(run), parity.CPU_OPTIONS)
    assert row.passed, row.differences
    return row


def passed_on(run, ways):
    """(how often, bytes that a device gets) arrays go from device to device in a step."""
    tokens, hops = run.data.batch * run.data.seq // ways, run.model.layers * (ways - 1)
    keys = 2 * run.model.kv_heads * run.model.head_dim * 4  # of a token its keys and values
    return hops * 3, hops * tokens * 3 * keys  # forward; backward, with their gradients


@pytest.mark.slow  # tests/tools/test_parity.py compares one such mesh with one device
def test_a_run_over_its_tokens_gives_the_values_of_one_device_and_says_no_more_than_it_must(alone):
    run = run_of("llama", 2)
    talk = compared(alone, run, context=2).talk["cpu"]
    assert talk["collective-permute"] == passed_on(run, 2)
    segments = run.data.batch * run.data.seq * 4
    assert talk["all-gather"] == (1, segments), "once for all layers; of rotations none"
    assert talk["reduce-scatter"] == talk["all-to-all"] == (0, 0)


@pytest.mark.parametrize(
    ("remat", "rounds"), [("none", 2), ("dots", 2), ("attention", 2), ("full", 3)]
)
def test_no_ring_goes_round_again_for_what_remat_keeps(remat, rounds):
    run = run_of("llama", 2, remat=remat)
    run = dataclasses.replace(run, mesh=parity.mesh_of({"context": 2}))
    with jax.set_mesh(meshes.make(run.mesh, jax.devices()[:2])):
        program = train.build(run)
        lowered = program.jit(train.train_step).lower(program.state, program.batch())
    assert lowered.as_text().count("collective_permute") == rounds + 1  # of gradients


def test_rows_that_do_not_divide_into_chunks_are_refused():
    run = run_of("llama", 2)
    data = dataclasses.replace(run.data, seq=18)
    run = dataclasses.replace(run, data=data, mesh=parity.mesh_of({"context": 2}))
    with pytest.raises(ValueError) as caught:
        check_split(run, 2)
    assert str(caught.value) == (
        "data: seq=18 does not divide over context=2 x chunks=2: it must be a multiple of 4"
    )
    both_ways = dataclasses.replace(run, model=SIZES["bert"])
    check_split(dataclasses.replace(both_ways, layout=Layout(vocab=None)), 2)


RUNS = {
    "grouped heads": ("llama", {}, {"context": 4}),
    "rows too": ("llama", {}, {"data": 2, "context": 2}),
    "heads too": ("llama", {}, {"context": 2, "tensor": 2}),
    "windows": ("mistral", {}, {"fsdp": 2, "context": 2}),
    "experts": ("mixtral", {}, {"context": 2, "tensor": 2}),
    "not causal": ("bert", {"head": "classifier"}, {"fsdp": 2, "context": 2}),
    "outputs in order": ("gpt2", {"head": "none"}, {"context": 4}),
    "weights over context": (
        "llama",
        {"layout": Layout(embed=("fsdp", "context")), "accumulate": 2, "remat": "attention"},
        {"fsdp": 2, "context": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_model_gives_the_values_of_one_device(alone, name):
    family, how, sizes = RUNS[name]
    row = compared(alone, run_of(family, 4, **how), **sizes)
    if name == "grouped heads":
        assert row.talk["cpu"]["collective-permute"] == passed_on(run_of(family, 4), 4)
    if name == "weights over context":
        cfg = run_of(family, 4).model
        assert row.leaves["embedding.table"] == cfg.vocab * cfg.embed * 4 // 4
