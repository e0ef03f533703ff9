"""Other ways to run the same thing: which fit a device's memory, and which of them are fastest."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from configs.run import Run, check_split
from costs import targets
from costs.precision import FP8, HEAD, INT8, MOMENTS, WEIGHTS
from costs.targets import Target
from model.precision import Passes, Precision
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
    limit_s: float = 40.0  # of this process' own work: other work does not shorten a search
    tried: int = 0
    _until: float = math.inf
    _best: dict[Run, list[Plan]] = field(default_factory=dict)

    def count(self, run: Run) -> Plan:
        self.tried += 1
        return plans.count(run, self.target, self.trace, self.rate)

    def counted(self, runs: Iterable[Run]) -> Iterator[Plan]:
        """The plans of those runs that can be split over the target."""
        for run in runs:
            if time.process_time() < self._until and not refused(run, self.target):
                yield self.count(run)

    def start(self, share: float = 0.4) -> None:
        """Time begins for one kind of change: a share of what a search may take."""
        self._until = time.process_time() + share * self.limit_s

    def smallest_change(self, run: Run) -> Plan | None:
        """The fastest that fits of those that differ by one change, else by more, else None.

        Then with a smaller state, which changes results a little, and with a smaller batch.
        """
        self.start()
        fit = [plan for plan in self.counted(singles(run, self.target)) if plan.fits]
        fit = fit or self.best(run)
        for form in smaller(run):
            if not fit:
                self.start()
                tries = itertools.chain([form], singles(form, self.target))
                fit = [plan for plan in self.counted(tries) if plan.fits]
        for batch in halves(run.data.batch):
            if not fit:
                self.start()
                tries = (changed(one, batch=batch) for one in (run, *smaller(run)))
                fit = [plan for plan in self.counted(tries) if plan.fits]
        return min(fit, key=lambda plan: plan.step / plan.run.data.batch, default=None)

    def formats(self, run: Run) -> tuple[Plan, dict[str, Plan | None]]:
        """(the run with bfloat16 matmuls and a float32 state; it in each format, by its flags).

        None: the hardware multiplies it no faster.
        """
        sheet, base = self.target.sheet, in_bfloat16(run)
        found: dict[str, Plan | None] = {}
        for name, words in (("int8", (INT8, HEAD)), ("fp8", (FP8,))):
            fast = sheet is not None and sheet.peak(name) > sheet.bf16
            for flags in words:
                head = "int8" if flags == HEAD else "bf16"
                found[flags] = self.count(rounded(base, name, head)) if fast else None
        for flags, one in zip((MOMENTS, f"{WEIGHTS} {MOMENTS}"), smaller(base), strict=False):
            if not refused(one, self.target):
                found[flags] = self.count(one)
        return self.count(base), found

    def best(self, run: Run) -> list[Plan]:
        """The ten fastest meshes, remat policies and micro-batches with which the run fits.

        First each mesh with the policy that recomputes least but for "none", which keeps float32
        values that cost more to read than to make; then the fastest few with "none" as well.
        """
        if run in self._best:
            return self._best[run]
        self.start(1.0)
        found: list[Plan] = []
        for mesh in meshes_of(self.target):
            one = dataclasses.replace(run, mesh=mesh)
            parts = (1, 2, 4, 8) if mesh.stage == 1 else (16, 8, 4, 2, 1)  # fewer stages wait
            tries = (changed(one, remat=name, accumulate=n) for n in parts for name in REMATS[1:])
            fit = next((plan for plan in self.counted(tries) if plan.fits), None)
            found += [fit] if fit else []
        found.sort(key=lambda plan: plan.step)
        self.start()
        more = (changed(plan.run, remat=REMATS[0]) for plan in found[:4])
        found += [plan for plan in self.counted(more) if plan.fits]
        self._best[run] = sorted(found, key=lambda plan: plan.step)[:10]
        return self._best[run]


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


def in_bfloat16(run: Run) -> Run:
    """The run with matmuls in bfloat16, and weights and moments in float32."""
    model = dataclasses.replace(
        run.model, dtype="bfloat16", param_dtype="float32", precision=Precision()
    )
    return dataclasses.replace(
        run, model=model, optim=dataclasses.replace(run.optim, moments="float32")
    )


def rounded(run: Run, name: str, head: str) -> Run:
    """The run with the matmuls of hidden layers, and of the head, by presets of these names."""
    precision = dataclasses.replace(Precision.by_name(name), head=Passes.by_name(head))
    return dataclasses.replace(run, model=dataclasses.replace(run.model, precision=precision))


def smaller(run: Run) -> Iterator[Run]:
    """The run with a state of fewer bytes: moments in int8, then weights in bfloat16 too."""
    if run.optim.name != "adamw" or run.layout.host:
        return
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, moments="int8"))
    yield run
    yield dataclasses.replace(run, model=dataclasses.replace(run.model, param_dtype="bfloat16"))


def flags(run: Run, base: Run, devices: int) -> list[str]:
    """The flags that make `run` of `base`, by the fields that a search changes."""

    def fields(one: Run) -> dict[str, str | int]:
        mesh = {f"mesh.{axis}": size for axis, size in one.mesh.sizes(devices).items()}
        return mesh | {
            "model.remat": one.model.remat,
            "optim.accumulate": one.optim.accumulate,
            "model.arch.head.chunk": one.model.arch.head.chunk,
            "data.batch": one.data.batch,
            "optim.moments": one.optim.moments,
            "model.param_dtype": one.model.param_dtype,
            "layout.host": ",".join(one.layout.host) or "none",
            "layout.optimizer": one.layout.optimizer or "none",
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


def refused(run: Run, target: Target) -> str:
    """Why the run cannot be split over the target; "" if it can."""
    try:
        check_split(run, target.count)
    except ValueError as error:
        return str(error)
    return ""


def singles(run: Run, target: Target) -> Iterator[Run]:
    """Runs with the same result that take less memory, each by one change."""
    for name in REMATS[REMATS.index(run.model.remat) + 1 :]:
        yield changed(run, remat=name)
    for n in (2, 4, 8, 16, 32):
        yield changed(run, accumulate=n * run.optim.accumulate)
    for n in (2, 4, 8):
        yield changed(run, chunk=max(1, run.model.arch.head.chunk // n))
    if run.mesh.sizes(target.count)["data"] > 1 and run.layout.optimizer is None:
        yield dataclasses.replace(run, layout=dataclasses.replace(run.layout, optimizer="data"))
    if not run.layout.host and target.platform != "cpu":
        yield dataclasses.replace(run, layout=dataclasses.replace(run.layout, host=("optimizer",)))
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
