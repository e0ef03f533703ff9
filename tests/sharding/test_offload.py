"""Host memory changes no value. Simulated CPU devices have a "pinned_host" of their own."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from configs.run import check_split
from model.config import Arch, Moe
from model.layers import Role
from model.remat import REMAT
from optim.config import OptimConfig
from optim.update import make_update
from sharding import offload
from sharding.layout import ACTIVATIONS, HOSTED, Layout
from sharding.mesh import MeshConfig
from tests.marks import mostly_slow
from tests.sharding import tiny
from tests.sharding.tiny import MODEL, init, mesh_of, run_of
from tests.tolerance import SAME, assert_same

ONE = (1, 1, 1)
ALL = ("optimizer", "embedding", "input", "attention")
SHAPES = {"blocks": {"w": (3, 4, 5), "b": (3, 4)}, "embedding": {"table": (6, 4)}, "norm": (4,)}
ROLES = {
    "blocks": {"w": Role("matrix", 1, 1), "b": Role()},
    "embedding": {"table": Role("embedding")},
    "norm": Role(),
}


def hosted(tree):
    """The names of the arrays in host memory."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree.leaves_with_path(tree)
        if leaf.sharding.memory_kind == offload.HOST
    }


# ---- the update ----------------------------------------------------------------------------------


def drawn(seed):
    """Three layers and more, on one device."""
    draw, where = np.random.default_rng(seed), NamedSharding(jax.sharding.get_mesh(), jax.P())

    def leaf(shape):
        return jax.device_put(np.float32(draw.normal(size=shape)), where)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def steps(name, *, by_layer):
    """Parameters and state after two steps and one that is not good, which changes nothing."""
    cfg = OptimConfig(name=name, lr=0.1, warmup=1, clip=0.5)
    update, params = make_update(cfg, 9, ROLES, 0, by_layer=by_layer), drawn(0)
    state, step = update.init(params), jax.jit(update.step)
    if by_layer:
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), (params, state)
        )
        _, home = offload.place(("optimizer",), *shapes)
        state = offload.filled(offload.without(state, home), home)
        assert len(hosted(state)) >= len(jax.tree.leaves(params))
    for number, good in enumerate((True, True, False)):
        before = jax.device_get((params, state))
        params, state = step(number, good, drawn(1 + number), state, params)
    after = jax.device_get((params, state))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    return after


@pytest.mark.parametrize("name", mostly_slow(("adamw", "sgd", "lion", "muon"), "adamw"))
def test_the_update_of_a_layer_at_a_time_is_that_of_all_at_once(name):
    with jax.set_mesh(mesh_of(ONE)):
        there, here = steps(name, by_layer=True), steps(name, by_layer=False)
    assert jax.tree.structure(there) == jax.tree.structure(here)
    jax.tree.map(assert_same, there, here)


def test_the_moments_come_to_the_device_one_layer_at_a_time():
    with jax.set_mesh(mesh_of(ONE)):
        program = train.build(run_of(ONE, Layout(host=("optimizer",))))
        made = program.jit(train.train_step).trace(program.state, program.batch())
    fetched = [
        var.aval.shape
        for eqn in equations(made.jaxpr)
        if eqn.primitive.name == "device_put" and jax.memory.Space.Device in eqn.params["devices"]
        for var in eqn.outvars
    ]
    params = program.state.params
    layers = [leaf.shape[1:] for leaf in jax.tree.leaves(params["blocks"])]
    rest = [params[name] for name in params if name != "blocks"]
    wanted = 2 * (layers + [leaf.shape for leaf in jax.tree.leaves(rest)])
    assert sorted(fetched) == sorted(wanted)


