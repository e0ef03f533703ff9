"""Prove that placement changes no value: a recipe on one device against every mesh.

The recipe's model is shrunk, its structure kept, and takes steps of plain SGD in float32 on random
packed rows: on one device, then on each mesh of simulated CPU devices. A row of the table holds
the largest relative difference of the losses; of the first step's gradients and of the last
parameters the norm of the difference over the norm of the whole tree, from the worst copy; bytes
of the parameters on a device; and how often each kind of collective runs in one compiled step,
with the bytes that it hands to a device (a reduce-scatter: takes from it).

A head without a training loss is trained on the mean of 1 + sin(y_k + k) over its outputs y of all
tokens that are no padding, and its outputs are compared as well. Experts: parameters are drawn such
that each token prefers its experts by a wide margin, so every mesh makes the same choices.

A mesh of several stages has at least as many layers and micro-batches, and is compared with one
device that has as many. Processes share the meshes; one that crashes is a mesh that fails.

Exit code 1 if a difference is above 1e-5. Where matmuls round their operands (--config.precision)
scales are those of one device too, but a sum in another order moves some numbers across the border
between two that are rounded to, which later layers and steps feel. How much is measured: one device
runs again from parameters with other last bits. A mesh may differ by 1e-3, or thrice what these do.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from absl import flags

import train
from configs import command
from configs.run import Run, check_split
from costs import targets
from costs.collectives import NAMES, collectives, totals
from costs.memory import human, state_bytes
from model.config import HEADS, Arch, ModelConfig, Moe
from model.families import FAMILIES
from sharding import mesh as meshes
from sharding import runtime
from sharding.layout import AXES, BUILT
from sharding.mesh import MeshConfig
from tools.crew import Crew
from training import moments, shrunk

TOLERANCE = 1e-5  # the same values, summed in another order
ROUNDED = 1e-3  # the same, of matmuls that round their operands; or if that is more
SWAYS, NUDGES = 3, 3  # times what so many runs from parameters with other last bits differ by
AOT_WIDTH = 64  # of a head: for a few KiB a TPU's compiler prefers other collectives
CPU_OPTIONS = {"xla_backend_optimization_level": 0}  # compiling is what takes the time

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "family", None, "A family or a published size of one, in place of the recipe's model",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("head", None, f"Another head: {', '.join(HEADS)}", flag_values=FLAGS)
flags.DEFINE_integer("devices", 8, "Of each mesh", flag_values=FLAGS)
flags.DEFINE_string(
    "meshes", "all", "As data=2,fsdp=4;tensor=8; all: every factorisation", flag_values=FLAGS
)
flags.DEFINE_integer("steps", 10, "Of SGD", flag_values=FLAGS)
flags.DEFINE_list("aot", [], f"Also compile for: {targets.known()}", flag_values=FLAGS)
flags.DEFINE_string(
    "platform", "cpu", "cpu simulates its devices; cuda or tpu must have them", flag_values=FLAGS
)
flags.DEFINE_integer(
    "jobs", None, "Processes that share the meshes; 0: this one. Default on CPU as many as cores",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean("verbose", False, "Bytes of each parameter", flag_values=FLAGS)


# ---- one device, then each mesh ------------------------------------------------------------------


def compiled(program: train.Program, options: dict | None) -> Any:
    """The step of this program's head, compiled; it takes over the state's memory."""
    own = program.run.model.arch.head.kind == "language"
    step = train.train_step if own else moments.output_step
    lowered = program.jit(step, donate_argnums=0).lower(program.state, program.batch())
    return lowered.compile(compiler_options=options)


@dataclass(frozen=True)
class Reference:
    """What one device makes of a run."""

    start: Any  # parameters
    first: moments.Moment
    last: moments.Moment
    losses: list[float]
    moved: float  # the parameters' way, over their norm
    # What the differences are if the parameters' last bits are others; of rounded matmuls only.
    sway: dict[str, float] = field(default_factory=dict)

    @property
    def within(self) -> dict[str, float]:
        """The largest differences that count as none, where that is not TOLERANCE."""
        return {kind: max(ROUNDED, SWAYS * sway) for kind, sway in self.sway.items()}


@dataclass(frozen=True)
class Row:
    """One mesh against the reference."""

    mesh: dict[str, int]
    differences: dict[str, float]
    leaves: dict[str, int]  # bytes on a device of each parameter
    talk: dict[str, dict[str, tuple[int, int]]]  # platform -> kind of collective -> count, bytes
    refused: str = ""  # why the house does not build this mesh
    broken: str = ""  # the error that came in place of a program
    within: dict[str, float] = field(default_factory=dict)  # where it is not TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether every difference is small enough; NaN is not."""
        small = (d <= self.within.get(kind, TOLERANCE) for kind, d in self.differences.items())
        return not self.broken and all(small)


