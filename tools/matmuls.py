"""What the matmuls of a recipe are worth in fewer bits, on the device at hand.

python -m tools.bench matmul --config=configs/llama.py:1B-80GB

Each weight of a layer meets as many tokens as a step of the recipe has, the head's a chunk: in the
compute dtype and rounded to each format, in each pass, its rounding included. Printed, weight by
weight: TFLOP/s, the ratio to the compute dtype, the error, as the norm of the difference from the
product in float32 over the norm of that; then a few tokens, where the weight's bytes count, as a
share of the rate of a copy; and torch's own 8-bit products, where torch is installed. Random
numbers. The last line is one JSON object.
"""

import functools
import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax import lax
from rich.console import Console
from rich.table import Table

from configs import command
from configs.run import Run
from costs import rates
from model.config import ModelConfig
from model.matmul import einsum
from model.matmul.stored import store
from model.precision import GRADIENTS, Format, Passes
from sharding import mesh as meshes
from sharding import runtime
from tools.plan import sized

FLAGS = flags.FlagValues()
flags.DEFINE_integer("tokens", 0, "That meet each weight; 0: of a step", flag_values=FLAGS)
flags.DEFINE_string("output", None, "A file for the JSON object too", flag_values=FLAGS)
SPEC, OUT = "TI,OI->TO", jax.P(None, None)
PASSES = ("forward", "dgrad", "wgrad")
FEW = (1, 16)  # tokens of a decoding step
STORED = ("bf16", "w8", "w4g64")
WEIGHTS, MOST = 2**30, 32  # bytes of them, so that no cache holds them; and how many at most


class Shape(NamedTuple):
    """A weight [O, I], and how many tokens meet it at a time."""

    name: str
    outputs: int
    inputs: int
    tokens: int


def shapes(cfg: ModelConfig, tokens: int) -> list[Shape]:
    """The weights of a layer, and the head's, which meets its loss's chunks."""
    inner = cfg.heads * cfg.head_dim
    return [
        Shape("qkv", inner + 2 * cfg.kv_heads * cfg.head_dim, cfg.embed, tokens),
        Shape("out", cfg.embed, inner, tokens),
        Shape("up", cfg.mlp, cfg.embed, tokens),
        Shape("down", cfg.embed, cfg.mlp, tokens),
        Shape("head", cfg.vocab, cfg.embed, min(tokens, cfg.arch.head.chunk)),
    ]


def work(kind: str, form: str) -> Callable[..., jax.Array]:
    """One pass of x [T, I] and w [O, I], or of dy [T, O] and one of these, in a format."""
    passes = Passes(**{kind: form})
    product = functools.partial(einsum, SPEC, out=OUT, passes=passes)

    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        if kind == "forward":
            return product(x, w)
        if kind == "dgrad":
            return jax.vjp(lambda x: product(x, w), x)[1](dy)[0]
        return jax.vjp(lambda w: product(x, w), w)[1](dy)[0]

    return run


