"""Which engine computes the attention of whole rows: the fastest that can, here."""

import functools

import jax
from absl import logging

from model.kernels import cudnn
from model.kernels.attention import plain


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

    On a GPU by cuDNN, unless `kernels` is "plain"; where it does not apply, the reason is logged
    once.
    """
    if platform() == "gpu" and kernels == "fastest":
        reason = cudnn.why_not(q_BTKGH, causal=causal, softcap=softcap, documents=documents)
        if not reason:
            how["documents"] = documents
            return cudnn.attention(q_BTKGH, k_BTKH, v_BTKH, segments_BT, **how)
        tell("plain attention, of memory [T, T]", reason)
    how |= {"causal": causal, "softcap": softcap}
    return plain(q_BTKGH, k_BTKH, v_BTKH, segments_BT, **how)


def platform() -> str:
    """Of the devices of the mesh in use: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = getattr(device, "platform", None) or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@functools.cache
def tell(what: str, reason: str) -> None:
    """Say once what is done that is slower than it could be, and why."""
    logging.warning("%s: %s", what, reason)
