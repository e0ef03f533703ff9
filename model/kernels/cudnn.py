"""Flash attention by cuDNN, for NVIDIA GPUs. Dao et al. 2022, arXiv:2205.14135.

The public jax.nn.dot_product_attention knows neither documents within a row nor which of its parts
a backward pass keeps; what it is made of does. This is the one file that imports it.

Shapes: B rows, T tokens, K kv heads, G query heads per kv head, H head size, M documents of a row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding import runtime

try:
    from jax._src.cudnn import fused_attention_stablehlo as sdpa
except ImportError:  # a later JAX may move it: then the plain attention serves
    sdpa = None

# Bytes that the backward may take at once where XLA is asked for the same bits each time: two for
# each head and pair of a row's tokens, as often as the row may have documents.
WORKSPACE = 1 << 29
AHEAD = "cuDNN attention does not compile ahead of time"
PRIMITIVE = "dot_product_attention_fwd"  # its outputs are the attention and the log-sum-exp


def why_not(q_BTKGH: jax.Array, *, causal: bool, softcap: float, documents: int) -> str:
    """Why cuDNN does not compute this attention here; "" if it does."""
    head = q_BTKGH.shape[-1]
    if sdpa is None:
        return "this JAX has no cuDNN attention"
    if q_BTKGH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16, not {q_BTKGH.dtype}"
    if head % 8 or head > 256:
        return f"cuDNN takes heads of a multiple of 8 up to 256, not {head}"
    if softcap:
        return "cuDNN has no soft-cap"
    if not causal:
        return "padding of a row that is read in both directions needs a mask"
    if not documents:
        return "any number of documents may share a row; data.documents bounds them"
    if jax.default_backend() != "gpu":
        return AHEAD
    return ""


def attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int = 0,
    documents: int,
) -> jax.Array:
    """Causal attention within each segment, [B, T, K, G, H]; as `attention.plain` but for padding.

    `documents` is the most that a row has, padding at its end aside. Memory: the output and one
    number for each token and head.
    """
    B, T, K, G, _ = q_BTKGH.shape
    spans_of_row = documents + 1 if documents > 1 else 1  # padding is one more
    if B * K > 1 and runtime.same_bits() and 2 * B * spans_of_row * K * G * T**2 > WORKSPACE:
        how = {"scale": scale, "window": window, "documents": documents}
        return by_head(functools.partial(attention, **how), q_BTKGH, k_BTKH, v_BTKH, segments_BT)
    how: dict[str, Any] = {"mask_type": sdpa.MaskType.CAUSAL}
    if documents > 1:
        starts, lengths = spans(segments_BT, spans_of_row)
        how = {
            "mask_type": sdpa.MaskType.PADDING_CAUSAL,
            "q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": starts, "kv_offsets": starts,
        }  # fmt: skip
    o_BTNH = sdpa.dot_product_attention(
        q_BTKGH.reshape(B, T, K * G, -1), k_BTKH, v_BTKH,
        scale=scale, sliding_window_length=window or None, **how,
    )  # fmt: skip
    return o_BTNH.reshape(q_BTKGH.shape)


def by_head(
    attend: Callable[..., jax.Array],
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """`attend`, for one row and kv head at a time."""
    B, _, K, *_ = q_BTKGH.shape

    def apart(a: jax.Array) -> jax.Array:
        """[B, T, K, ...] as [B K, 1, T, 1, ...]."""
        moved = jnp.moveaxis(a, 2, 1)
        return moved.reshape(B * K, 1, a.shape[1], 1, *a.shape[3:])

    parts = [*map(apart, (q_BTKGH, k_BTKH, v_BTKH)), jnp.repeat(segments_BT, K, axis=0)[:, None]]
    o = lax.map(lambda part: attend(*part), tuple(parts))
    return jnp.moveaxis(o.reshape(B, K, *o.shape[2:3], *o.shape[4:]), 1, 2)


def spans(segments_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Where each row's runs of one segment begin, [B, M + 1], and their lengths, [B, M]; M = most.

    Both int32, and -1 after the last run, as cuDNN wants them.
    """
    tokens = segments_BT.shape[1]
    t_T = jnp.arange(tokens, dtype=jnp.int32)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins_BT = jnp.where(segments_BT != before_BT, t_T[None], tokens)
    starts_BM = jnp.sort(begins_BT, axis=1)[:, :most]
    starts_BM = jnp.pad(
        starts_BM, ((0, 0), (0, most + 1 - starts_BM.shape[1])), constant_values=tokens
    )
    there = starts_BM < tokens
    lengths_BM = jnp.where(there[:, :-1], starts_BM[:, 1:] - starts_BM[:, :-1], -1)
    return jnp.where(there, starts_BM, -1), lengths_BM


def gradients(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    o_BTNH: jax.Array,
    lse_BNT: jax.Array,
    do_BTNH: jax.Array,
    *,
    scale: float,
    mask_type: Any,
    sliding_window_length: int | None = None,
    **spans: jax.Array,
) -> list[jax.Array]:
    """[dq, dk, dv] of cuDNN's attention, whose weights are exp(logits - lse)."""
    none = jnp.zeros(0, q_BTNH.dtype)
    where = [spans.get(name, none) for name in ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")]
    kept = (q_BTNH, k_BTKH, v_BTKH, none, *where, none, none, lse_BNT, o_BTNH)
    settings = (scale, 42, 0.0, (False, False), mask_type, sdpa.AttentionLayout.BTNH.value)
    grads = sdpa._dot_product_attention_bwd_rule(
        *settings, sliding_window_length, True, False, kept, do_BTNH
    )
    return list(grads[:3])
