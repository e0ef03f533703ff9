"""Context parallelism: rows whose tokens are split over devices, and attention over such rows.

Ring attention, Liu et al. 2023, arXiv:2310.01889: a device keeps its queries; keys and values go
from device to device, and what each visit adds is merged by its log-sum-exp. Under a causal mask
later tokens see more, so P devices share a row as 2P chunks, device i has chunks i and 2P - 1 - i
(zigzag; Llama 3, arXiv:2407.21783, section 3.3.2), and each has as many pairs of chunks to work on.

Shapes: B rows, T tokens of a device, C its chunks, N tokens of a chunk, K kv heads, G query heads
per kv head, H head size.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sharding.gather import axes_of

UNSEEN = -1e30  # log-sum-exp of a query that has seen nothing: less than any, and finite


# ---- which device has which tokens, and what they see --------------------------------------------


def chunks(ways: int, causal: bool) -> tuple[tuple[int, ...], ...]:
    """The chunks of each device, by their number in the row; unless causal, one in turn."""
    return tuple((i, 2 * ways - 1 - i) if causal else (i,) for i in range(ways))


def order(tokens: int, ways: int, causal: bool) -> np.ndarray:
    """[tokens] int: the place in the row of each token, as the row is laid over `ways` devices."""
    held = np.array(chunks(ways, causal)).reshape(-1)
    return np.arange(tokens).reshape(held.size, -1)[held].reshape(-1)


def lay(rows: np.ndarray, where: jax.NamedSharding, causal: bool) -> np.ndarray:
    """[rows, tokens, ...] with the tokens of each row in the order that this sharding wants."""
    ways = math.prod(where.mesh.shape[axis] for axis in axes_of(where.spec[1]))
    return rows if ways == 1 else rows[:, order(rows.shape[1], ways, causal)]


@dataclass(frozen=True, order=True)
class Part:
    """What a chunk of queries sees of a chunk of keys.

    The first `tokens` queries see the last `tokens` keys, in places t and s counted from the first
    of these: if causal those with s <= t, and those with t - s < window (0: however far).
    """

    tokens: int
    causal: bool = False
    window: int = 0


@dataclass(frozen=True)
class Pair:
    """Work: chunk `q` of a device's queries and chunk `k` of the keys that visit it."""

    part: Part
    q: int
    k: int

    def rank(self) -> tuple:
        """Sorts the work of each device so that theirs is alike."""
        return not self.part.causal, -self.part.tokens, self.q, self.k


Slot = tuple[Pair | None, ...]  # of each device


@dataclass(frozen=True)
class Visit:
    """The keys of device i - shift at device i: one slot after another, a pair or None in each."""

    shift: int
    slots: tuple[Slot, ...]


def part_of(apart: int, tokens: int, window: int, causal: bool) -> Part | None:
    """What queries see of the keys `apart` chunks of `tokens` before theirs; None: nothing."""
    if not causal or (apart > 0 and (not window or window >= (apart + 1) * tokens)):
        return Part(tokens)
    if apart == 0:
        return Part(tokens, causal=True, window=window if window < tokens else 0)
    seen = min(tokens, window - 1 - (apart - 1) * tokens)  # a corner: early queries, late keys
    if apart < 0 or seen <= 0:
        return None
    return Part(seen, window=window - apart * tokens + tokens - seen)


def visits(ways: int, tokens: int, window: int, causal: bool) -> tuple[Visit, ...]:
    """The visits in which anyone sees anything, by their shift; chunks have `tokens` tokens."""
    held = chunks(ways, causal)

    def work(i: int, j: int) -> list[Pair]:
        pairs = itertools.product(enumerate(held[i]), enumerate(held[j]))
        parts = ((part_of(x - y, tokens, window, causal), q, k) for (q, x), (k, y) in pairs)
        return sorted((Pair(*one) for one in parts if one[0]), key=Pair.rank)

    each = [[work(i, (i - shift) % ways) for i in range(ways)] for shift in range(ways)]
    found = (Visit(s, tuple(itertools.zip_longest(*pairs))) for s, pairs in enumerate(each))
    return tuple(visit for visit in found if visit.slots)


