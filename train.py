"""Train a Transformer on text, on one device or on a mesh of them.

The same command in the same --workdir goes on where it stopped.
"""

import dataclasses
import json
import math
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx
from jax.sharding import NamedSharding

from checkpoint import store
from configs import command, load
from configs.run import Run, check, describe, differences, from_json, to_json
from costs import devices, flops, memory
from costs.speed import Speed
from data import split
from data.held_out import HeldOut, held_out_batches
from data.loader import Loader
from data.sources import open_sources
from inference.sampling import sample
from model import transformer
from monitor import report
from monitor.metrics import Metrics
from monitor.profile import Profile
from monitor.progress import Progress
from monitor.signals import Signals
from optim.optimizer import make_optimizer
from optim.schedule import make_schedule
from sharding import mesh as meshes
from sharding import runtime
from text import tokenizer as tokenizers

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default runs/RECIPE-TIME")
RESTORE = flags.DEFINE_string("restore", None, "start from the state of another run, DIR[@STEP]")
PROFILE = flags.DEFINE_string("profile", None, "write a trace of steps START:STOP to DIR/profile")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of a cluster")
PROCESSES = flags.DEFINE_integer("processes", None, "processes of the cluster")
PROCESS = flags.DEFINE_integer("process", None, "number of this process, from 0")

Batch = dict[str, jax.Array]  # inputs, targets, positions, segments: int32 [B, T]


# ---- the step ------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step changes."""

    step: jax.Array  # steps done
    params: Any
    opt_state: Any


def init_state(program: "Program", seed: int) -> State:
    """The state before the first step; under jit each device makes its own part."""
    run = program.run
    params = transformer.init(run.model, run.layout, jax.random.key(seed))
    return State(jnp.int32(0), params, program.optimizer.init(params))


def train_step(program: "Program", state: State, batch: Batch) -> tuple[State, dict]:
    """One step: (state, batch) in, the next state and its metrics, as device scalars, out.

    The loss is the mean over the batch's target tokens, in however many micro-batches it comes.
    """
    run = program.run
    count = jnp.sum(batch["segments"] > 0)

    def loss(params: Any, rows: Batch) -> tuple[jax.Array, jax.Array]:
        weights = (rows["segments"] > 0).astype(jnp.float32) / jnp.maximum(count, 1)
        return nnx.merge(program.graph, params).loss(**rows, weights=weights)

    gradient = jax.value_and_grad(loss, has_aux=True)
    if run.optim.accumulate == 1:
        (_, nats), grads = gradient(state.params, batch)
    else:

        def add(carry: tuple, rows: Batch) -> tuple[tuple, None]:
            (_, nats), grads = gradient(state.params, rows)
            return jax.tree.map(jnp.add, carry, (nats, grads)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        (nats, grads), _ = jax.lax.scan(add, zero, micro_batches(batch, run.optim.accumulate))

    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": nats,
        "grad_norm": optax.tree.norm(grads),
        "lr": program.schedule(state.step),
        "tokens": count,
    }
    return State(state.step + 1, params, opt_state), metrics


def micro_batches(batch: Batch, parts: int) -> Batch:
    """[B, T] as [parts, B / parts, T]; each device's rows stay where they are."""

    def split(rows_BT: jax.Array) -> jax.Array:
        parted = rows_BT.reshape(-1, parts, rows_BT.shape[1])
        return jnp.swapaxes(parted, 0, 1)

    return jax.tree.map(split, batch)


