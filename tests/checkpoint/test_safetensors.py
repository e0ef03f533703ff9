"""Safetensors: the library's bytes both ways; and a damaged or hostile file is an error, soon."""

import hashlib
import json
import os
import random
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from checkpoint import safetensors
from checkpoint.safetensors import INDEX, NAMES, SINGLE, Safetensors
from checkpoint.tensors import Tensor

library = pytest.importorskip("safetensors.numpy")
ARRAYS = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4) - 5,
    "a.weight": np.arange(10, dtype=np.float16).reshape(5, 2) / 3,
    "c.weight": np.arange(-4, 4).reshape(2, 2, 2).astype(ml_dtypes.bfloat16),
    "steps": np.arange(5),
    "one": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
    "mask": np.array([True, False]),
}


def described(arrays=ARRAYS):
    return {name: Tensor(array.shape, NAMES[array.dtype]) for name, array in arrays.items()}


def written(folder, arrays=ARRAYS, shard_bytes=10**9):
    folder.mkdir(exist_ok=True, parents=True)
    return safetensors.write(folder, described(arrays), arrays.__getitem__, shard_bytes)


def by_library(arrays=ARRAYS):
    """The bytes that the safetensors library writes."""
    return library.save(dict(arrays), {"format": "pt"})


def assert_reads(folder, arrays=ARRAYS):
    found = Safetensors(folder)
    assert found.tensors == described(arrays)
    for name, array in arrays.items():
        values = found.read(name)
        assert values.dtype == array.dtype and values.shape == array.shape
        assert values.tobytes() == array.tobytes()


def test_the_bytes_are_those_of_the_library(tmp_path):
    digests = written(tmp_path)
    data = (tmp_path / SINGLE).read_bytes()
    assert data == by_library()
    assert digests == {SINGLE: hashlib.sha256(data).hexdigest()}


def test_what_the_library_wrote_is_read(tmp_path):
    (tmp_path / SINGLE).write_bytes(by_library())
    assert_reads(tmp_path)


def test_rows_are_those_of_the_whole(tmp_path):
    written(tmp_path)
    found = Safetensors(tmp_path)
    for name, start, stop in (("a.weight", 1, 4), ("c.weight", 1, 2), ("b.weight", 2, 2)):
        rows = found.rows(name, start, stop)
        assert rows.tobytes() == ARRAYS[name][start:stop].tobytes()
        assert rows.shape == ARRAYS[name][start:stop].shape


def test_the_only_file_may_have_any_name(tmp_path):
    written(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "weights.safetensors")
    assert_reads(tmp_path)


def test_shards_come_back_and_hold_what_fits(tmp_path):
    digests = written(tmp_path, shard_bytes=50)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == "model-00001-of-00003.safetensors" and len(files) == 3
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    assert digests.keys() == {*files, INDEX}
    for file, digest in digests.items():
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == digest
    assert_reads(tmp_path)


def test_a_cache_of_links_is_read(tmp_path):
    """A download cache: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    written(tmp_path / "blobs", shard_bytes=50)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert_reads(snapshot)


# ---- what is refused ----


def raw(header, values=b"", length=None):
    """A file of this header, JSON text or an object."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def entry(start=0, stop=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


