"""The engine on a small model of its own: any schedule gives the loss and gradients of a loop."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from costs.collectives import collectives
from model.matmul import einsum
from sharding import mesh as meshes
from sharding import pipeline, stages
from sharding.schedule import PipelineConfig, Table, ideal_bubble
from tests.tolerance import assert_formula, assert_same
from tools.parity import mesh_of

LAYERS, ROWS, TOKENS, D, VOCAB = 12, 4, 3, 8, 5
QUICK = [("1f1b", 1, 2, 3)]
SLOW = [("gpipe", 1, 4, 5), ("interleaved", 3, 2, 4), ("interleaved", 2, 2, 3)]


def cut(flight, batch):
    """A table to begin with, layers x + tanh(w x) that each add to the loss, a squared error."""

    def enter(ends, row):
        hot = jax.nn.one_hot(row["ids"], VOCAB)
        return jnp.einsum("BTV,VD->BTD", hot, ends["table"], out_sharding=batch)

    def stage(layers, x, row):
        def layer(x, w):
            x = x + jnp.tanh(einsum("BTD,ED->BTE", x, w, out=flight)) * row["scale"][..., None]
            return x, jnp.sum(stages.apart(x) ** 2, axis=(1, 2, 3))

        x, more = lax.scan(jax.checkpoint(layer, prevent_cse=False), x, layers)
        return x, 0.01 * jnp.sum(more, axis=0), {"squares": jnp.sum(more, axis=0)}

    def leave(ends, x, row):
        loss = jnp.sum((x * ends["out"][None, None] - row["scale"][..., None]) ** 2)
        return loss, {"error": loss}

    return pipeline.Cut(enter, stage, leave)


def plain(layers, ends, rows):
    """(loss, told) in NumPy's terms, micro-batch by micro-batch."""
    told = {"squares": 0.0, "error": 0.0}
    for ids, scale in zip(rows["ids"], rows["scale"], strict=True):
        x = ends["table"][ids]
        for w in layers:
            x = x + jnp.tanh(jnp.einsum("BTD,ED->BTE", x, w)) * scale[..., None]
            told["squares"] += jnp.sum(x**2)
        told["error"] += jnp.sum((x * ends["out"][None, None] - scale[..., None]) ** 2)
    return told["error"] + 0.01 * told["squares"], told


def drawn(micro_batches):
    """(layers, ends, rows) as NumPy arrays."""
    draw = np.random.default_rng(0)
    layers = draw.normal(size=(LAYERS, D, D)).astype(np.float32) / 3
    ends = {"table": draw.normal(size=(VOCAB, D)), "out": draw.normal(size=D)}
    shape = (micro_batches, ROWS, TOKENS)
    rows = {
        "ids": draw.integers(0, VOCAB, shape, np.int32),
        "scale": draw.uniform(0.5, 1, shape).astype(np.float32),
    }
    return layers, jax.tree.map(np.float32, ends), rows


def staged(how, layers, ends, rows):
    """(loss, told) of the engine, rows over fsdp."""
    batch = jax.P("fsdp", None, None)
    table = Table.make(how, stages.stage_count(), len(rows["ids"]))
    dealt = stages.deal(layers, how.repeats)
    return pipeline.loss(cut(stages.flight_spec(batch), batch), table, dealt, ends, rows)


def mesh(**sizes):
    """A mesh of these sizes, in use."""
    return jax.set_mesh(meshes.make(mesh_of(sizes), jax.devices()[: math.prod(sizes.values())]))


def placed(layers, ends, rows):
    """The same on the mesh in use, layers over stages and rows over fsdp."""
    where = jax.P("stage", None, "fsdp"), jax.P(), jax.P(None, "fsdp")
    return [jax.device_put(a, spec) for a, spec in zip((layers, ends, rows), where, strict=True)]


@pytest.mark.parametrize(
    ("schedule", "repeats", "count", "micro_batches"),
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_any_schedule_gives_the_gradients_of_a_loop_in_the_clocks_of_the_formula(
    schedule, repeats, count, micro_batches
):
    how, drawn_ = PipelineConfig(schedule, repeats), drawn(micro_batches)
    right = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(*drawn_)
    with mesh(stage=count, fsdp=2):
        args = placed(*drawn_)
        twice = jax.value_and_grad(lambda *args: 2 * staged(how, *args)[0], (0, 1))
        step = jax.jit(twice).lower(*args).compile()
        loss, gradients = step(*args)
    assert_same(loss, 2 * right[0][0])
    assert_same(gradients, jax.tree.map(lambda g: 2 * g, right[1]))
    # A layer gathers its weight once forward and once backward: so the gathers count the work.
    did = sum(one.times for one in collectives(step.as_text()) if one.name == "all-gather")
    must = 2 * micro_batches * LAYERS // count
    bubble = Table.make(how, count, micro_batches).bubble()
    assert 1 - must / did == pytest.approx(bubble)
    if repeats == 1 or micro_batches % count == 0:
        assert bubble == pytest.approx(ideal_bubble(count, micro_batches, repeats))


@pytest.mark.slow
def test_without_gradients_only_forwards_run():
    how, drawn_ = PipelineConfig(), drawn(3)
    with mesh(stage=2, fsdp=2):
        args = placed(*drawn_)
        step = jax.jit(functools.partial(staged, how)).lower(*args).compile()
        assert_same(step(*args), jax.jit(plain)(*drawn_))
    did = sum(one.times for one in collectives(step.as_text()) if one.name == "all-gather")
    assert did == (3 + 2 - 1) * LAYERS // 2


@pytest.mark.slow
def test_1f1b_needs_no_more_memory_for_more_micro_batches():
    """Rows of the batch aside; with gpipe all of them wait for the first backward."""

    def needs(schedule, micro_batches):
        with mesh(stage=2, fsdp=2):
            args = placed(*drawn(micro_batches))
            grad = jax.grad(lambda *args: staged(PipelineConfig(schedule), *args)[0], (0, 1))
            compiled = jax.jit(grad).lower(*args).compile()
        rows = sum(a.nbytes for a in args[2].values())
        return compiled.memory_analysis().temp_size_in_bytes - rows

    kept = LAYERS // 2 * ROWS // 2 * TOKENS * D * 4  # what a layer begins with, of each layer
    assert needs("1f1b", 16) - needs("1f1b", 8) < kept
    assert needs("gpipe", 16) - needs("gpipe", 8) > 8 * kept


@pytest.mark.parametrize(("count", "repeats"), [(4, 2), (2, 4), (4, 3), (4, 6)])
def test_layers_are_dealt_to_the_stages_that_work_on_them(count, repeats):
    layers = np.arange(count * repeats * 2)
    with mesh(stage=count):
        deal = jax.jit(functools.partial(stages.deal, repeats=repeats))
        dealt = deal(jax.device_put(layers, jax.P("stage")))
        assert jax.typeof(dealt).sharding.spec == jax.P(None, "stage")
    order = layers.reshape(repeats, count, 2).swapaxes(1, 2).reshape(-1, count)
    assert_formula(dealt, order)
