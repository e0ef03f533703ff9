"""What each optimisation of a recipe is worth: from none to all, one step at a time.

python -m tools.bench ladder --config=configs/llama.py:1B --config.data.seq=2048 --batch=1

The first rung is the recipe's model in float32, run operation by operation, with plain attention,
queries, keys and values by a matmul each, all logits at once, nothing recomputed, no memory taken
over, and one document a row with padding behind it. Each rung adds one thing that the recipe has;
what it lacks, or what changes nothing on this platform, is left out. --option=NAME=VALUE adds one
of XLA's to the last. Each runs in a process of its own by `tools.bench train`, on the same random
tokens. "tokens" are those of documents, not padding. A rung that does not fit is told as such. The
last line is one JSON object; --plot draws it.
"""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from configs import command, load
from configs.run import Run
from costs.memory import human
from sharding import runtime

FLAGS = flags.FlagValues()
flags.DEFINE_integer("steps", 5, "Timed, of each rung", flag_values=FLAGS)
flags.DEFINE_integer("documents", 4, "Of each packed row", flag_values=FLAGS)
flags.DEFINE_integer(
    "batch", 0, "Rows of all rungs but the last; 0: the recipe's", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "option", [], "NAME=VALUE of XLA: a rung more; may be repeated", flag_values=FLAGS
)
flags.DEFINE_string("plot", None, "A file for a drawing: .png, .svg", flag_values=FLAGS)
flags.DEFINE_string("output", None, "A file for the JSON object too", flag_values=FLAGS)
FULL = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


@dataclass
class Rung:
    """A step up, and what was measured on it."""

    name: str
    fields: dict[str, Any]  # of the recipe, by path
    flags: dict[str, Any]  # of tools.bench train
    figures: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


def rungs(
    run: Run, batch: int, documents: int, cpu: bool, options: Sequence[str] = ()
) -> Iterator[Rung]:
    """The steps from nothing to `run`, those left out that change nothing; then XLA's options."""
    model, head = run.model, run.model.arch.head
    rows = batch or run.data.batch
    fields = {
        "data.batch": rows,
        "model.dtype": "float32",
        "model.kernels": "plain",
        "model.remat": "none",
        "model.unroll": model.layers,
        "model.arch.head.chunk": rows * run.data.seq,
        "model.arch.head.logits": "float32",
        "precision": "bf16",
    }
    how = {"eager": True, "fused_projections": False, "donate": False, "packed": False}
    how |= {"documents": documents, "option": []}
    yield Rung("operation by operation, float32", dict(fields), dict(how))
    chunk = min(head.chunk, rows * run.data.seq)
    steps = [
        ("compiled and fused", {}, {"eager": False}),
        ("a loop over the layers", {"model.unroll": 1}, {}),
        (model.dtype, {"model.dtype": model.dtype}, {}),
        ("flash attention", {} if cpu else {"model.kernels": model.kernels}, {}),
        ("fused projections", {}, {"fused_projections": True}),
        ("logits in chunks", {"model.arch.head.chunk": chunk}, {}),
        (f"logits in {head.logits}", {"model.arch.head.logits": head.logits}, {}),
        (f"remat: {model.remat}", {"model.remat": model.remat}, {}),
        ("state taken over", {}, {"donate": True}),
        ("packed rows", {}, {"packed": True}),
        (f"{model.unroll} layers a round", {"model.unroll": model.unroll}, {}),
        (f"{run.data.batch} rows", {"data.batch": run.data.batch}, {}),
        ("matmuls in int8", {} if cpu else {"precision": "int8"}, {}),
    ]
    steps += [(word, {}, {"option": [*options[:i], word]}) for i, word in enumerate(options)]
    for name, more, flags_more in steps:
        if any(fields.get(key) != value for key, value in more.items()) or any(
            how[key] != value for key, value in flags_more.items()
        ):
            fields |= more
            how |= flags_more
            yield Rung(name, dict(fields), dict(how))


