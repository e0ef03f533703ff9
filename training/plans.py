"""What a run will take of each device, told before it starts: bytes and seconds."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from configs.run import Run, check_split
from costs import flops, kernels, peak, program, roofline, siblings, targets
from costs.collectives import collectives, totals
from costs.devices import Datasheet
from costs.memory import program_bytes, state_bytes
from costs.targets import Target
from sharding import offload

CPU_BANDWIDTH = 12e9  # bytes/s, of two cores: LOG.md
# A run on these devices: its program, and its step as jax.jit traces it.
Trace = Callable[[Run, list[jax.Device]], tuple[Any, Any]]


@dataclass(frozen=True)
class Plan:
    """A run on a target: bytes of one device by component, and the time of a step."""

    run: Run
    target: Target
    sizes: dict[str, int]  # devices along each axis
    parts: dict[str, int]
    at: str  # the kernel at which most is alive
    time: roofline.Time
    reached: roofline.Reached
    flops: float  # of the model, of all devices
    peak_flops: float  # of all devices
    host: int = 0  # bytes of the host's memory, for each device
    compiled: dict[str, Any] = field(default_factory=dict)

    @property
    def counted(self) -> int:
        """Bytes of a device."""
        return sum(self.parts.values())

    @property
    def bytes(self) -> int:
        """Bytes of a device: the compiler's if it was asked, else the count."""
        return self.compiled.get("bytes", self.counted)

    @property
    def step(self) -> float:
        """Seconds."""
        return self.time.step(self.reached.hidden, self.reached.slows)

    @property
    def mfu(self) -> float:
        """Share of the datasheet's peak that the model's FLOPs make up."""
        return self.flops / self.step / self.peak_flops

    @property
    def tokens_per_s(self) -> float:
        return self.run.data.batch * self.run.data.seq / self.step

    @property
    def fits(self) -> bool:
        return self.bytes <= self.target.usable


def devices(target: Target) -> list[jax.Device]:
    """As many simulated CPU devices, to trace on. ValueError if JAX has begun with fewer."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has begun
        jax.config.update("jax_num_cpu_devices", target.count)
    found = jax.devices("cpu")
    if len(found) < target.count:
        raise ValueError(f"{target.name}: {target.count} devices, but JAX began with {len(found)}")
    return found[: target.count]


def count(run: Run, target: Target, trace: Trace, rate: float = 0.0) -> Plan:
    """The plan of a run, from its traced step alone.

    `rate`: measured FLOP/s of one device, of a target without a datasheet. ValueError for a run
    that cannot be split over the target.
    """
    check_split(run, target.count)
    built, step = trace(run, devices(target))
    sizes = run.mesh.sizes(target.count)
    whole = program.read(step.jaxpr, sizes)
    compiler = kernels.COMPILERS[target.platform]
    schedule = kernels.schedule(whole, compiler)
    if compiler.joins:
        siblings.join(schedule)
    moment = peak.peak(schedule)
    own = [
        (leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(built.state.params)
    ]
    vocab = run.model.vocab // ways(run, "vocab", sizes)
    state, there = map(state_bytes, offload.apart(
        {"parameters": built.state.params, "optimizer": built.state.opt_state}
    ))  # fmt: skip
    parts = {**state, **peak.parts(moment, own, vocab)}
    sheet = target.sheet or Datasheet(rate, target.usable, CPU_BANDWIDTH)
    reached = roofline.REACHED[target.platform]
    head, moe = run.model.head_dim, run.model.arch.moe
    holders = ways(run, "experts", sizes)
    # Room is for all tokens of the devices that share the experts, should all want the same.
    filled = moe.active / (holders * min(moe.active, moe.experts // holders)) if moe.experts else 1
    time = roofline.seconds(schedule, sheet, reached, sizes, head, filled if holders > 1 else 1.0)
    tokens = run.data.batch * run.data.seq
    model = tokens * flops.flops_per_token(run.model, run.data.seq)
    return Plan(
        run, target, sizes, parts, " > ".join(moment.path), time, reached, model,
        sheet.bf16 * target.count, sum(there.values()) + program.on_host(whole),
    )  # fmt: skip


def compile_for(plan: Plan, trace: Trace) -> Plan:
    """The same plan with what the target's compiler says of the step."""
    name = plan.target.name
    if plan.run.layout.host and plan.target.platform == "gpu":
        why = "ahead of time a GPU's shows no memory but its own; counted, with layout.host"
        return dataclasses.replace(plan, compiled={"error": why})
    _, step = trace(plan.run, targets.devices_of(name))
    try:
        compiled = step.lower().compile(compiler_options=targets.compiler_options(name))
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(plan, compiled={"error": str(error)})
    stats = compiled.memory_analysis()
    total = program_bytes(stats)
    peaked = getattr(stats, "peak_memory_in_bytes", 0)
    found = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        # The most that is alive at once, where the compiler says it: that decides whether a step
        # fits. The sum is what a GPU takes as well; of TPUs it counts memory twice, and of a small
        # program the peak counts twice what is donated (LOG.md). A CPU's compiler gives its
        # arguments for it.
        "bytes": total if plan.target.platform == "cpu" else min(peaked or total, total),
        "sum": total,
        "collectives": totals(collectives(compiled.as_text())),
    }
    return dataclasses.replace(plan, compiled=found)


def ways(run: Run, axis: str, sizes: dict[str, int]) -> int:
    """Over how many devices the layout splits a logical axis."""
    names = getattr(run.layout, axis)
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(sizes[name] for name in names)
