"""The GGUF file format of llama.cpp: metadata and tensors, read without believing the file.

A file is a header (magic, version, counts), metadata (key, kind, value), what each tensor is
(name, dims, kind, offset), and the tensors' bytes. Numbers are little endian. No length in it
is used before it is held against the bytes that are left, so a damaged or hostile file costs a
second and 100 MB at most, and ends in a ValueError.
"""

import math
import mmap
import os
import stat
import struct
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.gguf_kinds import KINDS, OTHERS, Kind
from checkpoint.tensors import Tensor, Tensors

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had shorter lengths and was never published
ALIGNMENT = 32  # of tensors, unless general.alignment says otherwise

# Kinds of metadata by their numbers, as struct and numpy both spell them.
NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
BOOL, TEXT, ARRAY = 7, 8, 9
DEEPEST = 4  # arrays in arrays
MOST_DIMS = 4

# What a header may hold, since Python needs many times the bytes of the file for short texts.
# The largest published vocabulary, Gemma's, has 262,144 tokens and 514,906 merges; a million
# strings would take more than a second on a slow core.
MOST_TEXTS = 800_000  # strings
MOST_CHARACTERS = 1 << 24  # bytes of all strings
MOST_ARRAYS = 1 << 12  # within arrays, which no model has
MOST_KEYS = 1 << 14
MOST_TENSORS = 1 << 15

PIECE = 1 << 18  # values dequantized at one time: temporaries of 1 MiB stay in the cache


class Gguf(Tensors):
    """One GGUF file. `metadata` holds int, float, bool, str; arrays as np.ndarray, of str as list.

    ValueError for a file that is no sound GGUF file, an OSError for one that cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = _open(self.path)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if not size:
            raise ValueError(f"{self.path} is empty: no GGUF file")
        with mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) as data:
            header = _Header(self.path, data)
            self.metadata = header.metadata()
            self._places = header.places(self.metadata)
        self.tensors = {
            name: Tensor(shape, kind.name) for name, (shape, kind, _) in self._places.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self.rows(name, 0, self.tensors[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        shape, kind, offset = self._places[name]
        assert 0 <= start <= stop <= shape[0], f"rows {start} to {stop} of {shape[0]}"
        row = math.prod(shape[1:])
        first, last = start * row, stop * row
        if kind.fill is None:
            values = np.empty(last - first, kind.dtype)
            self._into(values.view(np.uint8), offset + first * kind.size)
        else:  # whole blocks, of which a one-dim tensor may want a part
            begin, end = first // kind.values, -(-last // kind.values)
            values = self._dequantize(kind, offset + begin * kind.size, end - begin)
            values = values[first - begin * kind.values :][: last - first]
        return values.reshape(stop - start, *shape[1:])

    def _dequantize(self, kind: Kind, offset: int, blocks: int) -> np.ndarray:
        """The float32 values of `blocks` blocks from byte `offset` on, piece by piece."""
        values = np.empty((blocks, kind.values), kind.dtype)
        step = PIECE // kind.values
        piece = np.empty((min(step, blocks), kind.size), np.uint8)
        for at in range(0, blocks, step):
            out = values[at : at + step]
            packed = piece[: len(out)]
            self._into(packed.reshape(-1), offset + at * kind.size)
            with np.errstate(all="ignore"):  # scales of a damaged file are any bits
                kind.fill(packed, out)
        return values.reshape(-1)

    def _into(self, out: np.ndarray, offset: int) -> None:
        """Fill uint8 [n] with the file's bytes from `offset` on.

        Read, not mapped: mapped pages count as memory of the process, and touching them after
        the file was cut short ends it.
        """
        while out.size:
            count = os.preadv(self._file, [out], offset)
            if not count:
                raise ValueError(f"{self.path} became shorter while it was read, at byte {offset}")
            out, offset = out[count:], offset + count


def _open(path: Path) -> int:
    """The file descriptor of a regular file. ValueError for anything else, without waiting."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return file
    os.close(file)
    found = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
    raise ValueError(f"{path} is {found}: a GGUF file is needed")


