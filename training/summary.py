"""What a run tells of itself before its first step and after its last."""

import dataclasses
import shlex
import sys
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import NamedSharding

from configs.run import Run, describe, to_json
from costs import flops, memory
from inference.sampling import sample
from model import transformer
from monitor import report
from sharding import mesh as meshes
from sharding import offload
from sharding.schedule import Table
from sharding.stages import stage_count
from training.loop import Loop


def print_run(loop: Loop, workdir: Path) -> None:
    """What is about to run."""
    program, text, speed = loop.program, loop.text, loop.speed
    if not meshes.is_main():
        return
    run = program.run
    sizes = " x ".join(f"{axis}={n}" for axis, n in jax.sharding.get_mesh().shape.items())
    held = [memory.state_bytes(part) for part in offload.apart(vars(program.state))]
    own, there = (
        ", ".join(f"{name} {memory.human(size)}" for name, size in part.items() if size > 999)
        for part in held
    )
    there = f"; in its host's memory {there}" if there else ""
    tokens, rate = run.data.batch * run.data.seq, speed.rate / 1e9
    lines = [
        describe(run),
        *(f"source     {source.describe()}" for source in text.sources),
        f"folder     {workdir}",
        f"parameters {flops.params(run.model):,}, {tokens:,} tokens a step",
        f"devices    {sizes}; each holds {own}{there}",
        *pipeline(run),
        f"hardware   {hardware()}, {rate:,.0f} GFLOP/s measured in {run.model.dtype} matmuls",
    ]
    loop.progress.print("\n".join(lines))  # a run outlives whoever reads what it prints


def pipeline(run: Run) -> list[str]:
    """What the stages wait, and what they keep, in words; nothing without stages."""
    how, stages, batches = run.pipeline, stage_count(), run.optim.accumulate
    if stages == 1:
        return []
    table = Table.make(how, stages, batches)
    kept = table.slots / how.repeats
    return [
        f"pipeline   {how.schedule}, {stages} stages, {batches} micro-batches (optim.accumulate): "
        f"bubble {table.bubble():.1%}, a stage keeps what {kept:g} micro-batches need"
    ]


def hardware() -> str:
    """All devices, in words."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def finish(loop: Loop, workdir: Path) -> None:
    """The sample and the report."""
    run = loop.run
    written = ""
    if run.sample.tokens:
        prompt = loop.text.tokenizer.encode([run.sample.prompt])[0]
        whole = dataclasses.replace(run.layout, sequence=None)  # a text that grows is not split
        graph, _, _ = transformer.abstract(run.model, whole)
        ids = sample(
            lambda params, *rows: nnx.merge(graph, offload.fetch(params)).logits(*rows),
            loop.state.params,
            [loop.text.tokenizer.end, *prompt.tolist()],
            tokens=run.sample.tokens,
            vocab=loop.text.tokenizer.size,
            where=NamedSharding(jax.sharding.get_mesh(), whole.spec("batch", None)),
            key=jax.random.key(run.seed),
            temperature=run.sample.temperature,
            end=loop.text.tokenizer.end,
        )
        written = run.sample.prompt + loop.text.tokenizer.decode(ids)
        loop.metrics.text("sample", written, run.steps)
        loop.progress.print(f"\n{written}\n")
    if meshes.is_main():
        page = workdir / "report.html"
        facts = {
            "Hardware": hardware(),
            "Parameters": f"{flops.params(run.model):,}",
            "Command": shlex.join(["python", *sys.argv]),
        }
        try:
            report.write(page, to_json(run), loop.metrics.rows(), written, facts)
        except OSError as error:  # how the run ends is for the state to say
            loop.progress.print(f"{page} cannot be written: {error.strerror}")
        else:
            loop.progress.print(f"{page}")
