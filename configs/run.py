"""Run: everything that a training run is, typed, and the checks that span its parts."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from configs import fields
from data.config import DataConfig
from model.config import ModelConfig, at_least
from optim.config import OptimConfig
from sharding.layout import ACTIVATIONS, BUILT, Layout
from sharding.mesh import MeshConfig
from sharding.schedule import PipelineConfig

MAY_CHANGE = ("name", "steps", "mesh", "layout", "pipeline", "log", "eval", "checkpoint", "guard")
MAY_CHANGE += ("deterministic", "sample")
MAY_CHANGE += ("optim.accumulate",)  # each mesh has its own best number of micro-batches
WINDOW = 128  # losses that a state remembers
SHORT = {"precision": "model.precision"}  # what a command line may call a group instead


@dataclass(frozen=True)
class LogConfig:
    """What is told while the run goes on."""

    every: int = 10  # steps between metrics

    def __post_init__(self):
        at_least("every", self.every, 1)


@dataclass(frozen=True)
class EvalConfig:
    """The held-out loss."""

    every: int = 100  # steps; 0: at the end only
    bytes: int = 1_000_000  # of held-out text, at most

    def __post_init__(self):
        at_least("every", self.every, 0)
        at_least("bytes", self.bytes, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of the run is saved, and which saves stay."""

    every: int = 1000  # steps; 0: at the end only
    keep: int = 2  # newest saves that stay
    keep_every: int = 0  # steps whose saves stay for ever; 0: none

    def __post_init__(self):
        at_least("every", self.every, 0)
        at_least("keep", self.keep, 1)
        at_least("keep_every", self.keep_every, 0)


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about steps that would harm it. docs/faults.md"""

    stop: int = 10  # steps skipped in a row that end the run
    spike: float = 0.0  # deviations above the mean loss from which a step is skipped; 0: any loss
    window: int = 64  # steps, of those that were taken, that the mean is of
    rewind: int = 0  # times that a run goes back to a save, past the batches, before it ends
    twice: int = 0  # steps between those that are computed twice, to compare the bits; 0: none

    def __post_init__(self):
        at_least("stop", self.stop, 1)
        at_least("rewind", self.rewind, 0)
        at_least("twice", self.twice, 0)
        at_least("spike", self.spike, 0)
        if not 8 <= self.window <= WINDOW:
            raise ValueError(f"window={self.window} must be 8 to {WINDOW} steps")


@dataclass(frozen=True)
class SampleConfig:
    """The text that the model writes when the run is done."""

    prompt: str = ""  # what it goes on from; empty: the beginning of a document
    tokens: int = 128  # 0: no sample
    temperature: float = 0.8  # 0: always the likeliest token

    def __post_init__(self):
        at_least("tokens", self.tokens, 0)
        at_least("temperature", self.temperature, 0)


@dataclass(frozen=True)
class Run:
    """A training run."""

    name: str = ""  # of the run's folder; empty: the recipe's file name
    steps: int = 100
    seed: int = 0
    deterministic: bool = False  # the same bits whenever it runs, on a GPU too: docs/faults.md
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: Layout = field(default_factory=Layout)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        if self.name[:1] in (".", "-", "~") or not self.name.isprintable() or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be a plain file name, such as my-run")
        if len(self.name) > 100:
            raise ValueError(f"name={fields.shown(self.name)} must have at most 100 characters")
        if not 1 <= self.steps < 2**31:
            raise ValueError(f"steps={self.steps} must be at least 1 and below 2**31")
        if not 0 <= self.seed < 2**32:  # JAX keys keep 32 bits: 2**32 would be 0 again
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**32")


def check(run: Run, devices: int) -> None:
    """Raise ValueError unless `run` can be trained, split over this many devices."""
    _trainable(run)
    check_split(run, devices)


def check_split(run: Run, devices: int) -> None:
    """Raise ValueError unless what `run` computes can be split over this many devices."""
    try:
        sizes = run.mesh.sizes(devices)
    except ValueError as error:
        raise ValueError(f"mesh: {error}") from error
    for axis, size in sizes.items():
        if size > 1 and axis not in BUILT:
            raise ValueError(f"mesh: {axis}={size} is not built; {', '.join(BUILT)} are")
    batch, accumulate = run.data.batch, run.optim.accumulate
    _divides("data: batch", batch, {**_ways(run, "batch", sizes), "accumulate": accumulate})
    tokens = _ways(run, "sequence", sizes)
    if any(size > 1 for size in tokens.values()):
        chunks = {"chunks": 2} if run.model.arch.attention.causal else {}
        _divides("data: seq", run.data.seq, {**tokens, **chunks})
    for name in ("embed", "kv_heads", "mlp", "vocab"):
        axis = "heads" if name == "kv_heads" else name
        fix = f", or --config.layout.{axis}=none"
        _divides(f"model: {name}", getattr(run.model, name), _ways(run, axis, sizes), fix)
    _check_stages(run, sizes)
    _check_host(run, sizes)
    moe, ways = run.model.arch.moe, _ways(run, "experts", sizes)
    _divides("model: arch.moe.mlp", moe.mlp, _ways(run, "mlp", sizes))
    _divides("model: arch.moe.experts", moe.experts, ways)
    if run.optim.moments != "float32":
        _check_moments(run, sizes)
    if sizes["expert"] > 1 and not moe.experts:
        raise ValueError(
            f"mesh: expert={sizes['expert']} splits experts, and the model has none; "
            f"data={sizes['expert']} or fsdp={sizes['expert']} split the rows of any model"
        )
    for axis in ways:
        if sizes[axis] > 1 and axis not in _ways(run, "batch", sizes):
            raise ValueError(
                f"layout: experts on {axis} needs batch on {axis} too: each device sends the "
                f"tokens of its own rows"
            )


def _check_host(run: Run, sizes: dict[str, int]) -> None:
    """Raise ValueError unless what lies in host memory can be used from there."""
    host = ",".join(run.layout.host)
    if host and sizes["stage"] > 1:
        raise ValueError(
            f"layout: host={host} is not built with mesh.stage={sizes['stage']}: stages keep all "
            f"on their devices; fsdp={sizes['stage']} splits layers' weights without stages"
        )
    if any(name in ACTIVATIONS for name in run.layout.host) and run.model.unroll > 1:
        # Those of several layers would be put together in the host's memory, by the host.
        raise ValueError(
            f"layout: host={host} moves activations one layer at a time, and model.unroll="
            f"{run.model.unroll} does several at once: --config.model.unroll=1"
        )
    if "optimizer" not in run.layout.host:
        return
    by_layer = f"layout: host={host} brings the optimizer's state one layer at a time, and"
    split = [axis for axis, size in _ways(run, "optimizer", sizes).items() if size > 1]
    if split:
        raise ValueError(
            f"{by_layer} optimizer={','.join(split)} splits its layers: leave one of the two out"
        )
    if run.optim.moments != "float32":
        raise ValueError(
            f"{by_layer} optim.moments={run.optim.moments} are updated in pieces of their own: "
            f"leave one of the two out"
        )
    if run.optim.name == "adafactor":
        raise ValueError(
            f"{by_layer} adafactor scales all layers of a matrix by one number; adamw, sgd, lion "
            f"and muon do not"
        )


def _check_stages(run: Run, sizes: dict[str, int]) -> None:
    """Raise ValueError unless the layers can be split over the stages, and nothing else is."""
    if run.layout.layers not in ("stage", None):
        raise ValueError(f"layout: layers={run.layout.layers!r} must be stage, or none")
    if sizes["stage"] == 1:
        return
    if run.layout.layers is None:
        raise ValueError(
            f"layout: layers=none leaves nothing to do for mesh.stage={sizes['stage']}"
        )
    for name in vars(run.layout):
        if name not in ("layers", "vocab", "host") and "stage" in _ways(run, name, sizes):
            raise ValueError(
                f"layout: {name} on stage cannot be: stages hold layers, and share the vocabulary"
            )
    if run.model.precision.delayed:
        raise ValueError(
            f"model: precision with scaling=delayed is not built with mesh.stage={sizes['stage']}: "
            f"stages add up what micro-batches see, and scales want the largest; scaling=current "
            f"runs on stages, and fsdp={sizes['stage']} splits layers without them"
        )
    repeats = {"repeats": run.pipeline.repeats, "layers of the pattern": run.model.places}
    _divides("model: layers", run.model.layers, {"stage": sizes["stage"], **repeats})


def _check_moments(run: Run, sizes: dict[str, int]) -> None:
    """Raise ValueError unless small moments lie as their weights do, no block over two devices."""
    if any(size > 1 for size in _ways(run, "optimizer", sizes).values()):
        raise ValueError(
            f"layout: optimizer={run.layout.optimizer} splits moments in float32 only, not "
            f"optim.moments={run.optim.moments}; optimizer=none, or split the weights too, by fsdp"
        )
    if run.optim.moments != "int8":
        return
    cfg, block = run.model, run.optim.block
    rows = {  # of a weight: its inputs
        "embed": (cfg.embed, "embed"),
        "heads x head_dim": (cfg.heads * cfg.head_dim, "heads"),
        "mlp": (cfg.mlp, "mlp"),
        "arch.moe.mlp": (cfg.arch.moe.mlp, "mlp"),
    }
    split = {name: (size, _ways(run, axis, sizes)) for name, (size, axis) in rows.items()}
    common = math.gcd(*(size // math.prod(ways.values()) for size, ways in split.values()))
    fit = max(n for n in range(1, 257) if common % n == 0)
    fix = f", or --config.optim.block={fit}" if fit >= 8 else ""
    for name, (size, ways) in split.items():
        _divides(f"optim: moments=int8 of {name}", size, {**ways, "block": block}, fix)


def _trainable(run: Run) -> None:
    """Raise ValueError unless the model predicts the next token of rows as long as the data's."""
    arch = run.model.arch
    if arch.head.kind != "language":
        raise ValueError(
            f"model: arch.head.kind={arch.head.kind!r} has no training loss here; 'language' has"
        )
    if not arch.attention.causal:
        raise ValueError(
            "model: arch.attention.causal=False sees the token that it is to predict; true trains"
        )
    positions = arch.embeddings.positions - arch.embeddings.first
    if arch.embeddings.positions and run.data.seq > positions:
        raise ValueError(
            f"data: seq={run.data.seq} is longer than the {positions} positions that the model "
            f"learns; at most --config.data.seq={positions}, or more "
            f"--config.model.arch.embeddings.positions"
        )