# ---- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """An engine for the attention of some queries to some keys.

    forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, segments_BS, causal=, window=) gives the output
    [B, T, K, G, H] and the log-sum-exp [B, T, K, G] float32, of a query that sees no key UNSEEN or
    less and any finite output. backward(*the same, o, lse, do) gives (dq, dk, dv), for o and lse
    over all keys. `causal` and `window` mean what they mean in Part, and are static.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def ring_attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    block: Block,
    window: int = 0,
    causal: bool = True,
) -> jax.Array:
    """Attention within each segment, [B, T, K, G, H], of rows split over devices along T.

    Tokens lie as `order` says. Named "attention" for remat policies: the output and its
    log-sum-exp, with which the backward pass makes the weights of a block anew; weights of all
    tokens never exist.
    """
    spec = jax.typeof(q_BTKGH).sharding.spec
    axes, sizes = axes_of(spec[1]), jax.sharding.get_abstract_mesh().shape
    ways = math.prod(sizes[axis] for axis in axes)
    share = len(chunks(ways, causal)[0])
    plan = visits(ways, q_BTKGH.shape[1] // (ways * share), window, causal)
    ring = Ring(axes, ways, share, plan, block)
    forward = jax.shard_map(ring.forward, out_specs=(spec, jax.P(*spec[:4])))
    specs = tuple(jax.typeof(a).sharding.spec for a in (q_BTKGH, k_BTKH, v_BTKH))
    backward = jax.shard_map(ring.backward, out_specs=specs)

    @jax.custom_vjp
    def attend(q, k, v, segments):
        return forward(q, k, v, segments)[0]

    def attend_fwd(q, k, v, segments):
        o, lse = (checkpoint_name(a, "attention") for a in forward(q, k, v, segments))
        return o, (q, k, v, segments, o, lse)

    def attend_bwd(kept, do):
        return *backward(*kept, do), None

    attend.defvjp(attend_fwd, attend_bwd)
    return attend(q_BTKGH, k_BTKH, v_BTKH, segments_BT)


@dataclass(frozen=True)
class Ring:
    """The work of one of `ways` devices along the mesh axes `axes`, each with `share` chunks."""

    axes: tuple[str, ...]
    ways: int
    share: int
    plan: tuple[Visit, ...]
    block: Block

    def forward(self, q_BTKGH, k_BTKH, v_BTKH, segments_BT):
        """(o [B, T, K, G, H], lse [B, T, K, G]): a device's queries over the keys of all."""
        keys, places = self.keys(k_BTKH, v_BTKH, segments_BT)
        queries = self.chunked(q_BTKGH), self.chunked(segments_BT)
        zeros = jnp.zeros_like(queries[0], jnp.float32)
        sums = zeros, jnp.full_like(zeros[..., 0], UNSEEN)

        def attend(keys, part, q_at, k_at, sums):
            """The sums with what one pair of chunks adds."""
            query, q_segments, o, lse = first((*queries, *sums), q_at, part)
            both, k_segments = last(keys, k_at, part)
            args = query, both[:, :, 0], both[:, :, 1], q_segments, k_segments
            more = self.block.forward(*args, causal=part.causal, window=part.window)
            return put(sums, merge((o, lse), more), q_at, 0)

        for visit, hop in zip(self.plan, self.hops, strict=True):
            keys, sums = lax.optimization_barrier((keys, sums))  # no more than one on its way
            visitor = keys, self.visiting(places, visit)
            if visit is not self.plan[-1]:
                # Devices talk over `axes`: the next keys and values are on their way while
                # these are worked on; 2 B n K H numbers' bytes, n tokens that others see.
                keys = self.pass_on(self.seen(keys), hop)
            for slot in visit.slots:
                sums = self.each(slot, functools.partial(attend, visitor), sums)
        o, lse = sums
        return o.reshape(q_BTKGH.shape).astype(v_BTKH.dtype), lse.reshape(q_BTKGH.shape[:-1])

    def backward(self, q_BTKGH, k_BTKH, v_BTKH, segments_BT, o_BTKGH, lse_BTKG, do_BTKGH):
        """(dq, dk, dv) of a device's queries and keys, for its part of the output's gradient."""
        keys, places = self.keys(k_BTKH, v_BTKH, segments_BT)
        rows = q_BTKGH, segments_BT, o_BTKGH, lse_BTKG, do_BTKGH
        queries = tuple(map(self.chunked, rows))
        dq, own, moving = jnp.zeros_like(queries[0], jnp.float32), None, None

        def attend(keys, part, q_at, k_at, sums):
            """The sums with what one pair of chunks adds."""
            query, q_segments, o, lse, do = first(queries, q_at, part)
            both, k_segments = last(keys, k_at, part)
            args = query, both[:, :, 0], both[:, :, 1], q_segments, k_segments, o, lse, do
            dq, dk, dv = self.block.backward(*args, causal=part.causal, window=part.window)
            dq += first(sums[:1], q_at, part)[0]
            dkeys = jnp.stack([dk, dv], axis=2) + last(sums[1:], k_at, part)[0]
            start = keys[0].shape[2] - part.tokens
            return *put(sums[:1], (dq,), q_at, 0), *put(sums[1:], (dkeys,), k_at, start)

        before = 0
        for visit, hop in zip(self.plan, self.hops, strict=True):
            keys, moving, dq = lax.optimization_barrier((keys, moving, dq))
            visitor = keys, self.visiting(places, visit)
            # Devices talk over `axes`: keys and values as in the forward pass, and their gradients
            # follow them, in float32: as many numbers, 4 bytes each.
            if visit is not self.plan[-1]:
                keys = self.pass_on(self.seen(keys), hop)
            if moving is not None:
                moving = self.pass_on(moving, before)
            sums = dq, jnp.zeros_like(visitor[0], jnp.float32)
            for slot in visit.slots:
                sums = self.each(slot, functools.partial(attend, visitor), sums)
            dq, more = sums
            if visit is self.plan[0]:
                own = more
            else:
                moving = more if moving is None else moving + more
            before = hop
        if moving is not None:
            # Devices talk over `axes`: the gradients come home, as many bytes.
            moving = self.pass_on(moving, before)
            unseen = own.shape[2] - moving.shape[2]
            own += jnp.pad(moving, [(0, 0), (0, 0), (unseen, 0), *[(0, 0)] * 3])
        dk, dv = own[:, :, :, 0], own[:, :, :, 1]
        grads = zip((dq, dk, dv), (q_BTKGH, k_BTKH, v_BTKH), strict=True)
        return tuple(grad.reshape(a.shape).astype(a.dtype) for grad, a in grads)

    def keys(self, k_BTKH, v_BTKH, segments_BT) -> tuple[jax.Array, jax.Array]:
        """(keys and values [B, C, N, 2, K, H], the segments of all devices [P, B, C, N])."""
        # One array, because a GPU sends one at a time while it works.
        keys = self.chunked(jnp.stack([k_BTKH, v_BTKH], axis=2))
        # Devices talk over `axes`: segments, 4 bytes a token, so each gets those of all at once.
        return keys, lax.all_gather(self.chunked(segments_BT), self.axes)

    def visiting(self, places: jax.Array, visit: Visit) -> jax.Array:
        """The visitor's part, [B, C, N], of the segments of all."""
        device = (lax.axis_index(self.axes) - visit.shift) % self.ways
        return lax.dynamic_index_in_dim(places, device, keepdims=False)

    @property
    def hops(self) -> list[int]:
        """How many devices on the keys go after each visit; after the last one, home."""
        shifts = [*(visit.shift for visit in self.plan), self.ways]
        return [b - a for a, b in itertools.pairwise(shifts)]

    def seen(self, keys: jax.Array) -> jax.Array:
        """Of each chunk what other devices see of it: its last tokens."""
        slots = itertools.chain(*(visit.slots for visit in self.plan[1:]))
        most = max(pair.part.tokens for pair in itertools.chain(*slots) if pair)
        return keys[:, :, -most:]

    def pass_on(self, array: jax.Array, hop: int) -> jax.Array:
        """That of the device `hop` before this one."""
        to = [(i, (i + hop) % self.ways) for i in range(self.ways)]
        # Devices talk over `axes`: each with one `hop` on, the bytes of the array.
        return lax.ppermute(array, self.axes, to)

    def each(self, slot: Slot, work: Callable[..., Any], sums: Any) -> Any:
        """`work(part, q, k, sums)` for this device's pair; where it has none, `sums` untouched."""
        some = next(filter(None, slot))
        parts = sorted({pair.part for pair in slot if pair})
        q, k = (self.mine([getattr(pair or some, name) for pair in slot]) for name in "qk")
        branches = [functools.partial(work, part, q, k) for part in parts]
        if None not in slot and len(parts) == 1:
            return branches[0](sums)
        number = [parts.index(pair.part) if pair else len(parts) for pair in slot]
        return lax.switch(self.mine(number), [*branches, lambda sums: sums], sums)

    def mine(self, values: Sequence[int]) -> int | jax.Array:
        """This device's of the values, one of each device; a number where they are all the same."""
        if len(set(values)) == 1:
            return values[0]
        return jnp.asarray(values, jnp.int32)[lax.axis_index(self.axes)]

    def chunked(self, a: jax.Array) -> jax.Array:
        """[B, T, ...] as [B, C, N, ...]."""
        return a.reshape(a.shape[0], self.share, -1, *a.shape[2:])


def first(arrays: Sequence[jax.Array], chunk: int | jax.Array, part: Part) -> list[jax.Array]:
    """The first tokens of a chunk, as many as the part has; [B, C, N, ...] -> [B, n, ...]."""
    return [_taken(a, chunk, 0, part.tokens) for a in arrays]


def last(arrays: Sequence[jax.Array], chunk: int | jax.Array, part: Part) -> list[jax.Array]:
    """The last tokens of a chunk, as many as the part has."""
    return [_taken(a, chunk, a.shape[2] - part.tokens, part.tokens) for a in arrays]


def _taken(a: jax.Array, chunk: int | jax.Array, start: int, tokens: int) -> jax.Array:
    a = lax.dynamic_index_in_dim(a, chunk, axis=1, keepdims=False)
    return lax.slice_in_dim(a, start, start + tokens, axis=1)


def put(
    arrays: Sequence[jax.Array], parts: Sequence[jax.Array], chunk: int | jax.Array, start: int
) -> tuple[jax.Array, ...]:
    """The arrays [B, C, N, ...] with these parts [B, n, ...] in a chunk, from token `start` on."""

    def one(a: jax.Array, part: jax.Array) -> jax.Array:
        at = (0, chunk, start, *[0] * (a.ndim - 3))
        return lax.dynamic_update_slice(a, part[:, None].astype(a.dtype), at)

    return tuple(one(a, part) for a, part in zip(arrays, parts, strict=True))


def merge(ours: Sequence[jax.Array], more: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over two sets of keys, (o, lse), from that over each; float32."""
    (o, lse), (o_more, lse_more) = ours, more
    total = jnp.logaddexp(lse, lse_more)
    share, share_more = (jnp.exp(part - total)[..., None] for part in (lse, lse_more))
    return o * share + o_more.astype(jnp.float32) * share_more, total
