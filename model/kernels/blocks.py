"""Attention of some queries to some keys, of which ring attention is made; no device talks here.

As `attention.plain`, by pieces of the queries, so that memory grows with the keys alone.

Shapes: B rows, T queries, S keys, K kv heads, G query heads per kv head, H head size.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.context import UNSEEN

PIECE = 512  # queries whose weights exist at one time


def forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(output [B, T, K, G, H], log-sum-exp [B, T, K, G]), both float32.

    A query sees the keys of its segment; if causal, s <= t only; of those, t - s < window (0: all).
    The log-sum-exp of one that sees none is UNSEEN or a little more, its output some mean.
    """

    def piece(_: None, rows: tuple, first: Any) -> tuple[None, tuple]:
        q, segments = rows
        z, _ = logits(q, k_BSKH, scale, softcap)
        z = jnp.where(seen(segments, segments_BS, first, causal, window), z, UNSEEN)
        top = jnp.max(z, axis=-1, keepdims=True)
        e = jnp.exp(z - top)
        total = jnp.sum(e, axis=-1, keepdims=True)
        o = jnp.einsum(
            "BKGTS,BSKH->BTKGH",
            e.astype(v_BSKH.dtype),
            v_BSKH,
            preferred_element_type=jnp.float32,
        )
        lse, total = (jnp.moveaxis(a, 3, 1)[..., 0] for a in (top + jnp.log(total), total))
        return None, (o / total[..., None], lse)

    return in_pieces(piece, None, (q_BTKGH, segments_BT))[1]


def backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    o_BTKGH: jax.Array,
    lse_BTKG: jax.Array,
    do_BTKGH: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to (dq, dk, dv), float32; o and lse are those over all keys.

    Dao et al. 2022, arXiv:2205.14135, algorithm 4.
    """

    def piece(sums: tuple, rows: tuple, first: Any) -> tuple[tuple, jax.Array]:
        q, segments, o, lse, do = rows
        z, slope = logits(q, k_BSKH, scale, softcap)
        lse, delta = (jnp.moveaxis(a, 1, 3)[..., None] for a in (lse, dot(o, do)))
        p = jnp.where(seen(segments, segments_BS, first, causal, window), jnp.exp(z - lse), 0)
        dp = jnp.einsum("BTKGH,BSKH->BKGTS", do, v_BSKH, preferred_element_type=jnp.float32)
        dz = (p * (dp - delta) * slope * scale).astype(q.dtype)
        dq = jnp.einsum("BKGTS,BSKH->BTKGH", dz, k_BSKH, preferred_element_type=jnp.float32)
        dk = jnp.einsum("BKGTS,BTKGH->BSKH", dz, q, preferred_element_type=jnp.float32)
        p = p.astype(do.dtype)
        dv = jnp.einsum("BKGTS,BTKGH->BSKH", p, do, preferred_element_type=jnp.float32)
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = tuple(jnp.zeros_like(a, jnp.float32) for a in (k_BSKH, v_BSKH))
    rows = q_BTKGH, segments_BT, o_BTKGH, lse_BTKG, do_BTKGH
    (dk, dv), dq = in_pieces(piece, zeros, rows)
    return dq, dk, dv


def logits(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, scale: float, softcap: float
) -> tuple[jax.Array, jax.Array | float]:
    """(logits [B, K, G, T, S] float32, their slope in those before the cap)."""
    z = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    z *= scale
    if not softcap:
        return z, 1.0
    z = jnp.tanh(z / softcap)
    return softcap * z, 1 - z * z


def dot(o_BTKGH: jax.Array, do_BTKGH: jax.Array) -> jax.Array:
    """[B, T, K, G] float32, which is also the mean of the weights' gradients under the weights."""
    return jnp.sum(o_BTKGH.astype(jnp.float32) * do_BTKGH.astype(jnp.float32), axis=-1)


def seen(
    segments_BT: jax.Array, segments_BS: jax.Array, first: Any, causal: bool, window: int
) -> jax.Array:
    """[B, 1, 1, T, S] bool: does a query, the first of them in place `first`, see a key?"""
    seen_BTS = segments_BT[:, :, None] == segments_BS[:, None]
    t_T, s_S = (jnp.arange(a.shape[1]) for a in (segments_BT, segments_BS))
    back_TS = first + t_T[:, None] - s_S[None]
    if causal:
        seen_BTS &= (back_TS >= 0)[None]
    if window:
        seen_BTS &= (back_TS < window)[None]
    return seen_BTS[:, None, None]


def in_pieces(piece: Callable, sums: Any, rows: tuple) -> tuple[Any, Any]:
    """(sums, outputs [B, T, ...]) of `piece(sums, rows, first)` for PIECE of the T rows at a time.

    Rows beyond the last are zeros, of a segment that nobody has.
    """
    tokens = rows[0].shape[1]
    if tokens <= PIECE:
        return piece(sums, rows, 0)
    count = math.ceil(tokens / PIECE)

    def split(i: int, a: jax.Array) -> jax.Array:
        wide = ((0, 0), (0, count * PIECE - tokens), *[(0, 0)] * (a.ndim - 2))
        a = jnp.pad(a, wide, constant_values=-1 if i == 1 else 0)
        return jnp.moveaxis(a.reshape(a.shape[0], count, PIECE, *a.shape[2:]), 1, 0)

    def step(sums: Any, own: tuple) -> tuple[Any, Any]:
        return piece(sums, own[1:], own[0])

    own = (jnp.arange(count) * PIECE, *(split(i, a) for i, a in enumerate(rows)))
    sums, outputs = lax.scan(step, sums, own)

    def join(a: jax.Array) -> jax.Array:
        a = jnp.moveaxis(a, 0, 1)
        return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :tokens]

    return sums, jax.tree.map(join, outputs)
