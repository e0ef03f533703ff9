"""Which engine computes attention, of whole rows or of blocks: the fastest that can, here."""

import functools
from typing import Any

import jax
from absl import logging

from model.kernels import blocks, cudnn, cudnn_blocks
from model.kernels.attention import plain
from sharding.context import Block


def attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    documents: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    kernels: str = "fastest",
    **how: float,
) -> jax.Array:
    """As `attention.plain`, on one device's rows and heads; `documents`: the most of a row, 0: any.

    On a GPU by cuDNN, on a TPU by splash, unless `kernels` is "plain"; where they do not apply, the
    reason is logged once.
    """
    here = platform() if kernels == "fastest" else "any"
    if here == "gpu":
        reason = cudnn.why_not(q_BTKGH, causal=causal, softcap=softcap, documents=documents)
        if not reason:
            how["documents"] = documents
            return cudnn.attention(q_BTKGH, k_BTKH, v_BTKH, segments_BT, **how)
        tell("plain attention, of memory [T, T]", reason)
    how |= {"causal": causal, "softcap": softcap}
    if here == "tpu":
        from model.kernels import splash  # 0.2 s, for which no other platform has to wait

        if not (reason := splash.why_not(q_BTKGH)):
            return splash.attention(q_BTKGH, k_BTKH, v_BTKH, segments_BT, **how)
        tell("plain attention, of memory [T, T]", reason)
    return plain(q_BTKGH, k_BTKH, v_BTKH, segments_BT, **how)


def checks() -> bool:
    """`check_vma` of a jax.shard_map around `attention`: splash says nothing of its results."""
    return platform() != "tpu"


def block(
    *, documents: int, causal: bool, scale: float, softcap: float, kernels: str = "fastest"
) -> Block:
    """For the blocks of rows of at most so many documents, 0: any; `causal` is that of whole rows.

    On a GPU by cuDNN those blocks that it has a mask for, unless `kernels` is "plain"; why not the
    others, and none on a TPU, is logged once.
    """

    def engine(q_BTKGH: jax.Array, kind: dict) -> tuple[Any, dict]:
        """A module, and what its functions want beyond the block."""
        if platform() == "gpu" and kernels == "fastest":
            reason = cudnn.why_not(q_BTKGH, causal=causal, softcap=softcap, documents=1)
            reason = reason or cudnn_blocks.why_not(documents=documents, **kind)
            if not reason:
                return cudnn_blocks, {"documents": documents, "scale": scale, **kind}
            tell("plain blocks of attention", reason)
        if platform() == "tpu" and kernels == "fastest":
            tell("plain blocks of attention", "splash computes whole rows only")
        return blocks, {"softcap": softcap, "scale": scale, **kind}

    def forward(q_BTKGH: jax.Array, *args: jax.Array, **kind: Any) -> tuple:
        module, how = engine(q_BTKGH, kind)
        return module.forward(q_BTKGH, *args, **how)

    def backward(q_BTKGH: jax.Array, *args: jax.Array, **kind: Any) -> tuple:
        module, how = engine(q_BTKGH, kind)
        return module.backward(q_BTKGH, *args, **how)

    return Block(forward, backward)


def platform() -> str:
    """Of the devices of the mesh in use: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = getattr(device, "platform", None) or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@functools.cache
def tell(what: str, reason: str) -> None:
    """Say once what is done that is slower than it could be, and why."""
    logging.warning("%s: %s", what, reason)
