"""Flash attention by the splash kernel that JAX ships, for TPUs. Dao et al. 2022, arXiv:2205.14135.

Shapes: B rows, T tokens, K kv heads, G query heads per kv head, N = K G, H head size.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos
except ImportError:  # a later JAX may move it: then the plain attention serves
    splash = None

LANES = 128  # what a TPU computes at once: blocks are multiples of it
# The most tokens of a block of queries and of keys. MaxText's recipes take 1,024 to 2,048 and 512,
# and give a program more of the vector memory than it has by default; its defaults are 512 for all.
QUERIES, KEYS = 1024, 512


def why_not(q_BTKGH: jax.Array) -> str:
    """Why splash does not compute this attention; "" if it does."""
    tokens, head = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    if splash is None:
        return "this JAX has no splash attention"
    if q_BTKGH.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash takes bfloat16 or float32, not {q_BTKGH.dtype}"
    if head % 8 or head > 256:
        return f"splash takes heads of a multiple of 8 up to 256, not {head}"
    if tokens < LANES:
        return f"rows of {tokens} tokens; splash works on blocks of {LANES}"
    return ""


def attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """Attention within each segment, [B, T, K, G, H]; as `attention.plain`.

    Memory: the output; while it is made, 512 bytes more for each token and head. The output and its
    log-sum-exp are named "attention" for remat policies. `interpret`: on any device, slowly.
    """
    rows, tokens, _, _, head = q_BTKGH.shape
    more = -tokens % LANES
    q_BTKGH = (q_BTKGH.astype(jnp.float32) * scale).astype(q_BTKGH.dtype)
    heads_first = (
        jnp.pad(jnp.moveaxis(a, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))
        for a in (q_BTKGH.reshape(rows, tokens, -1, head), k_BTKH, v_BTKH)
    )
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)), constant_values=-1)  # nobody's
    sizes = blocks(tokens + more)
    if head < LANES:  # heads last would lie in memory as if they were LANES wide
        last = splash.QKVLayout.SEQ_MINOR
        sizes = dataclasses.replace(sizes, q_layout=last, k_layout=last, v_layout=last)
    *where, seen = visible(tokens + more, window if causal else 0, causal)
    attend = splash.SplashAttentionKernel(
        *where,
        mask_function=seen,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    o_BNTH = jax.vmap(attend)(*heads_first, splash.SegmentIds(segments_BT, segments_BT))
    return jnp.moveaxis(o_BNTH, 2, 1)[:, :tokens].reshape(q_BTKGH.shape)


def blocks(tokens: int) -> Any:
    """How many tokens the kernels take at a time."""
    queries, keys = math.gcd(tokens, QUERIES), math.gcd(tokens, KEYS)
    # One kernel for all gradients would write those of queries once for each block of keys.
    return splash.BlockSizes(
        queries, keys, keys,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=keys,
        block_q_dq=queries, block_kv_dq=keys,
    )  # fmt: skip


@functools.cache
def visible(tokens: int, window: int, causal: bool) -> tuple:
    """(blocks of the forward pass, of dq, of dk and dv; what a query sees of a block of keys)."""
    sizes = blocks(tokens)
    mask = Band(tokens, window) if causal else masks.FullMask((tokens, tokens))
    mask = masks.MultiHeadMask((mask,))  # every head's
    forward, seen = infos.process_mask(mask, (sizes.block_q, sizes.block_kv))
    dkv, _ = infos.process_mask_dkv(mask, (sizes.block_q_dkv, sizes.block_kv_dkv))
    return forward, forward, dkv, seen


class Band(masks.Mask if splash else object):
    """A token sees itself and the `window` - 1 before it; 0: all before it.

    The kernel computes that for each block. Beforehand it needs to know only whether a block shows
    all, some or nothing, so here a block is two numbers: with as many as it has, 131,072 tokens
    would take two minutes.
    """

    def __init__(self, tokens: int, window: int):
        self.tokens, self.window = tokens, window or tokens
        self.q_sequence = np.arange(tokens, dtype=np.int32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.tokens

    def mask_function(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """For places of queries and keys, of one shape: does the one see the other?"""
        seen = queries >= keys
        return seen if self.window == self.tokens else seen & (queries - keys < self.window)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = block
        least, most = queries.start - keys.stop + 1, queries.stop - 1 - keys.start
        all_of_it = least >= 0 and most < self.window
        return np.array([all_of_it, most >= 0 and least < self.window])
