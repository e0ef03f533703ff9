"""Stand-ins for kernels, where a compiler or a count cannot have the kernel itself.

cuDNN's attention does not compile ahead of time, and neither its work nor that of a TPU's shows in
a jaxpr. The stand-in keeps what they keep: for the backward pass q, k, v, the output and the
log-sum-exp of each query, never the weights over tokens. A TPU's, and those of the 8-bit kernels
for Hopper GPUs, are for counts alone: each is one operation, which reads and writes what the kernel
does. Their results mean nothing.

Shapes: B rows, T tokens, K kv heads, G query heads per kv head, H head size; of matrices R rows,
N outputs, K contracted.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.kernels import (
    attention,
    blocks,
    cudnn,
    cudnn_blocks,
    engine,
    hopper,
    hopper_round,
    splash,
)
from sharding.context import Block

# Counted by name: costs/work.py.
FORWARD, BACKWARD = "attention_forward", "attention_backward"
MATMUL, ROUND = "matmul_8bit", "round_8bit"


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
    platform: str = "gpu",
) -> jax.Array:
    """As `model.kernels.engine.attention` there by shape, dtype and work: [B, T, K, G, H]."""
    if platform == "tpu":
        reason = splash.why_not(q_BTKGH)
    else:
        reason = cudnn.why_not(q_BTKGH, causal=causal, softcap=softcap, documents=documents)
    if kernels == "plain" or reason not in ("", cudnn.AHEAD):
        how = {"causal": causal, "softcap": softcap, "scale": scale, "window": window}
        return attention.plain(q_BTKGH, k_BTKH, v_BTKH, segments_BT, **how)
    if platform == "gpu":
        return _fused(q_BTKGH, k_BTKH, v_BTKH, segments_BT, (window, causal), 0)
    # Beside a TPU's kernel heads lie in memory as whole registers; of q, k and v only wide ones, as
    # it takes narrow ones with tokens last.
    head, more = q_BTKGH.shape[-1], -q_BTKGH.shape[-1] % splash.LANES
    given = (q_BTKGH, k_BTKH, v_BTKH)
    if head > splash.LANES:
        given, more = (_wider(a, more) for a in given), 0
    return _fused(*given, segments_BT, (window, causal), more)[..., :head]


def _wider(a: jax.Array, more: int) -> jax.Array:
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(q, k, v, segments, seen, more):
    return _forward(q, k, v, segments, seen, more)[0]


def _forward(q, k, v, segments, seen, more):
    o, lse = _attended(q, k, v, segments, seen, more)
    # Both are what the backward pass asks for, so a policy keeps both or neither.
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (q, k, v, segments, o, lse)


def _backward(seen, more, kept, do):
    return *_gradients(*kept, do, seen), None


def _attended(q, k, v, segments, seen, more=0):
    """(output, with heads wider by `more`; log-sum-exp)."""

    def forward(q, k, v, segments):
        q, k, v, segments = lax.optimization_barrier((q, k, v, segments))
        o = q + (k + v)[:, :, :, None] + segments[:, :, None, None, None].astype(q.dtype)
        lse = jnp.sum((q * k[:, :, :, None]).astype(jnp.float32), axis=-1)
        return lax.optimization_barrier((_wider(o, more), lse))

    return _named(forward, FORWARD, seen)(q, k, v, segments)


def _gradients(q, k, v, segments, o, lse, do, seen):
    def backward(q, k, v, segments, o, lse, do):
        q, k, v, o, lse, do = lax.optimization_barrier((q, k, v, o, lse, do))
        o, do = (a[..., : q.shape[-1]] for a in (o, do))
        dq = q + o + do + k[:, :, :, None] + lse[..., None].astype(q.dtype)
        dk, dv = k + jnp.sum(do * q, axis=3), v + jnp.sum(do * o, axis=3)
        return lax.optimization_barrier((dq, dk, dv))

    return _named(backward, BACKWARD, seen)(q, k, v, segments, o, lse, do)


_fused.defvjp(_forward, _backward)


def block(
    *, documents: int, causal: bool, scale: float, softcap: float, kernels: str = "fastest"
) -> Block:
    """As `model.kernels.engine.block` of a GPU by shape, dtype and work."""
    how = {"scale": scale, "softcap": softcap}

    def apart(q: jax.Array, kind: dict[str, Any]) -> bool:
        reason = cudnn.why_not(q, causal=causal, softcap=softcap, documents=1)
        reason = reason.removeprefix(cudnn.AHEAD)
        return bool(
            kernels == "plain" or reason or cudnn_blocks.why_not(documents=documents, **kind)
        )

    def forward(q, k, v, segments, keys, **kind):
        if apart(q, kind):
            return blocks.forward(q, k, v, segments, keys, **how, **kind)
        return _attended(q, k, v, segments, (kind["window"], kind["causal"]))

    def backward(q, k, v, segments, keys, o, lse, do, **kind):
        if apart(q, kind):
            return blocks.backward(q, k, v, segments, keys, o, lse, do, **how, **kind)
        o, do = o.astype(q.dtype), do.astype(q.dtype)
        return _gradients(q, k, v, segments, o, lse, do, (kind["window"], kind["causal"]))

    return Block(forward, backward)


def _named(function: Any, name: str, seen: tuple[int, bool]) -> Any:
    """`function` under a name that tells what the real one computes."""
    window, causal = seen
    return _whole(function, f"{name}_{window}_{int(causal)}")


def matmul(
    x_RK: jax.Array,
    w_NK: jax.Array,
    sx: jax.Array,
    sw: jax.Array,
    dtype: str,
    tile: hopper.Tile | None = None,
) -> jax.Array:
    """As `hopper.matmul` by shape, dtype and work: [R, N]."""

    def product(x, w, sx, sw):
        y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return (y * jnp.sum(sx) * jnp.sum(sw)).astype(dtype)

    return _whole(product, f"{MATMUL}_{'groups' if sx.ndim > 1 else 'whole'}")(x_RK, w_NK, sx, sw)


def both(
    x_RK: jax.Array, rows: hopper_round.Levels | None, turned: hopper_round.Levels
) -> tuple[jax.Array | None, jax.Array]:
    """As `hopper_round.both` by shape, dtype and work: ([R, K] or None, [K, R])."""
    ways = [(way, way is turned) for way in (rows, turned) if way is not None]
    scales = [by for way, _ in ways for by in way[1:] if by is not None]

    def rounded(x, *scales):
        x = sum(map(jnp.sum, scales)) * x
        return tuple((x.T if last else x).astype(way.form) for way, last in ways)

    made = _whole(rounded, ROUND)(x_RK, *scales)
    return (None if rows is None else made[0]), made[-1]


def _whole(function: Any, name: str) -> Any:
    """`function` under a name by which it counts as one operation."""
    function.__name__ = name
    return jax.jit(function)


@contextlib.contextmanager
def in_place(platform: str, *, counted: bool = True) -> Iterator[None]:
    """Models built and traced in here compute as on "gpu", "tpu" or "cpu".

    `counted`: to be counted, not compiled.
    """
    with contextlib.ExitStack() as stack:
        if platform == "gpu" or (platform == "tpu" and counted):
            there = functools.partial(attend, platform=platform)
            stack.enter_context(mock.patch.object(engine, "attention", there))
        if platform == "gpu":
            stack.enter_context(mock.patch.object(engine, "block", block))
        if platform == "gpu" and counted:
            stack.enter_context(mock.patch.object(engine, "platform", lambda: "gpu"))
            stack.enter_context(mock.patch.multiple(hopper, not_here=str, matmul=matmul))
            stack.enter_context(mock.patch.object(hopper_round, "both", both))
        yield
