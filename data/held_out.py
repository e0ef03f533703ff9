"""The held-out documents as a fixed list of batches, with the bytes of text that they cover."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data import packing
from data.config import DataConfig
from data.split import Split
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """Batches to score: bits per byte = nats of all targets / ln 2 / bytes."""

    batches: tuple[dict[str, np.ndarray], ...]  # packing.ARRAYS, int32 [rows, seq]
    bytes: int  # of text, in the batches of all processes together
    documents: int


def held_out_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    sources: Sequence[Split],
    *,
    bytes: int,
    rows: Sequence[int],
) -> HeldOut:
    """The held-out documents of all sources in the order of their hashes, `bytes` of text at most.

    The last document is cut so that any tokenizer covers the same text (of shards: the same share
    of its tokens). `rows`, within [0, batch), are those of this process; the last batch is filled
    up with empty rows. Without held-out documents there is no batch.
    """
    places = [
        (int(p.source.hashes[i]), k, int(i)) for k, p in enumerate(sources) for i in p.held_out
    ]
    sequences, covered = [], 0
    for _, k, i in sorted(places):
        if covered >= bytes:
            break
        source = sources[k].source
        source.check(tokenizer)
        size = int(source.sizes[i])
        ids, size = source.beginning(i, tokenizer, min(size, bytes - covered))
        if size:
            sequences.append(ids)
            covered += size
    if not sequences:
        return HeldOut((), 0, 0)
    plan = packing.plan(np.array([len(ids) - 1 for ids in sequences]), config.seq, config.documents)
    batches = []
    for step in range(math.ceil(plan.rows / config.batch)):
        wanted = [step * config.batch + row for row in rows]
        wanted = [row if row < plan.rows else -1 for row in wanted]
        made = packing.fill(plan, wanted, sequences.__getitem__, config.seq, across=config.across)
        batches.append(made)
    return HeldOut(tuple(batches), covered, len(sequences))
