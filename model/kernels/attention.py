"""Attention over one device's rows and heads; no device talks here.

Shapes: B rows, T tokens, S tokens held in a cache, K kv heads, G query heads per kv head,
H head size.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

LEAST_BLOCK = 128  # queries


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


def masked(z_BKGTS: jax.Array, seen_BTS: jax.Array, scale: float, softcap: float) -> jax.Array:
    """Products of queries and keys as logits; what is not seen, far below the rest."""
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
    z_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32)
    z_BKGTS = masked(z_BKGTS, visible(segments_BT, window, causal), scale, softcap)
    top_BKGT = jax.lax.stop_gradient(jnp.max(z_BKGTS, axis=-1, keepdims=True))
    e_BKGTS = jnp.exp(z_BKGTS - top_BKGT)
    # Divided by its sum after the product with v: over H numbers a token, not over T.
    total_BTKG = jnp.moveaxis(jnp.sum(e_BKGTS, axis=-1), 3, 1)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", e_BKGTS.astype(v_BTKH.dtype), v_BTKH)
    o_BTKGH = checkpoint_name(o_BTKGH, "attention")  # what the backward pass asks for
    return (o_BTKGH / total_BTKG[..., None]).astype(v_BTKH.dtype)


def blocked(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """As `plain`, causal, without gradients in mind: a third of its time on CPU.

    A quarter of the queries at a time sees the keys that come before its end, and no others.
    """
    tokens = q_BTKGH.shape[1]
    block = max(LEAST_BLOCK, -(-tokens // 4))
    k_BKHT, v_BKTH = jnp.moveaxis(k_BTKH, 1, 3), jnp.moveaxis(v_BTKH, 1, 2)
    seen_BTT = visible(segments_BT, window)
    parts = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        first = max(0, start + 1 - window) if window else 0
        z_BKGTS = products(q_BTKGH[:, start:end], k_BKHT[..., first:end])
        z_BKGTS = masked(z_BKGTS, seen_BTT[:, start:end, first:end], scale, softcap)
        e_BKGTS = jnp.exp(z_BKGTS - jnp.max(z_BKGTS, axis=-1, keepdims=True))
        o_BKGTH = weighted(e_BKGTS, v_BKTH[:, :, first:end])
        parts.append(o_BKGTH / jnp.sum(e_BKGTS, axis=-1, keepdims=True))
    return jnp.moveaxis(jnp.concatenate(parts, axis=3), 3, 1).astype(v_BTKH.dtype)


def cached(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    held_k_BKHS: jax.Array,
    held_v_BKSH: jax.Array,
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
    tokens, held = q_BTKGH.shape[1], held_k_BKHS.shape[3]
    t_T, s_S = jnp.arange(tokens), jnp.arange(held)
    back_BTS = held_B[:, None, None] + t_T[None, :, None] - s_S[None, None]
    seen_BTS = (s_S[None, None] < held_B[:, None, None]) & (back_BTS < (window or held + tokens))
    back_TT = t_T[:, None] - t_T[None]
    own_BTT = ((back_TT >= 0) & (back_TT < (window or tokens)))[None]
    k_BKHT, v_BKTH = jnp.moveaxis(k_BTKH, 1, 3), jnp.moveaxis(v_BTKH, 1, 2)
    before_BKGTS = masked(products(q_BTKGH, held_k_BKHS), seen_BTS, scale, softcap)
    own_BKGTT = masked(products(q_BTKGH, k_BKHT), own_BTT, scale, softcap)
    top_BKGT = jnp.maximum(
        jnp.max(before_BKGTS, axis=-1, keepdims=True), jnp.max(own_BKGTT, axis=-1, keepdims=True)
    )
    before_BKGTS, own_BKGTT = jnp.exp(before_BKGTS - top_BKGT), jnp.exp(own_BKGTT - top_BKGT)
    total_BKGT = jnp.sum(before_BKGTS, axis=-1) + jnp.sum(own_BKGTT, axis=-1)
    o_BKGTH = weighted(before_BKGTS, held_v_BKSH) + weighted(own_BKGTT, v_BKTH)
    return jnp.moveaxis(o_BKGTH / total_BKGT[..., None], 3, 1).astype(v_BTKH.dtype)


def products(q_BTKGH: jax.Array, k_BKHS: jax.Array) -> jax.Array:
    """Queries times keys, [B, K, G, T, S] float32.

    With all queries of a kv head in one matrix (R), and both matrices as a product of rows and
    columns wants them: so that on CPU XLA neither turns the keys, which takes longer than the
    product, nor sums along a vector register.
    """
    rows, tokens, heads, groups, size = q_BTKGH.shape
    q_BKRH = jnp.moveaxis(q_BTKGH, 1, 3).reshape(rows, heads, -1, size)
    z_BKRS = jnp.einsum("BKRH,BKHS->BKRS", q_BKRH, k_BKHS, preferred_element_type=jnp.float32)
    return z_BKRS.reshape(rows, heads, groups, tokens, -1)


def weighted(e_BKGTS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """The sum of the values, each with its weight, [B, K, G, T, H]; as `products` computes."""
    rows, heads, groups, tokens, held = e_BKGTS.shape
    e_BKRS = e_BKGTS.astype(v_BKSH.dtype).reshape(rows, heads, -1, held)
    o_BKRH = jnp.einsum("BKRS,BKSH->BKRH", e_BKRS, v_BKSH)
    return o_BKRH.reshape(rows, heads, groups, tokens, -1)
