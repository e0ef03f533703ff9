"""A run whose newest saves are damaged goes on from the newest good one, and says why."""

import json
import os
import re
import shutil
import types

import jax
import numpy as np
import pytest

from checkpoint.store import Saved, Store
from sharding import mesh as meshes
from sharding.mesh import MeshConfig
from tests.marks import mostly_slow
from training.origin import not_finite


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, saved at 4, 8 and 12, whose newest saves a test damages."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    return tmp_path / "run"


def folder_of(run, step: int = 12):
    return run / "checkpoints" / str(step)


def shard(run, step: int = 12):
    """The largest file of its arrays."""
    return max(folder_of(run, step).glob("state/**/d/*"), key=lambda path: path.stat().st_size)


def saved_again(run, change) -> None:
    """Step 10, the newest, as another program could have saved it: `change(name, values)` of step
    12, manifest and all."""
    saved = Saved.open(run / "checkpoints", 12)
    state = {name: change(name, saved.read(name)) for name in saved.arrays()}
    note, tokenizer = saved.json("run"), saved.json("tokenizer")
    shutil.rmtree(saved.folder)
    made = Store(saved.path, keep=9)
    made.save(10, jax.device_put(state), note, tokenizer)
    made.wait()
    made.close()
    assert Saved.open(saved.path).step == 10 and Saved.open(saved.path).verify()


