"""Checkpoints: bytes in, the same bytes out, on any mesh; and what is said when that cannot be."""

import dataclasses
import math
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import NamedSharding

import train
from checkpoint import store
from checkpoint.store import Saved, Store, locate
from configs.run import Run
from data.config import DataConfig
from model.config import ModelConfig
from model.precision import Precision
from optim import histories
from optim.config import OptimConfig
from sharding import mesh as meshes
from sharding.mesh import MeshConfig

NOTE, TOKENIZER = {"run": {"steps": 3}, "tokens": 2**40}, {"meshlm": "bytes"}
SMALL = ModelConfig(layers=2, embed=16, heads=4, kv_heads=4, head_dim=4, mlp=16, vocab=64)
OTHER_BITS = 0x7FC1  # a NaN that arithmetic would not give


def mesh_of(devices: int, **sizes: int) -> jax.sharding.Mesh:
    return meshes.make(MeshConfig(**sizes), jax.devices()[:devices])


def shapes(mesh, *, model=SMALL, optim="adamw"):
    """The state of a run, without arrays."""
    data = DataConfig(batch=8, seq=16)
    with jax.set_mesh(mesh):
        return train.build(Run(model=model, data=data, optim=OptimConfig(name=optim))).state


def filled(abstract, seed=0):
    """The state with random numbers, made on the host."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        array = rng.standard_normal(leaf.shape) * 100
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract)


def saved(path, state, step=1, **kwargs):
    made = Store(path, **kwargs)
    made.save(step, state, NOTE, TOKENIZER)
    made.wait()
    made.close()
    return Saved.open(path)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """(the state that was saved from 8 devices, its checkpoint)."""
    state = filled(shapes(mesh_of(8, data=2, fsdp=2, tensor=2)))
    return state, saved(tmp_path_factory.mktemp("eight"), state, step=7)


@pytest.mark.parametrize("optim", ["adamw", "muon", "adafactor"])
def test_a_train_state_comes_back_bit_for_bit(tmp_path, optim):
    state = filled(shapes(mesh_of(8, fsdp=4), optim=optim))
    found = saved(tmp_path, state).restore(shapes(mesh_of(8, fsdp=4), optim=optim))
    assert_same(found, state)
    assert type(found.opt_state) is type(state.opt_state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding


def test_a_state_moves_from_mesh_to_mesh_bit_for_bit(tmp_path, on_eight):
    state, here = on_eight
    for i, (devices, sizes) in enumerate(
        [(4, {"fsdp": 4}), (2, {"tensor": 2}), (1, {}), (8, {"data": 1, "fsdp": 8})]
    ):
        abstract = shapes(mesh_of(devices, **sizes))
        found = here.restore(abstract)
        assert_same(found, state)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
            assert a.sharding == b.sharding
        here = saved(tmp_path / str(i), found)
    assert_same(here.restore(shapes(mesh_of(8, data=2, fsdp=2, tensor=2))), state)


def test_histories_come_back_and_where_one_side_has_none_they_begin_anew_or_are_left(tmp_path):
    mesh, precision = mesh_of(8, fsdp=2, tensor=2), Precision.by_name("fp8_delayed")
    plain, delayed = (
        shapes(mesh),
        shapes(mesh, model=dataclasses.replace(SMALL, precision=precision)),
    )
    state = filled(delayed)
    with_history = saved(tmp_path / "with", state)
    assert_same(with_history.restore(delayed), state)
    left = with_history.restore(plain)
    assert_same(left.params, histories.weights(state.params))
    begun = saved(tmp_path / "without", left).restore(delayed)
    assert_same(histories.weights(begun.params), left.params)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state.params)
    fresh = histories.joined(left.params, zeros)
    assert_same(begun.params, fresh)
    own = begun.params["blocks"][0]["mlp"]["down"]["history"]
    assert own.sharding == delayed.params["blocks"][0]["mlp"]["down"]["history"].sharding


def test_bfloat16_and_unusual_bits_survive(tmp_path):
    model = dataclasses.replace(SMALL, param_dtype="bfloat16")
    mesh = mesh_of(8, fsdp=2, tensor=2)
    state = filled(shapes(mesh, model=model))
    bits = np.array([OTHER_BITS, 0xFF80, 0x8000, 0x0001, *[0] * 12], np.uint16)
    scale = jax.device_put(bits.view(jnp.bfloat16), NamedSharding(mesh, jax.P()))
    state.params["norm"]["scale"] = scale
    found = saved(tmp_path, state).restore(shapes(mesh, model=model))
    assert found.params["norm"]["scale"].dtype == jnp.bfloat16
    assert_same(found, state)


def test_a_parameter_of_two_arrays_comes_back(tmp_path):
    whole = NamedSharding(mesh_of(8), jax.P())
    values, scales = np.arange(-6, 6, dtype=np.int8).reshape(3, 4), np.float32([[1], [2], [3]])
    params = {"w": {"values": values, "scales": scales}}
    state = {"params": jax.device_put(params, whole), "opt_state": optax.EmptyState()}
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    assert_same(saved(tmp_path, state).restore(abstract), state)


def test_the_note_and_the_tokenizer_come_back(on_eight):
    _, here = on_eight
    assert here.json("run") == NOTE and here.json("tokenizer") == TOKENIZER


def test_saving_does_not_wait_for_the_disk_and_keeps_what_the_state_was(tmp_path):
    whole = NamedSharding(mesh_of(8), jax.P())
    state = {"a": jax.device_put(np.ones((512, 512), np.float32), whole)}
    made = Store(tmp_path)
    made.save(1, state, NOTE, TOKENIZER)
    state["a"].delete()  # as donation does
    made.wait()
    made.close()
    abstract = {"a": jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=whole)}
    assert float(Saved.open(tmp_path).restore(abstract)["a"].sum()) == 512 * 512


def test_a_save_on_many_devices_compiles_nothing(tmp_path, on_eight):
    state, _ = on_eight
    compiled = []

    def note(event, _, **kwargs):
        if "backend_compile" in event:
            compiled.append((event, kwargs))

    jax.monitoring.register_event_duration_secs_listener(note)
    jax.clear_caches()
    try:
        saved(tmp_path, state)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


# ---- what stays on disk ----


def tiny(step: int) -> dict:
    return {"a": jax.device_put(np.full((4,), step, np.float32), jax.devices()[0])}


def steps_in(path) -> list[int]:
    return sorted(int(folder.name) for folder in path.iterdir() if folder.name.isdecimal())


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(2, 0, [50, 60]), (1, 0, [60]), (2, 30, [30, 50, 60]), (1, 20, [20, 40, 60])],
)
def test_the_newest_stay_and_every_nth(tmp_path, keep, keep_every, left):
    made = Store(tmp_path, keep=keep, keep_every=keep_every)
    assert made.latest() is None
    for step in range(10, 70, 10):
        made.save(step, tiny(step), NOTE, TOKENIZER)
    made.wait()
    assert made.latest() == 60
    made.close()
    assert steps_in(tmp_path) == left
    assert Saved.open(tmp_path).step == 60


def test_a_store_goes_on_where_another_stopped(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, tiny(step), step, keep=2)
    assert steps_in(tmp_path) == [2, 3]


def test_a_half_written_save_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    saved(tmp_path, tiny(5), 5)
    torn = tmp_path / "9.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert Saved.open(tmp_path).step == 5
    made = Store(tmp_path)
    assert made.latest() == 5
    made.save(6, tiny(6), NOTE, TOKENIZER)
    made.wait()
    made.close()
    assert not torn.exists() and steps_in(tmp_path) == [5, 6]


def test_no_thread_outlives_a_closed_store(tmp_path):
    saved(tmp_path / "first", tiny(1))  # what the library starts for good
    before = threading.active_count()
    saved(tmp_path / "second", tiny(1))
    assert threading.active_count() <= before


def chunk_on_disk(here: Saved, name: str) -> tuple[int, ...]:
    """The chunk of one array, as its own metadata says."""
    base = f"file://{here.path}/{here.step}/state/"
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    opened = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    return opened.chunk_layout.read_chunk.shape


def test_a_stacked_array_is_stored_one_layer_a_chunk(tmp_path):
    mesh = mesh_of(8, data=4, fsdp=2)
    whole, split = (NamedSharding(mesh, jax.P(None, axis)) for axis in (None, "fsdp"))
    block = {
        "large": jax.device_put(np.ones((6, 512, 1024), np.float32), whole),  # 2 MiB a layer
        "split": jax.device_put(np.ones((6, 1024, 1024), np.float32), split),  # 2 MiB a device
        "small": jax.device_put(np.ones((6, 256, 256), np.float32), whole),  # 256 KiB a layer
    }
    here = saved(tmp_path, {"params": {"blocks": {0: block}}, "rest": block["large"][0]})
    assert chunk_on_disk(here, "params.blocks.0.large") == (1, 512, 1024)
    assert chunk_on_disk(here, "params.blocks.0.split") == (1, 512, 1024)
    layers, *rest = chunk_on_disk(here, "params.blocks.0.small")
    assert rest == [256, 256] and 1 <= layers <= 4  # chunks of 1 MiB at most
    assert chunk_on_disk(here, "rest") == (512, 1024)


# ---- what is refused ----


def test_another_model_is_refused_with_the_array_and_both_shapes(on_eight):
    _, here = on_eight
    wider = dataclasses.replace(SMALL, mlp=32)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.\w+\.weight") as caught:
        here.restore(shapes(mesh_of(8), model=wider))
    assert "16" in str(caught.value) and "32" in str(caught.value)
    deeper = dataclasses.replace(SMALL, layers=3)
    with pytest.raises(ValueError, match=r"shape \(2, .*\), the run's \(3, "):
        here.restore(shapes(mesh_of(8), model=deeper))


def test_another_optimizer_is_refused_with_the_arrays(on_eight):
    _, here = on_eight
    with pytest.raises(ValueError, match=r"arrays that the run lacks: opt_state.*optimizer differ"):
        here.restore(shapes(mesh_of(8), optim="sgd"))


def test_more_parameters_than_were_saved_are_refused(on_eight):
    _, here = on_eight
    arch = dataclasses.replace(
        SMALL.arch, attention=dataclasses.replace(SMALL.arch.attention, qk_norm="head")
    )
    with pytest.raises(ValueError, match=r"lacks \d+ arrays that the run has: .*k_norm"):
        here.restore(shapes(mesh_of(8), model=dataclasses.replace(SMALL, arch=arch)))


def test_a_run_is_located_by_its_folder_its_checkpoints_folder_and_a_step(tmp_path, monkeypatch):
    run = tmp_path / "run"
    made = Store(run / "checkpoints", keep=3)
    for step in (3, 20, 100):
        made.save(step, tiny(step), NOTE, TOKENIZER)
    made.wait()
    made.close()
    folder = run / "checkpoints"
    for name, step in ((run, 100), (folder, 100), (f"{run}@20", 20), (f"{folder}@3", 3)):
        assert locate(str(name)) == Saved(folder, step)
    monkeypatch.chdir(tmp_path)
    assert locate("run@20") == Saved(folder, 20)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("{run}@21", FileNotFoundError, "holds no step 21, but 20"),
        ("{run}@", ValueError, "'' is no step; .*@1000, say"),
        ("{run}@latest", ValueError, "'latest' is no step"),
        ("{run}@-1", ValueError, "'-1' is no step"),
        ("{run}@2@3", FileNotFoundError, "run@2 is no folder"),
        ("{run}/absent", FileNotFoundError, "absent is no folder"),
        ("{empty}", FileNotFoundError, "holds no checkpoint"),
        ("{empty}@3", FileNotFoundError, "holds no checkpoint"),
    ],
)
def test_what_cannot_be_located_is_said(tmp_path, name, error, message):
    saved(tmp_path / "run" / "checkpoints", tiny(20), 20)
    (tmp_path / "empty").mkdir()
    name = name.format(run=tmp_path / "run", empty=tmp_path / "empty")
    with pytest.raises(error, match=message):
        locate(name)


def test_a_folder_with_an_at_sign_can_be_named(tmp_path):
    run = tmp_path / "me@home"
    saved(run / "checkpoints", tiny(20), 20)
    assert locate(f"{run}@20").step == 20
    assert locate(str(run)).step == 20


def test_names_of_arrays_are_dotted_paths():
    names = store.flatten({"a": [jnp.ones(1), {"b": jnp.ones(2)}], "c": optax.EmptyState()})
    assert sorted(names) == ["a.0", "a.1.b"]
    assert math.prod(names["a.1.b"].shape) == 2
    assert re.fullmatch(r"[\w.]+", "".join(names))


# ---- reading and writing a slice at a time ----


def lazy(array, calls, *, stacked):
    """The array as a Lazy that notes what is asked of it."""

    def read(index):
        calls.append(index)
        return array if index is None else array[index]

    return store.Lazy(array.shape, array.dtype, read, stacked)


def test_what_is_written_lazily_is_read_like_any_other(tmp_path):
    draw, calls = np.random.default_rng(0), []
    arrays = {
        "params.blocks.0.w": draw.standard_normal((5, 300, 1000)).astype(np.float32),
        "params.blocks.0.scale": draw.standard_normal((5, 7)).astype(jnp.bfloat16),
        "params.table": draw.standard_normal((33, 8)).astype(np.float32),
    }
    lazies = {name: lazy(a, calls, stacked="blocks" in name) for name, a in arrays.items()}
    store.save_lazily(tmp_path, 0, lazies, {"model": 1}, TOKENIZER)
    assert sorted(calls, key=str) == sorted([*range(5), *range(5), None], key=str)
    here = locate(str(tmp_path))
    assert here.json("run") == {"model": 1} and here.step == 0
    assert here.arrays() == {name: (a.shape, a.dtype) for name, a in sorted(arrays.items())}
    mesh = mesh_of(8, fsdp=4)
    abstract = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, jax.P()))
        for name, a in arrays.items()
    }
    assert_same(here.restore(abstract), arrays)
    assert chunk_on_disk(here, "params.blocks.0.w") == (1, 300, 1000)
    assert chunk_on_disk(here, "params.blocks.0.scale") == (5, 7)


def test_a_slice_is_read_alone(on_eight):
    state, here = on_eight
    for name, array in store.flatten(state).items():
        assert here.read(name).tobytes() == np.asarray(array).tobytes()
        if store.STACKED.search(name):
            assert here.read(name, 1).tobytes() == np.asarray(array)[1].tobytes()


def test_an_error_while_writing_lazily_is_raised_and_ends_it(tmp_path, caplog):
    calls = []

    def fail(index):
        calls.append(index)
        raise OSError("gone")

    shape, dtype = (4, 8), np.dtype(np.float32)
    lazies = {f"params.blocks.{i}": store.Lazy(shape, dtype, fail, True) for i in range(3)}
    with pytest.raises(OSError, match="gone"):
        store.save_lazily(tmp_path, 0, lazies, {}, {})
    assert len(calls) <= len(lazies)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_damage_is_told_in_a_line_with_its_place(tmp_path):
    here = saved(tmp_path, tiny(3), 3)
    (tmp_path / "3" / "run" / "metadata").write_text("{")
    with pytest.raises(ValueError, match=r"3/run/metadata is damaged: Expecting"):
        here.json("run")
    (tmp_path / "3" / "state" / "manifest.ocdbt").write_bytes(b"no manifest")
    for read in (here.arrays, lambda: here.read("a")):
        with pytest.raises(ValueError, match=r"/3 is damaged: cannot read ") as caught:
            read()
        assert len(str(caught.value)) < 500
