"""Attention over one device's rows and heads; no device talks here.

Shapes: B rows, T tokens, S tokens held in a cache, K kv heads, G query heads per kv head,
H head size.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def visible(segments_BT: jax.Array, window: int, causal: bool = True) -> jax.Array:
    """[B, T, T] bool: may token t (dim 1) see token s (dim 2)?

    It sees tokens of its own segment; if causal, at or before itself, fewer than `window` places
    back (0: however far).
    """
    seen_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if not causal:
        return seen_BTT
    tokens = segments_BT.shape[1]
    back_TT = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None]
    return ((back_TT >= 0) & (back_TT < (window or tokens)))[None] & seen_BTT


def weights(q_BTKGH: jax.Array, k_BSKH: jax.Array, seen_BTS: jax.Array, scale, softcap):
    """Logits of q on k, [B, K, G, T, S] float32; what is not seen, far below the rest."""
    z_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    z_BKGTS *= scale
    if softcap:
        z_BKGTS = softcap * jnp.tanh(z_BKGTS / softcap)
    return jnp.where(seen_BTS[:, None, None], z_BKGTS, -1e30)


def plain(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> jax.Array:
    """Attention within each segment, [B, T, K, G, H]. Vaswani et al. 2017, arXiv:1706.03762.

    Softmax in float32. Named "attention" for remat policies: the output before its division.
    Memory: the [B, K, G, T, T] weights, so for short rows and as the oracle.
    """
    z_BKGTS = weights(q_BTKGH, k_BTKH, visible(segments_BT, window, causal), scale, softcap)
    top_BKGT = jax.lax.stop_gradient(jnp.max(z_BKGTS, axis=-1, keepdims=True))
    e_BKGTS = jnp.exp(z_BKGTS - top_BKGT)
    # Divided by its sum after the product with v: over H numbers a token, not over T.
    total_BTKG = jnp.moveaxis(jnp.sum(e_BKGTS, axis=-1), 3, 1)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", e_BKGTS.astype(v_BTKH.dtype), v_BTKH)
    o_BTKGH = checkpoint_name(o_BTKGH, "attention")  # what the backward pass asks for
    return (o_BTKGH / total_BTKG[..., None]).astype(v_BTKH.dtype)


def cached(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    held_k_BSKH: jax.Array,
    held_v_BSKH: jax.Array,
    held_B: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Causal attention of T tokens that follow the first `held_B` of a cache, [B, T, K, G, H].

    As `plain` over the whole text. The cache is only read: it and the T tokens are two parts of
    one softmax, and nobody copies one to the other.
    """
    tokens, held = q_BTKGH.shape[1], held_k_BSKH.shape[1]
    t_T, s_S = jnp.arange(tokens), jnp.arange(held)
    back_BTS = held_B[:, None, None] + t_T[None, :, None] - s_S[None, None]
    seen_BTS = (s_S[None, None] < held_B[:, None, None]) & (back_BTS < (window or held + tokens))
    back_TT = t_T[:, None] - t_T[None]
    own_BTT = ((back_TT >= 0) & (back_TT < (window or tokens)))[None]
    before_BKGTS = weights(q_BTKGH, held_k_BSKH, seen_BTS, scale, softcap)
    own_BKGTT = weights(q_BTKGH, k_BTKH, own_BTT, scale, softcap)
    top_BKGT = jnp.maximum(
        jnp.max(before_BKGTS, axis=-1, keepdims=True), jnp.max(own_BKGTT, axis=-1, keepdims=True)
    )
    before_BKGTS, own_BKGTT = jnp.exp(before_BKGTS - top_BKGT), jnp.exp(own_BKGTT - top_BKGT)
    total_BKGT = jnp.sum(before_BKGTS, axis=-1) + jnp.sum(own_BKGTT, axis=-1)
    o_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", before_BKGTS.astype(held_v_BSKH.dtype), held_v_BSKH
    ) + jnp.einsum("BKGTS,BSKH->BTKGH", own_BKGTT.astype(v_BTKH.dtype), v_BTKH)
    return (o_BTKGH / jnp.moveaxis(total_BKGT, 3, 1)[..., None]).astype(v_BTKH.dtype)
