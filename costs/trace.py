"""A profiler's trace of a GPU, summed up: how long each kind of work took, and what hid what."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax

# By the names that CUDA's libraries and XLA give their kernels; the first that matches.
KINDS = {
    "communication": r"nccl|all-?reduce|all-?gather|reduce-?scatter|collective|ncclDevKernel",
    "attention": r"sdpa|flash|fmha|cudnn_generated_fort_native|cudnn.*attention",
    "matmul": r"gemm|nvjet|cutlass|cublas|wgmma|matmul|dot|xmma",
    "copy": r"^memcpy|^memset|copy|transpose|concatenate",
}
MEMORY = "memory-bound"  # all other kernels: XLA's fusions


@dataclass(frozen=True)
class Trace:
    """Seconds of one device, per run."""

    kinds: dict[str, float]  # communication: only what nothing else hid
    hidden: float  # communication that ran beside other work
    idle: float  # no kernel ran
    span: float  # from the first kernel to the last
    kernels: list[tuple[str, float, float]] = field(default_factory=list)  # name, seconds, calls


def kind_of(name: str) -> str:
    """The kind of work of a kernel."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return MEMORY


def traced(run: Callable[[], None], runs: int = 1) -> Trace | None:
    """The trace of `runs` calls of `run`, which must wait for its result; None without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for plane in data.planes
            if re.fullmatch(r"/device:GPU:0.*", plane.name)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return summed(events, runs) if events else None


def summed(events: list[tuple[str, float, float]], runs: int) -> Trace:
    """Kernels as (name, start, end), in ns, summed up per run."""
    by_name: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    talk, work = [], []
    for name, start, end in events:
        by_name[name] += end - start
        calls[name] += 1
        kind = kind_of(name)
        kinds[kind] += end - start
        (talk if kind == "communication" else work).append((start, end))
    both, alone = length(talk + work), length(work)
    exposed = both - alone
    hidden = kinds["communication"] - exposed
    if talk:
        kinds["communication"] = exposed
    span = max(end for _, _, end in events) - min(start for _, start, _ in events)
    unit = 1e9 * runs
    return Trace(
        {kind: ns / unit for kind, ns in kinds.most_common()},
        hidden / unit,
        (span - both) / unit,
        span / unit,
        [(name, ns / unit, calls[name] / runs) for name, ns in by_name.most_common()],
    )


def length(spans: list[tuple[float, float]]) -> float:
    """How much of the line the spans cover."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
