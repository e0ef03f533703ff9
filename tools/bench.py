"""How fast a recipe trains, held against what its hardware can do.

python -m tools.bench train --config=configs/llama.py:1B

Random tokens, no files: the step of the recipe is compiled, warmed up and timed, then traced once.
Printed: tokens per second of a device, model FLOP/s over the datasheet's peak (MFU) and over the
matmul and attention rates measured in the same run, peak memory, compile time, where the step's
time went, joules per token where the driver counts them. The last line is one JSON object;
--compare=FILE prints the ratios to an earlier one.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

import train
from configs import command
from configs.run import Run, check
from costs import devices, flops, fusion, rates, trace
from costs.apart import Apart
from costs.eager import Eager
from costs.energy import Energy
from costs.memory import human, program_bytes
from model import transformer
from model.attention import SelfAttention
from sharding import mesh as meshes
from sharding import offload, runtime
from tools import fusion as fusions
from tools import ladder, matmuls
from tools.plan import sized

FLAGS = flags.FlagValues()
flags.DEFINE_integer("steps", 20, "Timed", flag_values=FLAGS)
flags.DEFINE_integer("warmup", 3, "Steps before those that are timed", flag_values=FLAGS)
flags.DEFINE_integer("documents", 1, "Of each row, of uneven lengths", flag_values=FLAGS)
flags.DEFINE_integer("kernels", 12, "The longest kernels to print", flag_values=FLAGS)
flags.DEFINE_string(
    "compare", None, "A file whose last line is from an earlier run", flag_values=FLAGS
)
flags.DEFINE_string("output", None, "A file for the JSON object too", flag_values=FLAGS)
flags.DEFINE_boolean("rates", True, "Measure what the hardware keeps up too", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "option", [], "NAME=VALUE, that XLA compiles the step with; may be repeated", flag_values=FLAGS
)
# What a program without these would do, for the ladder to hold against:
flags.DEFINE_boolean("eager", False, "Run each operation by itself", flag_values=FLAGS)
flags.DEFINE_boolean("donate", True, "Let the step take over its state's memory", flag_values=FLAGS)
flags.DEFINE_boolean(
    "fused_projections", True, "No: queries, keys and values by a matmul each", flag_values=FLAGS
)
flags.DEFINE_boolean("packed", True, "No: one document a row, and padding", flag_values=FLAGS)


def random_batch(run: Run, documents: int, packed: bool = True) -> dict[str, np.ndarray]:
    """A batch of random tokens, each row cut at random into so many documents, without padding;
    or, not packed, with the first of them alone."""
    draw, (B, T) = np.random.default_rng(0), (run.data.batch, run.data.seq)
    ids = draw.integers(0, run.model.vocab, (B, T + 1), dtype=np.int32)
    segments = np.ones((B, T), np.int32)
    for row in segments:
        row[draw.choice(np.arange(1, T), documents - 1, replace=False)] += 1
        row[:] = 1 + np.cumsum(row - 1)
    if not packed:
        segments[segments > 1] = 0
    begins = np.concatenate([np.ones((B, 1), bool), np.diff(segments) > 0], axis=1)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    start = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.where(segments > 0, places - start, 0).astype(np.int32),
        "segments": segments,
    }


def options(words: list[str]) -> dict[str, Any]:
    """XLA's options of "NAME=VALUE"; a small program is compiled with them. ValueError if one is
    not known or not of its kind."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(
                f"--option={word}: write NAME=VALUE, as xla_gpu_enable_triton_gemm=false"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=found)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--option: XLA says: {error}") from error
    return found


def stepper(program: train.Program) -> tuple[Callable[..., Any], Any]:
    """What makes the next state and the metrics of a state and a batch, and what it runs by: a
    compiled program, or an Eager."""
    if not FLAGS.eager:
        donated = {"donate_argnums": 0} if FLAGS.donate else {}
        step = program.jit(train.train_step, **donated).lower(program.state, program.batch())
        compiled = step.compile(compiler_options=options(FLAGS.option))
        return compiled, compiled
    shapes = program.state, program.batch()
    step = functools.partial(train.train_step, program)
    closed, results = jax.make_jaxpr(step, return_shape=True)(*shapes)
    structure, eager = jax.tree.structure(results), Eager()

    def one(*args: Any) -> Any:
        return jax.tree.unflatten(structure, eager(closed, *jax.tree.leaves(args)))

    return one, eager


