"""Packing: how documents are laid into rows of `seq` tokens, and the making of those rows.

A document of n tokens is the sequence [end] + tokens + [end]: n + 1 inputs, each with the token
after it as its target. What is longer than a row is cut into pieces; each token of the document is
a target exactly once. A piece is a segment of its row: its positions start at 0 and its segment
id, from 1, tells it from its neighbours. Padding has segment 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WASTE = 0.01  # share of padding at which documents are split to fill rows
ARRAYS = ("inputs", "targets", "positions", "segments")


@dataclass(frozen=True)
class Plan:
    """Pieces of documents, sorted by row."""

    document: np.ndarray  # int64 [pieces], index into the planned documents
    first: np.ndarray  # int64 [pieces], the piece's first input within its document
    length: np.ndarray  # int64 [pieces], inputs
    starts: np.ndarray  # int64 [rows + 1], the first piece of each row

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def pieces(self, row: int) -> slice:
        return slice(int(self.starts[row]), int(self.starts[row + 1]))


def plan(lengths: np.ndarray, seq: int, documents: int = 0) -> Plan:
    """Lay documents of `lengths` inputs, each at least 1, into rows of `seq`.

    Whole pieces go where they fit best, the longest first. If more than WASTE would be padding,
    the emptiest rows are emptied into the gaps of the others. Padding is at most WASTE or one row.
    With a bound of `documents` for a row, a row of more is cut into several, and padded.
    """
    lengths = np.asarray(lengths, np.int64)
    count = -(-lengths // seq)
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    first = number * seq
    length = np.minimum(lengths[document] - first, seq)
    row = _best_fit(length, seq)
    filled = np.bincount(row, length).astype(np.int64)
    total = int(length.sum())
    allowed = max(-(-total // seq), int(total / (seq * (1 - WASTE))))
    if len(filled) > allowed:
        document, first, length, row = _pour(
            (document, first, length, row), seq - filled, len(filled) - allowed
        )
    order = np.argsort(row, kind="stable")
    if documents:
        first_of = np.searchsorted(row[order], row[order])
        parts = (np.arange(len(row)) - first_of) // documents
        _, row[order] = np.unique(np.stack([row[order], parts]), axis=1, return_inverse=True)
    rows = int(row.max()) + 1
    starts = np.searchsorted(row[order], np.arange(rows + 1))
    return Plan(document[order], first[order], length[order], starts)


def _best_fit(length: np.ndarray, seq: int) -> np.ndarray:
    """The row of each piece: best-fit decreasing, all pieces of one length together."""
    order = np.argsort(-length, kind="stable")
    at = np.flatnonzero(np.diff(length[order], prepend=-1))  # where another length begins
    bounds = [*at.tolist(), len(order)]
    row_of = np.empty(len(length), np.int64)
    rows = 0
    by_space: dict[int, list[np.ndarray]] = {}  # rows that have just this much room
    spaces = 0  # bit s is set where by_space[s] has rows
    for i in range(len(at)):
        ids = order[bounds[i] : bounds[i + 1]]
        size = int(length[ids[0]])
        while len(ids):
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                found = by_space.pop(space)
                spaces ^= 1 << space
                free = found[0] if len(found) == 1 else np.concatenate(found)
            else:
                space = seq
                free = np.arange(rows, rows - (-len(ids) // (seq // size)))
                rows += len(free)
            each = space // size
            used = min(len(free), -(-len(ids) // each))
            now = ids[: used * each]
            row_of[now] = free[np.arange(len(now)) // each]
            last = len(now) - (used - 1) * each  # pieces in the last of these rows
            ids = ids[len(now) :]
            for left, group in (
                (space, free[used:]),
                (space - each * size, free[: used - 1]),
                (space - last * size, free[used - 1 : used]),
            ):
                if left and len(group):
                    by_space.setdefault(left, []).append(group)
                    spaces |= 1 << left
    return row_of


def _pour(pieces: tuple[np.ndarray, ...], gaps: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
    """Empty the `rows` rows with the largest gaps into the gaps of the others, largest first.

    `pieces` is (document, first, length, row); they come back with rows numbered anew.
    """
    order = np.argsort(-gaps, kind="stable")
    poured = np.zeros(len(gaps), bool)
    poured[order[:rows]] = True
    moves = poured[pieces[3]]
    document, first, length, _ = (part[moves] for part in pieces)
    targets = order[rows:]
    piece_stops = np.cumsum(length)
    gap_stops = np.cumsum(gaps[targets])
    # both the end of a piece and the end of a gap begin a new fragment
    stops = np.union1d(piece_stops, gap_stops[gap_stops < piece_stops[-1]])
    begins = np.concatenate([[0], stops[:-1]])
    piece = np.searchsorted(piece_stops, begins, side="right")
    gap = np.searchsorted(gap_stops, begins, side="right")
    within = begins - (piece_stops[piece] - length[piece])
    fragments = (document[piece], first[piece] + within, stops - begins, targets[gap])
    whole = tuple(np.concatenate([a[~moves], b]) for a, b in zip(pieces, fragments, strict=True))
    number = np.cumsum(~poured) - 1
    return (*whole[:3], number[whole[3]])


def fill(
    plan: Plan,
    rows: Sequence[int],
    sequence: Callable[[int], np.ndarray],
    seq: int,
    *,
    across: bool = False,
) -> dict[str, np.ndarray]:
    """Make `rows` of a plan: ARRAYS, each int32 [rows, seq].

    `sequence` gives the ids of a planned document with the ends around them. A row below 0 is
    padding throughout. With `across` all pieces of a row are one segment.
    """
    arrays = {name: np.zeros((len(rows), seq), np.int32) for name in ARRAYS}
    for k, row in enumerate(rows):
        if row >= 0:
            own = plan.pieces(row)
            _fill_row(
                {name: array[k] for name, array in arrays.items()},
                zip(plan.document[own].tolist(), plan.first[own].tolist(), strict=True),
                plan.length[own],
                sequence,
            )
    if across:
        arrays["positions"] = np.where(arrays["segments"] > 0, np.arange(seq, dtype=np.int32), 0)
        arrays["segments"] = np.minimum(arrays["segments"], 1)
    return arrays


def _fill_row(
    row: dict[str, np.ndarray],
    pieces: Iterable[tuple[int, int]],
    length: np.ndarray,
    sequence: Callable[[int], np.ndarray],
) -> None:
    """Write the pieces (document, first) of `length` inputs into the arrays of one row."""
    spans = zip(pieces, length.tolist(), strict=True)
    ids = np.concatenate([sequence(i)[a : a + n + 1] for (i, a), n in spans])
    stops = np.cumsum(length + 1)  # each piece brings one id more than it has inputs
    used = len(ids) - len(length)
    row["inputs"][:used] = np.delete(ids, stops - 1)
    row["targets"][:used] = np.delete(ids, stops - length - 1)
    starts = np.cumsum(length) - length
    row["positions"][:used] = np.arange(used) - np.repeat(starts, length)
    row["segments"][:used] = np.repeat(np.arange(1, len(length) + 1), length)
