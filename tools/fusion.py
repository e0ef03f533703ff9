"""What XLA fused of a recipe's training step, what that saved, and what it left.

python -m tools.bench fusion --config=configs/llama.py:1B

The step is compiled for the devices that are here, or with --aot for a target that is not (with a
stand-in for cuDNN's attention, as tools.plan does), and not run. Printed: its kernels by kind with
the bytes they move, against what its operations would move one by one and against the least; then
the places of the source between which most bytes still pass through memory. costs/fusion.py says
how that is counted. --diff=FIELD=VALUE, as often as wanted, compiles the recipe with those fields
as well and puts both side by side. The last line is one JSON object.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from configs import command, fields
from configs.load import ROOT
from configs.run import Run, check
from costs import fusion, targets
from costs.devices import DATASHEETS
from costs.fusion import Fusion
from costs.memory import human
from sharding import runtime
from tools.plan import sized, tracer

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string("diff", [], "FIELD=VALUE of a second configuration", flag_values=FLAGS)
flags.DEFINE_string("aot", None, f"Compile for: {targets.known()}", flag_values=FLAGS)
flags.DEFINE_integer("places", 10, "The costliest places to print", flag_values=FLAGS)
flags.DEFINE_string("hlo", None, "A file for the text of the compiled step", flag_values=FLAGS)


def compiled(run: Run) -> str:
    """The text of the run's step, compiled for its mesh on the devices here or of the target."""
    devices = targets.devices_of(FLAGS.aot) if FLAGS.aot else jax.devices()
    _, step = tracer(targets.parse(FLAGS.aot).platform if FLAGS.aot else "")(run, devices)
    options = targets.compiler_options(FLAGS.aot) if FLAGS.aot else None
    return step.lower().compile(compiler_options=options).as_text()


def figures(found: Fusion) -> dict[str, Any]:
    """The numbers of a program."""
    return {
        "kernels": found.launches,
        "operations_fused": found.fused,
        "moved_bytes": found.moved,
        "saved_bytes": found.saved,
        "least_bytes": found.least,
        "kinds": {kind: {"kernels": n, "bytes": size} for kind, (n, size) in found.kinds().items()},
    }


def show(console: Console, each: list[Fusion]) -> None:
    """Programs side by side."""
    table = Table("", *(name for name in ("this recipe", "with --diff")[: len(each)]), box=None)
    rows = [figures(found) for found in each]
    table.add_row("kernels", *(f"{row['kernels']:,}" for row in rows))
    table.add_row("operations inside fusions", *(f"{row['operations_fused']:,}" for row in rows))
    table.add_row("bytes moved", *(human(row["moved_bytes"]) for row in rows))
    table.add_row("fusion saved", *(human(row["saved_bytes"]) for row in rows))
    table.add_row("if all that could were fused", *(human(row["least_bytes"]) for row in rows))
    kinds = {kind: None for row in rows for kind in row["kinds"]}
    for kind in kinds:
        own = [row["kinds"].get(kind, {"kernels": 0, "bytes": 0}) for row in rows]
        table.add_row(kind, *(f"{human(k['bytes'])} in {k['kernels']:,}" for k in own))
    console.print(table)


def show_places(console: Console, found: Fusion, rate: float | None) -> None:
    """Where most bytes still pass between kernels."""
    title = ["bytes", *(["ms"] if rate else []), "times", "written at", "read at", "array"]
    table = Table(*title, box=None)
    for left in found.left[: FLAGS.places]:
        ms = [f"{left.bytes / rate * 1e3:.2f}"] if rate else []
        shape = "x".join(map(str, left.shape)) or "one"
        readers = ", ".join(map(shortened, left.readers))
        table.add_row(
            human(left.bytes), *ms, str(left.count), shortened(left.writer), readers, shape
        )
    console.print(table)
    if found.beside:
        console.print(
            f"{human(found.beside)} more are written by matmuls and read by memory-bound kernels: "
            f"a matmul's kernel would have to do their work"
        )


def shortened(place: str) -> str:
    """A place in an installed package without the path that it is installed at."""
    return place.rpartition("site-packages/")[2]


def main(run: Run) -> int:
    """Compile and print."""
    runtime.prepare()
    with command.user_input():
        if FLAGS.places < 0:
            raise ValueError(f"--places={FLAGS.places} must be at least 0")
        run = sized(run)
        runs = [run]
        if FLAGS.diff:
            pairs = [text.partition("=") for text in FLAGS.diff]
            if wrong := [name for name, sign, _ in pairs if not sign]:
                raise ValueError(f"--diff={wrong[0]} must be FIELD=VALUE, such as model.remat=full")
            runs.append(fields.override(run, {name: value for name, _, value in pairs}))
        if FLAGS.aot and (lacks := targets.missing(targets.parse(FLAGS.aot))):
            raise ValueError(f"--aot={lacks}")
        if FLAGS.aot:  # the plug-in of the target must not look for its devices
            jax.config.update("jax_platforms", "cpu")
        for each in runs:
            check(each, targets.parse(FLAGS.aot).count if FLAGS.aot else jax.device_count())
    console = Console(width=140)
    texts = [compiled(each) for each in runs]
    if FLAGS.hlo:
        with command.user_input():
            Path(FLAGS.hlo).write_text(texts[0], encoding="utf-8")
    found = [fusion.analyse(text, os.fspath(ROOT)) for text in texts]
    show(console, found)
    kind = targets.parse(FLAGS.aot).kind if FLAGS.aot else jax.devices()[0].device_kind
    sheet = DATASHEETS.get(kind)
    for name, one in zip(("", "with --diff:"), found, strict=False):
        console.print(f"\n{name}".rstrip("\n"))
        show_places(console, one, sheet.bandwidth if sheet else None)
    line = {"recipe": run.name, "device": FLAGS.aot or kind, **figures(found[0])}
    line["places"] = [dataclasses.asdict(left) for left in found[0].left[: FLAGS.places]]
    if FLAGS.diff:
        line |= {"diff": FLAGS.diff, "with_diff": figures(found[1])}
    print(json.dumps(line), flush=True)
    return 0