def measure(run: Run, documents: int) -> tuple[dict[str, Any], trace.Trace | None]:
    """The figures of a run's step on the mesh in use, and where the time of one step went."""
    clock = time.perf_counter
    started = clock()
    program = train.build(run)
    state = jax.block_until_ready(program.fresh())
    made = clock()
    run_step, runs_by = stepper(program)
    compiled = None if isinstance(runs_by, Eager) else runs_by
    ready = clock()
    rows = random_batch(run, documents, FLAGS.packed)
    tokens = int((rows["segments"] > 0).sum())
    batch = program.place(rows)
    hold = [state]
    del state

    def step() -> jax.Array:
        hold[0], metrics = run_step(hold[0], batch)
        return metrics["loss"]

    losses = [step() for _ in range(FLAGS.warmup)]
    jax.block_until_ready(hold[0])
    first, energy = clock(), Energy()
    joules = energy.joules()
    for _ in range(FLAGS.steps):
        losses.append(step())
    jax.block_until_ready(hold[0])
    seconds = (clock() - first) / FLAGS.steps
    used = None if joules is None else (energy.joules() - joules) / FLAGS.steps
    where = trace.traced(lambda: jax.block_until_ready(step())) if compiled else None
    count = jax.device_count()
    work = tokens * flops.flops_per_token(run.model, run.data.seq) / count
    peak = devices.peak_flops(jax.devices()[0], run.model.dtype)
    figures = {
        "device": f"{count} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "tokens_per_s_per_device": round(tokens / seconds / count, 1),
        "step_s": seconds,
        "tflops_per_device": round(work / seconds / 1e12, 5),
        "mfu": round(work / seconds / peak, 4) if peak else None,
        "peak_bytes": devices.peak_memory(),
        "init_s": round(made - started, 2),
        "compile_s": round(ready - made, 2) if compiled else None,
        "joules_per_token": used and round(used / tokens, 5),
        "losses": [round(float(loss), 6) for loss in losses],
    }
    if compiled:
        made = fusion.analyse(compiled.as_text())
        figures["planned_bytes"] = program_bytes(compiled.memory_analysis())
        figures |= {"kernels": made.launches, "moved_bytes": made.moved}
    else:
        figures["kernels"] = runs_by.count // len(losses)
    if where:
        figures["where_ms"] = {kind: round(s * 1e3, 2) for kind, s in where.kinds.items()}
        figures["where_ms"] |= {"idle": round(where.idle * 1e3, 2)}
        figures["hidden_communication_ms"] = round(where.hidden * 1e3, 2)
    return figures, where


