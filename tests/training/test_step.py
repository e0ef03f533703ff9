"""train_step: in micro-batches, on meshes, with padding, it is the same step."""

import dataclasses

import jax
import numpy as np
import pytest

import train
from configs.run import Run
from data.config import DataConfig
from model.config import Arch, ModelConfig
from optim.config import OptimConfig
from sharding import mesh as meshes
from sharding.mesh import MeshConfig
from tests.tolerance import SAME, assert_same

MODEL = ModelConfig(
    layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32, vocab=64, dtype="float32",
    arch=Arch(activation="relu2"),
)  # fmt: skip
BATCH, SEQ, STEPS = 16, 16, 3
RUN = Run(
    steps=STEPS,
    model=MODEL,
    data=DataConfig(batch=BATCH, seq=SEQ),
    # Momentum and no sign: an update is as exact as its gradient.
    optim=OptimConfig(name="sgd", lr=0.1, schedule="constant"),
)
EVEN, UNEVEN = "even", "uneven"


def batches(kind: str) -> list[dict]:
    """Packed rows; "uneven": of 0 to all tokens, most of them in the last micro-batches."""
    made, rng = [], np.random.default_rng(0)
    for _ in range(STEPS):
        ids = rng.integers(0, MODEL.vocab, (BATCH, SEQ + 1)).astype(np.int32)
        lengths = np.full(BATCH, SEQ)
        if kind == UNEVEN:
            lengths = np.array([0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 3, 1, 16, 16, 9, 16])
        segments = np.where(np.arange(SEQ) < lengths[:, None], 1 + (np.arange(SEQ) >= 8), 0)
        positions = np.broadcast_to(np.arange(SEQ) % 8, (BATCH, SEQ))
        arrays = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}
        made.append(
            {k: np.array(v, np.int32) for k, v in (arrays | {"segments": segments}).items()}
        )
    return made


@pytest.fixture(scope="module")
def trained():
    """`trained(devices, mesh, accumulate, kind)`: (metrics of each step, parameters)."""
    done = {}

    def train_once(devices, mesh, accumulate, kind):
        key = devices, mesh, accumulate
        with jax.set_mesh(meshes.make(mesh, jax.devices()[:devices])):
            if key not in done:
                optim = dataclasses.replace(RUN.optim, accumulate=accumulate)
                program = train.build(dataclasses.replace(RUN, optim=optim, mesh=mesh))
                done[key] = program, program.compile()
            program, step = done[key]
            rng = np.random.default_rng(0)  # init would take as long to compile as the step
            state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.state)
            params = jax.tree.map(
                lambda a: 0.3 * np.float32(rng.standard_normal(a.shape)), state.params
            )
            state = dataclasses.replace(state, params=params)
            state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.state))
            found = []
            for batch in batches(kind):
                state, metrics = step(state, program.place(batch))
                found.append({name: float(value) for name, value in metrics.items()})
        return found, jax.device_get(state.params)

    return train_once


@pytest.mark.parametrize("kind", [EVEN, UNEVEN])
@pytest.mark.parametrize(
    ("devices", "mesh", "accumulate"),
    [
        (1, MeshConfig(), 4),
        pytest.param(8, MeshConfig(data=2, fsdp=2, tensor=2), 4, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_are_the_big_batch(trained, kind, devices, mesh, accumulate):
    wanted, params = trained(1, MeshConfig(), 1, kind)
    found, moved = trained(devices, mesh, accumulate, kind)
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=SAME)
    assert_same(moved, params)
    assert wanted[-1]["loss"] < wanted[0]["loss"]


def test_tokens_count_targets_and_padding_is_none(trained):
    found, _ = trained(1, MeshConfig(), 1, UNEVEN)
    assert [row["tokens"] for row in found] == [64] * STEPS


def test_what_lies_in_the_padding_changes_nothing(trained, monkeypatch):
    wanted, params = trained(1, MeshConfig(), 1, UNEVEN)
    rows = batches(UNEVEN)
    for batch in rows:
        empty = batch["segments"] == 0
        batch["inputs"][empty], batch["targets"][empty] = 7, 9
    monkeypatch.setattr(f"{__name__}.batches", lambda _: rows)
    found, moved = trained(1, MeshConfig(), 1, UNEVEN)
    assert [row["loss"] for row in found] == [row["loss"] for row in wanted]
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_micro_batches_leave_rows_on_their_devices():
    """Parts are taken of every device's rows, so that no row moves."""
    rows = np.arange(BATCH * SEQ, dtype=np.int32).reshape(BATCH, SEQ)
    mesh = meshes.make(MeshConfig(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        where = jax.sharding.NamedSharding(mesh, jax.P("data", None))
        placed = {"inputs": jax.device_put(rows, where)}
        split = jax.jit(lambda batch: train.micro_batches(batch, 4))
        text = split.lower(placed).compile().as_text()
        parts = split(placed)["inputs"]
    assert parts.shape == (4, BATCH // 4, SEQ)
    assert sorted(np.array(parts)[:, :, 0].ravel()) == sorted(rows[:, 0])
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
