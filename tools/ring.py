"""Time attention over a row split along `context` against the rate of one device alone.

Forward and backward pass of one layer's attention: of the whole row on one device; of the ring; of
a ring in which nobody talks, each device working on its own keys over and over; of the talk alone.
The efficiency is the rate of a device of the ring over that of the one. Hidden is that share of the
talk's time by which the ring is faster than its work and its talk in turn.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from configs import command
from model.kernels import engine
from sharding import mesh as meshes
from sharding.context import Block, Ring, lay, ring_attention
from sharding.mesh import MeshConfig
from tools.parity import table

FLAGS = flags.FlagValues()
for name, value, what in (
    ("context", 4, "Devices that share a row"),
    ("tokens", 131_072, "Of a row"),
    ("rows", 1, "Rows"),
    ("heads", 32, "Query heads"),
    ("kv_heads", 8, "Key and value heads"),
    ("head_dim", 128, "Size of a head"),
    ("window", 0, "Tokens that a token sees; 0: all before it"),
    ("documents", 1, "Of each row, of one length"),
    ("repeats", 5, "Timed calls; the median counts"),
):
    flags.DEFINE_integer(name, value, what, lower_bound=int(name != "window"), flag_values=FLAGS)
flags.DEFINE_string("dtype", "bfloat16", "Of queries, keys and values", flag_values=FLAGS)
flags.DEFINE_string("platform", None, "cpu simulates its devices", flag_values=FLAGS)


def devices() -> list[jax.Device]:
    """The devices of a row. ValueError if there are fewer."""
    if FLAGS.platform:
        jax.config.update("jax_platforms", FLAGS.platform)
    if FLAGS.platform == "cpu":
        with contextlib.suppress(RuntimeError):  # JAX has begun: with the devices that it has
            jax.config.update("jax_num_cpu_devices", FLAGS.context)
    if FLAGS.heads % FLAGS.kv_heads:
        raise ValueError(f"--heads={FLAGS.heads} is no multiple of --kv_heads={FLAGS.kv_heads}")
    if FLAGS.tokens % (2 * FLAGS.context):
        raise ValueError(f"--tokens={FLAGS.tokens} is no multiple of 2 x --context={FLAGS.context}")
    found = jax.devices()
    if len(found) < FLAGS.context:
        raise ValueError(f"--context={FLAGS.context} is more than the {len(found)} devices here")
    return found[: FLAGS.context]


def drawn(spec: jax.P) -> tuple[jax.Array, ...]:
    """q, k, v, segments and the output's gradient, split so."""
    rows, K, size = (FLAGS.rows, FLAGS.tokens), FLAGS.kv_heads, FLAGS.head_dim
    shapes = {"q": (K, FLAGS.heads // K, size), "k": (K, size), "v": (K, size)}
    shapes["do"] = shapes["q"]

    def draw() -> tuple[jax.Array, ...]:
        normal = functools.partial(jax.random.normal, dtype=FLAGS.dtype, out_sharding=spec)
        found = {
            name: normal(jax.random.key(i), (*rows, *shape))
            for i, (name, shape) in enumerate(shapes.items())
        }
        return found["q"], found["k"], found["v"], found["do"]

    numbers = 1 + np.arange(FLAGS.tokens) * FLAGS.documents // FLAGS.tokens
    segments = np.broadcast_to(numbers.astype(np.int32), rows)
    where = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec[:2]))
    q, k, v, do = jax.jit(draw)()
    return q, k, v, jax.device_put(lay(segments, where, causal=True), where), do


