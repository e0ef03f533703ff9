"""How long a schedule takes, by what the hardware is known to reach. The model, all of it:

- A kernel takes as long as its matmuls at the matmul rate, or as its bytes at the memory rate,
  whichever is longer, and at least a launch. Kernels run one after another.
- Matmuls of 8-bit operands reach the same share of their own peak (alone 0.68 to 0.81, LOG.md).
- Fused attention runs at its own rate, which falls with the size of a head.
- A collective of n devices moves (n - 1) / n of its bytes, an all-reduce twice that, at the rate of
  the network that joins them; where a group takes k devices of a host, over k adapters.
- Gathers of weights, sums of gradients and what goes round a ring can hide behind kernels; sums of
  activations and tokens on their way to experts cannot, their reader waits. `Reached.hidden` says
  how much of the former does, `Reached.slows` what the kernels beside it lose: it takes cores and
  memory from them.
- What is copied to the host's memory or from there takes HOST bytes/s, one copy after another, and
  nothing hides it.
- Experts get as many tokens as they would if the router had no favourites (`filled`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from costs.devices import Datasheet
from costs.kernels import Kernel, Schedule
from costs.talk import Talk
from sharding.layout import AXES

HOST = 50e9  # as measured on an H100 (LOG.md)
# Axes over which weights and their gradients travel, and of activations only what goes round.
HIDES = {"dcn", "data", "fsdp", "expert", "context"}


@dataclass(frozen=True)
class Reached:
    """Shares of the datasheet's rates, and where they come from."""

    matmul: float
    attention: float  # of the matmul peak, heads of 128, forward and backward
    attention_64: float
    memory: float
    rounds: float  # of that: a kernel that rounds a matrix to 8 bits, both ways
    link: float
    hidden: float  # of the collectives that can hide
    slows: float  # s that kernels lose for each s of a collective beside them
    launch: float  # s
    float32: float  # rate of float32 matmuls, as JAX does them by default, over that of the peak
    source: str


GPU = Reached(
    matmul=0.71, attention=0.46, attention_64=0.38, memory=0.88, rounds=0.72, link=0.82,
    hidden=0.87, slows=0.9, launch=3e-6, float32=0.5,
    source="as measured on H100 and H200 (LOG.md): matmuls 673 to 750 TFLOP/s within a step, "
    "attention by cuDNN 455 and 375 at heads of 128 and 64, copies 2.95 TB/s, NCCL 370 GB/s, 87 % "
    "of it hidden, at the cost of 0.9 s of the kernels beside it for each second",
)  # fmt: skip
TPU = Reached(
    matmul=0.85, attention=0.50, attention_64=0.30, memory=0.85, rounds=1.0, link=0.80,
    hidden=1.0, slows=0.0, launch=1e-6, float32=1.0,
    source="assumed, not measured: no TPU was at hand",
)  # fmt: skip
CPU = Reached(
    matmul=0.60, attention=0.60, attention_64=0.60, memory=0.60, rounds=1.0, link=1.0,
    hidden=0.0, slows=0.0, launch=5e-6, float32=1.0,
    source="the matmul rate measured at the start; shares of it seen in the quickstart's step",
)  # fmt: skip
REACHED = {"gpu": GPU, "tpu": TPU, "cpu": CPU}