def _ways(run: Run, axis: str, sizes: dict[str, int]) -> dict[str, int]:
    """The mesh axes that split a logical axis, with their sizes."""
    names = getattr(run.layout, axis)
    names = (names,) if isinstance(names, str) else names or ()
    return {name: sizes[name] for name in names}


def _divides(what: str, size: int, ways: dict[str, int], fix: str = "") -> None:
    factors = {name: n for name, n in ways.items() if n > 1}
    total = math.prod(factors.values())
    if size % total:
        over = " x ".join(f"{name}={n}" for name, n in factors.items())
        raise ValueError(
            f"{what}={size} does not divide over {over}: it must be a multiple of {total}{fix}"
        )


def to_json(run: Run) -> dict[str, Any]:
    """`run` as JSON values; `from_json` gives it back exactly."""
    return fields.encode(run)


def from_json(data: Any) -> Run:
    """The Run in parsed JSON. ValueError for an unknown field, a wrong type or a wrong value."""
    return fields.decode(Run, data)


def differences(before: Run, now: Run) -> list[str]:
    """The fields in which `now` is another run than `before`, with both values.

    A run stays the same when it moves to another mesh, trains longer, or is told about more often.
    """
    there = {path: value for path, _, value in fields.leaves(before)}
    return [
        f"{path}={fields.spell(there[path])} there, {fields.spell(value)} here"
        for path, _, value in fields.leaves(now)
        if not {path, path.split(".")[0]} & set(MAY_CHANGE) and value != there[path]
        if path != "model.vocab" or value  # 0 is resolved before it is saved
    ]


def describe(run: Run) -> str:
    """One line per group: all of its own fields, and of nested groups what is not the default."""
    default = dict(fields.spelled(Run()))
    lines: dict[str, list[str]] = {}
    for path, text in fields.spelled(run):
        group, _, name = path.partition(".")
        group, name = (group, name) if name else ("run", path)
        if "." not in name or text != default.get(path):
            text = text if text.isprintable() and " " not in text else json.dumps(text)
            lines.setdefault(group, []).append(f"{name}={text}")
    return "\n".join(f"{group:<10} {' '.join(words)}" for group, words in lines.items())
