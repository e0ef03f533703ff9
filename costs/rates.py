"""What one device keeps up, measured: attention of a model's shape, copies of its memory."""

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from costs.flops import visible
from model import kernels
from model.config import ModelConfig
from sharding import mesh as meshes


def timed(work: Callable[..., Any], *args: Any, least: float = 0.5) -> float:
    """Seconds of one call: the median over bursts of calls that take `least` seconds in all."""
    jax.block_until_ready(work(*args))
    started = time.perf_counter()
    jax.block_until_ready(work(*args))
    burst = max(1, min(20, int(0.05 / max(time.perf_counter() - started, 1e-6))))
    seconds, end = [], time.perf_counter() + least
    while time.perf_counter() < end or not seconds:
        started = time.perf_counter()
        for _ in range(burst):
            made = work(*args)
        jax.block_until_ready(made)
        seconds.append((time.perf_counter() - started) / burst)
    return median(seconds)


def attention_rate(config: ModelConfig, rows: int, seq: int, documents: int = 1) -> float:
    """FLOP/s of a layer's attention, forward and backward, on the first device.

    Counted as costs.flops does: 12 N H for each visible token, causal attention half.
    """
    groups = config.heads // config.kv_heads
    with jax.set_mesh(meshes.make(meshes.MeshConfig(), jax.local_devices()[:1])) as _:
        shapes = ((groups, config.head_dim), (config.head_dim,), (config.head_dim,))
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v = (
            jax.random.normal(key, (rows, seq, config.kv_heads, *shape), config.dtype)
            for key, shape in zip(keys, shapes, strict=False)
        )
        slope = jax.random.normal(keys[3], q.shape, config.dtype)
        segments = jnp.ones((rows, seq), jnp.int32)
        attend = functools.partial(
            kernels.engine.attention, scale=config.head_dim**-0.5, documents=documents
        )
        attend = jax.shard_map(attend, out_specs=jax.P())

        @jax.jit
        def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            o, pull = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
            return o, pull(slope)

        seconds = timed(both, q, k, v)
    return 12.0 * config.heads * config.head_dim * visible(seq) * rows * seq / seconds


def copy_rate(size: int = 2**30) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes on the first device."""
    device = jax.local_devices()[0]
    size = size if device.platform != "cpu" else 2**27
    mesh = meshes.make(meshes.MeshConfig(), [device])
    with jax.set_mesh(mesh):
        draw = jax.jit(
            lambda: jax.random.normal(jax.random.key(0), (size // 4,)),
            out_shardings=NamedSharding(mesh, jax.P()),
        )
        seconds = timed(jax.jit(lambda a: -a), draw())
    return 2 * size / seconds
