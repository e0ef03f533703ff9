"""fp8 with delayed scaling in whole steps: what is remembered, when, and that it learns."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import train
from configs.run import check_split
from model.precision import Precision
from optim import histories
from sharding import mesh as meshes
from sharding.mesh import MeshConfig
from tests.sharding.tiny import MODEL, batches, init, losses, run_of
from tests.tolerance import assert_same
from training import origin


def rounding(name):
    return run_of((1, 1, 1), model=dataclasses.replace(MODEL, precision=Precision.by_name(name)))


DELAYED = rounding("fp8_delayed")


@pytest.fixture(scope="module")
def start():
    return init(DELAYED)


@pytest.fixture(scope="module")
def compiled():
    """(the program of a run, its step), each compiled once; called where its mesh is set."""
    made = {}

    def get(run):
        if run not in made:
            program = train.build(run)
            made[run] = program, program.compile()
        return made[run]

    return get


def after(compiled, run, params, steps=1):
    """[state after each step], on the host, from these parameters."""
    count = int(np.prod(list(vars(run.mesh).values())))
    with jax.set_mesh(meshes.make(run.mesh, jax.devices()[:count])):
        program, step = compiled(run)
        where = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
        state, found = program.begin(jax.device_put(params, where)), []
        for batch, _ in zip(batches(), range(steps), strict=False):
            state, metrics = step(state, program.place(batch))
            found.append(jax.device_get((state, metrics)))
        return found


def remembered(params):
    """{layer's name: [L, 3, N]}."""
    block = params["blocks"][0]
    each = block["attention"] | block["mlp"]
    return {name: each[name]["history"] for name in ("qkv", "out", "gate_up", "down")}


@pytest.mark.slow
def test_histories_hold_what_the_last_steps_saw_and_skipped_steps_are_not_among_them(
    compiled, start
):
    (first, _), (second, told) = after(compiled, DELAYED, start.params, steps=2)
    assert told["skipped"] == 0
    for name, own in remembered(second.params).items():
        group = "attention" if name in ("qkv", "out") else "mlp"
        for at, params in ((1, start.params), (0, first.params)):  # the newest first
            w = params["blocks"][0][group][name]["weight"]
            largest = np.abs(w).max(axis=tuple(range(1, w.ndim)))
            np.testing.assert_array_equal(own[:, 1, at], largest)
        assert (own[..., :2] > 0).all() and (own[..., 2:] == 0).all()
    broken = jax.tree.map(np.copy, second.params)
    broken["head"]["table"][3, 5] = np.nan
    ((state, told),) = after(compiled, DELAYED, broken)
    assert told["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, remembered(state.params), remembered(broken))


@pytest.mark.slow
def test_micro_batches_and_devices_remember_what_the_whole_batch_has_shown(compiled, start):
    ((wanted, _),) = after(compiled, DELAYED, start.params)
    parts = dataclasses.replace(DELAYED, optim=dataclasses.replace(DELAYED.optim, accumulate=2))
    meshed = dataclasses.replace(DELAYED, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    zero1 = dataclasses.replace(
        DELAYED,
        mesh=MeshConfig(data=2, context=2),
        layout=dataclasses.replace(DELAYED.layout, optimizer="data"),
    )
    for run in (parts, meshed, zero1):
        ((found, _),) = after(compiled, run, start.params)
        assert_same(remembered(found.params), remembered(wanted.params))


@pytest.mark.slow
def test_it_learns_as_without_rounding_and_as_with_current_scales(start):
    bare = dataclasses.replace(start, params=histories.weights(start.params))
    exact, current = (losses(rounding(name), bare)[0] for name in ("bf16", "fp8"))
    delayed, _ = losses(DELAYED, start)
    learned = exact[0] - exact[-1]
    assert learned > 1
    ours, theirs = (np.sqrt(np.mean((one - exact) ** 2)) for one in (delayed, current))
    assert 0 < ours < 1.25 * theirs < 0.05 * learned


def test_stages_are_refused():
    run = dataclasses.replace(DELAYED, mesh=MeshConfig(stage=2))
    with pytest.raises(ValueError, match=r"scaling=delayed is not built with mesh\.stage=2"):
        check_split(run, 2)


def test_the_weights_of_another_model_are_trained_in_the_runs_precision():
    theirs = SimpleNamespace(cfg=dataclasses.replace(MODEL, layers=3), name="theirs")
    model = origin._of(DELAYED, theirs).model
    assert (model.layers, model.precision.name) == (3, "fp8_delayed")
