"""The endless stream of documents that a run trains on, cut into windows whose rows are planned.

The order of a source's documents is a shuffle by (seed, source, epoch). A mixture takes the next
document from the source that is furthest behind its share of the tokens. A window is the next
documents with a certain number of tokens; its rows are packed, then shuffled. All of it is a pure
function of the sources, the tokenizer, `seq`, the weights and the seed.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from data import packing
from data.packing import Plan
from data.shuffle import permute
from data.split import Split
from text.tokenizer import Tokenizer

WINDOW = 1 << 19  # tokens of a window, or WINDOW_ROWS rows if that is more
WINDOW_ROWS = 256
FIRST_WINDOW = 1 << 16  # tokens of window 0: soon ready; each that follows is twice as large
READ = 1 << 16  # bytes of text tokenized at once, at least

ORDER = 1 << 12  # places of the shuffle worked out at once


@dataclass(frozen=True)
class Window:
    """Documents and the plan of their rows."""

    before: dict  # state of the stream of windows before this one
    after: dict
    samples: list[tuple[int, int, int]]  # (source, epoch, document) of each document
    sequences: list[np.ndarray]  # ids of each document with the ends around them
    plan: Plan
    rows: list[int]  # of the plan, in the order of training


class Stream:
    """One shuffled endless stream over some documents."""

    def __init__(self, members: Sequence[tuple[int, Split]], tokenizer: Tokenizer, key: tuple):
        """`members` are sources with their number; `key` names the shuffle."""
        self._sources = {number: part.source for number, part in members}
        self._number = np.concatenate([np.full(len(p.train), n) for n, p in members])
        self._index = np.concatenate([p.train for _, p in members])
        self._tokenizer = tokenizer
        self._key = key
        self._bytes_per_token = 1.0
        self._order: tuple[int, int, list[int]] | None = None  # epoch, first place, documents
        self.restore(0)

    def __len__(self) -> int:
        return len(self._index)

    def restore(self, position: int) -> None:
        """Go to the document number `position` of the stream."""
        self.position = position  # of the next document taken
        self._ready: deque[tuple[tuple[int, int, int], np.ndarray]] = deque()

    def take(self, wanted: int) -> tuple[tuple[int, int, int], np.ndarray]:
        """The next document, ((source, epoch, index), ids); reads ahead for `wanted` tokens."""
        if not self._ready:
            self._read(wanted)
        self.position += 1
        return self._ready.popleft()

    def _at(self, position: int) -> tuple[int, int, int]:
        """(source, epoch, index) of the document at `position` of the stream."""
        epoch, place = divmod(position, len(self))
        start = place - place % ORDER
        if self._order is None or self._order[:2] != (epoch, start):
            places = np.arange(start, min(start + ORDER, len(self)))
            self._order = epoch, start, permute(places, len(self), *self._key, epoch).tolist()
        i = self._order[2][place - start]
        return int(self._number[i]), epoch, int(self._index[i])

    def _read(self, wanted: int) -> None:
        """Tokenize the next documents, about as many as hold `wanted` tokens."""
        samples, size = [], 0
        while not samples or size < max(wanted * self._bytes_per_token, READ):
            number, epoch, index = self._at(self.position + len(samples))
            samples.append((number, epoch, index))
            size += int(self._sources[number].sizes[index]) + 1
        found = {}
        for number, source in self._sources.items():
            unique = sorted({index for n, _, index in samples if n == number})
            ids = source.sequences(unique, self._tokenizer)
            found.update(zip(((number, index) for index in unique), ids, strict=True))
        for sample in samples:
            self._ready.append((sample, found[sample[0], sample[2]]))
        self._bytes_per_token = size / sum(len(ids) - 1 for _, ids in self._ready)


class Windows(grain.IterDataset):
    """Windows without end, as a grain dataset; the state of its iterator is a few numbers."""

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float],
        tokenizer: Tokenizer,
        seq: int,
        seed: int,
        tokens: int | None = None,
        documents: int = 0,
    ):
        """`tokens` is the size of every window; None: as the constants above say.

        `documents` is the most of a row; 0: any number.
        """
        super().__init__()
        for part in splits:
            part.source.check(tokenizer)
        members = list(enumerate(splits))
        if weights:
            groups = [[member] for member, weight in zip(members, weights, strict=True) if weight]
        else:
            groups = [members]
        total = sum(weights)
        self.weights = [weight / total for weight in weights if weight] or [1.0]
        self.seq, self.seed, self.tokens = seq, seed, tokens
        self.documents = documents
        self._make = lambda: [
            Stream(group, tokenizer, ("documents", seed, k)) for k, group in enumerate(groups)
        ]

    def __iter__(self) -> "_WindowIterator":
        return _WindowIterator(self, self._make())

    def size(self, number: int) -> int:
        """Tokens of window `number`, at least."""
        if self.tokens is not None:
            return self.tokens
        rising = FIRST_WINDOW << min(number, 32)
        return max(WINDOW_ROWS * self.seq, min(rising, WINDOW))


class _WindowIterator(grain.DatasetIterator):
    def __init__(self, windows: Windows, streams: list[Stream]):
        super().__init__()
        self._windows = windows
        self._streams = streams
        self._number = 0
        self._tokens = [0] * len(streams)  # targets taken of each stream so far

    def get_state(self) -> dict:
        return {
            "number": self._number,
            "documents": [len(stream) for stream in self._streams],
            "positions": [stream.position for stream in self._streams],
            "tokens": list(self._tokens),
        }

    def set_state(self, state: dict) -> None:
        documents = [len(stream) for stream in self._streams]
        if list(state["documents"]) != documents:
            raise ValueError(
                f"the saved data position is in sources of {state['documents']} documents, these "
                f"have {documents}: they are not the data that the run was trained on"
            )
        self._number = state["number"]
        self._tokens = list(state["tokens"])
        for stream, position in zip(self._streams, state["positions"], strict=True):
            stream.restore(position)

    def __next__(self) -> Window:
        before = self.get_state()
        size = self._windows.size(self._number)
        samples, sequences, have = [], [], 0
        weights = self._windows.weights
        while have < size:
            k = min(range(len(weights)), key=lambda k: self._tokens[k] / weights[k])
            sample, ids = self._streams[k].take(int((size - have) * weights[k]) + 1)
            samples.append(sample)
            sequences.append(ids)
            self._tokens[k] += len(ids) - 1
            have += len(ids) - 1
        windows, lengths = self._windows, np.array([len(ids) - 1 for ids in sequences])
        plan = packing.plan(lengths, windows.seq, windows.documents)
        key = ("rows", self._windows.seed, self._number)
        rows = permute(np.arange(plan.rows), plan.rows, *key).tolist()
        self._number += 1
        return Window(before, self.get_state(), samples, sequences, plan, rows)
