"""Collectives of compiled programs: counts and bytes against figures by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding

from costs.collectives import Collective, collectives, totals
from tests.sharding.tiny import mesh_of

# What XLA writes for a GPU: two gathers as one that begins and ends, a loop of three rounds.
GPU = """
HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], bf16[4,6])) -> (s32[], bf16[4,6]) {
  %carry = (s32[], /*index=1*/bf16[4,6]{1,0}) parameter(0)
  %all-gather-start = ((bf16[4,6]{1,0}, f32[2]{0}), (bf16[16,6]{1,0}, f32[8]{0})) all-gather-start(%a, %b), replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-done = (bf16[16,6]{1,0}, f32[8]{0}) all-gather-done(%all-gather-start)
  %reduce-scatter.1 = f32[4,6]{1,0} reduce-scatter(%c), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (x: f32[8,4]) -> f32[] {
  %loop = (s32[], bf16[4,6]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %permute-start = (pred[5]{0}, pred[5]{0}, u32[], u32[]) collective-permute-start(%d), source_target_pairs={{0,1},{1,0}}
  %permute-done = pred[5]{0} collective-permute-done(%permute-start)
  ROOT %all-reduce = f32[] all-reduce(%e), replica_groups=mesh['data'=2,'fsdp'=3,'tensor'=4] {'data','fsdp'}, to_apply=%add
}
"""  # noqa: E501

# What it writes for a TPU: one gather, in each of the fusions that parts of it hide behind.
TPU = """
%part.1 (p: f32[2]) -> f32[8] {
  %g.1 = f32[8]{0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
}

%part.2 (p: f32[2]) -> f32[8] {
  %g.2 = f32[8]{0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
}

%cond (p: (s32[])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %one = f32[8] fusion(%x), kind=kCustom, calls=%part.1
  %two = f32[8] fusion(%one), kind=kCustom, calls=%part.2
}

ENTRY %main (x: s32[]) -> s32[] {
  ROOT %loop = (s32[]) while(%init), condition=%cond, body=%body
}
"""  # noqa: E501

# And a reduce-scatter: an all-reduce in a fusion, of rows padded so that parts overlap.
TPU_SCATTER = """
%all-reduce-scatter.clone.1 (p: bf16[20,6]) -> bf16[6,6] {
  %pad.1 = bf16[24,6]{1,0} pad(%p, %zero), padding=0_4x0_0
  %all-reduce.23 = bf16[24,6]{1,0} all-reduce(%pad.1), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = bf16[6,6]{1,0} dynamic-slice(%all-reduce.23, %i, %zero), dynamic_slice_sizes={6,6}
}

ENTRY %main (x: bf16[20,6]) -> bf16[6,6] {
  ROOT %fusion.1 = bf16[6,6]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone.1
}
"""


def test_a_gpus_text_is_counted_with_its_loops():
    assert collectives(GPU) == [
        Collective("all-gather", ((16, 6), (8,)), 16 * 6 * 2 + 8 * 4, 4, 3),
        Collective("reduce-scatter", ((4, 6),), 2 * 4 * 6 * 4, 2, 3),  # two devices' parts go in
        Collective("collective-permute", ((5,),), 5, 0, 1),
        Collective("all-reduce", ((),), 4, 6, 1),
    ]


def test_a_tpus_gather_in_two_fusions_is_one():
    assert collectives(TPU) == [Collective("all-gather", ((8,),), 32, 4, 5)]


def test_a_tpus_reduce_scatter_in_a_fusion_is_one():
    found = collectives(TPU_SCATTER)
    assert found == [Collective("reduce-scatter", ((6, 6),), 24 * 6 * 2, 4, 1)]


def test_kinds_that_do_not_occur_are_zero():
    assert totals(collectives(GPU)) == {
        "all-gather": (3, 3 * (16 * 6 * 2 + 8 * 4)),
        "reduce-scatter": (3, 3 * 192),
        "all-reduce": (1, 4),
        "collective-permute": (1, 5),
        "all-to-all": (0, 0),
    }
    assert collectives("HloModule nothing") == []


B, D, F, ROUNDS = 8, 16, 32, 5


def talking(x_BD, w_Fd):
    """One collective of each kind over fsdp=4, its size known by hand."""
    w_FD = lax.all_gather(w_Fd, "fsdp", axis=1, tiled=True)
    z_BF = lax.psum(x_BD @ w_FD.T, "tensor")
    z_Bf = lax.psum_scatter(z_BF, "fsdp", scatter_dimension=1, tiled=True)
    z_bF = lax.all_to_all(z_Bf, "fsdp", split_axis=0, concat_axis=1, tiled=True)
    around = [(i, (i + 1) % 4) for i in range(4)]
    return lax.fori_loop(0, ROUNDS, lambda _, z: lax.ppermute(z, "fsdp", around), z_bF)


def test_a_programs_bytes_are_those_by_hand():
    mesh = mesh_of((1, 4, 2))
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=NamedSharding(mesh, jax.P()))
        split = NamedSharding(mesh, jax.P(None, "fsdp"))
        w = jax.ShapeDtypeStruct((F, D), jnp.float32, sharding=split)
        over = jax.shard_map(talking, out_specs=jax.P("fsdp"), check_vma=False)
        text = jax.jit(over).lower(x, w).compile().as_text()
    assert totals(collectives(text)) == {
        "all-gather": (1, 4 * F * D),
        "reduce-scatter": (1, 4 * B * F),  # what goes in
        "all-reduce": (1, 4 * B * F),
        "collective-permute": (ROUNDS, ROUNDS * 4 * B * F // 4),
        "all-to-all": (1, 4 * B * F // 4),
    }


def test_a_group_of_one_talks_with_nobody():
    alone = GPU.replace("replica_groups={{0,1},{2,3}}", "replica_groups={{0},{1},{2},{3}}")
    assert totals(collectives(alone))["reduce-scatter"] == (0, 0)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("replica_groups={}", 0),
    ],
)
def test_a_group_is_read_in_each_way_of_writing_it(text, group):
    program = f"ENTRY %main (x: f32[]) -> f32[] {{\n  %a = f32[3] all-reduce(%x), {text}\n}}"
    assert [one.group for one in collectives(program)] == [group]
