"""The manifest of a checkpoint: what it holds, what it finds, and when it is written."""

import hashlib
import json
import os
import random
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from checkpoint import manifest, store
from checkpoint.convert import convert
from checkpoint.manifest import Manifest
from checkpoint.pretrained import open_pretrained
from checkpoint.store import Saved, Store
from tests.checkpoint import folders
from tests.faults.often import SEED

NOTE, TOKENIZER = {"run": {"steps": 3}, "tokens": 5}, {"meshlm": "bytes"}
FLIPS = 200


def state(step: int) -> dict:
    draw = np.random.default_rng(step)
    blocks = {"0": {"w": draw.standard_normal((3, 64, 64), np.float32)}}
    return jax.device_put({"params": {"blocks": blocks, "table": draw.standard_normal((99, 8))}})


def save(path, *steps: int, **kwargs) -> Saved:
    made = Store(path, **kwargs)
    for step in steps:
        made.save(step, state(step), NOTE, TOKENIZER)
    made.wait()
    made.close()
    return Saved.open(path)


@pytest.fixture
def saved(tmp_path) -> Saved:
    """A checkpoint of step 7, which a test may damage."""
    return save(tmp_path / "checkpoints", 7)


def files_of(folder) -> dict:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_a_manifest_holds_the_size_and_sha256_of_every_other_file(saved):
    found = files_of(saved.folder)
    del found["manifest.json"]
    first, second = (saved.folder / "manifest.json").read_text().splitlines()
    said = json.loads(first)
    assert said["files"] == {
        name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for name, path in found.items()
    }
    assert said["step"] == 7 and second == hashlib.sha256(first.encode()).hexdigest()
    for key, value in (("config", {"steps": 3}), ("tokenizer", TOKENIZER)):
        assert said[key] == hashlib.sha256(json.dumps(value).encode()).hexdigest()
    assert saved.verify() == sum(path.stat().st_size for path in found.values())


def test_every_one_of_200_flipped_bits_is_found_in_its_file(saved):
    draw = random.Random(SEED)
    found = files_of(saved.folder)
    for _ in range(FLIPS):
        name, path = draw.choice(sorted(found.items()))
        before = path.read_bytes()
        at = draw.randrange(8 * len(before))
        flipped = bytearray(before)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="is damaged") as caught:
            saved.verify()
        assert f"checkpoints/7 is damaged: {name} " in str(caught.value), at
        path.write_bytes(before)
    saved.verify()


def shorter(path):
    os.truncate(path, path.stat().st_size - 1)


def longer(path):
    path.write_bytes(path.read_bytes() + b" ")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (os.unlink, "state/manifest.ocdbt is missing"),
        (shorter, r"state/manifest.ocdbt has \d+ bytes, not the \d+ that were saved"),
        (longer, r"state/manifest.ocdbt has \d+ bytes, not the \d+ that were saved"),
        (a_pipe, "state/manifest.ocdbt is no file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(saved, damage, message):
    damage(saved.folder / "state" / "manifest.ocdbt")
    with pytest.raises(ValueError, match=message):
        saved.verify()


def test_of_many_bad_files_some_are_named_and_all_are_counted(saved):
    shutil.rmtree(saved.folder / "state")
    with pytest.raises(ValueError, match=r"state/\S+ is missing.*; and \d+ files more$"):
        saved.verify()


def test_a_checkpoint_without_a_manifest_is_damaged(saved):
    (saved.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"/7 is damaged: manifest\.json is missing"):
        saved.verify()


def test_the_folder_of_another_step_is_found_out(saved):
    saved.folder.rename(saved.path / "8")
    with pytest.raises(ValueError, match=r"/8 is damaged: its manifest\.json is that of step 7"):
        Saved.open(saved.path).verify()


@pytest.mark.parametrize(
    "said",
    [
        [],
        {},
        {"step": 7, "config": "", "tokenizer": "", "files": {"a": 3}},
        {"step": 7, "config": "", "tokenizer": "", "files": {"../a": [1, "x"]}},
        {"step": 7, "config": "", "tokenizer": "", "files": {"/dev/zero": [1, "x"]}},
    ],
)
def test_a_manifest_of_someone_else_can_say_nothing_that_harms(saved, said):
    text = json.dumps(said)
    lines = f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"
    (saved.folder / "manifest.json").write_text(lines)
    with pytest.raises(ValueError, match=r"is no manifest|outside of its folder"):
        saved.verify()


def test_processes_share_the_reading(saved):
    parts = [saved.verify(i, 3) for i in range(3)]
    assert sum(parts) == saved.verify() and all(parts)
    damaged = saved.folder / "state" / "_METADATA"
    longer(damaged)
    failed = 0
    for i in range(3):
        try:
            saved.verify(i, 3)
        except ValueError as error:
            failed += "state/_METADATA" in str(error)
    assert failed == 1


# ---- when it is written ----


@pytest.fixture
def held(monkeypatch):
    """Manifests are written when this event is set."""
    write, held = manifest.write, threading.Event()

    def wait(*args):
        held.wait(60)
        write(*args)

    monkeypatch.setattr(manifest, "write", wait)
    yield held
    held.set()


def test_saving_returns_before_anything_is_hashed(tmp_path, held):
    made = Store(tmp_path)
    made.save(1, state(1), NOTE, TOKENIZER)
    assert made.failed() is None and not (tmp_path / "1").exists()
    held.set()
    made.wait()
    made.close()
    assert Saved.open(tmp_path, 1).verify()


def test_no_checkpoint_exists_without_its_manifest_and_the_one_before_stays_till_then(
    tmp_path, held
):
    held.set()
    made = Store(tmp_path, keep=1)
    made.save(1, state(1), NOTE, TOKENIZER)
    made.wait()
    held.clear()
    made.save(2, state(2), NOTE, TOKENIZER)
    time.sleep(0.5)
    assert [saved.step for saved in Saved.all(tmp_path)] == [1]
    held.set()
    made.wait()
    made.close()
    assert [(saved.step, saved.verify() > 0) for saved in Saved.all(tmp_path)] == [(2, True)]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_kill_before_the_manifest_is_complete_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "seal", lambda folder: None)
    saved = save(tmp_path, 1)
    assert not manifest.LATE & Manifest.read(saved.folder).files.keys()
    assert saved.verify()