def eval_step(program: "Program", params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(nats of all targets, number of targets)."""
    weights = (batch["segments"] > 0).astype(jnp.float32)
    _, nats = nnx.merge(program.graph, params).loss(**batch, weights=weights)
    return nats, jnp.sum(weights)


@dataclass(frozen=True)
class Program:
    """What a run computes: a model without its arrays, an optimizer, the shapes of both."""

    run: Run
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: State = None  # shapes and shardings

    @property
    def rows(self) -> NamedSharding:
        """Where the rows of a batch live."""
        return NamedSharding(jax.sharding.get_mesh(), self.run.layout.spec("batch", None))

    def batch(self) -> Batch:
        """The shapes of a batch."""
        shape = (self.run.data.batch, self.run.data.seq)
        array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows)
        return dict.fromkeys(("inputs", "targets", "positions", "segments"), array)

    def place(self, arrays: dict) -> Batch:
        """This process' rows as part of the batch on the mesh."""
        return meshes.place(arrays, self.rows, self.run.data.batch)

    def jit(self, step: Any, **how: Any) -> Any:
        """`step` of this program, compiled when called."""
        return jax.jit(lambda *args: step(self, *args), **how)

    def compile(self) -> Any:
        """The train step, compiled; it takes over the memory of the state it is given."""
        return self.jit(train_step, donate_argnums=0).lower(self.state, self.batch()).compile()


def build(run: Run) -> Program:
    """The program of a run, its vocabulary resolved, on the mesh in use; allocates nothing."""
    graph, _, roles = transformer.abstract(run.model, run.layout)
    optimizer = make_optimizer(run.optim, run.steps, roles)
    program = Program(run, graph, optimizer, make_schedule(run.optim, run.steps))
    whole = NamedSharding(jax.sharding.get_mesh(), jax.P())

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = whole if leaf.sharding is None else NamedSharding(whole.mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    state = jax.tree.map(placed, jax.eval_shape(lambda: init_state(program, 0)))
    return dataclasses.replace(program, state=state)


@dataclass(frozen=True)
class Text:
    """What a run reads."""

    sources: tuple[split.Split, ...]
    tokenizer: tokenizers.Tokenizer
    held_out: HeldOut
    loader: Loader


def open_text(run: Run, tokenizer: tokenizers.Tokenizer | None) -> tuple[Run, Text]:
    """The run with its vocabulary resolved, and its text; `tokenizer`: that of a checkpoint."""
    sources = open_sources(run.data)
    if tokenizer is None:
        tokenizer = tokenizers.load(run.data.tokenizer, lambda: split.sample(sources))
    try:
        run = dataclasses.replace(run, model=run.model.with_vocab(tokenizer.size))
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    check(run, jax.device_count())
    mesh = meshes.make(run.mesh)
    rows = meshes.own_rows(NamedSharding(mesh, run.layout.spec("batch")), run.data.batch)
    loader = Loader(run.data, tokenizer, sources, seed=run.seed, rows=rows)
    held_out = held_out_batches(run.data, tokenizer, sources, bytes=run.eval.bytes, rows=rows)
    return run, Text(sources, tokenizer, held_out, loader)


# ---- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where the state of a run comes from: its own last save, another run's, or nowhere."""

    saved: store.Saved | None = None
    note: dict = field(default_factory=dict)  # what `Loop.save` noted beside the arrays
    own: bool = False  # the run's own last save

    @property
    def step(self) -> int:
        """Steps done."""
        return self.saved.step if self.saved else 0

    @classmethod
    def find(cls, run: Run, workdir: Path, restore: str | None) -> "Origin":
        """ValueError if `workdir` holds a run that this command does not go on with."""
        if (workdir / "config.json").is_file():
            differ = differences(load.load(str(workdir / "config.json")), run)
            if differ:
                raise ValueError(
                    f"{workdir} holds another run: {'; '.join(differ)}. Take another --workdir, "
                    f"and --restore={workdir} to start from its state"
                )
        own = workdir / "checkpoints"
        try:
            saved = store.Saved.open(own)
        except FileNotFoundError:
            if restore is None:
                return cls()
            saved = store.locate(restore)
        note = saved.json("run")
        if saved.step >= run.steps:
            raise ValueError(
                f"{saved.path} is at step {saved.step} of steps={run.steps}: nothing to do; "
                f"to go on, --config.steps={2 * saved.step}, say"
            )
        before = note["run"]["data"]["tokenizer"]
        if before != run.data.tokenizer:
            raise ValueError(
                f"data.tokenizer={run.data.tokenizer!r}, but the ids of {saved.path} are those "
                f"of {before!r}"
            )
        return cls(saved, note, own=saved.path == own.absolute())

    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """The one that the state was trained with."""
        return self.saved and tokenizers.from_json(json.dumps(self.saved.json("tokenizer")))

    def restore(self, program: Program, loader: Loader) -> State:
        """The state, on the mesh in use; the loader goes on too, if its data is the same."""
        run = program.run
        if self.saved is None:
            once = runtime.once()
            return jax.jit(lambda: init_state(program, run.seed), compiler_options=once)()
        state = self.saved.restore(program.state)
        before = from_json(self.note["run"])
        same = (before.data, before.seed) == (run.data, run.seed)
        if same:
            loader.restore(self.note["data"])
        if meshes.is_main():
            place = "the data goes on" if same else "the data begins anew: data or seed differ"
            print(f"restored   step {self.step} of {self.saved.path.parent}; {place}")
        return state


class Loop:
    """The steps of a run, with all that happens between them."""

    def __init__(self, program: Program, text: Text, state: State, origin: Origin, workdir: Path):
        run = program.run
        self.program, self.run, self.text, self.state = program, run, text, state
        self.step = origin.step
        self.tokens = origin.note.get("tokens", 0)
        self.saved_step = origin.step if origin.own else -1
        self.saves = store.Store(
            workdir / "checkpoints", keep=run.checkpoint.keep, keep_every=run.checkpoint.keep_every
        )
        self.metrics = Metrics(workdir, origin.step if origin.own else None, main=meshes.is_main())
        self.metrics.text("config", json.dumps(to_json(run), indent=2))
        self.progress = Progress(run.steps, origin.step, main=meshes.is_main())
        self.speed = Speed(run.model, run.data.seq)
        self.pending: list[tuple[dict, float]] = []  # metrics on the device, seconds of data wait
        self.evaluate_batch = program.jit(eval_step)

    def run_steps(self, signals: Signals, profile: Profile) -> None:
        """Up to the last step, or to the end of the step in which a signal comes."""
        run = self.run
        self.text.loader.start()  # reads while XLA compiles
        train_batch = self.program.compile()
        self.speed.start()
        with jax.transfer_guard("disallow"):
            for step in range(self.step + 1, run.steps + 1):
                profile.before(step)
                batch = next(self.text.loader)
                self.state, metrics = train_batch(self.state, self.program.place(batch.arrays))
                if self.step % run.log.every == 0:
                    self.log()  # the step before, while the device works on this one
                profile.after(step, metrics)
                self.step = step
                self.pending.append((metrics, self.text.loader.waited_s))
                self.progress.step(step)
                if due(step, run.eval.every) and step < run.steps:
                    self.evaluate()
                stop = self.asked_to_stop(signals)
                if due(step, run.checkpoint.every) or stop or step == run.steps:
                    self.save(wait=bool(stop) or step == run.steps)
                if stop:
                    self.stop(stop)
            self.evaluate()

    def log(self) -> None:
        """Fetch the metrics of the steps since the last log and write the last one's row."""
        if not self.pending:
            return
        fetched = jax.device_get([metrics for metrics, _ in self.pending])
        tokens = sum(int(metrics["tokens"]) for metrics in fetched)
        self.tokens += tokens
        last = fetched[-1]
        row = {
            "step": self.step,
            "loss": float(last["loss"]),
            "grad_norm": float(last["grad_norm"]),
            "lr": float(last["lr"]),
            "tokens": self.tokens,
            **self.speed.over(len(fetched), tokens),
            "data_wait_s": sum(waited for _, waited in self.pending) / len(self.pending),
            "peak_mem_bytes": devices.peak_memory(),
        }
        self.pending.clear()
        self.metrics.train(row)
        self.progress.log(row)
        if not math.isfinite(row["loss"]):
            raise command.Unhealthy(
                f"the loss of step {self.step} is {row['loss']}; a lower optim.lr or a longer "
                f"optim.warmup may help; the last good state is step {self.saves.latest()}"
            )

    def evaluate(self) -> None:
        """The held-out loss."""
        self.log()
        if not self.text.held_out.batches:
            return
        with self.speed.pause():
            sums = [
                self.evaluate_batch(self.state.params, self.program.place(arrays))
                for arrays in self.text.held_out.batches
            ]
            nats, targets = (
                sum(map(float, part)) for part in zip(*jax.device_get(sums), strict=True)
            )
        bits = nats / math.log(2) / self.text.held_out.bytes
        row = {"step": self.step, "eval_loss": nats / targets, "eval_bits_per_byte": bits}
        self.metrics.eval(row)
        self.progress.eval(row)

    def save(self, *, wait: bool) -> None:
        """Save the state, `wait` for the disk; an error is told, and the exit code if it stays."""
        self.log()
        note = {"run": to_json(self.run), "data": self.text.loader.state(), "tokens": self.tokens}
        with self.speed.pause():
            try:
                tokenizer = json.loads(self.text.tokenizer.to_json())
                self.saves.save(self.step, self.state, note, tokenizer)
                if wait:
                    self.saves.wait()
                self.saved_step = self.step
            except Exception as error:  # whatever the file system and its libraries raise
                self.progress.print(f"step {self.step} is not saved: {error}")

    def asked_to_stop(self, signals: Signals) -> int:
        """The signal that one of the processes received, 0 if none; they ask at logged steps."""
        if jax.process_count() == 1:
            return signals.received
        return meshes.agree(signals.received) if due(self.step, self.run.log.every) else 0

    def stop(self, signum: int) -> None:
        """End the command."""
        text = f"stopped by {signal.Signals(signum).name}, step {self.step}"
        if self.saved_step != self.step:
            raise command.Unsaved(f"{text} could not be saved")
        raise command.Stopped(signum, f"{text} saved; the same command goes on")

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.progress.close()
        self.metrics.close()
        self.saves.close()
        if error is None and self.saved_step != self.step:
            raise command.Unsaved(f"the state of step {self.step} could not be saved")


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps, 0 for never, is due."""
    return every > 0 and step % every == 0


def train(run: Run) -> None:
    """The command, once its flags are a Run."""
    runtime.prepare()
    with command.user_input():
        meshes.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        check(run, jax.device_count())
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(meshes.agree(int(time.time()))))
        workdir = Path(WORKDIR.value or f"runs/{run.name}-{stamp}")
        profile = Profile(workdir / "profile", PROFILE.value)
        origin = Origin.find(run, workdir, RESTORE.value)
        run, text = open_text(run, origin.tokenizer())
        if meshes.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            load.save(run, workdir / "config.json")
    with jax.set_mesh(meshes.make(run.mesh)), text.loader, profile, Signals() as signals:
        program = build(run)
        with command.user_input():
            state = origin.restore(program, text.loader)
        with Loop(program, text, state, origin, workdir) as loop:
            print_run(program, text, loop.speed, workdir)
            loop.run_steps(signals, profile)
            finish(loop, workdir)


def print_run(program: Program, text: Text, speed: Speed, workdir: Path) -> None:
    """What is about to run."""
    if not meshes.is_main():
        return
    run = program.run
    sizes = " x ".join(f"{axis}={n}" for axis, n in jax.sharding.get_mesh().shape.items())
    held = memory.state_bytes(vars(program.state)).items()
    parts = ", ".join(f"{name} {memory.human(size)}" for name, size in held if size > 99)
    tokens, rate = run.data.batch * run.data.seq, speed.rate / 1e9
    lines = [
        describe(run),
        *(f"source     {source.describe()}" for source in text.sources),
        f"folder     {workdir}",
        f"parameters {flops.params(run.model):,}, {tokens:,} tokens a step",
        f"devices    {sizes}; each holds {parts}",
        f"hardware   {hardware()}, {rate:,.0f} GFLOP/s measured in {run.model.dtype} matmuls",
    ]
    print("\n".join(lines), flush=True)


def hardware() -> str:
    """All devices, in words."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def finish(loop: Loop, workdir: Path) -> None:
    """The sample and the report."""
    run, program = loop.run, loop.program
    written = ""
    if run.sample.tokens:
        prompt = loop.text.tokenizer.encode([run.sample.prompt])[0]
        ids = sample(
            lambda params, *rows: nnx.merge(program.graph, params).logits(*rows),
            loop.state.params,
            [loop.text.tokenizer.end, *prompt.tolist()],
            tokens=run.sample.tokens,
            vocab=loop.text.tokenizer.size,
            where=program.rows,
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
        report.write(page, to_json(run), loop.metrics.rows(), written, facts)
        loop.progress.print(f"{page}")


def main() -> None:
    """The command."""
    command.run(
        train,
        recipe="configs/quickstart.py",
        examples=(
            "--config.steps=50 --config.optim.lr=1e-3",
            "--config=configs/llama.py:1B --config.mesh.fsdp=8",
            "--config.data.sources=book.txt,notes/ --workdir=runs/mine",
            "--config=runs/mine/config.json",
        ),
    )


if __name__ == "__main__":
    main()
