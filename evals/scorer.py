"""Scorer: how likely a model finds given tokens.

Shapes: B rows, T tokens of a row, S scored places of a row, C of one chunk, D embed, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from inference.decode import Model
from sharding.layout import Layout
from text.tokenizer import Tokenizer

SHORTEST = 32  # tokens of the smallest bucket
TAIL = 32  # rows that score at most this many tokens have programs of their own


@dataclass(frozen=True)
class Row:
    """Ids, of which the last `scored` are predicted, each from all those before it."""

    ids: Sequence[int]
    scored: int

    def __post_init__(self):
        assert 1 <= self.scored < len(self.ids), "nothing tells of the first token of a row"


@dataclass(frozen=True)
class Scored:
    """What a model says of the scored tokens of a row."""

    logprobs: np.ndarray  # float32 [scored], nats
    greedy: bool  # each is the likeliest in its place

    @property
    def total(self) -> float:
        """Log-probability of all of them, nats."""
        return float(np.sum(self.logprobs, dtype=np.float64))


class Scorer:
    """Scores rows of any length, in batches of rows about as long as each other.

    Lengths are rounded up to buckets, and a program is compiled at most twice for each: for rows
    with few scored tokens, and for others. Rows that differ in their last id alone, as short
    choices do, go through the model once.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        tokenizer: Tokenizer,
        *,
        batch: int = 8,
        prefix: Sequence[int] = (),
        each: Callable[[int, int], None] = lambda done, rows: None,
    ):
        """`batch`: rows at one time. `prefix`: ids that begin a document even where the tokenizer
        says nothing of it. `each(done, rows)` is called before every batch; it may raise to stop.
        """
        self.model = model
        self.params = params  # others may take their place; programs stay compiled
        self.tokenizer = tokenizer
        self.prefix = tuple(prefix)
        self.batch = -(-batch // model.ways) * model.ways
        self.each = each
        chunk = max(model.cfg.arch.head.chunk * model.ways // self.batch, 1)
        self._score = jax.jit(functools.partial(score, model.graph, model.layout, chunk))

    @functools.cached_property
    def start(self) -> int:
        """The id that a text is scored after where it has nothing before it."""
        name = self.tokenizer.specials.get("bos_token")
        ids = self.tokenizer.prompt(name, whole=False) if name else []
        return ids[0] if len(ids) == 1 else self.tokenizer.end

    def document(self, text: str) -> list[int]:
        """The ids of a text from its beginning, which it may spell out itself ("<s>...")."""
        spelled = text.startswith(self.tokenizer.specials.get("bos_token") or "\0")
        ids = list(self.tokenizer.prompt(text, whole=not spelled))
        return ids if tuple(ids[: len(self.prefix)]) == self.prefix else [*self.prefix, *ids]

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        """What the model says of each row, in the order of `rows`."""
        found: list[Scored | None] = [None] * len(rows)
        done = 0
        with jax.set_mesh(self.model.mesh):
            for batch in batches(rows, self.batch):
                self.each(done, len(rows))
                arrays = fill([[rows[i] for i in group] for group in batch], self.batch)
                placed = map(self.model.place, arrays)
                logprobs, greedy = jax.device_get(self._score(self.params, *placed))
                for b, group in enumerate(batch):
                    at = 0
                    for i in group:
                        own = slice(at, at := at + rows[i].scored)
                        found[i] = Scored(logprobs[b, own].copy(), bool(greedy[b, own].all()))
                    done += len(group)
        return found


def batches(rows: Sequence[Row], size: int) -> Iterator[list[list[int]]]:
    """The numbers of rows, in groups that share their inputs, `size` groups at a time.

    Longest first, so that memory runs out early; at most TAIL scored tokens in a group, or else
    in none of the batch.
    """
    few: dict[tuple[bytes, int], list[int]] = {}
    many, room = [], {}
    for i, row in enumerate(rows):
        if row.scored > TAIL:
            many.append([i])
            continue
        inputs = np.asarray(row.ids[:-1], np.int32).tobytes()
        count, left = room.get(inputs, (0, TAIL))
        if row.scored > left:
            count, left = count + 1, TAIL
        room[inputs] = count, left - row.scored
        few.setdefault((inputs, count), []).append(i)
    for groups in (many, list(few.values())):
        groups.sort(key=lambda group: -len(rows[group[0]].ids))
        yield from (groups[at : at + size] for at in range(0, len(groups), size))


def bucket(tokens: int) -> int:
    """The least of 32, 48, 64, 96, 128 ... that is not below `tokens`."""
    size = SHORTEST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def fill(batch: Sequence[Sequence[Row]], rows: int) -> tuple[np.ndarray, ...]:
    """Inputs, positions, segments, places and targets of a batch; the first three are [B, T].

    Places and targets [B, S] say where the hidden state stands that is to tell of which id. Rows
    are padded on the right, and there are `rows` of them.
    """
    T = bucket(max(len(group[0].ids) for group in batch) - 1)
    few = batch[0][0].scored <= TAIL
    inputs = np.zeros((rows, T), np.int32)
    segments = np.zeros_like(inputs)
    places = np.zeros((rows, TAIL if few else T), np.int32)
    targets = np.zeros_like(places)
    for b, group in enumerate(batch):
        n, at = len(group[0].ids) - 1, 0
        inputs[b, :n] = group[0].ids[:-1]
        segments[b, :n] = 1
        for row in group:
            own = slice(at, at := at + row.scored)
            places[b, own] = np.arange(n - row.scored, n)
            targets[b, own] = row.ids[n + 1 - row.scored :]
    positions = np.arange(T, dtype=np.int32) * segments  # padding may lie beyond learned ones
    return inputs, positions, segments, places, targets


def score(
    graph: nnx.GraphDef,
    layout: Layout,
    chunk: int,
    params: Any,
    inputs_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    places_BS: jax.Array,
    targets_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities float32, whether it is the likeliest) of each target, [B, S].

    The logits of at most `chunk` places of a row exist at one time.
    """
    model = nnx.merge(graph, params)
    x_BTD = model(inputs_BT, positions_BT, segments_BT)
    pick = jax.shard_map(
        lambda x_BTD, places_BS: jnp.take_along_axis(x_BTD, places_BS[..., None], axis=1),
        out_specs=layout.spec("batch", None, None),
    )
    x_BSD, S = pick(x_BTD, places_BS), places_BS.shape[1]

    def one_chunk(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = (
            lax.dynamic_slice_in_dim(array, at, C, axis=1) for array in (x_BSD, targets_BS)
        )
        z_BCV = model.head.logits(x_BCD, model.table())
        where = jax.typeof(z_BCV).sharding
        ids_BCV = lax.broadcasted_iota(jnp.int32, z_BCV.shape, 2, out_sharding=where)
        own_BC = jnp.sum(jnp.where(ids_BCV == targets_BC[..., None], z_BCV, 0), axis=-1)
        # Devices talk over `vocab`: these need all of it, two numbers of 4 bytes a place.
        top_BC = jnp.max(z_BCV, axis=-1)
        total_BC = jnp.sum(jnp.exp(z_BCV - top_BC[..., None]), axis=-1)
        return own_BC - top_BC - jnp.log(total_BC), own_BC >= top_BC

    C = next(size for size in range(min(chunk, S), 0, -1) if S % size == 0)
    if C == S:
        return one_chunk(0)
    parts = lax.map(one_chunk, jnp.arange(0, S, C))  # [S / C, B, C]
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], S), parts)