def refer(run: Run, devices: list[jax.Device], options: dict | None) -> Reference:
    """The run on the first of `devices`, its parameters drawn anew."""
    one = mesh_of({})
    with jax.set_mesh(meshes.make(one, devices[:1])):
        program = train.build(dataclasses.replace(run, mesh=one))
        roles = train.transformer.abstract(run.model, run.layout)[2]
        start = shrunk.parameters(run.model, program.state.params, roles)
        step, losses, first, last = compiled(program, options), [], None, None
        for moment in moments.each(program, step, start):
            losses.append(float(moment.loss))
            first = first or jax.device_get(moment)
            last = moment
        moved = moments.distance(last.params, start)
        right = Reference(start, first, jax.device_get(last), losses, moved)
        if not run.model.precision.quantized:
            return right
        found = [
            differences(program, step, shrunk.nudged(start, seed), right) for seed in range(NUDGES)
        ]
        sway = {kind: float(np.max([one[kind] for one in found])) for kind in found[0]}
        return dataclasses.replace(right, sway=sway)


def differences(program: train.Program, step: Any, start: Any, right: Reference) -> dict:
    """How far the steps from these parameters are off the reference's."""
    found, losses = {"loss": 0.0}, []
    for i, moment in enumerate(moments.each(program, step, start)):
        losses.append(moments.distance(moment.loss, right.losses[i]))
        if i == 0:
            if jax.tree.leaves(moment.outputs):
                wanted = right.first.outputs
                wanted = program.lay(wanted) if wanted.ndim == 3 else wanted
                found["outputs"] = moments.distance(moment.outputs, wanted)
            found["gradients"] = moments.distance(moment.grads, right.first.grads)
    found["loss"] = float(np.max(losses))  # max() would lose a NaN
    found["parameters"] = moments.distance(moment.params, right.last.params)
    return found


def compare(
    run: Run, mesh: MeshConfig, devices: list[jax.Device], right: Reference, options: dict | None
) -> Row:
    """The run on one mesh of `devices`, against the reference."""
    run = dataclasses.replace(run, mesh=mesh)
    sizes = mesh.sizes(len(devices))
    check_split(run, len(devices))
    with jax.set_mesh(meshes.make(mesh, devices)):
        program = train.build(run)
        step = compiled(program, options)
        found = differences(program, step, right.start, right)
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="."): state_bytes([leaf])["0"]
            for path, leaf in jax.tree.leaves_with_path(program.state.params)
        }
        talk = {devices[0].platform: totals(collectives(step.as_text()))}
    return Row(sizes, found, leaves, talk, within=right.within)


def ahead(run: Run, mesh: MeshConfig, target: str) -> dict[str, tuple[int, int]]:
    """The collectives of one step compiled for a target that is not here."""
    run = dataclasses.replace(run, mesh=mesh)
    with jax.set_mesh(meshes.make(mesh, targets.devices_of(target))):
        text = compiled(train.build(run), targets.compiler_options(target)).as_text()
    return totals(collectives(text))


# ---- what was asked ------------------------------------------------------------------------------


def mesh_of(sizes: dict[str, int]) -> MeshConfig:
    """The mesh of these sizes, 1 along the other axes."""
    return MeshConfig(**{**dict.fromkeys(AXES, 1), **sizes})