def seconds(work: Callable[..., Any], args: tuple) -> float:
    """Of one call, compiled, the median of several after one that does not count."""
    compiled = jax.jit(work).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(FLAGS.repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return median(times)


def alone(block: Block, q, k, v, segments, do) -> Any:
    """Forward and backward pass of a row that one device has whole."""
    how = {"causal": True, "window": FLAGS.window}
    o, lse = block.forward(q, k, v, segments, segments, **how)
    o = o.astype(q.dtype)
    return o, block.backward(q, k, v, segments, segments, o, lse, do, **how)


def together(block: Block, q, k, v, segments, do) -> Any:
    """The same of a row that devices share."""
    ring = functools.partial(ring_attention, block=block, window=FLAGS.window)
    o, pull = jax.vjp(lambda *qkv: ring(*qkv, segments), q, k, v)
    return o, pull(do)


def talk(q, k, v, segments, do) -> Any:
    """What goes round in `together`, of a row without a window."""
    del q, do
    ways = FLAGS.context
    to = [(i, (i + 1) % ways) for i in range(ways)]

    def local(k, v, segments):
        keys = jnp.stack([k, v])
        gradients, forward = keys.astype(jnp.float32), keys
        # Devices talk over `context`, the same bytes as in sharding/context.py.
        for _ in range(ways - 1):
            forward = lax.ppermute(forward, "context", to)
        for _ in range(ways - 1):
            keys, gradients = lax.ppermute((keys, gradients), "context", to)
        return forward, keys, gradients, lax.all_gather(segments, "context")

    split = jax.P(None, None, "context")
    return jax.shard_map(local, out_specs=(split,) * 4)(k, v, segments)


def report(found: list[jax.Device]) -> str:
    """The table of these devices."""
    ways, scale = FLAGS.context, FLAGS.head_dim**-0.5
    block = engine.block(documents=FLAGS.documents, causal=True, scale=scale, softcap=0.0)
    with jax.set_mesh(meshes.make(MeshConfig(data=1), found[:1])):
        one = seconds(functools.partial(alone, block), drawn(jax.P(None, None, None, None)))
    with jax.set_mesh(meshes.make(MeshConfig(data=1, context=ways), found)):
        args = drawn(jax.P(None, "context", None, None))
        ring = seconds(functools.partial(together, block), args)
        with mock.patch.object(Ring, "pass_on", lambda ring, arrays, hop: arrays):
            work = seconds(functools.partial(together, block), args)
        said = 0 if FLAGS.window else seconds(talk, args)
    length = FLAGS.tokens / FLAGS.documents
    window = min(FLAGS.window or length, length)
    pairs = FLAGS.rows * FLAGS.documents * window * (length - window / 2)
    flops = 14 * pairs * FLAGS.heads * FLAGS.head_dim  # 2 and 5 matmuls; Dao 2023, arXiv:2307.08691
    lines = [
        ["one device", f"{one * 1e3:.2f}", f"{flops / one / 1e12:.1f}"],
        [f"ring of {ways}", f"{ring * 1e3:.2f}", f"{flops / ring / ways / 1e12:.1f}"],
        ["its work alone", f"{work * 1e3:.2f}", f"{flops / work / ways / 1e12:.1f}"],
    ]
    told = f"efficiency {one / ways / ring:.1%}"
    if said:
        lines.append(["its talk alone", f"{said * 1e3:.2f}", ""])
        told += f", {min(max((work + said - ring) / said, 0), 1):.0%} of the talk hidden"
    return (
        f"{ways} x {found[0].device_kind}: {FLAGS.rows} x {FLAGS.tokens:,} tokens, {FLAGS.heads} "
        f"heads over {FLAGS.kv_heads} of {FLAGS.head_dim}, {FLAGS.dtype}\n\n"
        + table(["forward and backward", "ms", "TFLOP/s a device"], lines)
        + f"\n\n{told}"
    )


def main() -> None:
    """Time, and print."""
    with command.user_input():
        found = devices()
    print(report(found))


if __name__ == "__main__":
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            examples=(
                "--context=4 --tokens=131072",
                "--platform=cpu --context=2 --tokens=512 --heads=4 --kv_heads=2 --head_dim=16",
            ),
            values=FLAGS,
        )
    )
