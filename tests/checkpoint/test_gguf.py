"""GGUF files: every kind of value against its definition, and no file that hangs or kills."""

import contextlib
import gc
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoint.gguf import (
    DEEPEST,
    MOST_ARRAYS,
    MOST_CHARACTERS,
    MOST_KEYS,
    MOST_TENSORS,
    MOST_TEXTS,
    Gguf,
)
from checkpoint.gguf_kinds import KINDS
from tests.checkpoint.gguf_files import BLOCKS, blocks, packed, text

ROOT = Path(__file__).resolve().parents[2]


def half(block, at):
    return float(block[at : at + 2].view("<f2")[0])


def signed(byte):
    return int(byte) - 256 * (byte > 127)


def six_bits(packed, i):
    """Scale and minimum i of Q4_K and Q5_K, from their 12 bytes."""
    if i < 4:
        return packed[i] & 63, packed[4 + i] & 63
    scale = packed[4 + i] & 15 | packed[i - 4] >> 6 << 4
    return scale, packed[4 + i] >> 4 | packed[i] >> 6 << 4


def one(kind, block, i):
    """Value i of a block, by the definition of its kind in ggml."""
    b = [int(byte) for byte in block]

    def nibble(at, i):  # of 32 values in 16 bytes
        return b[at + i % 16] >> 4 * (i // 16) & 15

    if kind == "Q4_0":
        return half(block, 0) * (nibble(2, i) - 8)
    if kind == "Q4_1":
        return half(block, 0) * nibble(4, i) + half(block, 2)
    if kind in ("Q5_0", "Q5_1"):
        high = 2 if kind == "Q5_0" else 4
        q = nibble(high + 4, i) | (b[high + i // 8] >> i % 8 & 1) << 4
        return half(block, 0) * (q - 16) if high == 2 else half(block, 0) * q + half(block, 2)
    if kind == "Q8_0":
        return half(block, 0) * signed(b[2 + i])
    half_of_block, l, group = i // 128, i % 32, i // 16
    two = 2 * (i % 128 // 32)  # shift of two bits
    if kind == "Q2_K":
        q = b[16 + 32 * half_of_block + l] >> two & 3
        return half(block, 80) * (b[group] & 15) * q - half(block, 82) * (b[group] >> 4)
    if kind == "Q3_K":
        q = (b[32 + 32 * half_of_block + l] >> two & 3) - 4 * (1 - (b[l] >> i // 32 & 1))
        low = b[96 + group % 8] >> 4 * (group // 8) & 15
        high = b[104 + group % 4] >> 2 * (group // 4) & 3
        return half(block, 108) * ((low | high << 4) - 32) * q
    if kind in ("Q4_K", "Q5_K"):
        scale, minimum = six_bits(b[4:16], i // 32)
        q = b[(16 if kind == "Q4_K" else 48) + 32 * (i // 64) + l] >> 4 * (i // 32 % 2) & 15
        if kind == "Q5_K":
            q |= (b[16 + l] >> i // 32 & 1) << 4
        return half(block, 0) * scale * q - half(block, 2) * minimum
    low = b[64 * half_of_block + i % 64] >> 4 * (i % 128 // 64) & 15
    high = b[128 + 32 * half_of_block + l] >> two & 3
    return half(block, 208) * signed(b[192 + group]) * ((low | high << 4) - 32)


def opened(tmp_path, data):
    (tmp_path / "model.gguf").write_bytes(data)
    return Gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", BLOCKS)
def test_each_value_is_what_its_kind_defines(kind, tmp_path):
    data = blocks(kind, 6)
    values, _ = BLOCKS[kind]
    file = opened(tmp_path, packed({}, {"w": (kind, (3, 2 * values), data.tobytes())}))
    right = np.array([[one(kind, block, i) for i in range(values)] for block in data])
    assert file.tensors["w"].dtype == kind and file.tensors["w"].shape == (3, 2 * values)
    found = file.read("w")
    assert found.dtype == np.float32
    scale = np.abs(right).max()
    np.testing.assert_allclose(found, right.reshape(3, -1), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_tensor_of_many_pieces_is_read_like_each_of_its_rows(kind, tmp_path):
    values, _ = BLOCKS[kind]
    shape = (7, 5, 41 * values)  # more than one piece, and no multiple of it
    data = blocks(kind, 7 * 5 * 41, seed=1)
    file = opened(tmp_path, packed({}, {"w": (kind, shape, data.tobytes())}))
    whole = file.read("w")
    assert np.isfinite(whole).all()
    for start, stop in [(0, 1), (2, 5), (6, 7), (3, 3)]:
        assert (file.rows("w", start, stop) == whole[start:stop]).all()
    flat = opened(tmp_path, packed({}, {"w": (kind, (whole.size,), data.tobytes())}))
    assert (flat.rows("w", 5, 77) == whole.reshape(-1)[5:77]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_come_in_their_own_type(dtype, tmp_path):
    right = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(dtype)
    file = opened(tmp_path, packed({}, {"a": right, "b": right[0]}))
    found = file.read("a")
    assert found.dtype == dtype and (found == right).all()
    assert found.flags.writeable
    assert (file.rows("a", 1, 4) == right[1:4]).all()
    assert (file.read("b") == right[0]).all()


@pytest.mark.parity
@pytest.mark.parametrize("kind", [*BLOCKS, "BF16"])
def test_the_gguf_package_reads_the_same_bits(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    data = (
        blocks(kind, 64)
        if kind in BLOCKS
        else np.random.default_rng(0).normal(size=(64, 4)).astype(ml_dtypes.bfloat16).view(np.uint8)
    )
    values, _ = BLOCKS.get(kind, (4, 8))
    file = opened(tmp_path, packed({}, {"w": (kind, (64, values), data.tobytes())}))
    right = gguf.dequantize(data, number).reshape(64, values)
    assert (file.read("w").astype(np.float32) == right).all()
    assert KINDS[int(number)].name == kind


VALUES = {
    "text": "größe ☃", "small": 3, "large": -5, "yes": True, "no": False, "real": 0.5,
    "words": ["a", "", "☃"], "none": [], "nested": [["a"], [], ["b", "c"]],
}  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_kind_comes_back(version, tmp_path):
    file = opened(tmp_path, packed(VALUES, {}, version))
    assert file.metadata == VALUES
    assert {key: type(value) for key, value in file.metadata.items()} == {
        key: type(value) for key, value in VALUES.items()
    }


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?"])
def test_arrays_of_numbers_keep_their_type(dtype, tmp_path):
    right = np.array([0, 1, 100, 1], dtype)
    found = opened(tmp_path, packed({"numbers": right, "after": 1}, {})).metadata
    assert found["numbers"].dtype == right.dtype and (found["numbers"] == right).all()
    assert found["after"] == 1


def test_alignment_is_the_files_own(tmp_path):
    right = np.arange(6, dtype=np.float32)
    tensors = {"a": right[:5], "b": right}
    file = opened(tmp_path, packed({"general.alignment": 128}, tensors, alignment=128))
    assert (file.read("a") == right[:5]).all() and (file.read("b") == right).all()


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    file = opened(tmp_path, packed({}, {"w": np.zeros((4, 8), np.float32)}))
    os.truncate(file.path, 100)
    with pytest.raises(ValueError, match="became shorter while it was read"):
        file.read("w")


# Files that lie.


def front(tensors=0, keys=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def key(kind, rest, name="k"):
    return text(name) + struct.pack("<I", kind) + rest


def info(name="w", shape=(4,), kind=0, offset=0):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def aligned(data):
    return data + bytes(-len(data) % 32)


HUGE = 2**64 - 1
DEEP = struct.pack("<IQ", 9, 1) * (DEEPEST + 1)
HOSTILE = {
    "empty": (b"", "is empty"),
    "other format": (b"PK\x03\x04" + bytes(40), "begins with b'PK.*no GGUF file"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "version 1": (front(version=1), "version 1; 2 and 3"),
    "version 9": (front(version=9), "version 9; 2 and 3"),
    "many keys": (front(keys=HUGE), "metadata keys at byte"),
    "many tensors": (front(tensors=HUGE), "tensors at byte"),
    "long key": (front(keys=1, rest=struct.pack("<Q", HUGE) + bytes(60)), "goes on to byte"),
    "long text": (front(keys=1, rest=key(8, struct.pack("<Q", 2**62))), "goes on to byte"),
    "many words": (front(keys=1, rest=key(9, struct.pack("<IQ", 8, 2**61))), "strings of 'k'"),
    "many numbers": (front(keys=1, rest=key(9, struct.pack("<IQ", 4, 2**62))), "'k' at byte"),
    "many arrays": (front(keys=1, rest=key(9, struct.pack("<IQ", 9, 2**60))), "arrays within 'k'"),
    "deep": (front(keys=1, rest=key(9, DEEP + bytes(60))), "arrays within arrays"),
    "unknown value": (front(keys=1, rest=key(13, bytes(8))), "unknown kind 13"),
    "no UTF-8": (front(keys=1, rest=key(8, text(b"\xff\xfe"))), "utf-8"),
    "key twice": (front(keys=2, rest=key(4, bytes(4)) * 2), "metadata key 'k' twice"),
    "alignment 0": (packed({"general.alignment": 0}, {}), "alignment 0"),
    "alignment 24": (packed({"general.alignment": 24}, {}), "alignment 24"),
    "alignment text": (packed({"general.alignment": "32"}, {}), "alignment '32'"),
    "parts": (packed({"split.count": 3}, {}), "one of 3 parts.*gguf-split"),
    "tensor twice": (aligned(front(2, 0, info() * 2)) + bytes(16), "tensor 'w' twice"),
    "no dims": (aligned(front(1, 0, info(shape=()))) + bytes(16), "0 dims"),
    "many dims": (front(1, 0, info(shape=(1,) * 5)) + bytes(64), "5 dims"),
    "dims without end": (front(1, 0, text("w") + struct.pack("<I", 2**32 - 1) + bytes(64)), "dims"),
    "size 0": (front(1, 0, info(shape=(0, 4))) + bytes(64), r"\(0, 4\)"),
    "sizes overflow": (front(1, 0, info(shape=(2**33, 2**33))) + bytes(64), "needs 2951"),
    "size negative": (front(1, 0, info(shape=(HUGE,))) + bytes(64), "needs 73786"),
    "offset overflow": (front(1, 0, info(offset=2**64 - 32)) + bytes(64), "needs 16 bytes at byte"),
    "offset past": (aligned(front(1, 0, info(offset=32))) + bytes(32), "needs 16 bytes"),
    "offset odd": (aligned(front(1, 0, info(offset=5))) + bytes(64), "no multiple of 32"),
    "half a block": (front(1, 0, info(shape=(2, 16), kind=2)) + bytes(64), "blocks of 32"),
    "other kind": (front(1, 0, info(kind=20)) + bytes(64), "IQ4_NL, which is none of F32, F16"),
    "unknown kind": (front(1, 0, info(kind=99)) + bytes(64), "unknown kind 99"),
}  # fmt: skip


def outcome(path):
    """The message that refuses a file, or None; after a second at most."""
    begin = time.process_time()
    try:
        file = Gguf(path)
        for name in file.tensors:
            file.read(name)
        found = None
    except ValueError as error:
        found = str(error)
    assert time.process_time() - begin < 1
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_with_its_name_and_what_is_wrong(name, tmp_path):
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    found = outcome(path)
    assert found.startswith(str(path)) and re.search(message, found), found


def strings(count, each):
    return front(keys=1, rest=key(9, struct.pack("<IQ", 8, count) + text(each) * count))


LARGE = {
    "many strings": lambda: strings(MOST_TEXTS + 1, ""),
    "most strings": lambda: strings(MOST_TEXTS - 1, "☃abcdefgh"),
    "most text": lambda: front(keys=1, rest=key(8, text("🙂" + "a" * (MOST_CHARACTERS - 5)))),
    "much text": lambda: strings(4, "🙂" + "a" * (MOST_CHARACTERS // 3)),
    "many keys": lambda: front(keys=MOST_KEYS + 1, rest=key(0, b"a") * (MOST_KEYS + 1)),
    "most keys": lambda: front(
        keys=MOST_KEYS, rest=b"".join(key(0, b"a", f"{i:05}") for i in range(MOST_KEYS))
    ),
    "many arrays": lambda: front(
        keys=1, rest=key(9, struct.pack("<IQ", 9, MOST_ARRAYS + 1) + 12 * bytes(MOST_ARRAYS + 1))
    ),
    "many tensors": lambda: front(MOST_TENSORS + 1, 0, info() * (MOST_TENSORS + 1)),
    "most tensors": lambda: (
        aligned(front(MOST_TENSORS, 0, b"".join(info(f"{i:05}") for i in range(MOST_TENSORS))))
        + bytes(16)
    ),
    "numbers": lambda: front(keys=1, rest=key(9, struct.pack("<IQ", 4, 1 << 24) + bytes(1 << 26))),
}
ALONE = """
import resource, sys, time
from checkpoint.gguf import Gguf

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, spent = peak(), []
for _ in range(3):  # other processes slow some of them
    begin, message = time.process_time(), ""
    try:
        Gguf(sys.argv[1])
    except ValueError as error:
        message = str(error)
    spent.append(time.process_time() - begin)
print(min(spent), peak() - before)
print(message, end="", file=sys.stderr)
"""


@pytest.mark.parametrize("name", LARGE)
def test_a_large_header_costs_a_second_and_little_more_memory_than_itself(name, tmp_path):
    path = tmp_path / "large.gguf"
    path.write_bytes(LARGE[name]())
    command = [sys.executable, "-c", ALONE, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, grown = map(float, done.stdout.split())
    assert seconds < 1
    assert grown < 2 * path.stat().st_size + 100e6
    assert bool(done.stderr) == name.startswith(("many", "much")), done.stderr


def small():
    """A file with some of everything, 2 KB."""
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": ("Q4_0", (2, 64), blocks("Q4_0", 4).tobytes()),
        "c": ("Q6_K", (2, 256), blocks("Q6_K", 2).tobytes()),
    }
    return packed(VALUES | {"numbers": np.arange(9)}, tensors)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = small()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data)
    assert outcome(path) is None
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf (is|begins)"):
            Gguf(path)


def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path):
    data, path = small(), tmp_path / "changed.gguf"
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        for at in draw.integers(4, len(data) - 600, draw.integers(1, 4)):
            changed[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.integers(256)])
        path.write_bytes(changed)
        refused += outcome(path) is not None
    assert refused > 50


def test_only_files_are_read_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "folder.gguf").mkdir()
    for name, message in {"pipe": "pipe", "to_pipe": "pipe", "folder.gguf": "folder"}.items():
        with pytest.raises(ValueError, match=f"{name} is a {message}: a GGUF file is needed"):
            Gguf(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        Gguf("/dev/zero")
    for name in ("loop", "gone", "missing"):
        with pytest.raises(OSError, match=name):
            Gguf(tmp_path / name)
    (tmp_path / "model.gguf").write_bytes(small())
    (tmp_path / "link.gguf").symlink_to("model.gguf")  # as download caches make them
    assert Gguf(tmp_path / "link.gguf").tensors == Gguf(tmp_path / "model.gguf").tensors


def test_files_are_closed(tmp_path):
    (tmp_path / "model.gguf").write_bytes(small())
    (tmp_path / "hostile.gguf").write_bytes(small()[:100])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Gguf(tmp_path / "model.gguf")
        with contextlib.suppress(ValueError):
            Gguf(tmp_path / "hostile.gguf")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
