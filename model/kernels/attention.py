"""Attention over one device's rows and heads; no device talks here.

Shapes: B rows, T tokens, K kv heads, G query heads per kv head, H head size.
"""

import jax
import jax.numpy as jnp


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

    Softmax in float32. Memory: the [B, K, G, T, T] weights, so for short rows and as the oracle.
    """
    z_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32)
    z_BKGTS *= scale
    if softcap:
        z_BKGTS = softcap * jnp.tanh(z_BKGTS / softcap)
    seen_BTS = visible(segments_BT, window)
    z_BKGTS = jnp.where(seen_BTS[:, None, None], z_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(z_BKGTS, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BTKH)