def meshes_of(text: str, devices: int) -> list[MeshConfig]:
    """The meshes that --meshes names. ValueError for one that `devices` do not make."""
    if text == "all":
        every = meshes.factorisations(devices, len(BUILT))
        return [mesh_of(dict(zip(BUILT, sizes, strict=True))) for sizes in every]
    parts = filter(None, (part.strip() for part in text.split(";")))
    found = [mesh_named(part, devices, "--meshes") for part in parts]
    if not found:
        raise ValueError(f"--meshes={text!r} names no mesh, write all or such as fsdp={devices}")
    return found


def mesh_named(text: str, devices: int, flag: str) -> MeshConfig:
    """The mesh of data=2,fsdp=4. ValueError, which names the flag, for none of so many devices."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = (word.strip() for word in item.partition("="))
        if axis not in AXES or not size.isdigit():
            example = ",".join(f"{axis}=2" for axis in BUILT)
            raise ValueError(f"{flag}: {item!r} is no AXIS=SIZE, such as {example}")
        sizes[axis] = int(size)
    try:
        mesh = mesh_of(sizes)
        mesh.sizes(devices)
    except ValueError as error:
        raise ValueError(f"{flag}={text}: {error}") from error
    return mesh


def combinations() -> str:
    """Which mesh axes a run can be split over together: a table of pairs, and what else is refused.

    Each axis has 2 devices; models have experts where the axes hold `expert`.
    """
    why: dict[tuple[str, ...], str] = {}  # of sets of axes none of whose parts is refused
    for size in range(1, len(BUILT) + 1):
        for axes in itertools.combinations(BUILT, size):
            if any(set(refused) <= set(axes) for refused in why):
                continue
            moe = Moe(experts=4) if "expert" in axes else Moe()
            run = Run(model=ModelConfig(arch=Arch(moe=moe)))
            mesh = mesh_of(dict.fromkeys(axes, 2))
            run = shrunk.shrunk_run(run, 2**size, 1, stages=mesh.stage)
            run = dataclasses.replace(run, mesh=mesh)
            try:
                check_split(run, 2**size)
            except ValueError as error:
                why[axes] = str(error)

    def cell(a: str, b: str) -> str:
        return "no" if any(set(axes) <= {a, b} for axes in why) else "yes"

    pairs = table(["", *BUILT], [[a, *(cell(a, b) for b in BUILT)] for a in BUILT])
    told = [f"- {' x '.join(axes)}: {error}" for axes, error in why.items()]
    return "\n".join([pairs, "", *(told or ["No set of axes is refused."])])


def model_of(run: Run) -> ModelConfig:
    """The recipe's model, or that of --family, with the head of --head."""
    cfg = model_named(run.model, FLAGS.family) if FLAGS.family else run.model
    if FLAGS.head:
        if FLAGS.head not in HEADS:
            raise ValueError(f"--head={FLAGS.head} is none of {', '.join(HEADS)}")
        head = dataclasses.replace(cfg.arch.head, kind=FLAGS.head)
        cfg = dataclasses.replace(cfg, arch=dataclasses.replace(cfg.arch, head=head))
    return cfg


def model_named(cfg: ModelConfig, name: str) -> ModelConfig:
    """The first size of a family, or a published size, with `cfg`'s remat and unrolling."""
    sizes = {}
    for family in FAMILIES:
        one = next(iter(family.sizes.values()))
        sizes |= {family.name: one, family.outer: one, **family.sizes}
    if name not in sizes:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(f"--family={name} is none of {known}, nor a published size of one")
    unroll = cfg.unroll if cfg.unroll < cfg.layers else 1
    how = {"remat": cfg.remat, "unroll": unroll, "precision": cfg.precision}
    return dataclasses.replace(sizes[name], **how)


def find_devices(platform: str, count: int) -> list[jax.Device]:
    """`count` devices, simulated on CPU. ValueError if there are fewer."""
    jax.config.update("jax_platforms", platform)
    if platform == "cpu":
        with contextlib.suppress(RuntimeError):  # JAX has begun: with the devices that it has
            jax.config.update("jax_num_cpu_devices", count)
            runtime.compile_quickly()
    else:
        jax.config.update("jax_default_matmul_precision", "highest")  # not TF32, not bfloat16
    try:
        found = jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(f"--platform={platform}: {error}") from error
    if len(found) < count:
        raise ValueError(f"--devices={count} is more than the {len(found)} of {platform} here")
    return found[:count]


