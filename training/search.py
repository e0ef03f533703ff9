"""Other ways to run the same thing: which fit a device's memory, and which of them are fastest."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from configs.run import Run, check_split
from costs import targets
from costs.targets import Target
from model.remat import REMAT
from sharding import mesh as meshes
from sharding.layout import AXES, BUILT
from sharding.mesh import MeshConfig
from training import plans
from training.plans import Plan, Trace

REMATS = ("none", *REMAT)  # from least compute to least memory


@dataclass
class Search:
    """Counts runs, until the time that was given is over."""

    target: Target
    trace: Trace
    rate: float = 0.0
    limit_s: float = 30.0  # of this process' own work: other work does not shorten a search
    tried: int = 0
    _since: float = field(default_factory=time.process_time)

    def count(self, run: Run) -> Plan:
        self.tried += 1
        return plans.count(run, self.target, self.trace, self.rate)

    def counted(self, runs: Iterable[Run]) -> Iterator[Plan]:
        """The plans of those runs that can be split over the target."""
        for run in runs:
            over = time.process_time() - self._since > self.limit_s
            if not over and possible(run, self.target):
                yield self.count(run)

    def smallest_change(self, run: Run) -> Plan | None:
        """The fastest that fits of those that differ by one change, else by more, else None."""
        self._since = time.process_time()
        fit = [plan for plan in self.counted(singles(run, self.target)) if plan.fits]
        fit = fit or self.best(run)
        if not fit:
            self._since = time.process_time()
            smaller = (changed(run, batch=batch) for batch in halves(run.data.batch))
            fit = [plan for plan in self.counted(smaller) if plan.fits][:1]
        return min(fit, key=lambda plan: plan.step / plan.run.data.batch, default=None)

    def best(self, run: Run) -> list[Plan]:
        """The ten fastest meshes, remat policies and micro-batches with which the run fits.

        First each mesh with the policy that recomputes least but for "none", which keeps float32
        values that cost more to read than to make; then the fastest few with "none" as well.
        """
        self._since, found = time.process_time(), []
        for mesh in meshes_of(self.target):
            one = dataclasses.replace(run, mesh=mesh)
            tries = (
                changed(one, remat=name, accumulate=parts)
                for parts in (1, 2, 4, 8)
                for name in REMATS[1:]
            )
            fit = next((plan for plan in self.counted(tries) if plan.fits), None)
            found += [fit] if fit else []
        found.sort(key=lambda plan: plan.step)
        more = (changed(plan.run, remat=REMATS[0]) for plan in found[:4])
        found += [plan for plan in self.counted(more) if plan.fits]
        return sorted(found, key=lambda plan: plan.step)[:10]


def changed(run: Run, remat: str = "", accumulate: int = 0, chunk: int = 0, batch: int = 0) -> Run:
    """The run with other values of these, where they are given."""
    model, data, optim = run.model, run.data, run.optim
    if remat:
        model = dataclasses.replace(model, remat=remat)
    if chunk:
        head = dataclasses.replace(model.arch.head, chunk=chunk)
        model = dataclasses.replace(model, arch=dataclasses.replace(model.arch, head=head))
    if accumulate:
        optim = dataclasses.replace(optim, accumulate=accumulate)
    if batch:
        data = dataclasses.replace(data, batch=batch)
    return dataclasses.replace(run, model=model, data=data, optim=optim)


def flags(run: Run, base: Run, devices: int) -> list[str]:
    """The flags that make `run` of `base`, by the fields that a search changes."""

    def fields(one: Run) -> dict[str, str | int]:
        mesh = {f"mesh.{axis}": size for axis, size in one.mesh.sizes(devices).items()}
        return mesh | {
            "model.remat": one.model.remat,
            "optim.accumulate": one.optim.accumulate,
            "model.arch.head.chunk": one.model.arch.head.chunk,
            "data.batch": one.data.batch,
        }

    before = fields(base)
    return [f"--config.{key}={value}" for key, value in fields(run).items() if value != before[key]]


def meshes_of(target: Target) -> Iterator[MeshConfig]:
    """Every mesh over the target's devices, those first that talk least: rows split, then weights,
    then what is inside a layer."""
    axes = [axis for axis in BUILT if axis != "dcn"]  # the slow network: `data` goes over it too
    found = [
        dict.fromkeys(AXES, 1) | dict(zip(axes, sizes, strict=True))
        for sizes in meshes.factorisations(target.count, len(axes))
    ]
    inner = ("stage", "expert", "context", "tensor")
    found.sort(key=lambda sizes: (math.prod(sizes[axis] for axis in inner), sizes["data"]))
    for sizes in found:
        if target.platform != "gpu" or sizes["tensor"] <= targets.HOST:
            yield MeshConfig(**sizes)


def possible(run: Run, target: Target) -> bool:
    """Whether the run can be split over the target."""
    with contextlib.suppress(ValueError):
        check_split(run, target.count)
        return True
    return False


def singles(run: Run, target: Target) -> Iterator[Run]:
    """Runs with the same result that take less memory, each by one change."""
    for name in REMATS[REMATS.index(run.model.remat) + 1 :]:
        yield changed(run, remat=name)
    for n in (2, 4, 8, 16, 32):
        yield changed(run, accumulate=n * run.optim.accumulate)
    for n in (2, 4, 8):
        yield changed(run, chunk=max(1, run.model.arch.head.chunk // n))
    for mesh in meshes_of(target):
        if mesh.sizes(target.count) != run.mesh.sizes(target.count):
            yield dataclasses.replace(run, mesh=mesh)


def fewest(plan: Plan) -> int:
    """Devices whose memory holds at least what a step splits over them all: the state, and its
    gradients."""
    over = math.prod(plan.sizes[axis] for axis in ("stage", "fsdp", "expert", "tensor"))
    state = plan.parts["parameters"] * 2 + plan.parts["optimizer"]
    return math.ceil(state * over / plan.target.usable)


def halves(n: int) -> Iterator[int]:
    while n > 1:
        n //= 2
        yield n