class _Header:
    """A file's bytes up to its tensors, read from front to back."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0
        self.texts, self.characters, self.arrays = MOST_TEXTS, MOST_CHARACTERS, MOST_ARRAYS  # left
        magic = data[:4]
        if magic != MAGIC:
            raise self.error(f"begins with {magic!r}, not {MAGIC!r}: it is no GGUF file")
        self.at = 4
        version = self.number("<I", "the version")
        if not version & 0xFFFF:
            raise self.error("is big endian; little endian GGUF files are read")
        if version not in VERSIONS:
            raise self.error(f"has GGUF version {version}; 2 and 3 are read")
        self.tensors = self.number("<Q", "the number of tensors")
        self.keys = self.number("<Q", "the number of metadata keys")
        self.check(self.keys, 8 + 4 + 1, MOST_KEYS, "metadata keys")
        self.check(self.tensors, 8 + 4 + 8 + 4 + 8, MOST_TENSORS, "tensors")

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.path} {text}")

    def check(self, count: int, size: int, most: int, what: str) -> None:
        """ValueError unless `count` things of `size` bytes or more can follow."""
        left = len(self.data) - self.at
        if count * size > left:
            raise self.error(
                f"is cut short or damaged: {count} {what} at byte {self.at} need {count * size} "
                f"bytes at least, and {left} are left"
            )
        if count > most:
            raise self.error(f"holds {count} {what}; at most {most} are read")

    def skip(self, size: int, what: str) -> int:
        """Pass over `size` bytes, which exist, and say where they begin."""
        begin = self.at
        if size > len(self.data) - begin:
            raise self.error(
                f"is cut short or damaged: {what} at byte {begin} needs {size} bytes, "
                f"and {len(self.data) - begin} are left"
            )
        self.at += size
        return begin

    def number(self, code: str, what: str) -> Any:
        begin = self.skip(struct.calcsize(code), what)
        return struct.unpack_from(code, self.data, begin)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings, each after its length; a vocabulary has a hundred thousand."""
        self.texts -= count
        if self.texts < 0:
            raise self.error(f"holds more than {MOST_TEXTS} strings, more than any model needs")
        data, at, size = self.data, self.at, len(self.data)
        end = min(size, at + 8 * count + self.characters)
        length = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            begin = at + 8
            at = begin + length(data, at)[0] if begin <= end else begin
            if at > size:
                raise self.error(
                    f"is cut short or damaged: {what} at byte {begin - 8} goes on to byte {at}, "
                    f"and the file ends at {size}"
                )
            if at > end:
                raise self.error(
                    f"holds more than {MOST_CHARACTERS} bytes of text, more than any model needs"
                )
            try:
                found.append(data[begin:at].decode())
            except UnicodeDecodeError as error:
                raise self.error(f"is damaged: {what} at byte {begin}: {error}") from None
        self.characters -= at - self.at - 8 * count
        self.at = at
        return found

    def text(self, what: str) -> str:
        return self.strings(1, what)[0]

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value of metadata."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == TEXT:
            return self.text(what)
        if kind != ARRAY:
            raise self.error(f"is damaged: {what} at byte {self.at} has the unknown kind {kind}")
        if depth == DEEPEST:
            raise self.error(f"is damaged: {what} has arrays within arrays, deeper than {DEEPEST}")
        inner = self.number("<I", f"the kind of {what}")
        count = self.number("<Q", f"the length of {what}")
        if inner in NUMBERS:
            code = np.dtype(NUMBERS[inner] if inner != BOOL else "<B")
            begin = self.skip(count * code.itemsize, what)
            numbers = np.frombuffer(self.data, code, count, begin)
            return numbers != 0 if inner == BOOL else numbers.copy()
        if inner == TEXT:
            self.check(count, 8, MOST_TEXTS, f"strings of {what}")
            return self.strings(count, what)
        self.check(count, 12, self.arrays, f"arrays within {what}")
        self.arrays -= count
        return [self.value(inner, what, depth + 1) for _ in range(count)]

    def metadata(self) -> dict[str, Any]:
        found = {}
        for _ in range(self.keys):
            key = self.text("a metadata key")
            if key in found:
                raise self.error(f"is damaged: it holds the metadata key {_short(key)} twice")
            kind = self.number("<I", f"the kind of {_short(key)}")
            found[key] = self.value(kind, _short(key))
        return found

    def places(self, metadata: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], Kind, int]]:
        """Shape, kind and first byte of each tensor, all of which lie in the file."""
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"has general.alignment {alignment!r}, which is no power of two")
        if (parts := metadata.get("split.count", 1)) not in (0, 1):
            raise self.error(
                f"is one of {parts} parts of a model; join them with llama.cpp's gguf-split --merge"
            )
        found = {}
        for _ in range(self.tensors):
            name = self.text("a tensor's name")
            if name in found:
                raise self.error(f"is damaged: it holds the tensor {_short(name)} twice")
            found[name] = self.tensor(_short(name), alignment)
        begin = -(-self.at // alignment) * alignment
        for name, (shape, kind, offset) in found.items():
            size = math.prod(shape) // kind.values * kind.size
            if begin + offset + size > len(self.data):
                raise self.error(
                    f"is cut short or damaged: tensor {_short(name)}, {kind.name} of shape "
                    f"{shape}, needs {size} bytes at byte {begin + offset}, and the file ends at "
                    f"{len(self.data)}"
                )
            found[name] = shape, kind, begin + offset
        return found

    def tensor(self, name: str, alignment: int) -> tuple[tuple[int, ...], Kind, int]:
        """Shape, kind and offset of a tensor, after its name."""
        dims = self.number("<I", f"the number of dims of {name}")
        if not 1 <= dims <= MOST_DIMS:
            raise self.error(f"is damaged: tensor {name} has {dims} dims, not 1 to {MOST_DIMS}")
        sizes = [self.number("<Q", f"the dims of {name}") for _ in range(dims)]
        shape = tuple(reversed(sizes))  # a file lists the dim that lies together first
        number = self.number("<I", f"the kind of {name}")
        offset = self.number("<Q", f"the offset of {name}")
        if number not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise self.error(
                f"stores tensor {name} as {OTHERS.get(number, f'the unknown kind {number}')}, "
                f"which is none of {known}"
            )
        kind = KINDS[number]
        if not all(shape) or shape[-1] % kind.values:
            raise self.error(
                f"is damaged: tensor {name} of shape {shape} is no {kind.name}, whose rows are "
                f"blocks of {kind.values} values"
            )
        if offset % alignment:
            raise self.error(
                f"is damaged: tensor {name} begins at {offset}, no multiple of {alignment}"
            )
        return shape, kind, offset


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:60]}...{name[-17:]}")
