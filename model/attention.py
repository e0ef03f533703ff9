"""The attention half of a block: project, rotate, attend, project back.

Shapes: B rows, T tokens, S tokens of a cache, D embed, K kv heads, G query heads per kv head,
H head size; J = G + 2: a kv head's queries, then its key, then its value.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model import kernels
from model.cache import KeysValues
from model.config import ModelConfig
from model.layers import Linear, RMSNorm
from model.rope import Rotation, rotate
from sharding.context import ring_attention
from sharding.layout import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer knows of the rows it works on."""

    segments: jax.Array  # [B, T]; tokens of one document share a number, 0 is padding
    rotations: dict[str, Rotation]  # "global" and "local"; none without RoPE
    # The most documents of a row, 0: any number. A bound lets kernels do without a [T, T] mask.
    documents: int = field(default=0, metadata={"static": True})
    held: jax.Array | None = None  # [B], tokens in the cache; None: the rows are whole texts
    # What layers hand back: "hidden", their states; "cache", the keys and values of the rows;
    # "finite", how many values of "attention", "mid", "mlp" and "out", in that order, are not.
    keep: tuple[str, ...] = field(default=(), metadata={"static": True})


class SelfAttention(nnx.Module):
    """Grouped-query attention. Ainslie et al. 2023, arXiv:2305.13245.

    Queries, keys and values come from one matmul. Its weight keeps kv heads as a dim of its own,
    so that splitting them over devices crosses no reshape.
    """

    def __init__(self, cfg: ModelConfig, window: int, layout: Layout, rngs: nnx.Rngs):
        attention, groups = cfg.arch.attention, cfg.heads // cfg.kv_heads
        sizes = {"D": cfg.embed, "K": cfg.kv_heads, "J": groups + 2, "G": groups, "H": cfg.head_dim}
        axes = {"D": "embed", "K": "heads"}
        linear = functools.partial(
            Linear,
            sizes=sizes,
            axes=axes,
            layout=layout,
            rngs=rngs,
            dtype=cfg.param_dtype,
            passes=cfg.precision.attention,
        )
        self.qkv = linear("BTD,KJHD->BTKJH", bias=attention.qkv_bias, batch="KJ")
        self.out = linear("BTKGH,DKGH->BTD", bias=attention.out_bias, std=cfg.residual_std)

        def norm(*heads: int) -> RMSNorm | None:
            """Over a head, or over all of them."""
            if attention.qk_norm == "none":
                return None
            heads = heads if attention.qk_norm == "all" else ()
            where = layout.spec("heads", None, None) if heads else None
            shape = (*heads, cfg.head_dim)
            return RMSNorm(shape, cfg.arch.norm, cfg.param_dtype, spec=where)

        self.q_norm, self.k_norm = norm(cfg.kv_heads, groups), norm(cfg.kv_heads, 1)
        rope = cfg.arch.rope
        self.rotation = "local" if window and rope.local_theta else "global"
        logits = {
            "scale": attention.scale or 1 / math.sqrt(cfg.head_dim),
            "softcap": attention.softcap,
        }
        settings = {**logits, "window": window}
        whole = {"causal": attention.causal, "kernels": cfg.kernels}
        self.attend = functools.partial(kernels.engine.attention, **whole, **settings)
        self.block = functools.partial(kernels.engine.block, **whole, **logits)
        self.attend_ring = functools.partial(ring_attention, window=window, causal=attention.causal)
        self.attend_fresh = functools.partial(kernels.attention.blocked, **settings)
        self.attend_cached = functools.partial(kernels.attention.cached, **settings)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: KeysValues | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """(y_BTD, the rows' keys and values); `cache` holds those of the tokens before them."""
        rows, *_ = where = jax.typeof(x_BTD).sharding.spec
        tokens = jax.typeof(context.segments).sharding.spec[1]
        # Devices talk over `residual`: tokens that lie apart between the blocks only come together;
        # the bytes of x.
        q_BTKGH, k_BTKH, v_BTKH = self.project(x_BTD, rows, tokens)
        if self.q_norm is not None:
            q_BTKGH, k_BTKH = self.q_norm(q_BTKGH), self.k_norm(k_BTKH)
        if context.rotations:
            rotation = context.rotations[self.rotation]
            q_BTKGH, k_BTKH = rotate(q_BTKGH, rotation), rotate(k_BTKH, rotation)
        k_BTKH, v_BTKH = k_BTKH.squeeze(3), v_BTKH.squeeze(3)
        # Rows and heads are split, and no token looks beyond its own: devices don't talk here.
        over = functools.partial(jax.shard_map, out_specs=jax.typeof(q_BTKGH).sharding.spec)
        if tokens:
            assert cache is None and "cache" not in context.keep, "decoding needs whole rows"
            # Devices talk over `sequence`: tokens are split, so keys and values go round, their
            # bytes P - 1 times.
            block = self.block(documents=context.documents)
            o_BTKGH = self.attend_ring(q_BTKGH, k_BTKH, v_BTKH, context.segments, block=block)
        elif cache is not None:
            o_BTKGH = over(self.attend_cached)(q_BTKGH, k_BTKH, v_BTKH, *cache, context.held)
        else:
            attend = functools.partial(self.attend, documents=context.documents)
            attend = self.attend_fresh if "cache" in context.keep else attend
            over = functools.partial(over, check_vma=kernels.engine.checks())
            o_BTKGH = over(attend)(q_BTKGH, k_BTKH, v_BTKH, context.segments)
        # Devices talk over `heads`: the sum over heads crosses them, to where x lives; the bytes
        # of y, or twice where tokens lie together.
        y_BTD = self.out(o_BTKGH, out=where)
        return y_BTD, (jnp.moveaxis(k_BTKH, 1, 3), jnp.moveaxis(v_BTKH, 1, 2))

    def project(self, x_BTD: jax.Array, *where: Any) -> list[jax.Array]:
        """Queries [B, T, K, G, H], keys and values [B, T, K, 1, H]; `where` splits rows, tokens."""
        qkv_BTKJH = self.qkv(x_BTD, out=jax.P(*where, *self.qkv.features))
        qkv_BTKJH = checkpoint_name(qkv_BTKJH, "qkv")
        groups = qkv_BTKJH.shape[3] - 2
        return lax.split(qkv_BTKJH, (groups, 1, 1), axis=3)
