"""Files of documents: which formats there are, and where in a file each document lies.

`scan` reads a file once and gives a table with a row per section, and a `Blob` that gives the
bytes back. A document longer than `section` bytes is several sections, cut at line breaks: each is
tokenized as a document of its own, so that one file of many gigabytes needs little memory.
Sections of one document share its hash.
"""

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import mmap
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.blob import CHUNK, PACKED, Blob, places, store, unpack
from text import cache

_CODE = "py pyi c h cc cpp hpp cu go java js ts rs rb sh jl"
TEXT = frozenset(f".{suffix}" for suffix in ("txt text md rst tex html " + _CODE).split(" "))
JSON_LINES = frozenset((".jsonl", ".ndjson"))
JSON_LINES_IF_NAMED = JSON_LINES | {".json"}  # a folder's .json files are settings more often
PARQUET = ".parquet"
KNOWN = TEXT | JSON_LINES | {PARQUET}  # what is read of the files of a folder

NAMES_KEPT = 20  # bad rows that are named; the others are counted
WORTH_CACHING = 32 << 20  # bytes of a file whose table is kept on disk
BOM = codecs.BOM_UTF8

# offset, length: the row in the blob; start, stop: the section within the text of the row
TABLE = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<i8"),
        ("start", "<i8"),
        ("stop", "<i8"),
        ("line", "<i8"),  # from 1
        ("hash", "<u8"),  # blake2b, 64 bits, of the whole document
    ]
)


@dataclass
class Bad:
    """Rows that cannot be used: how many, and the names and reasons of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < NAMES_KEPT:
            self.first.append(f"{name}: {reason}")

    def extend(self, other: "Bad") -> None:
        self.count += other.count
        self.first = (self.first + other.first)[:NAMES_KEPT]


@dataclass(frozen=True)
class Scan:
    """The documents of one file."""

    path: Path
    blob: Blob
    field: str | None  # the row is a JSON object and this its text; None: the row is the text
    table: np.ndarray  # of TABLE
    rows: int  # usable documents
    bad: Bad

    def text(self, row: np.void) -> str:
        """The section that a row of a table describes."""
        start, stop = int(row["start"]), int(row["stop"])
        if self.field is None:
            return self.blob.read(int(row["offset"]) + start, stop - start).decode()
        data = self.blob.read(int(row["offset"]), int(row["length"]))
        return json.loads(data)[self.field].encode()[start:stop].decode()


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the format and the one that tells the packing: ".jsonl", ".gz"."""
    parts = [suffix.lower() for suffix in path.suffixes[-2:]]
    packing = parts.pop() if parts and parts[-1] in PACKED else ""
    return (parts[-1] if parts else ""), packing


def is_known(path: Path) -> bool:
    """Whether a file found in a folder is read as documents."""
    return suffixes(path)[0] in KNOWN


def scan(path: Path, text_field: str, section: int, room: int) -> Scan:
    """Find the documents of `path`, unpacked into memory if it fits in `room` bytes.

    Whatever makes a row unusable goes to `bad`; OSError for a file that cannot be read, ValueError
    for a missing library or a Parquet file without the column.
    """
    kind, packing = suffixes(path)
    row_field = text_field if kind in JSON_LINES_IF_NAMED else None
    stat = path.stat()
    sort = f"{text_field} {section} {TABLE}" if kind in JSON_LINES_IF_NAMED | {PARQUET} else ""
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {sort}"
    key = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    index = cache.folder() / f"index-{section}-{key}.npz"
    if kind == PARQUET:
        known = _read_index(index)
        place = next((place for place in places(key) if place.is_file()), None)
        if known and place:
            return Scan(path, Blob(place), None, *known)
        blob, *found = _scan_parquet(path, text_field, section, room, key)
    else:
        blob, cut_short = unpack(path, packing, room, key) if packing else (Blob(path), "")
        known = _read_index(index) if blob.size() > WORTH_CACHING else None
        if known:
            return Scan(path, blob, row_field, *known)
        bad = Bad()
        with blob.view() as view:
            if row_field is None:
                table, rows = _scan_text(view, str(path), section, cut_short, bad)
            else:
                table, rows = _scan_lines(view, str(path), row_field, section, cut_short, bad)
        found = table, rows, bad
    if blob.size() > WORTH_CACHING:
        _write_index(index, *found)
    return Scan(path, blob, row_field, *found)


def cut(view: bytes | mmap.mmap, offset: int, length: int, near: int, slack: int) -> int:
    """A place to cut UTF-8 text, in bytes from `offset`: after a line break close to `near`.

    The line break lies at most `slack` bytes before or after; without one, the cut is at the
    first whole character from `near` on.
    """
    low, high = max(near - slack, 1), min(near + slack, length - 1)
    after = view.find(b"\n", offset + near - 1, offset + high)
    if after >= 0:
        return after + 1 - offset
    before = view.rfind(b"\n", offset + low - 1, offset + near)
    if before >= 0:
        return before + 1 - offset
    while near < length and view[offset + near] & 0xC0 == 0x80:  # inside of a character
        near += 1
    return near


