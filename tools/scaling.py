"""Time a recipe's step on one device and on meshes that have as many times its work.

python -m tools.scaling --config=configs/llama.py:8B --config.model.layers=8

Weak scaling: the recipe is what one device does. A mesh gets more rows along dcn, data, fsdp,
expert and tensor, longer rows along context, more layers along stage, and there as many
micro-batches as --micro_batches says, of the recipe's rows each. The efficiency is the rate of
model FLOPs of a device over that of the one device alone. Random tokens; each step is timed, then
traced once, for how much of the communication nothing hides. The last line is one JSON object.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from configs import command
from configs.run import Run, check
from costs import flops
from sharding import mesh as meshes
from sharding import offload, runtime
from sharding.mesh import MeshConfig
from sharding.schedule import ideal_bubble
from tools import bench
from tools.parity import mesh_named, mesh_of, named, table
from tools.plan import sized

AXES = ("fsdp", "tensor", "stage", "context", "data")  # of any model

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "meshes", "all", "As fsdp=4;data=2,tensor=2; all: each axis alone", flag_values=FLAGS
)
flags.DEFINE_integer("micro_batches", 16, "Of a mesh of stages", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("output", None, "A file for the JSON object too", flag_values=FLAGS)
flags.DEFINE_integer("steps", 10, "Timed", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "warmup", 3, "Steps before those that are timed", lower_bound=1, flag_values=FLAGS
)


def wanted(devices: int, experts: int) -> list[MeshConfig]:
    """Those of --meshes."""
    if FLAGS.meshes == "all":
        return [mesh_of({axis: devices}) for axis in (*AXES, *["expert"] * bool(experts))]
    parts = filter(None, (part.strip() for part in FLAGS.meshes.split(";")))
    found = [mesh_named(part, devices, "--meshes") for part in parts]
    if not found:
        raise ValueError(f"--meshes={FLAGS.meshes!r} names no mesh, write all or fsdp={devices}")
    return found


def grown(run: Run, mesh: MeshConfig, micro_batches: int) -> Run:
    """The run with as much work for each device of a mesh as `run` has for one; of stages, for each
    of so many micro-batches."""
    micro = micro_batches if mesh.stage > 1 else run.optim.accumulate
    rows = run.data.batch // run.optim.accumulate * micro
    rows *= mesh.dcn * mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    data = dataclasses.replace(run.data, batch=rows, seq=run.data.seq * mesh.context)
    model = dataclasses.replace(run.model, layers=run.model.layers * mesh.stage)
    optim = dataclasses.replace(run.optim, accumulate=micro)
    return dataclasses.replace(run, mesh=mesh, data=data, model=model, optim=optim)


def waits(run: Run) -> float:
    """The share of a step that stages wait, by the formula."""
    return ideal_bubble(run.mesh.stage, run.optim.accumulate, run.pipeline.repeats)


def timed(run: Run, devices: list[jax.Device]) -> dict[str, Any]:
    """The figures of a run's step on these devices."""
    with jax.set_mesh(meshes.make(run.mesh, devices)):
        found, _ = bench.measure(run, documents=1)
    tokens = run.data.batch * run.data.seq / len(devices)
    work = tokens * flops.flops_per_token(run.model, run.data.seq)
    return {
        "mesh": named(run.mesh.sizes(len(devices))),
        "step_s": found["step_s"],
        "tokens_per_s_per_device": round(tokens / found["step_s"], 1),
        "tflops_per_device": work / found["step_s"] / 1e12,
        "planned_bytes": found["planned_bytes"],
        "communication_ms": found.get("where_ms", {}).get("communication", 0.0),
        "hidden_communication_ms": found.get("hidden_communication_ms", 0.0),
    }


def line(figures: dict[str, Any]) -> list[str]:
    """A mesh's line of the table."""
    talk, hidden = figures["communication_ms"], figures["hidden_communication_ms"]
    return [
        figures["mesh"],
        f"{figures['step_s'] * 1e3:.1f}",
        f"{figures['tokens_per_s_per_device']:,.0f}",
        f"{figures['tflops_per_device']:.4g}",
        f"{figures['efficiency']:.1%}",
        f"{figures['bubble']:.1%}" if figures["bubble"] else "",
        f"{talk + hidden:.1f}",
        f"{hidden / (talk + hidden):.0%}" if talk + hidden else "",
    ]


def main(run: Run) -> int:
    """Time and print."""
    runtime.prepare()
    with command.user_input():
        bench.FLAGS(["", f"--steps={FLAGS.steps}", f"--warmup={FLAGS.warmup}"])
        devices = jax.devices()
        if len(devices) < 2:
            raise ValueError("one device alone has nothing to scale to: at least two")
        data = dataclasses.replace(run.data, documents=1, across=True)
        run = dataclasses.replace(sized(run), data=data)
        one = dataclasses.replace(run, mesh=mesh_of({}))
        check(one, 1)
        asked = wanted(len(devices), run.model.arch.moe.experts)
        runs = [grown(run, mesh, FLAGS.micro_batches) for mesh in asked]
        for each in runs:
            check(each, len(devices))
        offload.check(run.layout.host, devices)
    alone = timed(one, devices[:1]) | {"efficiency": 1.0, "bubble": 0.0}
    found = [alone]
    for each in runs:
        figures = timed(each, devices)
        share = figures["tflops_per_device"] / alone["tflops_per_device"]
        found.append(figures | {"efficiency": round(share, 4), "bubble": round(waits(each), 4)})
        print(f"{figures['mesh']}: {share:.1%}", file=sys.stderr, flush=True)
    head = ["mesh", "ms a step", "tokens/s a device", "TFLOP/s a device", "efficiency"]
    print(f"{len(devices)} x {devices[0].device_kind}\n")
    print(table([*head, "bubble", "talk, ms", "hidden"], list(map(line, found))))
    text = json.dumps({"recipe": run.name, "device": devices[0].device_kind, "meshes": found})
    if FLAGS.output:
        with command.user_input():
            Path(FLAGS.output).write_text(text + "\n", encoding="utf-8")
    print("", text, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            recipe="configs/llama.py:1B",
            examples=(
                "--config=configs/llama.py:8B --config.model.layers=8 --output=scaling.json",
                "--config=configs/llama.py:1B --meshes='fsdp=4;data=2,tensor=2' --steps=5",
            ),
            values=FLAGS,
        )
    )
