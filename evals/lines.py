"""JSONL files of questions: an object a line, and errors that name the line."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 1 << 30  # bytes of a file, unpacked: all of it is held in memory


@dataclass(frozen=True)
class Lines:
    """The rows of a JSONL file, as objects, with the numbers of their lines."""

    path: str
    rows: tuple[tuple[int, dict[str, Any]], ...]
    content: bytes

    @classmethod
    def read(cls, path: str, limit: int = 0) -> "Lines":
        """The first `limit` rows of the file, 0 for all; a .gz is unpacked.

        ValueError names the line that is no JSON object.
        """
        content = read(path)
        rows = []
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: this is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}:{number}: a JSON object is wanted, this is a {type(row).__name__}"
                )
            rows.append((number, row))
            if len(rows) == limit:
                break
        if not rows:
            raise ValueError(f"{path} has no row")
        return cls(path, tuple(rows), content)

    def __iter__(self) -> Iterator["Fields"]:
        return (Fields(f"{self.path}:{number}", row) for number, row in self.rows)


def read(path: str) -> bytes:
    """The bytes of a file, unpacked if it is a .gz; a byte-order mark left out."""
    file = Path(path).expanduser()
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None
    if len(content) > LARGEST:
        raise ValueError(f"{path} has over {LARGEST >> 20} MiB; split it")
    return content.removeprefix(codecs.BOM_UTF8)


@dataclass(frozen=True)
class Fields:
    """A row of a JSONL file, asked for its fields; every ValueError names file and line."""

    where: str
    row: dict[str, Any]

    def wrong(self, what: str) -> ValueError:
        """An error about this row."""
        return ValueError(f"{self.where}: {what}")

    def text(self, *names: str) -> str:
        """The text under the first of `names` that is there."""
        value = self.get(*names)
        if not isinstance(value, str):
            raise self.wrong(f"{self.name(*names)!r} is {kind(value)}, it must be a text")
        return value

    def texts(self, name: str, least: int = 0) -> list[str]:
        """A list of texts."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.wrong(f"{name!r} must be a list of texts, this is {kind(value)}")
        if len(value) < least:
            raise self.wrong(f"{name!r} has {len(value)} texts, at least {least} are needed")
        return value

    def name(self, *names: str) -> str:
        """The first of `names` that is there. ValueError if none is."""
        for name in names:
            if name in self.row:
                return name
        wanted = " or ".join(map(repr, names))
        there = ", ".join(map(repr, list(self.row)[:8])) or "nothing"
        raise self.wrong(f"no field {wanted}, but {there}")

    def get(self, *names: str) -> Any:
        """What is under the first of `names` that is there."""
        return self.row[self.name(*names)]


def kind(value: Any) -> str:
    """What a JSON value is, for a message."""
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]