def against(run: Run, figures: dict[str, Any], documents: int) -> dict[str, Any]:
    """Rates measured in this process, and the least time of the step by them alone."""
    cfg, tokens = run.model, run.data.batch * run.data.seq / jax.device_count()
    matmul = devices.measured_matmul_rate(cfg.dtype)
    rows = max(1, run.data.batch // jax.device_count() // run.optim.accumulate)
    attention = rates.attention_rate(cfg, rows, run.data.seq, documents)
    products = 6.0 * flops.matmul_params(cfg) * tokens
    inner = tokens * flops.flops_per_token(cfg, run.data.seq) - products
    least = products / matmul + inner / attention
    return {
        "matmul_tflops": round(matmul / 1e12, 2),
        "attention_tflops": round(attention / 1e12, 2),
        "copy_gb_per_s": round(rates.copy_rate() / 1e9, 1),
        "share_of_rates": round(least / figures["step_s"], 4),
    }


def show(console: Console, figures: dict[str, Any], where: trace.Trace | None) -> None:
    """The figures as tables."""
    table = Table("", "figure", box=None)
    units = {"peak_bytes": human, "planned_bytes": human}
    for name, value in figures.items():
        if name in ("losses", "where_ms") or value is None:
            continue
        table.add_row(name, units[name](value) if name in units else str(value))
    console.print(table)
    if where:
        parts = Table("where a step's time went", "ms", "share", box=None)
        for kind, ms in figures["where_ms"].items():
            parts.add_row(kind, f"{ms:.1f}", f"{ms / where.span / 10:.1f} %")
        console.print(parts)
        longest = Table("kernel", "kind", "ms", "calls", box=None)
        for name, seconds, calls in where.kernels[: FLAGS.kernels]:
            longest.add_row(name[:70], trace.kind_of(name), f"{seconds * 1e3:.2f}", f"{calls:g}")
        console.print(longest)


def compared(console: Console, figures: dict[str, Any], before: dict[str, Any]) -> None:
    """Ratios to an earlier run, of all numbers that both have."""
    table = Table("", "before", "this run", "ratio", box=None)
    for name, value in figures.items():
        old = before.get(name)
        if isinstance(value, (int, float)) and isinstance(old, (int, float)) and old:
            table.add_row(name, f"{old:g}", f"{value:g}", f"{value / old:.3f}")
    console.print(table)


def last_object(path: str) -> dict[str, Any]:
    """The JSON object in the last line of a file. ValueError if it is none."""
    lines = Path(path).read_text(encoding="utf-8").strip().splitlines()
    try:
        found = json.loads(lines[-1])
        assert isinstance(found, dict)
    except (IndexError, ValueError, AssertionError):
        raise ValueError(f"--compare={path}: its last line is no JSON object") from None
    return found


def main(run: Run) -> int:
    """Measure and print."""
    runtime.prepare()
    with command.user_input():
        if FLAGS.steps < 1 or FLAGS.warmup < 1:
            raise ValueError(
                f"--steps={FLAGS.steps} and --warmup={FLAGS.warmup} must be at least 1"
            )
        options(FLAGS.option)
        if FLAGS.eager and jax.device_count() > 1:
            raise ValueError(f"--eager runs on one device, not on {jax.device_count()}")
        if not 1 <= FLAGS.documents <= run.data.seq:
            raise ValueError(f"--documents={FLAGS.documents} must be 1 to {run.data.seq}")
        before = last_object(FLAGS.compare) if FLAGS.compare else None
        data = dataclasses.replace(run.data, documents=FLAGS.documents, across=FLAGS.documents == 1)
        run = dataclasses.replace(sized(run), data=data)
        check(run, jax.device_count())
        offload.check(run.layout.host, jax.local_devices())
    console = Console(width=120)
    attention = SelfAttention if FLAGS.fused_projections else Apart
    with (
        jax.set_mesh(meshes.make(run.mesh)),
        mock.patch.object(transformer, "SelfAttention", attention),
    ):
        figures, where = measure(run, FLAGS.documents)
    if FLAGS.rates:
        figures |= against(run, figures, FLAGS.documents)
    show(console, figures, where)
    if before:
        compared(console, figures, before)
    line = json.dumps({"recipe": run.name, **figures})
    if FLAGS.output:
        with command.user_input():
            Path(FLAGS.output).write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    return 0


KINDS = {
    "train": (
        main,
        FLAGS,
        "configs/llama.py:1B",
        (
            "train --config=configs/llama.py:1B --config.data.batch=6 --output=base.json",
            "train --config=configs/llama.py:1B --config.model.remat=mlp --compare=base.json",
            "train --config=configs/llama.py:1B --option=xla_gpu_enable_triton_gemm=false",
        ),
    ),
    "fusion": (
        fusions.main,
        fusions.FLAGS,
        "configs/quickstart.py",
        (
            "fusion --config=configs/llama.py:1B --places=20 --hlo=step.txt",
            "fusion --diff=model.remat=full --diff=model.unroll=1",
            "fusion --config=configs/llama.py:8B --aot=h100x8 --hlo=step.txt",
        ),
    ),
    "ladder": (
        ladder.main,
        ladder.FLAGS,
        "configs/llama.py:124M",
        (
            "ladder --config.model.layers=4 --config.model.vocab=8192 --config.data.seq=256 "
            "--config.data.batch=4 --config.model.dtype=float32 --plot=ladder.png",
            "ladder --config=configs/llama.py:1B --config.data.seq=2048 --batch=1",
        ),
    ),
    "matmul": (
        matmuls.main,
        matmuls.FLAGS,
        "configs/llama.py:1B-80GB",
        (
            "matmul --config=configs/llama.py:8B-80GB",
            "matmul --config=configs/quickstart.py --tokens=1024",
        ),
    ),
}

if __name__ == "__main__":
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind not in KINDS:
        print(f"tools.bench: error: write one of {', '.join(KINDS)} first", file=sys.stderr)
        sys.exit(command.UserError.code)
    run_kind, values, recipe, examples = KINDS[kind]
    sys.exit(
        command.status(run_kind, sys.argv[2:], recipe=recipe, examples=examples, values=values)
    )
