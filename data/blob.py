"""Bytes that can be read at any place, and the unpacking of compressed files into such."""

import contextlib
import gzip
import mmap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from text import cache

PACKED = frozenset((".gz", ".zst"))
CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Blob:
    """Bytes that can be read at any place: a file, or memory."""

    where: Path | bytes

    def size(self) -> int:
        return len(self.where) if isinstance(self.where, bytes) else self.where.stat().st_size

    def in_memory(self) -> int:
        """Bytes of memory that this takes."""
        return len(self.where) if isinstance(self.where, bytes) else 0

    def read(self, offset: int, length: int) -> bytes:
        if isinstance(self.where, bytes):
            return self.where[offset : offset + length]
        with open(self.where, "rb") as file:
            file.seek(offset)
            return file.read(length)

    @contextlib.contextmanager
    def view(self) -> Iterator[bytes | mmap.mmap]:
        """All the bytes, as one thing that slices and finds."""
        if isinstance(self.where, bytes):
            yield self.where
        elif not self.size():  # mmap refuses these
            yield b""
        else:
            with (
                open(self.where, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            ):
                yield view


def unpack(path: Path, packing: str, room: int, key: str) -> tuple[Blob, str]:
    """The unpacked bytes of `path`, and why they end too early ("": they do not).

    They stay in memory if there are at most `room`, else they go to disk under `key`.
    """
    for place in places(key):
        if place.is_file():
            note = _note(place)
            return Blob(place), note.read_text(encoding="utf-8") if note.is_file() else ""
    head = bytearray()
    trouble = ""
    try:
        for chunk in _chunks(path, packing):
            head += chunk
            if len(head) > room:
                break
        else:
            return Blob(bytes(head)), ""
    except _troubles() as error:
        return Blob(bytes(head)), f"cannot be unpacked to its end: {error}"
    del head

    def fill(target: Path) -> None:
        nonlocal trouble
        with open(target, "wb") as out:
            try:
                for chunk in _chunks(path, packing):
                    out.write(chunk)
            except _troubles() as error:
                trouble = f"cannot be unpacked to its end: {error}"

    place = store(key, fill)
    if trouble:
        _note(place).write_text(trouble, encoding="utf-8")
    return Blob(place), trouble


def places(key: str) -> tuple[Path, Path]:
    """Where the unpacked file of `key` may lie: for good, or as long as this process."""
    return cache.folder() / f"unpacked-{key}", cache.scratch() / f"unpacked-{key}"


def store(key: str, fill: Callable[[Path], None]) -> Path:
    """The file of `key`, written by `fill` in the cache folder or else beside this process."""
    lasting, passing = places(key)
    try:
        cache.write(lasting, fill)
        return lasting
    except OSError:
        cache.write(passing, fill)
        return passing


def _note(place: Path) -> Path:
    """The file that says why the unpacked file `place` is not whole."""
    return place.with_name(place.name + ".cut")


def _chunks(path: Path, packing: str) -> Iterator[bytes]:
    """The unpacked bytes, in order; one of `_troubles` where they end too early."""
    if packing == ".gz":
        with gzip.open(path, "rb") as file:
            while chunk := file.read1(CHUNK):
                yield chunk
        return
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path} needs zstandard: pip install 'meshlm[zstd]'") from None
    frame = None
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            while data:  # a file may hold several frames
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last zstd frame is not whole")


def _troubles() -> tuple[type[Exception], ...]:
    """What the libraries raise for a damaged file."""
    troubles = (EOFError, gzip.BadGzipFile, zlib.error)
    try:
        import zstandard
    except ImportError:
        return troubles
    return (*troubles, zstandard.ZstdError)
