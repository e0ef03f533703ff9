"""Attention over one device's rows and heads; no device talks here.

Shapes: B rows, T tokens, K kv heads, G query heads per kv head, H head size.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def visible(segments_BT: jax.Array, window: int) -> jax.Array:
    """[B, T, T] bool: may token t (dim 1) see token s (dim 2)?

    It sees tokens of its own segment, at or before itself, fewer than `window` places back (0:
    however far).
    """
    tokens = segments_BT.shape[1]
    back_TT = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None]
    near_TT = (back_TT >= 0) & (back_TT < (window or tokens))
    return near_TT[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def plain(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Causal attention within each segment, [B, T, K, G, H]. Vaswani et al. 2017, arXiv:1706.03762.

    Softmax in float32. Named "attention" for remat policies: the output before its division.
    Memory: the [B, K, G, T, T] weights, so for short rows and as the oracle.
    """
    z_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32)
    z_BKGTS *= scale
    if softcap:
        z_BKGTS = softcap * jnp.tanh(z_BKGTS / softcap)
    seen_BTS = visible(segments_BT, window)
    z_BKGTS = jnp.where(seen_BTS[:, None, None], z_BKGTS, -1e30)
    top_BKGT = jax.lax.stop_gradient(jnp.max(z_BKGTS, axis=-1, keepdims=True))
    e_BKGTS = jnp.exp(z_BKGTS - top_BKGT)
    # Divided by its sum after the product with v: over H numbers a token, not over T.
    total_BTKG = jnp.moveaxis(jnp.sum(e_BKGTS, axis=-1), 3, 1)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", e_BKGTS.astype(v_BTKH.dtype), v_BTKH)
    o_BTKGH = checkpoint_name(o_BTKGH, "attention")  # what the backward pass asks for
    return (o_BTKGH / total_BTKG[..., None]).astype(v_BTKH.dtype)