def test_saves_in_quick_succession_are_all_complete(tmp_path):
    save(tmp_path, *range(1, 9), keep=1, keep_every=2)
    found = Saved.all(tmp_path)
    assert [saved.step for saved in found] == [8, 6, 4, 2]
    for saved in found:
        assert saved.verify() and Manifest.read(saved.folder).files.keys() >= manifest.LATE


def test_a_save_that_fails_beside_the_run_is_told_once_and_the_next_one_is_good(
    tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    made = Store(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", fail)
        made.save(1, state(1), NOTE, TOKENIZER)
        for _ in range(1000):
            told = made.failed()
            if told:
                break
            time.sleep(0.01)
    assert told[0] == 1 and "No space left" in str(told[1]) and made.failed() is None
    assert not list(tmp_path.iterdir()) and made.latest() is None
    made.save(2, state(2), NOTE, TOKENIZER)
    made.wait()
    made.close()
    assert made.failed() is None and Saved.open(tmp_path).verify()


def test_a_failed_save_costs_no_older_checkpoint_and_leaves_none_for_ever(tmp_path, monkeypatch):
    made = Store(tmp_path, keep=1)
    made.save(1, state(1), NOTE, TOKENIZER)
    made.wait()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", lambda *_: 1 / 0)
        made.save(2, state(2), NOTE, TOKENIZER)
        with pytest.raises(ZeroDivisionError):
            made.wait()
    assert Saved.open(tmp_path).step == 1 and Saved.open(tmp_path).verify()
    made.save(3, state(3), NOTE, TOKENIZER)
    made.wait()
    made.close()
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


# ---- weights ----


def test_weights_of_a_damaged_checkpoint_are_not_read(tmp_path):
    folders.write(tmp_path / "hf")
    convert(open_pretrained(str(tmp_path / "hf")), tmp_path / "ours")
    model = open_pretrained(str(tmp_path / "ours"))
    assert model.saved.verify() and model.read("norm.scale").any()
    shard = max((model.saved.folder / "state").rglob("*"), key=lambda path: path.stat().st_size)
    flipped = bytearray(shard.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    shard.write_bytes(flipped)
    again = open_pretrained(str(tmp_path / "ours"))
    for read in (lambda: again.read("norm.scale"), lambda: list(again.stored())):
        with pytest.raises(
            ValueError, match=rf"checkpoints/0 is damaged: .*{shard.name} has other"
        ):
            read()


def test_a_bad_step_is_set_aside_under_a_name_that_is_free(tmp_path):
    save(tmp_path, 1, 2)
    for name in ("2.bad", "2.bad2"):
        assert Saved.open(tmp_path, 2).set_aside() == tmp_path / name
        save(tmp_path, 2)
    assert Saved.open(tmp_path).step == 2
    assert store.locate(f"{tmp_path}@1").verify()