# ---- the table -----------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned columns that are Markdown as well."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def named(mesh: dict[str, int]) -> str:
    """A mesh as --meshes takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "1"


def spoken(count: int, size: int) -> str:
    """The collectives of one kind."""
    return f"{count}: {human(size)}" if count else "-"


def tables(rows: list[Row], verbose: bool) -> Iterator[str]:
    """What was found: differences, collectives for each platform, bytes of each parameter."""
    told = [row for row in rows if row.differences]
    if told:
        kinds = list(told[0].differences)
        head = ["mesh", *kinds, "parameters of a device", ""]
        yield table(
            head,
            [
                [
                    named(row.mesh),
                    *(f"{row.differences[kind]:.1e}" for kind in kinds),
                    human(sum(row.leaves.values())),
                    "pass" if row.passed else "FAIL",
                ]
                for row in told
            ],
        )
        for platform in told[0].talk:
            cells = [
                [named(row.mesh), *(spoken(*row.talk[platform][name]) for name in NAMES)]
                for row in told
            ]
            yield table([f"collectives, {platform}", *NAMES], cells)
        if verbose:
            yield table(
                ["bytes on a device", *(named(row.mesh) for row in told)],
                [[name, *(str(row.leaves[name]) for row in told)] for name in told[0].leaves],
            )
    for what, name in (("refused", "not supported"), ("broken", "FAILS with")):
        why = [[named(row.mesh), getattr(row, what)] for row in rows if getattr(row, what)]
        if why:
            yield table(["mesh", name], why)


@dataclass(frozen=True)
class Proof:
    """What is asked of every mesh, in whatever process."""

    recipe: Run
    devices: int
    steps: int
    platform: str
    targets: tuple[str, ...]

    @property
    def options(self) -> dict | None:
        """For the compiler."""
        return CPU_OPTIONS if self.platform == "cpu" else None

    def begin(self) -> list[jax.Device]:
        """The devices, once a process has them."""
        return find_devices(self.platform, self.devices)

    def run(self, mesh: MeshConfig) -> Run:
        """The recipe, shrunk to what this mesh needs, for one device as well."""
        return shrunk.shrunk_run(self.recipe, self.devices, self.steps, stages=mesh.stage)

    def refer(self, run: Run) -> Reference:
        """The run on one device."""
        return refer(run, self.begin(), self.options)

    def row(self, piece: tuple[Run, MeshConfig, Reference | Exception]) -> Row:
        """The run on a mesh, and its program for hardware that is not here."""
        run, mesh, right = piece
        if isinstance(right, Exception):
            raise right
        row = compare(run, mesh, self.begin(), right, self.options)
        wide = shrunk.shrunk_run(self.recipe, self.devices, 1, AOT_WIDTH, stages=mesh.stage)
        wide = dataclasses.replace(wide, model=dataclasses.replace(wide.model, dtype="bfloat16"))
        more = {target: ahead(wide, mesh, target) for target in self.targets}
        return dataclasses.replace(row, talk=row.talk | more)


def refused(proof: Proof, mesh: MeshConfig) -> Row | None:
    """The row of a mesh that the house does not build; an error unless all were asked for."""
    try:
        with command.user_input():
            check_split(dataclasses.replace(proof.run(mesh), mesh=mesh), proof.devices)
    except command.UserError as error:
        if FLAGS.meshes != "all":
            raise
        return Row(mesh.sizes(proof.devices), {}, {}, {}, refused=str(error))
    return None


def compared(proof: Proof, wanted: dict[int, MeshConfig], crew: Crew) -> dict[int, Row]:
    """Each mesh's row; tells of the references. Most stages first, as these take longest."""
    runs = {i: proof.run(mesh) for i, mesh in wanted.items()}
    alike = sorted(set(runs.values()), key=lambda run: -run.model.layers)
    found = dict(crew.each(proof.refer, alike))
    rights = {run: found[i] for i, run in enumerate(alike)}
    for run, right in rights.items():
        if isinstance(right, Reference):
            print(summary(run, right), flush=True)

    def broken(mesh: MeshConfig, error: Exception) -> Row:
        first = str(error).splitlines()[0]
        return Row(mesh.sizes(proof.devices), {}, {}, {}, broken=first)

    rows, order = {}, sorted(wanted, key=lambda i: -wanted[i].stage)
    pieces = [(runs[i], wanted[i], rights[runs[i]]) for i in order]
    for n, row in crew.each(proof.row, pieces):
        row = broken(wanted[order[n]], row) if isinstance(row, Exception) else row
        print("pass" if row.passed else "FAIL", named(row.mesh), file=sys.stderr, flush=True)
        rows[order[n]] = row
    return rows