WRONG = {
    "has 3 bytes: too short": b"abc",
    "a header of 99 bytes does not fit into 2 bytes": raw({}, length=99),
    "a header of 9,223,372,036,854,775,807 bytes": raw({}, length=2**63 - 1),
    "holds no proper JSON": raw(b"{'a': 1}"),
    "holds no proper JSON: .*recursion": raw(b"[" * 100_000),
    "holds no proper JSON: .*codec can't decode": raw(b'{"\xff": 1}'),
    "'a' is given twice": raw(b'{"a": 1, "a": 2}'),
    "must be an object": raw([1]),
    "the entry 7; it must give dtype, shape and data_offsets": raw({"a": 7}),
    r"the dtype 'F3', none of U64, ": raw({"a": entry(dtype="F3")}, bytes(8)),
    r"the dtype \['F32'\]": raw({"a": entry(dtype=["F32"])}, bytes(8)),
    r"the shape \[-2\]": raw({"a": entry(shape=[-2])}, bytes(8)),
    r"the shape \[2.0\]": raw({"a": entry(shape=[2.0])}, bytes(8)),
    r"the shape \[True, 2\]": raw({"a": entry(shape=[True, 2])}, bytes(8)),
    r"the data_offsets \[8, 0\]": raw({"a": entry(8, 0)}, bytes(8)),
    "has 8 bytes, F32 .3. takes 12": raw({"a": entry(shape=[3])}, bytes(8)),
    "has 8 bytes, F32 .4611686018427387904, 4. takes": raw(
        {"a": entry(shape=[2**62, 4])}, bytes(8)
    ),
    "'a' ends at byte 8 of 7: the file is cut short": raw({"a": entry()}, bytes(7)),
    "1 bytes after the last tensor": raw({"a": entry()}, bytes(9)),
    "'b' overlaps the tensor before it": raw({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "'b' leaves 4 bytes before it": raw({"a": entry(), "b": entry(12, 20)}, bytes(20)),
    "'a' leaves 8 bytes before it": raw({"a": entry(8, 16)}, bytes(16)),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_is_refused(tmp_path, message):
    (tmp_path / SINGLE).write_bytes(WRONG[message])
    with pytest.raises(ValueError, match=message) as caught:
        Safetensors(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    data = by_library()
    for length in range(0, len(data), 7):
        (tmp_path / SINGLE).write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"short|fit"):
            Safetensors(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_told(tmp_path):
    written(tmp_path)
    found = Safetensors(tmp_path)
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 3)
    with pytest.raises(ValueError, match=r"ends inside .*: it changed after it was opened"):
        for name in ARRAYS:
            found.read(name)


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        (None, ValueError, "has no weight_map"),
        ({}, ValueError, "has no weight_map"),
        ({"a": "../x.safetensors"}, ValueError, "'../x.safetensors'; it must be the plain name"),
        ({"a": "/etc/x.safetensors"}, ValueError, "must be the plain name"),
        ({"a": "b\\x.safetensors"}, ValueError, "must be the plain name"),
        ({"a": "model.bin"}, ValueError, "must be the plain name"),
        ({"a": 3}, ValueError, "the file of 'a' is 3"),
        ({"a": "x\0.safetensors"}, ValueError, "must be the plain name"),
        ({"b.weight": "9.safetensors"}, FileNotFoundError, "9.safetensors is missing, with 1 tens"),
        (dict.fromkeys((*ARRAYS, "d"), "1.safetensors"), ValueError, "lacks 'd', which "),
        ({"b.weight": "1.safetensors"}, ValueError, "lies in 1.safetensors, .* has it nowhere"),
        (
            dict.fromkeys(ARRAYS, "1.safetensors") | {"one": "2.safetensors"},
            ValueError,
            "'one' lies in 1.safetensors, .* has it in 2.safetensors",
        ),
        (
            dict.fromkeys(ARRAYS, "2.safetensors") | {"one": "1.safetensors"},
            ValueError,
            "lies in 2.safetensors|lies in 1.safetensors",
        ),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, weight_map, error, message):
    for file in ("1.safetensors", "2.safetensors"):
        (tmp_path / file).write_bytes(by_library())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        Safetensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pth"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: a pickle can run any code.*safe_"):
        Safetensors(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors, nor "):
        Safetensors(tmp_path)
    for i in range(2):
        (tmp_path / f"{i}.safetensors").write_bytes(by_library())
    with pytest.raises(ValueError, match=r"holds 2 safetensors files, .* but no model"):
        Safetensors(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(ValueError, match="is no regular file"):
        Safetensors(tmp_path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated, or the length of the header."""
    at, kind = rng.randrange(len(data)), rng.randrange(5)
    if kind == 0:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + rng.randrange(1, 9) :]
    if kind == 2:
        return data[:at] + data[max(at - 9, 0) : at] + data[at:]
    if kind == 3:
        return rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, at)).to_bytes(8, "little") + data[8:]
    digits = [match.span() for match in re.finditer(rb"\d+", data)]
    start, stop = rng.choice(digits)
    number = rng.choice((b"-1", b"0", b"1e9", b"99999999999999999999", b"4294967296", b"null"))
    return data[:start] + number + data[stop:]


def test_damaged_files_are_read_as_the_library_reads_them_or_refused(tmp_path):
    rng, data, accepted = random.Random(0), by_library(), 0
    tracemalloc.start()
    for _ in range(400):
        wrong = mutated(data, rng)
        (tmp_path / SINGLE).write_bytes(wrong)
        try:
            found = Safetensors(tmp_path)
            values = {name: found.read(name) for name in found.tensors}
        except ValueError:
            continue
        accepted += 1
        wanted = {name: bytes(view["data"]) for name, view in library.deserialize(wrong)}
        assert {name: array.tobytes() for name, array in values.items()} == wanted
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert accepted > 5  # changes of values


def test_damaged_indexes_are_read_or_refused(tmp_path):
    written(tmp_path, shard_bytes=50)
    rng, data = random.Random(1), (tmp_path / INDEX).read_bytes()
    for _ in range(200):
        (tmp_path / INDEX).write_bytes(mutated(data, rng))
        try:
            found = Safetensors(tmp_path)
        except (ValueError, FileNotFoundError):
            continue
        assert found.tensors == described()