def truncated(run):
    os.truncate(shard(run), shard(run).stat().st_size // 2)


def without_a_shard(run):
    shard(run).unlink()


def flipped(run):
    content = bytearray(shard(run).read_bytes())
    content[-7] ^= 16
    shard(run).write_bytes(content)


def without_arrays(run):
    shutil.rmtree(folder_of(run) / "state")


def without(name):
    def damage(run):
        (folder_of(run) / name).unlink()

    return damage


def garbled(name):
    def damage(run):
        (folder_of(run) / name).write_bytes(b'{"a": [\0\xff')

    return damage


def wider(run):
    saved_again(run, lambda name, a: np.stack([a, a]) if name.endswith("norm.scale") else a)


def with_nan(where):
    def damage(run):
        def change(name, values):
            if re.search(where, name) and values.size > 9:
                values = values.copy()
                values.flat[9] = np.nan
            return values

        saved_again(run, change)

    return damage


DAMAGES = {
    "truncated": (truncated, r"state/\S+ has [\d,]+ bytes, not the [\d,]+ that were saved"),
    "a shard missing": (without_a_shard, r"state/\S+ is missing"),
    "a bit flipped": (flipped, r"state/\S+ has other bytes than were saved"),
    "all arrays missing": (without_arrays, r"state/\S+ is missing.* files more"),
    "manifest missing": (without("manifest.json"), "manifest.json is missing"),
    "manifest garbled": (garbled("manifest.json"), "manifest.json is not what was written"),
    "note garbled": (garbled("run/metadata"), "run/metadata has 9 bytes"),
    "note missing": (without("run/metadata"), "run/metadata is missing"),
    "tokenizer garbled": (garbled("tokenizer/metadata"), "tokenizer/metadata has 9 bytes"),
    "metadata garbled": (garbled("state/_METADATA"), "state/_METADATA has 9 bytes"),
    "step metadata garbled": (garbled("_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA has 9 bytes"),
    "wrong shapes": (wider, r"norm.scale has shape \(2, .*, the run's \("),
    "NaN in parameters": (with_nan(r"^params\.\w+\.\w+$"), r"params.\S+ has 1 values that are NaN"),
    "NaN in moments": (with_nan(r"^opt_state.*nu\.\w+\.\w+$"), r"opt_state.\S+ has 1 values"),
}


@pytest.mark.parametrize("kind", mostly_slow(DAMAGES, "a bit flipped"))
def test_the_run_goes_on_from_the_save_before_and_ends_as_if_undamaged(
    finished, run, command_line, kind
):
    damage, why = DAMAGES[kind]
    damage(run)
    good = {path: path.read_bytes() for path in folder_of(run, 8).rglob("*") if path.is_file()}
    newest = Saved.open(run / "checkpoints")
    bad = {path.relative_to(newest.folder) for path in newest.folder.rglob("*")}
    ended = command_line()
    assert ended.code == 0, ended.err
    (told,) = re.findall("(?m)^bad save .*$", ended.out)
    assert re.search(rf"step {newest.step}: .*{why}", told), told
    aside = run / "checkpoints" / f"{newest.step}.bad"
    assert f"set aside  {aside}" in ended.out
    assert {path.relative_to(aside) for path in aside.rglob("*")} == bad
    assert re.search(r"restored   step 8 of .*; verified \S+ MB in \S+ s", ended.out)
    assert ended.state(12) == finished.state(12)
    assert all(path.read_bytes() == content for path, content in good.items())
    rows = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == [2, 4, 6, 6, 8, 10, 12, 12]
    assert "Traceback" not in ended.err


def test_two_bad_saves_are_both_told_and_set_aside(finished, run, command_line):
    truncated(run)
    (folder_of(run, 8) / "manifest.json").unlink()
    ended = command_line()
    assert ended.code == 0, ended.err
    assert re.findall(r"(?m)^bad save   step (\d+): ", ended.out) == ["12", "8"]
    assert "restored   step 4" in ended.out and ended.steps_saved() == [4, 8, 12]
    assert (run / "checkpoints" / "8.bad").is_dir() and (run / "checkpoints" / "12.bad").is_dir()
    assert ended.state(12) == finished.state(12)


def test_without_a_good_save_the_run_refuses_and_touches_none(run, command_line):
    for step in (4, 8, 12):
        shard(run, step).unlink()
    before = sorted(run.rglob("*"))
    ended = command_line()
    assert ended.code == 2 and not ended.batches
    for part in ("no good step", "Nothing was deleted", "another --workdir", "/4 is damaged"):
        assert part in ended.err
    assert sorted(run.rglob("*")) == before


def test_restore_of_a_bad_step_refuses_and_names_the_others(run, command_line, tmp_path):
    flipped(run)
    ended = command_line(f"--restore={run}@12", "--config.steps=14", workdir=tmp_path / "other")
    assert ended.code == 2 and not ended.batches
    assert "checkpoints/12 is damaged" in ended.err and "take another step: 4, 8" in ended.err
    with_nan(r"^params\.\w+\.\w+$")(run)
    ended = command_line(f"--restore={run}@10", workdir=tmp_path / "other")
    assert ended.code == 2 and not ended.batches and "1 values that are NaN" in ended.err


@pytest.mark.parametrize(
    "kind", mostly_slow(["a bit flipped", "note garbled", "NaN in parameters"], "note garbled")
)
def test_restore_of_another_run_takes_its_newest_good_step_and_says_so(
    finished, run, command_line, tmp_path, kind
):
    damage, why = DAMAGES[kind]
    damage(run)
    before = sorted(run.rglob("*"))
    ended = command_line(f"--restore={run}", workdir=tmp_path / "other")
    assert ended.code == 0, ended.err
    assert re.search(rf"(?m)^bad save   step 1[02]: .*{why}", ended.out)
    assert "restored   step 8" in ended.out and ended.state(12) == finished.state(12)
    assert sorted(run.rglob("*")) == before  # another's folder stays as it is


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_layers_of_two_stages_are_looked_at_where_they_lie(value):
    layers = np.ones((4, 3), np.float32)
    layers[3, 1] = value
    with jax.set_mesh(
        meshes.make(MeshConfig(stage=2, data=1, fsdp=1, tensor=1), jax.devices()[:2])
    ):
        layers = jax.device_put(layers, jax.P("stage"))
        found = not_finite(types.SimpleNamespace(params={"blocks": {"up": layers}}, opt_state={}))
    assert bool(found) == np.isnan(value) and (not found or "params.blocks.up has 1 value" in found)


def test_without_the_manifest_a_flipped_bit_would_be_read_as_a_weight(run):
    saved = Saved.open(run / "checkpoints", 12)
    kept = {name: saved.read(name).tobytes() for name in saved.arrays()}
    content, silent = shard(run).read_bytes(), 0
    for at in range(0, len(content), len(content) // 40):
        flipped = bytearray(content)
        flipped[at] ^= 1
        shard(run).write_bytes(flipped)
        try:
            found = {name: saved.read(name).tobytes() for name in saved.arrays()}
            silent += found != kept
        except ValueError:
            pass
    assert silent > 0
