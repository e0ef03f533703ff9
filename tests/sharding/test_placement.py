"""Placement changes, values do not: every mesh gives the losses of one device."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import train
from costs.memory import state_bytes
from model.config import Arch, Attention, Embeddings, Head, Moe, Norm
from sharding.layout import Layout
from tests.sharding.tiny import MODEL, init, losses, mesh_of, run_of
from tests.tolerance import SAME

EIGHT = [sizes for sizes in itertools.product([1, 2, 4, 8], repeat=3) if np.prod(sizes) == 8]
FEWER = [(2, 2, 1), (1, 2, 2), (1, 4, 1), (1, 1, 2)]
TIED = dataclasses.replace(MODEL, arch=dataclasses.replace(MODEL.arch, head=Head(tied=True)))
EXPERTS = dataclasses.replace(
    MODEL,
    layers=3,
    arch=Arch(
        moe=Moe(experts=4, every=2, mlp=8, balance=0.1, z_loss=0.01),
        embeddings=Embeddings(positions=12),
        attention=Attention(qk_norm="all"),
        norm=Norm(offset=1.0, placement="sandwich"),
    ),
)
ENCODER = dataclasses.replace(
    MODEL,
    arch=Arch(
        norm=Norm("layer", bias=True, placement="post"),
        attention=Attention(causal=False, qkv_bias=True, out_bias=True),
        embeddings=Embeddings(positions=12, types=2, norm=True),
        activation="gelu_erf",
        mlp_bias=True,
    ),
)
DEEP = dataclasses.replace(MODEL, layers=3, remat="full", unroll=2)
LAYOUTS = {
    "embed whole": Layout(embed=None),
    "vocab whole": Layout(vocab=None),
    "mlp whole": Layout(mlp=None),
    "heads whole": Layout(heads=None),
    "residual whole": Layout(residual=None),
    "weights over data too": Layout(embed=("data", "fsdp")),
    "vocab over fsdp": Layout(embed=None, vocab=("fsdp", "tensor"), batch="data", heads="fsdp"),
    "rows whole": Layout(batch=None, embed=None),
    "rows over data": Layout(batch="data", embed="data"),
    "all whole": Layout(embed=None, vocab=None, mlp=None, heads=None),
}


@pytest.fixture(scope="module")
def alone():
    """The first state and the losses of one device, by model and optimizer."""
    known = {}

    def alone(model, optimizer):
        if (model, optimizer) not in known:
            run = run_of((1, 1, 1), None, optimizer, model)
            start = init(run)
            known[model, optimizer] = start, losses(run, start)[0]
        return known[model, optimizer]

    return alone


def check(alone, sizes, layout=None, optimizer="adamw", model=MODEL):
    run = run_of(sizes, layout, optimizer, model)
    start, right = alone(model, optimizer)
    ours, state = losses(run, start)
    assert right[0] - right[-1] > 0.5, "a run that learns nothing shows no wrong gradient"
    np.testing.assert_allclose(ours, right, rtol=SAME)
    for path, leaf in jax.tree.leaves_with_path(state.params):
        assert_split(run, path, leaf)
    assert state_bytes(vars(state)) == device_bytes(state)


def assert_split(run, path, leaf):
    """Each device holds the part of a parameter that the layout names, and no more."""
    assert_named(run, path, leaf)
    part = leaf.sharding.shard_shape(leaf.shape)
    assert {shard.data.shape for shard in leaf.addressable_shards} == {part}, path


def assert_named(run, path, leaf):
    """A parameter is split as the layout names it."""
    sizes = vars(run.mesh)
    spec = (*leaf.sharding.spec, *[None] * leaf.ndim)
    axes = [(dim,) if isinstance(dim, str) else dim or () for dim in spec]
    ways = [int(np.prod([sizes[axis] for axis in dim], initial=1)) for dim in axes]
    part = tuple(size // n for size, n in zip(leaf.shape, ways, strict=False))
    assert leaf.sharding.shard_shape(leaf.shape) == part, path
    named = logical(run.layout, path, leaf.ndim)
    wanted = [tuple(axis for axis in dim if sizes[axis] > 1) for dim in named]
    assert wanted == [tuple(dim) for dim in axes[: leaf.ndim]], path


def logical(layout, path, rank):
    """The mesh axes of each dim of a parameter, from its name: what the layout must do."""
    names = [str(entry.key) for entry in path]
    sparse = rank == 5  # a stack of experts
    dims = {
        "positions.table": (None, "embed"),
        "types.table": (None, "embed"),
        "router.weight": (None, "embed"),
        "q_norm.scale": ("heads", None, None),
        "k_norm.scale": ("heads", None, None),
        "table": ("vocab", "embed"),
        "qkv.weight": ("heads", None, None, "embed"),
        "qkv.bias": ("heads", None, None),
        "out.weight": ("embed", "heads", None, None),
        "gate_up.weight": ("experts",) * sparse + (None, "mlp", "embed"),
        "gate_up.bias": (None, "mlp"),
        "up.weight": ("mlp", "embed"),
        "up.bias": ("mlp",),
        "down.weight": ("experts",) * (rank == 4) + ("embed", "mlp"),
    }
    own = dims.get(".".join(names[-2:])) or dims.get(names[-1]) or ()
    axes = [getattr(layout, name) if name else None for name in own]
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    return (*[()] * (rank - len(axes)), *axes)


def device_bytes(state):
    """Bytes on the first device of each part of the state."""
    first = jax.tree.leaves(state)[0].sharding.mesh.devices.flat[0]
    parts = {}
    for name, tree in vars(state).items():
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        parts[name] = sum(shard.data.nbytes for shard in shards if shard.device == first)
    return {name: size for name, size in parts.items() if size}


@pytest.mark.parametrize("model", [MODEL, EXPERTS, ENCODER], ids=["dense", "experts", "encoder"])
def test_each_parameter_lies_as_the_layout_says(model):
    run = run_of((2, 2, 2), model=model)
    with jax.set_mesh(mesh_of((2, 2, 2))):
        params = train.build(run).state.params
    for path, leaf in jax.tree.leaves_with_path(params):
        assert_named(run, path, leaf)


@pytest.mark.slow  # tests/tools/test_parity.py compares one hybrid mesh with one device
@pytest.mark.parametrize("sizes", [*EIGHT, *FEWER])
def test_every_mesh_gives_the_losses_of_one_device(alone, sizes):
    check(alone, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_muon_gives_the_losses_of_one_device(alone, sizes):
    check(alone, sizes, optimizer="muon")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_device(alone, name):
    check(alone, (2, 2, 2), LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [TIED, DEEP, EXPERTS, ENCODER],
    ids=["tied", "unrolled and recomputed", "experts", "encoder"],
)
def test_other_models_give_the_losses_of_one_device(alone, model):
    check(alone, (2, 2, 2), model=model)


def test_eight_ways_hold_an_eighth():
    held = {}
    for sizes in (1, 1, 1), (1, 8, 1), (1, 4, 2):
        with jax.set_mesh(mesh_of(sizes)):
            held[sizes] = state_bytes(vars(train.build(run_of(sizes)).state))["params"]
    D, F, K, J, H = MODEL.embed, MODEL.mlp, MODEL.kv_heads, 4, MODEL.head_dim
    whole = 4 * (2 * D + MODEL.layers * (4 * D + D))  # norms, and the bias of down
    biases = 4 * MODEL.layers * (2 * F + K * J * H)  # split over tensor only
    matrices = held[1, 1, 1] - whole - biases
    assert held[1, 8, 1] == matrices / 8 + biases + whole
    assert held[1, 4, 2] == matrices / 8 + biases / 2 + whole
