"""The recipes that ship."""

import dataclasses

import jax
import pytest

import train
from configs.load import load
from configs.run import check
from costs import flops
from sharding import mesh as meshes
from tests.meshes import hybrid

LLAMA_3_8B = 8_030_261_248
LLAMA_1B = 1_498_482_688  # with a head of its own
PUBLISHED = {"1B": LLAMA_1B, "8B": LLAMA_3_8B, "1B-80GB": LLAMA_1B, "8B-80GB": LLAMA_3_8B}


@pytest.mark.parametrize(
    ("size", "devices"),
    [("124M", 8), ("350M", 8), ("1B", 8), ("8B", 8), ("1B-80GB", 1), ("8B-80GB", 1)],
)
def test_the_step_of_every_llama_recipe_traces_and_lowers(size, devices):
    run = load(f"configs/llama.py:{size}")
    check(run, devices)
    with jax.set_mesh(meshes.make(run.mesh, jax.devices()[:devices])):
        program = train.build(run)
        lowered = program.jit(train.train_step, donate_argnums=0).lower(
            program.state, program.batch()
        )
    state, _ = lowered.out_info
    assert jax.tree.structure(state) == jax.tree.structure(program.state)
    count = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
    assert count == flops.params(run.model) == PUBLISHED.get(size, count)


def test_the_quickstart_can_be_split_by_four_along_every_axis():
    run = load("configs/quickstart.py")
    for mesh in (hybrid(4, 1, 1), hybrid(1, 4, 1), hybrid(1, 1, 4)):
        check(dataclasses.replace(run, mesh=mesh), devices=4)
    assert run.model.layers % 4 == 0


def test_an_unknown_llama_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'13B' is none of 124M, 350M, 1B, 8B, 1B-80GB, 8B-80GB"):
        load("configs/llama.py:13B")
