"""Blocks of ring attention by cuDNN: what kernels/blocks.py computes, in bfloat16.

cuDNN's masks are few: causal from the first of both, or a number of keys from the first on. Turned
round, both fit what a block of earlier keys shows: of all its documents the last one only, so a
number of keys at its end; of a window a corner, s >= t, which is causal from the end.

Shapes: B rows, T queries or keys, K kv heads, G query heads per kv head, N = K G, H head size;
M documents of a block.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels import cudnn
from sharding.context import UNSEEN

NOTHING = 1e30  # a log-sum-exp whose weights are all zero


def why_not(*, causal: bool, window: int, documents: int) -> str:
    """Why cuDNN has no mask for such a block; "" if it has. `documents` is the most of a row."""
    if causal and not documents:
        return "any number of documents may share a row; data.documents bounds them"
    if not causal and window > 1:
        return "a window that ends within a block of earlier keys, and begins there too"
    return ""


@dataclass(frozen=True)
class Mask:
    """How cuDNN is to see a block."""

    kind: dict[str, Any]  # arguments of cuDNN's attention
    turned: bool  # whether queries and keys go in from last to first
    seen_BT: jax.Array | None  # queries that see a key at all; None: all of them
    runs: tuple[jax.Array, jax.Array] | None  # of packed documents: see `places`

    def turn(self, a: jax.Array) -> jax.Array:
        """[B, T, ...] in the order that cuDNN wants; and back."""
        return jnp.flip(a, axis=1) if self.turned else a


def mask_of(
    segments_BT: jax.Array, keys_BT: jax.Array, *, causal: bool, window: int, documents: int
) -> Mask:
    """The mask of a block as ring attention describes it (sharding/context.py, Part)."""
    masks, tokens = cudnn.sdpa.MaskType, segments_BT.shape[1]
    if causal:
        how = {"sliding_window_length": window or None}
        if documents == 1:
            return Mask({"mask_type": masks.CAUSAL, **how}, False, None, None)
        starts, lengths = cudnn.spans(segments_BT, documents + 1)  # padding is one more
        how |= {"q_seqlen": lengths, "kv_seqlen": lengths}
        how |= {"q_offsets": starts, "kv_offsets": starts, "mask_type": masks.PADDING_CAUSAL}
        return Mask(how, False, None, places(segments_BT, starts, lengths))
    if documents == 1:
        kind = masks.CAUSAL if window else masks.NO_MASK
        return Mask({"mask_type": kind}, bool(window), None, None)
    seen_BT = segments_BT == keys_BT[:, -1:]
    count_B = jnp.sum(keys_BT == keys_BT[:, -1:], axis=1, dtype=jnp.int32)
    how = {
        "mask_type": masks.PADDING_CAUSAL if window else masks.PADDING,
        "q_seqlen": jnp.full_like(count_B, tokens),
        "kv_seqlen": jnp.where(seen_BT[:, 0], count_B, 1),  # of none in common, little work
    }
    return Mask(how, True, seen_BT, None)


def places(
    segments_BT: jax.Array, starts_BM: jax.Array, lengths_BM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the number of each token's run among those of all rows, its place in the run), [B, T].

    cuDNN keeps the log-sum-exp of packed documents as [runs, N, T].
    """
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    own_BT = jnp.cumsum(segments_BT != before_BT, axis=1, dtype=jnp.int32) - 1
    counts_B = jnp.sum(lengths_BM >= 0, axis=1, dtype=jnp.int32)
    first_B = jnp.cumsum(counts_B, dtype=jnp.int32) - counts_B
    start_BT = jnp.take_along_axis(starts_BM, own_BT, axis=1)
    t_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    return first_B[:, None] + own_BT, t_T[None] - start_BT


def forward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    keys_BT: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int,
    documents: int,
) -> tuple[jax.Array, jax.Array]:
    """(output [B, T, K, G, H], log-sum-exp [B, T, K, G] float32)."""
    mask = mask_of(segments_BT, keys_BT, causal=causal, window=window, documents=documents)
    q_BTNH = q_BTKGH.reshape(*q_BTKGH.shape[:2], -1, q_BTKGH.shape[-1])
    args = (mask.turn(a) for a in (q_BTNH, k_BTKH, v_BTKH))
    o, lse = cudnn.sdpa.dot_product_attention(*args, scale=scale, return_residual=True, **mask.kind)
    lse = jnp.moveaxis(lse, 1, 2) if mask.runs is None else lse[mask.runs[0], :, mask.runs[1]]
    o, lse = (mask.turn(a).reshape(q_BTKGH.shape[: a.ndim + 1]) for a in (o, lse))
    if mask.seen_BT is None:
        return o, lse
    seen = mask.seen_BT[..., None, None]
    return jnp.where(seen[..., None], o, 0), jnp.where(seen, lse, UNSEEN)


def backward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    keys_BT: jax.Array,
    o_BTKGH: jax.Array,
    lse_BTKG: jax.Array,
    do_BTKGH: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int,
    documents: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to (dq, dk, dv); o and lse are those over all keys."""
    mask = mask_of(segments_BT, keys_BT, causal=causal, window=window, documents=documents)
    if mask.seen_BT is not None:
        seen = mask.seen_BT[..., None, None]
        lse_BTKG = jnp.where(seen, lse_BTKG, NOTHING)
        do_BTKGH = jnp.where(seen[..., None], do_BTKGH, 0)
    rows, tokens = segments_BT.shape
    q, o, do = (a.reshape(rows, tokens, -1, a.shape[-1]) for a in (q_BTKGH, o_BTKGH, do_BTKGH))
    q, k, v, o, do = (mask.turn(a.astype(q.dtype)) for a in (q, k_BTKH, v_BTKH, o, do))
    lse_BTN = mask.turn(lse_BTKG.reshape(rows, tokens, -1))
    lse = jnp.moveaxis(lse_BTN, 1, 2)
    if mask.runs is not None:
        wide = jnp.repeat(jnp.zeros_like(lse), documents + 1, axis=0)
        lse = wide.at[mask.runs[0], :, mask.runs[1]].set(lse_BTN)
    grads = cudnn.gradients(q, k, v, o, lse, do, scale=scale, **mask.kind)
    dq, dk, dv = (mask.turn(a) for a in grads)
    return dq.reshape(q_BTKGH.shape), dk, dv
