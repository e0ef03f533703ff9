"""Time the steps of a pipeline, and hold what its stages wait against the formula.

python -m tools.bubble --config=configs/llama.py:1B --config.mesh.stage=4 --config.mesh.fsdp=1

Random tokens, `--rows` of a device and micro-batch, plain SGD. For each schedule and number M of
micro-batches: the median of `--steps` steps. A micro-batch more costs what the stages work on it,
so the slope over M is that work alone; a step is to take slope x (M + (S - 1) / V). "waits" is the
share of the step that is not M slopes: the bubble, and the optimizer and all else that comes once.
Last, where there are no other axes, the slope on one device of 1 / S of the layers and of the
vocabulary: that work where nobody talks.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np
from absl import flags

import train
from configs import command
from configs.run import Run, check
from sharding import mesh as meshes
from sharding import runtime
from sharding.mesh import MeshConfig
from sharding.schedule import PipelineConfig, ideal_bubble
from tools.bench import random_batch
from tools.parity import table
from tools.plan import sized

FLAGS = flags.FlagValues()
flags.DEFINE_list(
    "micro_batches", ["4", "8", "16"], "Of a step, two numbers or more", flag_values=FLAGS
)
flags.DEFINE_list(
    "schedules", ["1f1b", "gpipe", "interleaved:2"], "Each with its repeats", flag_values=FLAGS
)
flags.DEFINE_integer("rows", 1, "Of a device and micro-batch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("steps", 5, "Timed, after two that are not", lower_bound=1, flag_values=FLAGS)


def schedules() -> list[PipelineConfig]:
    """Those of --schedules."""
    found = []
    for text in FLAGS.schedules:
        name, _, repeats = text.partition(":")
        if not (repeats or "1").isdigit():
            raise ValueError(f"--schedules={text} is no name:repeats, such as interleaved:2")
        try:
            found.append(PipelineConfig(name, int(repeats or 1)))
        except ValueError as error:
            raise ValueError(f"--schedules={text}: {error}") from error
    return found


def counts() -> list[int]:
    """Those of --micro_batches."""
    texts = FLAGS.micro_batches
    if len(set(texts)) < 2 or not all(text.isdigit() and int(text) for text in texts):
        raise ValueError(f"--micro_batches={','.join(texts)} must be two numbers or more, as 4,8")
    return sorted(map(int, set(texts)))


def of(run: Run, how: PipelineConfig, micro_batches: int, ways: int) -> Run:
    """The run with so many micro-batches, of rows split so many ways."""
    data = dataclasses.replace(run.data, batch=micro_batches * FLAGS.rows * ways)
    optim = dataclasses.replace(run.optim, name="sgd", accumulate=micro_batches)
    return dataclasses.replace(run, data=data, optim=optim, pipeline=how)


def alone(run: Run, stages: int) -> Run:
    """The run of one device with a stage's work: its layers, and its share of the ends."""
    cfg = run.model
    cfg = dataclasses.replace(cfg, layers=cfg.layers // stages, vocab=cfg.vocab // stages)
    mesh = MeshConfig(data=1)
    return dataclasses.replace(run, model=cfg, mesh=mesh, pipeline=PipelineConfig())


def seconds(run: Run, devices: list[jax.Device]) -> float:
    """Of a step."""
    with jax.set_mesh(meshes.make(run.mesh, devices)):
        program = train.build(run)
        step, state = program.compile(), program.fresh()
        batch, times = program.place(random_batch(run, 1)), []
        for _ in range(FLAGS.steps + 2):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def slope(times: dict[int, float]) -> float:
    """Seconds of a micro-batch more, by least squares."""
    return float(np.polyfit(list(times), list(times.values()), 1)[0])


def lines(times: dict[int, float], stages: int, repeats: int) -> list[list[str]]:
    """A line of the table for each number of micro-batches."""
    each = slope(times)
    found = []
    for count, took in times.items():
        right = each * (count + (stages - 1) / repeats)
        waits, formula = 1 - count * each / took, ideal_bubble(stages, count, repeats)
        cells = f"{took * 1e3:.1f}", f"{waits:z.1%}", f"{formula:.1%}", f"{took / right - 1:+z.1%}"
        found.append([str(count), *cells])
    return found


def main(run: Run) -> int:
    """Time and print."""
    runtime.prepare()
    with command.user_input():
        how, micro, devices = schedules(), counts(), jax.devices()
        data = dataclasses.replace(run.data, documents=1, across=True)
        run = dataclasses.replace(sized(run), data=data)
        sizes = run.mesh.sizes(len(devices))
        stages = sizes["stage"]
        if stages == 1:
            raise ValueError("mesh.stage=1 has no bubble; write --config.mesh.stage=4 or so")
        ways = len(devices) // stages // sizes["context"] // sizes["tensor"]
        for each in how:
            check(of(run, each, micro[0], ways), len(devices))
    for each in how:
        times = {count: seconds(of(run, each, count, ways), devices) for count in micro}
        head = [f"{each.schedule} x {each.repeats}", "ms a step", "waits", "formula", "over it"]
        print(table(head, lines(times, stages, each.repeats)), end="\n\n", flush=True)
        print(f"a micro-batch: {slope(times) * 1e3:.2f} ms\n", flush=True)
    if len(devices) == stages:
        one = alone(run, stages)
        times = {count: seconds(of(one, one.pipeline, count, 1), devices[:1]) for count in micro}
        print(f"a micro-batch on one device, 1 / {stages} of the work: {slope(times) * 1e3:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            recipe="configs/llama.py:1B",
            examples=(
                "--config=configs/llama.py:1B --config.mesh.stage=4 --config.mesh.fsdp=1",
                "--config.mesh.stage=2 --config.mesh.fsdp=-1 --schedules=1f1b --micro_batches=4,16",
            ),
            values=FLAGS,
        )
    )
