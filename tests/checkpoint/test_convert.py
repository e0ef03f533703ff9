"""Conversion: what comes in goes out unchanged, bit by bit, or the receipt says what does not."""

import _thread
import dataclasses
import errno
import hashlib
import json
import os
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import train
from checkpoint import convert as converter
from checkpoint import manifest, safetensors
from checkpoint.convert import RECEIPT, convert
from checkpoint.pretrained import open_pretrained
from checkpoint.safetensors import Safetensors
from checkpoint.store import Store
from configs.run import Run, to_json
from data.config import DataConfig
from model.config import Arch, Norm
from sharding import mesh as meshes
from sharding.mesh import MeshConfig
from tests.checkpoint import folders

ROOT = Path(__file__).resolve().parents[2]


def converted(source, target, **how):
    return convert(open_pretrained(str(source)), target, **how)


def values_sha256(folder):
    """Over a Hugging Face directory, counted by the safetensors library's own reader."""
    library = pytest.importorskip("safetensors")
    digest = hashlib.sha256()
    with library.safe_open(folder / "model.safetensors", "np") as file:
        for name in sorted(file.keys()):
            digest.update(file.get_tensor(name).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", folders.MODELS)
def test_a_folder_goes_to_ours_and_back_as_the_same_bytes(tmp_path, family):
    folders.write(tmp_path / "hf", family)
    there = converted(tmp_path / "hf", tmp_path / "ours")
    back = converted(tmp_path / "ours", tmp_path / "back", to="hf")
    assert folders.files(tmp_path / "back") == folders.files(tmp_path / "hf")
    assert there["round_trip_bit_equal"] and back["round_trip_bit_equal"]
    assert there["family"] == back["family"] == family
    assert there["values_sha256"]["source"] == back["values_sha256"]["target"]
    assert there["values_sha256"]["target"] == back["values_sha256"]["source"]
    assert back["values_sha256"]["target"] == values_sha256(tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrow_dtypes_come_back(tmp_path, dtype):
    folders.write(tmp_path / "hf", dtype=dtype)
    there = converted(tmp_path / "hf", tmp_path / "ours")
    assert set(there["dtypes"]["target"]) == {{"F16": "float32", "BF16": "bfloat16"}[dtype]}
    back = converted(tmp_path / "ours", tmp_path / "back", to="hf")
    assert there["round_trip_bit_equal"] and back["round_trip_bit_equal"]
    assert folders.files(tmp_path / "back") == folders.files(tmp_path / "hf")


def test_a_few_tensors_of_another_dtype_come_back(tmp_path):
    values = folders.write(tmp_path / "hf", dtype="BF16")
    mixed = {
        name: array.astype(np.float32) if "norm" in name or "layers.1.mlp.up" in name else array
        for name, array in values.items()
    }
    folders.save(tmp_path / "hf", mixed)
    receipt = converted(tmp_path / "hf", tmp_path / "ours")
    assert receipt["round_trip_bit_equal"] and receipt["dtypes"]["target"]["float32"]
    found = open_pretrained(str(tmp_path / "ours"))
    assert found.read("embedding.table").dtype == ml_dtypes.bfloat16
    assert found.cfg.param_dtype == "float32"
    converted(tmp_path / "ours", tmp_path / "back", to="hf")
    before, after = (Safetensors(tmp_path / folder) for folder in ("hf", "back"))
    assert after.tensors == before.tensors


def test_shards_are_as_large_as_asked(tmp_path):
    values = folders.write(tmp_path / "hf", shard_bytes=3000)
    converted(tmp_path / "hf", tmp_path / "back", to="hf", shard_bytes=9000)
    files = list((tmp_path / "back").glob("model-*.safetensors"))
    largest = max(array.nbytes for array in values.values())
    assert len(files) > 2 and max(path.stat().st_size for path in files) < largest + 5000
    found = Safetensors(tmp_path / "back")
    assert all(found.read(name).tobytes() == values[name].tobytes() for name in values)


def test_a_narrower_dtype_is_told_with_what_differs(tmp_path):
    values = folders.write(tmp_path / "from")
    for to in ("hf", "meshlm"):
        receipt = converted(tmp_path / "from", tmp_path / to, to=to, dtype="bfloat16")
        assert not receipt["round_trip_bit_equal"] and receipt["differing"] == len(values)
        assert set(receipt["differ"]) < values.keys()
        assert open_pretrained(str(tmp_path / to)).cfg.param_dtype == "bfloat16"
    found = Safetensors(tmp_path / "hf")
    for name, array in values.items():
        wanted = array.astype(ml_dtypes.bfloat16)
        assert found.read(name).tobytes() == wanted.tobytes()
    config, before = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "from")
    )
    assert config == {**before, "torch_dtype": "bfloat16"}


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    values = folders.write(tmp_path / "hf")
    values["model.norm.weight"][3] = 1e6
    folders.save(tmp_path / "hf", values)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values beyond 65,504"):
        converted(tmp_path / "hf", tmp_path / "half", to="hf", dtype="float16")
    with pytest.raises(ValueError, match="dtype='float16' is for to='hf'"):
        converted(tmp_path / "hf", tmp_path / "half", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def trained(folder, **changes):
    """A checkpoint that training left: a recipe's run, with the optimizer's state."""
    model = dataclasses.replace(folders.LLAMA, **changes)
    run = Run(model=model, data=DataConfig(batch=8, seq=16))
    with jax.set_mesh(meshes.make(MeshConfig(), jax.devices()[:1])):
        program = train.build(run)
        state = program.fresh()
    store = Store(folder / "checkpoints")
    words = json.loads(folders.tokenizer().to_json())
    store.save(7, state, {"run": to_json(run), "data": {}, "tokens": 0}, words)
    store.wait()
    store.close()
    return state


def test_a_trained_checkpoint_goes_out_and_comes_back(tmp_path):
    state = trained(tmp_path / "run")
    receipt = converted(f"{tmp_path / 'run'}@7", tmp_path / "hf", to="hf")
    assert receipt["family"] == "llama" and receipt["round_trip_bit_equal"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == list(folders.tokenizer().ends)
    for name, text in folders.tokenizer().files().items():
        assert (tmp_path / "hf" / name).read_text() == text
    back = open_pretrained(str(tmp_path / "hf"))
    table = np.asarray(state.params["embedding"]["table"])
    assert back.read("embedding.table").tobytes() == table.tobytes()
    assert back.cfg == dataclasses.replace(folders.LLAMA, arch=back.cfg.arch)


def test_a_model_of_no_family_is_told_why(tmp_path):
    arch = Arch(norm=Norm(placement="sandwich"), activation="relu2")
    trained(tmp_path / "run", arch=arch)
    with pytest.raises(ValueError, match=r"no family has .*relu2"):
        converted(tmp_path / "run", tmp_path / "hf", to="hf")
    receipt = converted(tmp_path / "run", tmp_path / "ours", dtype="bfloat16")
    assert receipt["family"] is None
    assert open_pretrained(str(tmp_path / "ours")).family is None


def test_the_receipt_lies_in_the_target_and_its_hashes_are_right(tmp_path):
    folders.write(tmp_path / "hf")
    for to in ("hf", "meshlm"):
        folder = tmp_path / f"to-{to}"
        receipt = converted(tmp_path / "hf", folder, to=to)
        assert json.loads((folder / RECEIPT).read_text()) == receipt
        wanted = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in folders.files(folder).items()
        }
        assert receipt["files"] == wanted
        assert receipt["parameters"] * 4 == receipt["bytes"]
        assert receipt["tokenizer"] == folders.tokenizer().digest or receipt["tokenizer"]


def test_unused_tensors_and_copies_are_listed(tmp_path):
    tied = dataclasses.replace(
        folders.LLAMA, arch=Arch(head=dataclasses.replace(folders.LLAMA.arch.head, tied=True))
    )
    values = folders.write(tmp_path / "hf", cfg=tied)
    more = {
        "lm_head.weight": values["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    folders.save(tmp_path / "hf", values | more)
    receipt = converted(tmp_path / "hf", tmp_path / "ours")
    assert receipt["unused"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert receipt["copies"] == ["lm_head.weight"] and receipt["round_trip_bit_equal"]
    more["lm_head.weight"] = more["lm_head.weight"] + 1
    folders.save(tmp_path / "hf", values | more)
    receipt = converted(tmp_path / "hf", tmp_path / "other")
    assert receipt["differ"] == ["lm_head.weight"] and not receipt["round_trip_bit_equal"]


def test_a_round_trip_that_fails_is_noticed(tmp_path, monkeypatch):
    """The receipt reads what was written: a wrong write shows."""
    folders.write(tmp_path / "hf")
    right = safetensors.write

    def wrong(folder, tensors, read, shard_bytes):
        def swapped(name):
            return read(name.replace("layers.0", "layers.1"))

        return right(folder, tensors, swapped, shard_bytes)

    monkeypatch.setattr(converter.safetensors, "write", wrong)
    receipt = converted(tmp_path / "hf", tmp_path / "back", to="hf")
    assert not receipt["round_trip_bit_equal"]
    assert receipt["differ"] and all("layers.0" in name for name in receipt["differ"])


# ---- what is refused, and what is left then ----


@pytest.mark.parametrize(
    ("item", "change", "message"),
    [
        ("run", lambda note: [], "does not say what model it holds"),
        ("run", lambda note: {**note, "run": 7}, "does not say what model it holds"),
        ("run", lambda note: {**note, "model": {"layers": "3"}}, "model.layers='3' must be an int"),
        ("run", lambda note: {**note, "model": {**note["model"], "mlp": 25}}, "shape .*24.*25"),
        ("run", lambda note: {**note, "files": {"../evil": "x"}}, None),
        ("run", lambda note: {**note, "narrow": {"model.norm.weight": "F3"}}, None),
        (
            "tokenizer",
            lambda words: {**words, "files": {**words["files"], "../evil": "x"}},
            "evil",
        ),
    ],
)
def test_a_checkpoint_of_ours_is_not_believed(tmp_path, item, change, message):
    folders.write(tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "ours")
    path = tmp_path / "ours" / "checkpoints" / "0" / item / "metadata"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    folder = path.parents[1]
    note, words = (
        json.loads((folder / name / "metadata").read_text()) for name in ("run", "tokenizer")
    )
    config = note.get("run", note) if isinstance(note, dict) else note
    manifest.write(folder, 0, config, words)  # as its author can
    if message is None:
        converted(tmp_path / "ours", tmp_path / "back", to="hf")
    else:
        with pytest.raises(ValueError, match=message):
            converted(tmp_path / "ours", tmp_path / "back", to="hf")
    assert not (tmp_path / "evil").exists()


def test_a_target_that_is_taken_is_refused(tmp_path):
    folders.write(tmp_path / "hf")
    source = tmp_path / "hf"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    for target, message in (
        (tmp_path / "full", "full is not empty"),
        (tmp_path / "file", "file is a file"),
        (source / "inside" / "deeper", "lies inside the source"),
        (tmp_path / "link" / "inside", "lies inside the source"),
    ):
        with pytest.raises(ValueError, match=message):
            converted(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "hf", "link"]
    (tmp_path / "empty").mkdir()
    converted(source, tmp_path / "empty")
    assert (tmp_path / "empty" / RECEIPT).is_file()


@pytest.mark.parametrize("to", ["hf", "meshlm"])
@pytest.mark.parametrize("when", ["write", "compare"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_ends_it_leaves_nothing(tmp_path, to, when, error, heeds_ctrl_c):
    folders.write(tmp_path / "hf")

    def stop(what, done, total):
        if what == when and done > total / 2:
            if error is RuntimeError:
                raise RuntimeError("the machine")
            _thread.interrupt_main()

    with pytest.raises(error):
        converted(tmp_path / "hf", tmp_path / "target", to=to, progress=stop)
        time.sleep(1)  # until the interrupt is seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, monkeypatch):
    folders.write(tmp_path / "from")
    usage = converter.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda _: usage)
    for to in ("hf", "meshlm"):
        with pytest.raises(ValueError, match=r"has 1,000 bytes free, and .* are needed"):
            converted(tmp_path / "from", tmp_path / to, to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from"]


def test_a_disk_that_fills_up_is_told(tmp_path, monkeypatch):
    folders.write(tmp_path / "hf")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left on the disk: .*target") as caught:
        converted(tmp_path / "hf", tmp_path / "target", to="hf")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_array_that_was_not_written_whole_means_a_full_disk(tmp_path):
    """NumPy says no more of it than this."""
    full = pytest.raises(OSError, match="no space left on the disk")
    with full as error, converter.whole(tmp_path / "out"):
        raise OSError("300000 requested and 262112 written")
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
