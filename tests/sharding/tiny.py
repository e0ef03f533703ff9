"""A run small enough to compile for any mesh of eight devices, and its collectives."""

import math
from collections import Counter

import jax
import numpy as np
from jax.sharding import NamedSharding

import train
from configs.run import Run
from costs.collectives import collectives
from data.config import DataConfig
from model.config import Arch, Attention, Head, ModelConfig, Norm
from optim.config import OptimConfig
from sharding import mesh as meshes
from sharding.layout import Layout
from tests.meshes import hybrid

# Every weight divides by 8 along every axis; biases and norms that split, and that do not.
MODEL = ModelConfig(
    layers=2,
    embed=32,
    heads=16,
    kv_heads=8,
    head_dim=4,
    mlp=48,
    vocab=64,
    dtype="float32",
    arch=Arch(
        norm=Norm("layer", bias=True),
        attention=Attention(qkv_bias=True),
        head=Head(chunk=20),
        mlp_bias=True,
    ),
)
STEPS, ROWS, TOKENS = 20, 8, 12


def run_of(sizes, layout=None, optimizer="adamw", model=MODEL):
    return Run(
        steps=STEPS,
        model=model,
        data=DataConfig(batch=ROWS, seq=TOKENS),
        optim=OptimConfig(name=optimizer, lr=1e-2, warmup=2),
        mesh=hybrid(*sizes),
        layout=layout or Layout(),
    )


def mesh_of(sizes):
    return meshes.make(hybrid(*sizes), jax.devices()[: int(np.prod(sizes))])


def batches():
    """STEPS batches of random tokens, two documents and some padding a row; targets follow."""
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        inputs = draw.integers(0, MODEL.vocab, (ROWS, TOKENS), dtype=np.int32)
        first, end = draw.integers(1, 8, (ROWS, 1)), draw.integers(9, TOKENS + 1, (ROWS, 1))
        place = np.arange(TOKENS, dtype=np.int32)[None]
        yield {
            "inputs": inputs,
            "targets": (inputs + 7) % MODEL.vocab,
            "positions": np.where(place < first, place, place - first).astype(np.int32),
            "segments": ((1 + (place >= first)) * (place < end)).astype(np.int32),
        }


def init(run):
    """The first state of a run on one device, as NumPy arrays."""
    with jax.set_mesh(mesh_of((1, 1, 1))):
        program = train.build(run)
        return jax.device_get(jax.jit(lambda: train.init_state(program, 0))())


def losses(run, start):
    """The losses of STEPS steps on random tokens from the state `start`, and the last state."""
    count = int(np.prod(list(vars(run.mesh).values())))
    with jax.set_mesh(meshes.make(run.mesh, jax.devices()[:count])):
        program = train.build(run)
        where = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        state = jax.device_put(start, where)
        step, found = program.compile(), []
        for batch in batches():
            state, metrics = step(state, program.place(batch))
            found.append(metrics["loss"])
        return np.array([float(loss) for loss in found]), state


def results(text, name):
    """The dims of every result of a program's collectives of one kind."""
    return [dims for one in collectives(text) if one.name == name for dims in one.shapes]


def gathered(program):
    """(dims on a device, dims there when gathered) of each matrix of a layer and of the head."""
    mesh, params = jax.sharding.get_mesh(), program.state.params
    (block,) = params["blocks"].values()
    leads = {"head": 0, "gate_up": 2}  # dims before those of a matrix: layers; gate and up
    parts = {**block["attention"], **block["mlp"], "head": params["head"]["table"]}
    for name, part in parts.items():
        leaf = part["weight"] if isinstance(part, dict) else part
        spec = [None if dim == "fsdp" else dim for dim in leaf.sharding.spec]
        whole = NamedSharding(mesh, jax.P(*spec)).shard_shape(leaf.shape)
        lead = leads.get(name, 1)
        for _ in range(2 if name == "gate_up" else 1):
            yield leaf.sharding.shard_shape(leaf.shape)[lead:], whole[lead:]


def check_reduce_scatters(program, text):
    """A train step has one for each gathered weight, and reduces none of them whole."""

    def counted(shapes):  # compilers transpose and drop ones
        return Counter(tuple(sorted(n for n in shape if n > 1)) for shape in shapes)

    own, whole = map(counted, zip(*gathered(program), strict=True))
    assert own.total() == 6  # qkv, out, gate, up, down; the head's table
    found = counted(results(text, "reduce-scatter"))
    assert not own - found
    tokens = ROWS * TOKENS * MODEL.embed // jax.sharding.get_mesh().size  # apart between blocks
    assert {math.prod(shape) for shape in found - own} <= {tokens}
    assert not counted(results(text, "all-reduce")).keys() & whole.keys()