@dataclass
class Time:
    """Seconds of one step on one device, by what they go to; collectives by kind and axes."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # kernels that are bound by it
    talk: dict[tuple[str, tuple[str, ...]], tuple[float, int, float]] = field(default_factory=dict)
    flops: float = 0.0
    hides: float = 0.0  # collectives that can
    waits: float = 0.0  # and that cannot
    host: float = 0.0  # copies to the host's memory and from there

    @property
    def busy(self) -> float:
        """What kernels take."""
        return self.matmul + self.attention + self.memory

    def step(self, hidden: float, slows: float = 0.0) -> float:
        """Seconds of a step if this share of what can hide does, as long as there is work.

        `slows`: seconds that kernels lose for each second of a collective beside them.
        """
        under = min(hidden * self.hides, self.busy)
        return self.busy + self.host + self.waits + self.hides - (1 - slows) * under


def each(plan: Schedule, times: int = 1) -> Iterator[tuple[Kernel, int]]:
    """Every kernel with how often it runs; of a conditional, its longest branch."""
    for kernel in plan.kernels:
        if kernel.inner:
            branch = max(kernel.inner, key=lambda one: sum(k.flops for k, _ in each(one)))
            yield from each(branch, times * kernel.rounds)
        yield kernel, times


def seconds(
    plan: Schedule,
    sheet: Datasheet,
    reached: Reached,
    sizes: Mapping[str, int],
    head: int,
    filled: float = 1.0,
) -> Time:
    """The time of a schedule on a mesh of these sizes.

    `head`: size of an attention head; `filled`: share of the rows of experts that are no padding.
    """
    time = Time()
    for kernel, times in each(plan):
        if kernel.name == "loop":
            continue
        if kernel.link:
            time.host += times * kernel.link / HOST
            continue
        moved = sum(kernel.reads.values()) + kernel.written
        share = reached.memory * (reached.rounds if kernel.name == "round_8bit" else 1.0)
        memory = moved / (sheet.bandwidth * share)
        if kernel.talk:
            for talk in kernel.talk:
                add_talk(time, talk, times, sheet, reached, sizes)
            if not kernel.flops:
                continue
        attends = kernel.name.startswith("attention_")
        rate = attention_rate(reached, head) if attends else reached.matmul
        flops = kernel.flops * (filled if kernel.name.startswith("ragged") else 1)
        rate *= reached.float32 if kernel.dtype == "float32" else 1.0
        math_time = flops / (sheet.peak(kernel.dtype) * rate)
        time.flops += times * flops
        took = times * max(memory, math_time, reached.launch if moved > 2**12 else 0.0)
        if attends:
            time.attention += took
        elif kernel.flops and math_time >= memory:
            time.matmul += took
        else:
            time.memory += took
    return time


def attention_rate(reached: Reached, head: int) -> float:
    """Between the two measured sizes along a line; below the smaller in proportion."""
    if head <= 64:
        return reached.attention_64 * head / 64
    slope = (reached.attention - reached.attention_64) / 64
    return min(reached.attention, reached.attention_64 + slope * (head - 64))


def add_talk(
    time: Time, talk: Talk, times: int, sheet: Datasheet, reached: Reached, sizes: Mapping[str, int]
) -> None:
    share = (talk.ways - 1) / talk.ways * (2 if talk.kind == "all-reduce" else 1)
    share = 1.0 if talk.kind == "collective-permute" else share
    rate = bandwidth(talk.axes, sheet, sizes) * reached.link
    took = times * talk.bytes * share / rate if rate else 0.0
    seconds, count, size = time.talk.get((talk.kind, talk.axes), (0.0, 0, 0.0))
    time.talk[talk.kind, talk.axes] = seconds + took, count + times, size + times * talk.bytes
    if talk.kind == "collective-permute" or (set(talk.axes) <= HIDES and talk.kind != "all-to-all"):
        time.hides += took
    else:
        time.waits += took


def bandwidth(axes: tuple[str, ...], sheet: Datasheet, sizes: Mapping[str, int]) -> float:
    """Bytes/s, one way, at which each device of a group along these axes sends.

    Outer axes go over hosts, as sharding.mesh arranges them.
    """
    if not sheet.near:
        return sheet.link
    left = max(1, math.prod(sizes.values()) // sheet.near)  # hosts
    inside, beyond = 1, 1
    for axis in AXES:
        hosts = math.gcd(sizes[axis], left)
        left //= hosts
        if axis in axes:
            inside, beyond = inside * (sizes[axis] // hosts), beyond * hosts
    return min(sheet.link, sheet.far * inside) if beyond > 1 else sheet.link
