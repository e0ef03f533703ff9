"""Source: an indexed collection of documents; and Files, the kind that is made of text files."""

import abc
from collections.abc import Sequence

import numpy as np

from data.formats import TABLE, Bad, Scan, cut
from text.tokenizer import Tokenizer

SHORTEST = 64  # bytes of a lone document that can still be cut into two parts
LEAST_TAIL = 512  # bytes of a lone document that are held out, unless that is over a tenth


class Source(abc.ABC):
    """Documents 0 to len - 1, always in the same order whatever order a folder lists them in."""

    spec: str  # as the user named it
    sizes: np.ndarray  # int64 [documents], bytes of text
    hashes: np.ndarray  # uint64 [documents], of the content
    bad: Bad
    has_text = True

    def __len__(self) -> int:
        return len(self.sizes)

    @abc.abstractmethod
    def text(self, i: int) -> str:
        """Document `i`."""

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """Where document `i` begins: "file:line"."""

    def check(self, tokenizer: Tokenizer) -> None:  # noqa: B027, most sources take any
        """Raise ValueError unless `sequences` can be had with this tokenizer."""

    def sequences(self, indices: Sequence[int], tokenizer: Tokenizer) -> list[np.ndarray]:
        """Ids of each document with the end before and after them, [tokens + 2]."""
        end = np.array([tokenizer.end], np.int32)
        texts = [self.text(i) for i in indices]
        return [np.concatenate([end, ids, end]) for ids in tokenizer.encode(texts)]

    def beginning(self, i: int, tokenizer: Tokenizer, size: int) -> tuple[np.ndarray, int]:
        """Ids of at most the first `size` bytes of document `i`, with the ends; and the bytes."""
        text = self.text(i).encode()[:size].decode(errors="ignore")  # no half character
        end = np.array([tokenizer.end], np.int32)
        return np.concatenate([end, *tokenizer.encode([text]), end]), len(text.encode())


class Files(Source):
    """The documents of files."""

    def __init__(self, spec: str, scans: Sequence[Scan], bad: Bad):
        self.spec = spec
        self.bad = bad
        self.rows = sum(scan.rows for scan in scans)
        self._scans = [scan for scan in scans if scan.rows]
        tables = [scan.table for scan in self._scans]
        self._table = np.concatenate(tables) if tables else np.zeros(0, TABLE)
        self._file = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self._refresh()

    def _refresh(self) -> None:
        self.sizes = self._table["stop"] - self._table["start"]
        self.hashes = self._table["hash"]

    def text(self, i: int) -> str:
        return self._scans[self._file[i]].text(self._table[i])

    def name(self, i: int) -> str:
        return f"{self._scans[self._file[i]].path}:{self._table[i]['line']}"

    def cut_tail(self, share: float) -> int:
        """Cut the only document in two; returns how many of the now len(self) are before the cut.

        The part after it has about `share` of the bytes and begins a line where it can.
        ValueError if the document is too short.
        """
        total = int(self.sizes.sum())
        if total < SHORTEST:
            raise ValueError(
                f"{self.name(0)} is the only document of {self.spec!r} and its {total} bytes are "
                f"too few to hold out a part of them; set data.held_out=0"
            )
        tail = min(max(round(share * total), min(LEAST_TAIL, total // 10)), total - 1)
        stops = np.cumsum(self.sizes)
        i = int(np.searchsorted(stops, total - tail, side="right"))
        data = self.text(i).encode()
        near = int(total - tail - (stops[i] - self.sizes[i]))
        if near == 0:
            return i
        at = cut(data, 0, len(data), near, tail // 2)
        head, rest = self._table[i].copy(), self._table[i].copy()
        head["stop"] = rest["start"] = head["start"] + at
        if self._scans[0].field is None:
            rest["line"] += data[:at].count(b"\n")
        self._table = np.concatenate([self._table[:i], [head, rest], self._table[i + 1 :]])
        self._file = np.zeros(len(self._table), int)
        self._refresh()
        return i + 1
