"""Loader: the batches of a run, read ahead, resumable, and the same for any number of processes.

Batch s is the rows s * batch to s * batch + batch - 1 of one endless sequence of rows, which
depends on the seed and the config alone. Each process plans (and, of text, tokenizes) every window
whole, and makes the arrays of its own rows only.
"""

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from data import packing
from data.config import DataConfig
from data.split import Split
from data.stream import Window, Windows
from text.tokenizer import Tokenizer

BATCHES_AHEAD = 4
WINDOWS_AHEAD = 1

Sample = tuple[int, int, int, int]  # source, epoch, document, first token of the piece in it


@dataclass(frozen=True)
class Batch:
    """Rows of one step."""

    arrays: dict[str, np.ndarray]  # packing.ARRAYS, int32 [rows, seq]
    samples: tuple[tuple[Sample, ...], ...]  # the pieces of each row


class Loader:
    """An endless iterator of batches; `close` it, or use it as a context manager."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        sources: Sequence[Split],
        *,
        seed: int,
        rows: Sequence[int],
        window: int | None = None,
        ahead: int = BATCHES_AHEAD,
    ):
        """`rows` are the indices, within [0, batch), that this process must supply.

        `window` is the number of tokens planned at a time (default: data/stream.py); the rows
        depend on it. `ahead` batches are made before they are asked for.
        """
        if not all(0 <= row < config.batch for row in rows):
            raise ValueError(f"rows={list(rows)} must lie in 0 to {config.batch - 1}")
        windows = Windows(
            sources, config.weights, tokenizer, config.seq, seed, window, config.documents
        )
        batches = _Batches(
            ThreadPrefetchIterDataset(windows, prefetch_buffer_size=WINDOWS_AHEAD),
            config,
            tuple(rows),
        )
        # In a list, so that closing lets go of it: grain's __del__ fails at interpreter exit.
        self._iterators = [iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead))]
        self._finalizer = weakref.finalize(self, _close, self._iterators)
        self._padding = self._places = 0
        self.waited_s = 0.0  # seconds that the last `next` waited for its batch

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._iterators:
            raise RuntimeError("the loader is closed")
        return self._iterators[0]

    @property
    def waste(self) -> float:
        """Share of padding in the batches returned."""
        return self._padding / self._places if self._places else 0.0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._iterator)
        self.waited_s = time.perf_counter() - start
        segments = batch.arrays["segments"]
        self._padding += segments.size - np.count_nonzero(segments)
        self._places += segments.size
        return batch

    def start(self) -> None:
        """Begin to read ahead before the first batch is asked for."""
        self._iterator.start_prefetch()

    def state(self) -> dict:
        """Where the last returned batch ended, as small JSON."""
        return self._iterator.get_state()

    def restore(self, state: dict) -> None:
        """Go on after the batch whose `state` this is; ValueError if the sources are others."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Stop the threads; the loader is of no more use."""
        self._finalizer()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _close(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class _Batches(grain.IterDataset):
    """Batches out of windows, as a grain dataset."""

    def __init__(self, windows: grain.IterDataset, config: DataConfig, rows: tuple[int, ...]):
        super().__init__(windows)
        self.batch, self.seq, self.across = config.batch, config.seq, config.across
        self.rows = rows

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self._parent.__iter__(), self)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, windows: grain.DatasetIterator, batches: _Batches):
        super().__init__(windows)
        self._batches = batches
        self._window: Window | None = None
        self._row = 0  # the next of the window
        self._step = 0

    def get_state(self) -> dict:
        window, row = self._parent.get_state(), self._row
        if self._window is not None:
            whole = self._row == len(self._window.rows)
            window = self._window.after if whole else self._window.before
            row = 0 if whole else self._row
        return {"step": self._step, "row": row, "window": window}

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state["window"])
        self._window = None
        self._row = state["row"]
        self._step = state["step"]

    def __next__(self) -> Batch:
        parts = []
        wanted = set(self._batches.rows)
        made = 0
        while made < self._batches.batch:
            if self._window is None:
                self._window = next(self._parent)
            elif self._row == len(self._window.rows):
                self._window, self._row = next(self._parent), 0
            count = min(self._batches.batch - made, len(self._window.rows) - self._row)
            own = {i: self._row + i - made for i in range(made, made + count) if i in wanted}
            parts.append((self._window, own))
            made += count
            self._row += count
        self._step += 1
        return self._assemble(parts)

    def _assemble(self, parts: list[tuple[Window, dict[int, int]]]) -> Batch:
        """The rows of this process out of (window, {row of the batch: row of the window})."""
        shape = (len(self._batches.rows), self._batches.seq)
        arrays = {name: np.zeros(shape, np.int32) for name in packing.ARRAYS}
        samples: list[tuple[Sample, ...]] = [()] * shape[0]
        for window, own in parts:
            places = [k for k, row in enumerate(self._batches.rows) if row in own]
            rows = [window.rows[own[self._batches.rows[k]]] for k in places]
            made = packing.fill(
                window.plan, rows, window.sequences.__getitem__, shape[1],
                across=self._batches.across,
            )  # fmt: skip
            for name, array in made.items():
                arrays[name][places] = array
            for k, row in zip(places, rows, strict=True):
                pieces = window.plan.pieces(row)
                documents = window.plan.document[pieces].tolist()
                firsts = window.plan.first[pieces].tolist()
                samples[k] = tuple(
                    (*window.samples[i], first) for i, first in zip(documents, firsts, strict=True)
                )
        return Batch(arrays, tuple(samples))
