"""Which documents of a source are trained on and which are held out for evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.documents import Files, Source

SAMPLE = 2_000_000  # bytes of text that a tokenizer is trained on
BLOCK = 8192  # bytes of it that come from one place


@dataclass(frozen=True)
class Split:
    """A source and the indices of its documents of either kind."""

    source: Source
    train: np.ndarray  # int64
    held_out: np.ndarray  # int64

    def describe(self) -> str:
        """One line for the terminal."""
        bad = self.source.bad
        line = (
            f"{self.source.spec}: {len(self.train):,} documents to train on, "
            f"{len(self.held_out):,} held out, {self.source.sizes.sum() / 1e6:,.1f} MB"
        )
        if bad.count:
            line += f"; {bad.count} bad rows left out: {'; '.join(bad.first[:3])}"
        return line


def split(source: Source, share: float) -> Split:
    """Hold out the documents whose content hash, as a fraction, lies below `share`.

    At least one document falls on either side, and documents of equal content on the same one. Of
    a lone document, the tail is held out. ValueError where that is impossible.
    """
    everything = np.arange(len(source))
    if not share:
        return Split(source, everything, everything[:0])
    if isinstance(source, Files) and source.rows == 1:
        at = source.cut_tail(share)
        everything = np.arange(len(source))
        return Split(source, everything[:at], everything[at:])
    distinct = np.unique(source.hashes)
    if len(distinct) == 1:
        raise ValueError(
            f"the {len(source)} documents of {source.spec!r} are all the same text, so that none "
            f"can be held out; set data.held_out=0"
        )
    held = source.hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))
    if not held.any():
        held = source.hashes == distinct[0]
    if held.all():
        held = source.hashes != distinct[-1]
    return Split(source, everything[~held], everything[held])


def sample(splits: Sequence[Split], size: int = SAMPLE) -> Iterator[str]:
    """About `size` bytes of the text to train on, from places spread evenly over all of it.

    ValueError if a source holds tokens instead of text.
    """
    for part in splits:
        if not part.source.has_text:
            raise ValueError(
                f"{part.source.spec!r} holds tokens, no text to train a tokenizer on; "
                f"set data.tokenizer={part.source.spec}"
            )
    sizes = np.concatenate([part.source.sizes[part.train] for part in splits])
    index = np.concatenate([part.train for part in splits])
    owner = np.repeat(np.arange(len(splits)), [len(part.train) for part in splits])
    stops = np.cumsum(sizes)
    total = int(stops[-1])
    if total <= size:
        for k, i in zip(owner, index, strict=True):
            yield splits[k].source.text(i)
        return
    count = max(size // BLOCK, 1)
    held, text = -1, ""
    for k in range(count):
        at = (2 * k + 1) * total // (2 * count)
        which = int(np.searchsorted(stops, at, side="right"))
        if which != held:
            held, text = which, splits[owner[which]].source.text(index[which])
        # characters stand for bytes here: in which place a block begins matters to nobody
        start = (at - int(stops[which] - sizes[which])) * len(text) // int(sizes[which])
        yield text[start : start + BLOCK]