def equations(jaxpr):
    """Of a jaxpr, with those inside its loops and calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# ---- the run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right():
    """The first state on one device, and the losses from there with nothing on the host."""
    alone = run_of(ONE)
    start = init(alone)
    return start, tiny.losses(alone, start)[0]


def check_losses(right, run):
    start, losses = right
    assert losses[0] - losses[-1] > 0.1, "a run that learns nothing shows no wrong update"
    ours, state = tiny.losses(run, start)
    np.testing.assert_allclose(ours, losses, rtol=SAME)
    return state


@pytest.mark.slow
def test_a_mesh_that_keeps_all_it_can_on_the_host_has_the_losses_of_one_device(right):
    state = check_losses(right, run_of((2, 2, 2), Layout(host=ALL)))
    assert hosted(state.params) == {"embedding.table"}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert len(hosted(state.opt_state)) == len(moments)


@pytest.mark.slow
def test_activations_that_remat_would_make_again_may_wait_on_the_host(right):
    model = dataclasses.replace(MODEL, remat="full")
    check_losses(right, run_of((1, 2, 2), Layout(host=ACTIVATIONS), model=model))


@pytest.mark.slow
def test_muon_of_experts_on_several_devices_does_as_well():
    model = dataclasses.replace(MODEL, arch=Arch(moe=Moe(experts=4, active=2, mlp=24)))
    alone = run_of(ONE, None, "muon", model)
    start = init(alone)
    run = dataclasses.replace(
        run_of(ONE, Layout(host=ALL), "muon", model), mesh=MeshConfig(data=1, fsdp=2, expert=2)
    )
    check_losses((start, tiny.losses(alone, start)[0]), run)


@pytest.mark.slow
def test_a_run_begins_alike_wherever_its_moments_lie(right):
    with jax.set_mesh(mesh_of(ONE)):
        state = train.build(run_of(ONE, Layout(host=ALL))).fresh()
    assert hosted(state.opt_state)
    jax.tree.map(assert_same, jax.device_get(state), right[0])


# ---- what is refused -----------------------------------------------------------------------------


def test_the_names_for_activations_are_those_that_remat_knows_and_the_input():
    assert set(ACTIVATIONS) == {"input", *REMAT["dots"]}
    assert set(HOSTED) == {"optimizer", "embedding", *ACTIVATIONS}


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="host='params' is none of optimizer, embedding, input"):
        Layout(host=("params",))


def test_what_does_not_go_with_host_memory_is_refused():
    layout = Layout(host=("optimizer",), optimizer="data")
    with pytest.raises(ValueError, match="optimizer=data splits its layers"):
        check_split(run_of((2, 1, 1), layout), 2)
    check_split(run_of((1, 2, 1), layout), 2)
    run = run_of(ONE, Layout(host=("optimizer",)), "adafactor")
    with pytest.raises(ValueError, match=r"host=optimizer .* adafactor scales all layers"):
        check_split(run, 1)
    small = dataclasses.replace(run, optim=OptimConfig(moments="int8", block=8))
    with pytest.raises(ValueError, match=r"host=optimizer .* optim\.moments=int8 are updated in"):
        check_split(small, 1)
    run = run_of(ONE, Layout(host=("input",)))
    check_split(run, 1)
    unrolled = dataclasses.replace(run, model=dataclasses.replace(MODEL, unroll=2))
    with pytest.raises(ValueError, match=r"host=input .* model\.unroll=2 does several at once"):
        check_split(unrolled, 1)
    run = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, stage=2))
    with pytest.raises(ValueError, match=r"host=input is not built with mesh\.stage=2"):
        check_split(run, 2)


def test_a_device_without_such_memory_is_refused_by_name():
    memories = [SimpleNamespace(kind="unpinned_host")]
    device = SimpleNamespace(
        platform="metal", id=3, device_kind="M9", addressable_memories=lambda: memories
    )
    offload.check((), [device])
    with pytest.raises(
        ValueError, match=r"'pinned_host', which metal device 3 \(M9\) .* only unpinned_host"
    ):
        offload.check(("input",), [device])
    offload.check(HOSTED, jax.devices())