def _sections(view, offset: int, length: int, section: int) -> list[tuple[int, int]]:
    """(start, stop) of the sections of the text of `length` bytes at `offset`."""
    parts = -(-length // section)
    places = [0]
    for k in range(1, parts):
        places.append(cut(view, offset, length, k * length // parts, section // 8))
    places.append(length)
    return [(a, b) for a, b in itertools.pairwise(places) if a < b]


class _Rows(list):
    """Rows of a table in the making, which take little memory however many they are."""

    def __init__(self):
        self._full: list[np.ndarray] = []

    def append(self, row: tuple) -> None:
        super().append(row)
        if len(self) == 1 << 16:
            self._full.append(np.array(list(self), TABLE))
            self.clear()

    def table(self) -> np.ndarray:
        return np.concatenate([*self._full, np.array(list(self), TABLE)])


def _digest(view, offset: int, length: int) -> int:
    """64 bits of blake2b; UnicodeDecodeError unless the bytes are UTF-8. Reads chunk by chunk."""
    digest = hashlib.blake2b(digest_size=8)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(offset, offset + length, CHUNK):
        chunk = view[at : min(at + CHUNK, offset + length)]
        decoder.decode(chunk)
        digest.update(chunk)
    decoder.decode(b"", final=True)
    return int.from_bytes(digest.digest(), "little")


def _scan_text(view, name: str, section: int, cut_short: str, bad: Bad) -> tuple[np.ndarray, int]:
    """A file that is one document."""
    offset = len(BOM) if view[: len(BOM)] == BOM else 0
    length = len(view) - offset
    if cut_short:
        bad.add(name, cut_short)
        return np.zeros(0, TABLE), 0
    if not view[offset : offset + CHUNK].strip():
        bad.add(name, "empty")
        return np.zeros(0, TABLE), 0
    try:
        digest = _digest(view, offset, length)
    except UnicodeDecodeError as error:
        bad.add(f"{name}:{_line_of_error(view)}", f"not UTF-8: {error.reason}")
        return np.zeros(0, TABLE), 0
    rows, line, counted = _Rows(), 1, 0
    for start, stop in _sections(view, offset, length, section):
        if start:
            line += view[offset + counted : offset + start].count(b"\n")
            counted = start
        rows.append((offset, length, start, stop, line, digest))
    return rows.table(), 1


def _line_of_error(view) -> int:
    """The line, from 1, that holds the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 1
    for at in range(0, len(view), CHUNK):
        chunk = view[at : at + CHUNK]
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return lines + chunk[: max(error.start, 0)].count(b"\n")
        lines += chunk.count(b"\n")
    return lines


def _row_text(data: bytes, text_field: str) -> bytes:
    """The text of a JSON row as UTF-8; ValueError says why it has none."""
    try:
        row = json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is wanted, this is a {type(row).__name__}")
    if text_field not in row:
        raise ValueError(f"no field {text_field!r}, but {', '.join(map(repr, list(row)[:8]))}")
    return _encoded(row[text_field], text_field)


def _encoded(text, text_field: str) -> bytes:
    """`text` as UTF-8; ValueError unless it is a string with something in it."""
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not a string")
    if not text.strip():
        raise ValueError(f"field {text_field!r} is empty")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None


def _scan_lines(
    view, name: str, text_field: str, section: int, cut_short: str, bad: Bad
) -> tuple[np.ndarray, int]:
    """A file with a JSON object a line; blank lines are skipped."""
    rows, usable, line = _Rows(), 0, 0
    offset, end = (len(BOM) if view[: len(BOM)] == BOM else 0), len(view)
    while offset < end:
        line += 1
        stop = view.find(b"\n", offset)
        stop = end if stop < 0 else stop
        data = view[offset:stop]
        if data.strip():
            try:
                text = _row_text(data, text_field)
            except ValueError as error:
                bad.add(f"{name}:{line}", str(error))
            else:
                digest = _digest(text, 0, len(text))
                for a, b in _sections(text, 0, len(text), section):
                    rows.append((offset, stop - offset, a, b, line, digest))
                usable += 1
        offset = stop + 1
    if cut_short:
        bad.add(f"{name}:{line}", cut_short)
    elif not line:
        bad.add(name, "empty")
    return rows.table(), usable


def _scan_parquet(
    path: Path, text_field: str, section: int, room: int, key: str
) -> tuple[Blob, np.ndarray, int, Bad]:
    """A Parquet file with a document a row; its column of texts is unpacked as one blob."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'meshlm[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns, meta = file.schema_arrow.names, file.metadata
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    if text_field not in columns:
        raise ValueError(f"{path} has no column {text_field!r}, but {', '.join(columns)}")
    rows, bad, usable = _Rows(), Bad(), 0

    def fill(out: BinaryIO) -> None:
        nonlocal rows, bad, usable
        rows, bad, usable, offset, line = _Rows(), Bad(), 0, 0, 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    line += 1
                    try:
                        text = _encoded(value, text_field)
                    except ValueError as error:
                        bad.add(f"{path}:{line}", str(error))
                        continue
                    digest = _digest(text, 0, len(text))
                    for a, b in _sections(text, 0, len(text), section):
                        rows.append((offset, len(text), a, b, line, digest))
                    usable += 1
                    offset += out.write(text)

    def fill_file(target: Path) -> None:
        with open(target, "wb") as out:
            fill(out)

    unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if unpacked <= room:
        memory = io.BytesIO()
        fill(memory)
        blob = Blob(memory.getvalue())
    else:
        blob = Blob(store(key, fill_file))
    return blob, rows.table(), usable, bad


def _read_index(path: Path) -> tuple[np.ndarray, int, Bad] | None:
    """The table, usable rows and bad rows that `_write_index` kept; None if there are none."""
    try:
        with np.load(path) as file:
            table, counts, names = file["table"], file["counts"], file["names"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return table, int(counts[0]), Bad(int(counts[1]), [str(name) for name in names])


def _write_index(path: Path, table: np.ndarray, rows: int, bad: Bad) -> None:
    def fill(target: Path) -> None:
        with open(target, "wb") as file:
            np.savez(file, table=table, counts=[rows, bad.count], names=np.array(bad.first, "U"))

    with contextlib.suppress(OSError):  # the next run scans again
        cache.write(path, fill)
