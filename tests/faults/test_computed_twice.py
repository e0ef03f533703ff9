"""A step that gives other bits when it is computed again stops the run and names the devices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from configs.run import GuardConfig, Run
from sharding import mesh as meshes
from sharding.digest import differing, digests, odd_copies, probe
from sharding.mesh import MeshConfig
from sharding.offload import HOST
from tests.faults.often import SEED, nightly, sometimes, times
from training import twice
from training.twice import Kept

QUICK = ("--config.eval.every=0", "--config.eval.bytes=1", "--config.sample.tokens=0")
EVERY_STEP = (
    "--config.guard.twice=1", "--config.checkpoint.every=0", "--config.log.every=100",
    f"--config.seed={SEED}",
)  # fmt: skip


def flipped(a: jax.Array, device: int, at: int, bit: int) -> jax.Array:
    """`a` with another bit in what one device holds of it."""
    kept = Kept.of(a)
    numbers = [shard.device.id for shard in a.addressable_shards]
    part, _ = kept.parts[numbers.index(device)]
    part.reshape(-1).view(np.uint8)[at] ^= 1 << bit
    return kept.array()


@pytest.fixture(scope="module")
def mesh():
    return meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def tree(mesh):
    """Arrays of several kinds that lie in several ways."""
    draw = np.random.default_rng(SEED)
    made = {
        "split": (draw.standard_normal((8, 12), np.float32), jax.P("fsdp", "tensor")),
        "half": (draw.standard_normal((8, 6)).astype(jnp.bfloat16), jax.P("fsdp")),
        "copies": (draw.standard_normal((4, 3), np.float32), jax.P()),
        "number": (np.int32(7), jax.P()),
        "byte": (draw.integers(0, 99, (16,)).astype(np.int8), jax.P(("data", "fsdp"))),
        "truth": (draw.integers(0, 2, (5,)).astype(bool), jax.P()),
    }
    return {name: jax.device_put(a, NamedSharding(mesh, spec)) for name, (a, spec) in made.items()}


def test_any_flipped_bit_of_any_device_is_found_and_its_device_named(mesh, tree):
    draw, right = np.random.default_rng(SEED), digests(tree, mesh)
    assert not differing(right, digests(tree, mesh)).any()
    for _ in range(times(40, 2000)):
        name = draw.choice([name for name in tree if name != "truth"])
        device = int(draw.integers(8))
        size = tree[name].addressable_shards[0].data.nbytes
        other = flipped(tree[name], device, int(draw.integers(size)), int(draw.integers(8)))
        wrong = differing(right, digests({**tree, name: other}, mesh))
        assert [found.id for found in mesh.devices[wrong]] == [device], name


def test_two_changes_that_undo_each_other_in_a_sum_are_found(mesh, tree):
    signs = flipped(flipped(tree["split"], 3, 3, 7), 3, 11, 7)  # two signs
    values = np.asarray(tree["copies"])[::-1]  # the same values in another order
    other = jax.device_put(values, tree["copies"].sharding)
    for changed in ({"split": signs}, {"copies": other}):
        wrong = differing(digests(tree, mesh), digests({**tree, **changed}, mesh))
        assert wrong.any()


def test_of_copies_the_one_that_differs_is_named_and_of_two_both(mesh, tree):
    assert not odd_copies(digests(tree, mesh), mesh).any()
    for name, named in (("copies", [5]), ("half", [5]), ("split", [1, 5]), ("byte", [4, 5])):
        other = digests({**tree, name: flipped(tree[name], 5, 0, 0)}, mesh)
        assert [found.id for found in mesh.devices[odd_copies(other, mesh)]] == named, name


def test_of_devices_that_compute_the_same_by_themselves_the_odd_one_is_named(mesh):
    numbers = probe(mesh, size=16, rounds=3).copy()
    assert numbers.shape == mesh.devices.shape and len(set(numbers.flat)) == 1
    numbers.reshape(-1)[5] ^= 4
    (odd,) = mesh.devices[odd_copies({(): numbers}, mesh)]
    assert odd == mesh.devices.flat[5]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_state_comes_back_from_the_host_bit_by_bit_each_copy_for_itself(
    mesh, tree, backend, monkeypatch
):
    odd = {**tree, "copies": flipped(tree["copies"], 6, 2, 1)}
    odd["hosted"] = jax.device_put(tree["half"], tree["half"].sharding.with_memory_kind(HOST))
    right = digests(odd, mesh)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    kept = twice.keep(odd)
    held = [part for one in jax.tree.leaves(kept) for part, _ in one.parts]
    if backend == "gpu":  # the way there and back is direct, but of what lies there anyway
        assert {part.sharding.memory_kind for part in held if isinstance(part, jax.Array)} == {HOST}
        assert sum(isinstance(part, np.ndarray) for part in held) == mesh.size
    back = jax.tree.map(Kept.array, kept)
    assert not differing(right, digests(back, mesh)).any()
    assert all(back[name].sharding == odd[name].sharding for name in odd)


def test_without_room_in_memory_for_direct_copies_the_state_waits_in_pages(tree, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 68719476736 bytes are the limit")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "block_until_ready", full)
    held = [part for one in jax.tree.leaves(twice.keep(tree)) for part, _ in one.parts]
    assert held and all(isinstance(part, np.ndarray) for part in held)


def test_steps_are_counted_from_0_and_never_backward():
    with pytest.raises(ValueError, match="twice=-1 must be at least 0"):
        Run(guard=GuardConfig(twice=-1))


def test_on_a_gpu_it_needs_the_mode_in_which_bits_are_promised(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    twice.check(Run(deterministic=True, guard=GuardConfig(twice=9)))
    twice.check(Run())
    with pytest.raises(ValueError, match=r"guard\.twice=9 .* --config\.deterministic=true"):
        twice.check(Run(guard=GuardConfig(twice=9)))


# ---- the run ----


def hardware(monkeypatch, harm) -> None:
    """Steps give what `harm(number of the call, state)` makes of the state that they should."""
    compile_ = train.Program.compile

    def spoiled(program):
        right, calls = compile_(program), []

        def step(*args):
            calls.append(1)
            state, metrics = right(*args)
            return harm(len(calls), state), metrics

        return step

    monkeypatch.setattr(train.Program, "compile", spoiled)


def harmed(state, where: str, *devices: int):
    """The state with a bit flipped on each of the devices, in the largest array of a part of it."""
    part = getattr(state, where)
    largest = other = max(jax.tree.leaves(part), key=lambda leaf: leaf.size)
    for device in devices:
        other = flipped(other, device, 9, 4)
    part = jax.tree.map(lambda a: other if a is largest else a, part)
    return dataclasses.replace(state, **{where: part})


@pytest.mark.slow
def test_a_bit_that_flips_in_one_computation_ends_the_run_with_code_6_and_its_device(
    command_line, monkeypatch
):
    """Steps 4 and 8 of 12 are computed twice: calls 4 and 5, 9 and 10."""
    hardware(monkeypatch, lambda n, state: harmed(state, "params", 3) if n == 10 else state)
    ended = command_line(*QUICK, "--config.guard.twice=4")
    assert ended.code == 6, ended.err
    assert re.search(r"(?m)^twice      step 4: the same bits on 8 devices, in \S+ s$", ended.out)
    (told,) = re.findall("error: silent data corruption: .*", ended.err)
    assert "step 8 computed twice gave other bits on device 3 (cpu) of process 0 on " in told
    assert told.count("device ") == 1 and "step 4 was the last with equal bits" in told
    assert "Nothing of the step is saved" in told and "Traceback" not in ended.err
    assert ended.steps_saved() == [4]


@pytest.mark.slow
@pytest.mark.parametrize(("sick", "found"), [((), "no fault"), ((6,), "device 6 (cpu)")])
def test_what_reached_all_devices_is_looked_for_on_each_by_itself(
    command_line, monkeypatch, sick, found
):
    def looked(mesh):
        numbers = np.zeros(mesh.devices.shape, np.uint32)
        for device in sick:
            numbers.reshape(-1)[device] = 1
        return numbers

    monkeypatch.setattr(twice, "probe", looked)
    hardware(monkeypatch, lambda n, s: harmed(s, "params", *range(8)) if n == 10 else s)
    ended = command_line(*QUICK, "--config.guard.twice=4")
    assert ended.code == 6 and "on all 8 devices, so before they shared" in ended.err
    assert f"a short test of each device by itself finds {found}" in ended.err


@pytest.mark.slow
def test_what_is_saved_before_is_good_and_the_same_command_ends_as_if_undisturbed(
    finished, command_line, monkeypatch
):
    with monkeypatch.context() as patch:
        hardware(patch, lambda n, state: harmed(state, "opt_state", 7) if n == 10 else state)
        assert command_line("--config.guard.twice=4").code == 6
    ended = command_line("--config.guard.twice=4")
    assert ended.code == 0, ended.err
    assert ended.state(12) == finished.state(12) and ended.losses() == finished.losses()


@pytest.mark.slow
def test_a_copy_that_went_wrong_between_checks_is_named_too(command_line, monkeypatch):
    hardware(monkeypatch, lambda n, state: harmed(state, "params", 5) if n == 2 else state)
    ended = command_line(*QUICK, "--config.guard.twice=4")
    assert ended.code == 6 and "step 4 left copies that differ on device 5 " in ended.err
    assert "no step was checked before" in ended.err and ended.steps_saved() == []


def unalarmed(out: str, steps: int) -> bool:
    """Whether a run of so many steps, all computed twice, ended without an alarm."""
    return f"step {steps}/{steps} " in out and "twice      step 1: the same bits" in out


@pytest.mark.slow
def test_right_hardware_raises_no_alarm(start, tmp_path):
    steps = times(150, 500)
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    process = start(
        tmp_path / "run", *QUICK, *EVERY_STEP, f"--config.steps={steps}", XLA_FLAGS=flags
    )  # fmt: skip
    code, out, err = process.end(240)
    assert code == 0 and unalarmed(out, steps), err


@pytest.mark.slow
@nightly
def test_two_processes_compare_the_devices_of_both(several):
    first, second = several(2, *QUICK, "--config.guard.twice=4", "--config.mesh.data=2")
    for process, told in ((first, True), (second, False)):
        code, out, err = process.end(240)
        assert code == 0 and ("twice      step 4: the same bits on 2 devices" in out) == told, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "host"),
    sometimes(
        [
            ({"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, ""),
            ({"dcn": 2, "data": 2, "fsdp": 2}, ""),
            ({"data": 4, "fsdp": 2}, "optimizer"),
        ]
    ),
    ids=str,
)
def test_on_other_meshes_and_with_moments_in_host_memory_neither(command_line, sizes, host):
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    mesh += [f"--config.layout.host={host}"]
    ended = command_line(*QUICK, *mesh, *EVERY_STEP, "--config.steps=100")
    assert ended.code == 0 and unalarmed(ended.out, 100), ended.err