def exact(kind: str, x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
    """What `work` computes, in float32: products of bfloat16 are exact in it."""
    pairs = {"forward": (x, w.T), "dgrad": (dy, w), "wgrad": (dy.T, x)}
    highest = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(*pairs[kind], precision=highest, preferred_element_type=jnp.float32)


def drawn(key: int, *size: int, dtype: str) -> jax.Array:
    """Random numbers, made on the device."""
    return _normal(jax.random.key(key, impl="rbg"), size, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, size: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, size, jnp.float32).astype(dtype)


def of_many(shape: Shape, dtype: str) -> list[dict[str, Any]]:
    """A row of figures for each pass and format."""
    tokens = shape.tokens
    x = drawn(0, tokens, shape.inputs, dtype=dtype)
    w = drawn(1, shape.outputs, shape.inputs, dtype=dtype)
    dy = drawn(2, tokens, shape.outputs, dtype=dtype)
    found, flops = [], 2.0 * tokens * shape.outputs * shape.inputs
    for kind in PASSES:
        right, first = jax.jit(functools.partial(exact, kind))(x, w, dy), 0.0
        for form in GRADIENTS:
            started = time.perf_counter()
            run = jax.jit(work(kind, form)).lower(x, w, dy).compile()
            made = time.perf_counter() - started
            seconds = rates.timed(run, x, w, dy, least=0.1)
            first = first or seconds
            row = {"weight": shape.name, "tokens": tokens, "pass": kind, "format": form}
            row |= {"seconds": seconds, "tflops": flops / seconds / 1e12, "ratio": first / seconds}
            row |= {"error": float(jax.jit(apart)(run(x, w, dy), right)), "compile_s": made}
            found.append(row)
    return found


def of_few(shape: Shape, tokens: int, dtype: str, copy: float) -> list[dict[str, Any]]:
    """A row of figures for each format of stored weights: as many as no cache holds."""
    own = shape.outputs * shape.inputs * jnp.dtype(dtype).itemsize
    count = min(MOST, math.ceil(WEIGHTS / own))
    x, found = drawn(0, tokens, shape.inputs, dtype=dtype), []
    exactly = drawn(1, shape.outputs, shape.inputs, dtype=dtype)
    right = jnp.matmul(*(a.astype(jnp.float32) for a in (x, exactly.T)), precision="highest")
    product = functools.partial(einsum, SPEC, out=OUT)
    run = jax.jit(lambda x, ws: [product(x, w) for w in ws])
    for form in STORED:
        stored = functools.partial(store, inputs=1, form=Format.parse(form))
        keep = jax.jit(stored) if form != "bf16" else jnp.copy
        ws = [keep(exactly)] + [
            keep(drawn(key, *exactly.shape, dtype=dtype)) for key in range(2, count + 1)
        ]
        seconds = rates.timed(run, x, ws, least=0.1)
        size = sum(a.nbytes for a in jax.tree.leaves(ws))
        row = {"weight": shape.name, "tokens": tokens, "format": form, "seconds": seconds / count}
        row |= {"gb_per_s": size / seconds / 1e9, "share_of_copy": size / seconds / copy}
        found.append(row | {"error": float(apart(run(x, ws)[0], right))})
    return found


def of_torch(shape: Shape) -> list[dict[str, Any]]:
    """torch's own 8-bit products of already rounded operands, on its GPU."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    size = (shape.tokens, shape.inputs), (shape.outputs, shape.inputs)
    x, w = (torch.randint(-127, 128, s, device="cuda", dtype=torch.int8) for s in size)
    x8, w8 = (torch.randn(*s, device="cuda").to(torch.float8_e4m3fn) for s in size)
    ones = torch.ones((), device="cuda")
    scaled = {"scale_a": ones, "scale_b": ones, "out_dtype": torch.bfloat16}
    products = {
        "int8": lambda: torch._int_mm(x, w.t()),
        "fp8": lambda: torch._scaled_mm(x8, w8.t(), **scaled),
    }
    found = []
    for form, product in products.items():
        product()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            product()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / 10
        flops = 2.0 * shape.tokens * shape.outputs * shape.inputs
        row = {"weight": shape.name, "tokens": shape.tokens, "format": form, "seconds": seconds}
        found.append(row | {"tflops": flops / seconds / 1e12})
    return found


def apart(ours: jax.Array, right: jax.Array) -> jax.Array:
    """The norm of a difference over the norm of what is right."""
    return jnp.linalg.norm(ours.astype(jnp.float32) - right) / jnp.linalg.norm(right)


def table(console: Console, rows: list[dict[str, Any]], **shown: str) -> list[dict[str, Any]]:
    """Rows of figures, printed under their names; of each what `shown` formats."""
    names = [name for name in rows[0] if name in shown]
    made = Table(*names, box=None)
    for row in rows:
        made.add_row(*(format(row[name], shown[name]) for name in names))
    console.print(made)
    return rows


def main(run: Run) -> int:
    """Measure and print."""
    runtime.prepare()
    with command.user_input():
        if FLAGS.tokens < 0:
            raise ValueError(f"--tokens={FLAGS.tokens} must be at least 0")
        run = sized(run)
    tokens = FLAGS.tokens or run.data.batch * run.data.seq // run.optim.accumulate
    console, dtype, copy = Console(width=120), run.model.dtype, rates.copy_rate()
    words = {"weight": "", "pass": "", "format": "", "tokens": "d"}
    every = shapes(run.model, tokens)
    up = next(each for each in every if each.name == "up")
    many, few = [], []
    with jax.set_mesh(meshes.make(meshes.MeshConfig(), jax.local_devices()[:1])):
        for each in every:
            figures = {"tflops": ".1f", "ratio": ".2f", "error": ".1e", "compile_s": ".1f"}
            many += table(console, of_many(each, dtype), **words, **figures)
        console.print(f"\nfew tokens; a copy moves {copy / 1e9:,.0f} GB/s")
        for count in FEW:
            figures = {"gb_per_s": ",.0f", "share_of_copy": ".0%", "error": ".1e"}
            few += table(console, of_few(up, count, dtype, copy), **words, **figures)
    torch = [row for each in every for row in of_torch(each)]
    if torch:
        console.print("\ntorch, of operands that are rounded")
        table(console, torch, **words, tflops=".1f")
    kind = jax.local_devices()[0].device_kind
    found = {"recipe": run.name, "device": kind, "tokens": tokens, "copy_gb_per_s": copy / 1e9}
    line = json.dumps(found | {"many": many, "few": few, "torch": torch})
    if FLAGS.output:
        with command.user_input():
            Path(FLAGS.output).write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    return 0
