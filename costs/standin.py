"""A stand-in for fused attention, for compilers and counts that cannot have the engine itself.

cuDNN's attention does not compile ahead of time, and its work shows in no jaxpr. This keeps what it
keeps: for the backward pass q, k, v, the output and the log-sum-exp of each query, never the
weights over tokens. Its results mean nothing.

Shapes: B rows, T tokens, K kv heads, G query heads per kv head, H head size.
"""

import contextlib
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.kernels import attention, cudnn, engine

FORWARD, BACKWARD = "attention_forward", "attention_backward"  # counted by name: costs/work.py


def attend(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    documents: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    scale: float = 1.0,
    window: int = 0,
    kernels: str = "fastest",
) -> jax.Array:
    """As `model.kernels.engine.attention` of a GPU by shape, dtype and work: [B, T, K, G, H]."""
    reason = cudnn.why_not(q_BTKGH, causal=causal, softcap=softcap, documents=documents)
    if kernels == "plain" or reason not in ("", cudnn.AHEAD):
        how = {"causal": causal, "softcap": softcap, "scale": scale, "window": window}
        return attention.plain(q_BTKGH, k_BTKH, v_BTKH, segments_BT, **how)
    return _fused(q_BTKGH, k_BTKH, v_BTKH, segments_BT, (window, causal))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q, k, v, segments, seen):
    return _forward(q, k, v, segments, seen)[0]


def _named(function: Any, name: str, seen: tuple[int, bool]) -> Any:
    """`function` under a name that tells what the real one computes."""
    window, causal = seen
    function.__name__ = f"{name}_{window}_{int(causal)}"
    return jax.jit(function)


def _forward(q, k, v, segments, seen):
    def forward(q, k, v, segments):
        q, k, v, segments = lax.optimization_barrier((q, k, v, segments))
        o = q + (k + v)[:, :, :, None] + segments[:, :, None, None, None].astype(q.dtype)
        lse = jnp.sum((q * k[:, :, :, None]).astype(jnp.float32), axis=-1)
        return lax.optimization_barrier((o, lse))

    o, lse = _named(forward, FORWARD, seen)(q, k, v, segments)
    # Both are what the backward pass asks for, so a policy keeps both or neither.
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (q, k, v, segments, o, lse)


def _backward(seen, kept, do):
    def backward(q, k, v, segments, o, lse, do):
        q, k, v, o, lse, do = lax.optimization_barrier((q, k, v, o, lse, do))
        dq = q + o + do + k[:, :, :, None] + lse[..., None].astype(q.dtype)
        dk, dv = k + jnp.sum(do * q, axis=3), v + jnp.sum(do * o, axis=3)
        return lax.optimization_barrier((dq, dk, dv))

    return *_named(backward, BACKWARD, seen)(*kept, do), None


_fused.defvjp(_forward, _backward)


def in_place(platform: str) -> contextlib.AbstractContextManager:
    """Models built and traced in here attend as on "gpu", "tpu" or "cpu"."""
    if platform != "gpu":
        return contextlib.nullcontext()
    return mock.patch.object(engine, "attention", attend)