def summary(run: Run, right: Reference) -> str:
    """What the run is, and what one device makes of it."""
    cfg, data = run.model, run.data
    parts = f" in {run.optim.accumulate} micro-batches" if run.optim.accumulate > 1 else ""
    sway = ", ".join(f"{kind} by {sway:.1e}" for kind, sway in right.sway.items())
    sway = f"; with other last bits of the first it changes {sway}" if sway else ""
    return (
        f"{FLAGS.family or run.name}: {cfg.layers} layers of {cfg.embed}, {data.batch} rows of "
        f"{data.seq} tokens{parts}, {run.steps} steps of SGD in float32; on one device the loss "
        f"went from {right.losses[0]:.4f} to {right.losses[-1]:.4f}, the parameters moved by "
        f"{right.moved:.1%}{sway}"
    )


def main(recipe: Run) -> int:
    """Compare and print; the exit code."""
    with command.user_input():
        count, jobs = FLAGS.devices, FLAGS.jobs
        if count < 1 or FLAGS.steps < 1:
            raise ValueError(f"--devices={count} and --steps={FLAGS.steps} must be at least 1")
        if jobs is not None and (jobs < 0 or (jobs and FLAGS.platform != "cpu")):
            raise ValueError(f"--jobs={jobs} must be at least 0, and 0 where devices are real")
        recipe = dataclasses.replace(recipe, model=model_of(recipe))
        wanted = dict(enumerate(meshes_of(FLAGS.meshes, count)))
        proof = Proof(recipe, count, FLAGS.steps, FLAGS.platform, tuple(FLAGS.aot))
        proof.begin()
        for target in FLAGS.aot:
            if len(targets.devices_of(target)) != count:
                raise ValueError(f"--aot={target} has not --devices={count} devices; give as many")
        rows = {i: row for i, mesh in wanted.items() if (row := refused(proof, mesh))}
    left = {i: mesh for i, mesh in wanted.items() if i not in rows}
    if jobs is None:
        jobs = min(os.cpu_count(), len(left)) if FLAGS.platform == "cpu" and len(left) > 1 else 0
    with Crew(jobs, proof.begin) as crew:
        rows |= compared(proof, left, crew)
    print("", *tables([rows[i] for i in wanted], FLAGS.verbose), sep="\n\n")
    passed = sum(rows[i].passed for i in left)
    rounded = recipe.model.precision.quantized
    within = (
        f"{ROUNDED:.0e}, or {SWAYS} x its last bits' change," if rounded else f"{TOLERANCE:.0e}"
    )
    print(f"\n{passed} of {len(left)} meshes within {within} of one device")
    return 0 if passed == len(left) else 1


if __name__ == "__main__":
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            recipe="configs/quickstart.py",
            examples=(
                "--config=configs/llama.py:8B --meshes='data=2,fsdp=2,tensor=2;fsdp=8'",
                "--family=mixtral --devices=4 --verbose",
                "--family=bert --head=classifier --meshes=fsdp=8",
                "--config=configs/llama.py:1B --meshes=fsdp=8 --aot=h100x8,v5e-8",
            ),
            values=FLAGS,
        )
    )