def climb(rung: Rung, folder: Path, steps: int) -> None:
    """Run a rung, and put down what was measured."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    steps, warmup = (2, 1) if rung.flags["eager"] else (steps, 2)
    words = [f"--config={folder / 'config.json'}", f"--output={result}", f"--steps={steps}"]
    words += [f"--config.{path}={value}" for path, value in rung.fields.items()]
    how = {**rung.flags}
    words += [f"--option={word}" for word in how.pop("option")]
    words += [f"--{name}={str(value).lower()}" for name, value in how.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "train", "--norates", f"--warmup={warmup}", *words],
        cwd=load.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        rung.figures = json.loads(result.read_text(encoding="utf-8"))
    elif FULL.search(done.stderr) or done.returncode == -9:
        rung.failed = "out of memory"
    else:
        lines = done.stderr.strip().splitlines()
        raise ValueError(f"{rung.name}: {lines[-1] if lines else f'exit code {done.returncode}'}")


def show(console: Console, climbed: list[Rung]) -> None:
    """The rungs as a table; factors are those over the first that ran."""
    table = Table(
        "", "ms a step", "tokens/s", "x", "peak memory", "planned", "GFLOP/s", "kernels", "moved",
        "compile s", "loss", box=None,
    )  # fmt: skip
    first = next((rung.figures for rung in climbed if rung.figures), {})
    for rung in climbed:
        got = rung.figures
        if not got:
            table.add_row(rung.name, rung.failed)
            continue
        factor = got["tokens_per_s_per_device"] / first["tokens_per_s_per_device"]
        same = rung.flags["packed"] == climbed[0].flags["packed"]
        loss = got["losses"][0] / first["losses"][0] - 1
        table.add_row(
            rung.name,
            f"{got['step_s'] * 1e3:,.1f}",
            f"{got['tokens_per_s_per_device']:,.0f}",
            f"{factor:.2f}",
            human(got["peak_bytes"]),
            human(got["planned_bytes"]) if "planned_bytes" in got else "",
            f"{got['tflops_per_device'] * 1e3:,.4g}",
            f"{got['kernels']:,}",
            human(got["moved_bytes"]) if "moved_bytes" in got else "",
            f"{got['compile_s']:.1f}" if got["compile_s"] else "",
            f"{loss:+.1e}" if same else "other tokens",
        )
    console.print(table)


def summary(climbed: list[Rung]) -> dict[str, Any]:
    """The last rung against the first that ran."""
    ran = [rung for rung in climbed if rung.figures]
    if len(ran) < 2:
        return {}
    first, last = ran[0].figures, ran[-1].figures
    return {
        "speed": round(last["tokens_per_s_per_device"] / first["tokens_per_s_per_device"], 3),
        "memory": round(last["peak_bytes"] / first["peak_bytes"], 3),
        "efficiency": round(last["tflops_per_device"] / first["tflops_per_device"], 3),
    }


def plot(climbed: list[Rung], path: str, title: str) -> None:
    """Speed and memory of each rung, as bars."""
    from matplotlib.figure import Figure

    ran = [rung for rung in climbed if rung.figures]
    figure = Figure(figsize=(11, 1 + 0.45 * len(ran)), layout="constrained")
    names = [rung.name for rung in ran]
    speed, memory = figure.subplots(1, 2, sharey=True)
    bars = speed.barh(names, [rung.figures["tokens_per_s_per_device"] for rung in ran])
    speed.bar_label(bars, fmt="{:,.0f}", padding=3)
    speed.set_xlabel("tokens per second")
    bars = memory.barh(
        names, [rung.figures["peak_bytes"] / 2**30 for rung in ran], color="tab:orange"
    )
    memory.bar_label(bars, fmt="{:.2f}", padding=3)
    memory.set_xlabel("peak memory, GiB")
    speed.invert_yaxis()
    for axes in (speed, memory):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(run: Run) -> int:
    """Climb and print. The devices are left to the rungs."""
    with command.user_input():
        for name in ("steps", "documents"):
            if FLAGS[name].value < 1:
                raise ValueError(f"--{name}={FLAGS[name].value} must be at least 1")
        if not 0 <= FLAGS.batch <= run.data.batch:
            raise ValueError(f"--batch={FLAGS.batch} must be 1 to the recipe's {run.data.batch}")
        if math.prod(vars(run.mesh).values()) not in (1, -1):
            raise ValueError("the ladder is climbed on one device: leave the mesh as it is")
        if FLAGS.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'meshlm[plot]'")
    console, climbed = Console(width=150), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load.save(run, folder / "config.json")
        for rung in rungs(run, FLAGS.batch, FLAGS.documents, runtime.alone(), FLAGS.option):
            with command.user_input():
                climb(rung, folder, FLAGS.steps)
            climbed.append(rung)
            print(f"{rung.name}: {rung.failed or _short(rung)}", file=sys.stderr, flush=True)
    show(console, climbed)
    line = {"recipe": run.name, **summary(climbed)}
    line["rungs"] = [dataclasses.asdict(rung) for rung in climbed]
    device = next((rung.figures["device"] for rung in climbed if rung.figures), "")
    with command.user_input():
        if FLAGS.plot:
            plot(climbed, FLAGS.plot, f"{run.name} on {device}")
        if FLAGS.output:
            Path(FLAGS.output).write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line), flush=True)
    return 0


def _short(rung: Rung) -> str:
    got = rung.figures
    return f"{got['tokens_per_s_per_device']:,.0f} tokens/s, {human(got['peak_bytes'])}"
