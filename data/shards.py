"""Shards: documents already tokenized, in a folder that `python -m tools.prepare` writes.

manifest.json     counts, sizes, what was read with which settings, digest of the tokenizer
tokenizer.json    the tokenizer
documents.npy     a row of DOCUMENTS per document
tokens-00000.bin  end, document, end, document, ... end; uint16, or uint32 for larger vocabularies

The manifest is written last: a folder without one is no source.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.documents import Source
from data.formats import Bad
from data.split import Split
from text import cache
from text.tokenizer import Tokenizer, from_json

MANIFEST = "manifest.json"
FORMAT = "meshlm shards 1"
SHARD = 1 << 28  # tokens of a file, about
BATCH = 4 << 20  # bytes of text tokenized at a time
DOCUMENTS = np.dtype(
    [
        ("shard", "<i4"),
        ("start", "<i8"),  # of the end token before it
        ("tokens", "<i8"),  # without the ends
        ("bytes", "<i8"),  # of text
        ("hash", "<u8"),
        ("held_out", "?"),
    ]
)


class Shards(Source):
    """The documents of a folder of shards; reads of its tokens are reads of mapped memory."""

    has_text = False

    def __init__(self, spec: str, folder: Path):
        self.spec = spec
        self.bad = Bad()
        self._folder = folder
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self._documents = np.load(folder / "documents.npy")
            counts = (len(self._documents), self._documents.dtype)
            dtype = np.dtype(self.manifest["dtype"])
            if counts != (self.manifest["documents"], DOCUMENTS):
                raise ValueError(f"documents.npy holds {counts[0]} documents")
            self._tokens = []
            for shard in self.manifest["shards"]:
                path = folder / shard["file"]
                if path.stat().st_size != shard["tokens"] * dtype.itemsize:
                    raise ValueError(f"{shard['file']} has {path.stat().st_size} bytes")
                self._tokens.append(np.asarray(np.memmap(path, dtype, "r")))  # slices faster
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(
                f"{spec!r} is a damaged folder of shards ({error!r}): make it again"
            ) from None
        self.sizes = self._documents["bytes"]
        self.hashes = self._documents["hash"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What the documents were tokenized with."""
        return from_json((self._folder / "tokenizer.json").read_text(encoding="utf-8"))

    def text(self, i: int) -> str:
        return self.tokenizer.decode(self._sequence(i))

    def name(self, i: int) -> str:
        return f"{self._folder}:{i}"

    def check(self, tokenizer: Tokenizer) -> None:
        if tokenizer.digest != self.manifest["tokenizer"]:
            raise ValueError(
                f"{self.spec!r} was tokenized with another tokenizer ({self.manifest['size']} ids) "
                f"than data.tokenizer ({tokenizer.size} ids); set data.tokenizer={self.spec}"
            )

    def sequences(self, indices: Sequence[int], tokenizer: Tokenizer) -> list[np.ndarray]:
        return [self._sequence(i) for i in indices]

    def beginning(self, i: int, tokenizer: Tokenizer, size: int) -> tuple[np.ndarray, int]:
        ids, whole = self._sequence(i), int(self.sizes[i])
        if size >= whole:
            return ids, whole
        count = (len(ids) - 2) * size // whole  # the bytes of a token are not known: an estimate
        return np.concatenate([ids[: count + 1], ids[-1:]]), whole * count // (len(ids) - 2)

    def _sequence(self, i: int) -> np.ndarray:
        row = self._documents[i]
        return self._tokens[row["shard"]][row["start"] : row["start"] + row["tokens"] + 2]

    def split(self, share: float) -> Split:
        """The split made when the folder was; ValueError if that held out another share."""
        everything = np.arange(len(self))
        if not share:
            return Split(self, everything, everything[:0])
        if share != self.manifest["held_out"]:
            raise ValueError(
                f"{self.spec!r} was prepared with held_out={self.manifest['held_out']}, not "
                f"{share}: set data.held_out to that or to 0, or prepare it again"
            )
        held = self._documents["held_out"]
        return Split(self, everything[~held], everything[held])


def write(
    folder: Path,
    splits: Sequence[Split],
    tokenizer: Tokenizer,
    config: DataConfig,
    progress: Callable[[int], None] = lambda size: None,
    shard: int = SHARD,
) -> dict:
    """Tokenize all documents into `folder`; returns the manifest.

    `progress` is told the bytes of text done so far. ValueError if the folder holds shards.
    """
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} already holds shards; remove it or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
    tables, done = [], 0
    with contextlib.closing(_Writer(folder, dtype, shard)) as writer:
        for part in splits:
            part.source.check(tokenizer)
            table = np.zeros(len(part.source), DOCUMENTS)
            table["bytes"], table["hash"] = part.source.sizes, part.source.hashes
            table["held_out"][part.held_out] = True
            tables.append(table)
            for batch in _batches(part.source.sizes):
                for i, ids in zip(batch, part.source.sequences(batch, tokenizer), strict=True):
                    table["tokens"][i] = len(ids) - 2
                    table["shard"][i], table["start"][i] = writer.append(ids)
                done += int(part.source.sizes[batch].sum())
                progress(done)
    documents = np.concatenate(tables)
    cache.write(
        folder / "tokenizer.json", lambda p: p.write_text(tokenizer.to_json(), encoding="utf-8")
    )
    cache.write(folder / "documents.npy", lambda p: _save(p, documents))
    manifest = {
        "format": FORMAT,
        "documents": len(documents),
        "tokens": int(documents["tokens"].sum()),
        "bytes": int(documents["bytes"].sum()),
        "dtype": dtype.name,
        "size": tokenizer.size,
        "end": tokenizer.end,
        "tokenizer": tokenizer.digest,
        "held_out": config.held_out,
        "held_out_documents": int(documents["held_out"].sum()),
        "sources": list(config.sources),
        "field": config.field,
        "bad_rows": sum(part.source.bad.count for part in splits),
        "shards": writer.shards,
    }
    text = json.dumps(manifest, indent=1)
    cache.write(folder / MANIFEST, lambda p: p.write_text(text, encoding="utf-8"))
    return manifest


class _Writer:
    """Appends documents to the token files of a folder."""

    def __init__(self, folder: Path, dtype: np.dtype, limit: int):
        self.shards: list[dict] = []
        self._folder, self._dtype, self._limit = folder, dtype, limit
        self._file = None

    def append(self, ids: np.ndarray) -> tuple[int, int]:
        """Write [end, document, end]; returns the shard and the place of the first end in it."""
        if self._file is None or self.shards[-1]["tokens"] >= self._limit:
            self.close()
            self.shards.append({"file": f"tokens-{len(self.shards):05}.bin", "tokens": 0})
            self._file = open(self._folder / self.shards[-1]["file"], "wb")  # noqa: SIM115
        shard = self.shards[-1]
        if shard["tokens"]:
            ids = ids[1:]  # the end before this document is the one after its neighbour
        start = max(shard["tokens"] - 1, 0)
        self._file.write(ids.astype(self._dtype).tobytes())
        shard["tokens"] += len(ids)
        return len(self.shards) - 1, start

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _batches(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """The indices 0 to len - 1, in order, in runs of about BATCH bytes of text."""
    if len(sizes):
        stops = np.cumsum(sizes)
        yield from np.split(np.arange(len(sizes)), 1 + np.flatnonzero(np.diff(stops // BATCH)))


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
