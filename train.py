"""Train a Transformer on text, on one device or on a mesh of them.

The same command in the same --workdir goes on where it stopped.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import NamedSharding

from configs import command, load
from configs.run import Run, check
from model import transformer
from monitor.goodput import Goodput
from monitor.profile import Profile
from monitor.signals import Signals
from optim import histories
from optim.lean import norm
from optim.schedule import make_schedule
from optim.update import Update, make_update
from sharding import context, offload, runtime
from sharding import mesh as meshes
from sharding.gather import Axes, axes_of
from sharding.stages import stage_count
from sharding.zero import lent, own
from text import cache
from training import twice
from training.guard import Guard
from training.lock import Lock
from training.loop import Loop
from training.origin import Origin, resolve
from training.summary import finish, print_run
from training.text import open_text
from training.watch import Watch

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; default runs/RECIPE-TIME")
RESTORE = flags.DEFINE_string(
    "restore", None, "start from another run's state, DIR[@STEP], or a published model's weights"
)
PROFILE = flags.DEFINE_string("profile", None, "write a trace of steps START:STOP to DIR/profile")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of a cluster")
PROCESSES = flags.DEFINE_integer("processes", None, "processes of the cluster")
PROCESS = flags.DEFINE_integer("process", None, "number of this process, from 0")
CONNECT = flags.DEFINE_float(
    "connect_timeout", None, "seconds to wait for the other processes; default 20 with "
    "--coordinator, 300 where a scheduler starts them"
)  # fmt: skip
HEARTBEAT = flags.DEFINE_float("heartbeat", 60, "seconds of silence after which a process is lost")
STEP = flags.DEFINE_float("step_timeout", 1800, "seconds that a step may take; 0: any time")

Batch = dict[str, jax.Array]  # inputs, targets, positions, segments: int32 [B, T]


# ---- the step ------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step changes."""

    step: jax.Array  # steps done
    params: Any
    opt_state: Any
    guard: Guard


def init_state(program: "Program", seed: int) -> State:
    """The state before the first step; under jit each device makes its own part."""
    run = program.run
    params = transformer.init(run.model, run.layout, jax.random.key(seed))
    return State(jnp.int32(0), params, program.optimizer.init(params), Guard.fresh())


def train_step(program: "Program", state: State, batch: Batch) -> tuple[State, dict]:
    """One step: (state, batch) in, the next state and its metrics, as device scalars, out.

    The loss is the mean over the batch's target tokens, in however many micro-batches it comes.
    A step that the guard does not let through changes neither parameters nor optimizer.
    """
    run, staged, params = program.run, stage_count() > 1, offload.fetch(state.params)
    count = jnp.sum(batch["segments"] > 0)

    def loss(params: Any, rows: Batch) -> tuple[jax.Array, dict]:
        weights = (rows["segments"] > 0).astype(jnp.float32) / jnp.maximum(count, 1)
        model, rows = nnx.merge(program.graph, params), {**rows, "weights": weights}
        if staged:
            return model.staged_loss(rows, run.pipeline, documents=program.documents)
        return model.loss(**rows, documents=program.documents)

    def gradient(rows: Batch) -> tuple[dict, Any]:
        (_, told), grads = program.gradient(loss, params, rows)
        return told, grads

    if staged:
        told, grads = gradient(micro_batches(batch, run.optim.accumulate))
    elif run.optim.accumulate == 1:
        told, grads = gradient(batch)
    else:
        parts = micro_batches(batch, run.optim.accumulate)

        def add(sums: Any, rows: Batch) -> tuple[Any, None]:
            return histories.added(sums, gradient(rows)), None

        first = jax.tree.map(lambda rows: rows[0], parts)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, first))
        (told, grads), _ = jax.lax.scan(add, zero, parts)

    # Devices talk over the whole mesh: the gradients' norm, 4 bytes for each parameter's.
    nats, size = told.pop("nats"), norm(histories.weights(grads))
    good, guard, judged = state.guard.judge(run.guard, nats, size)
    number = state.step - state.guard.skipped  # of this step, among those that were taken
    params = offload.fetch(state.params, after=grads)
    params, opt_state = program.optimizer.step(number, good, grads, state.opt_state, params)
    params = offload.put(params, like=state.params)
    metrics = {
        "loss": nats,
        "grad_norm": size,
        "lr": program.schedule(number),
        "tokens": count,
        **judged,
        **told,
    }
    return State(state.step + 1, params, opt_state, guard), metrics


def micro_batches(batch: Batch, parts: int) -> Batch:
    """[B, T] as [parts, B / parts, T]; each device's rows stay where they are."""

    def split(rows_BT: jax.Array) -> jax.Array:
        parted = rows_BT.reshape(-1, parts, rows_BT.shape[1])
        return jnp.swapaxes(parted, 0, 1)

    return jax.tree.map(split, batch)


def eval_step(program: "Program", params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(nats of all targets, number of targets)."""
    run, weights = program.run, (batch["segments"] > 0).astype(jnp.float32)
    model, rows = nnx.merge(program.graph, offload.fetch(params)), {**batch, "weights": weights}
    if stage_count() > 1:
        rows = micro_batches(rows, run.optim.accumulate)
        _, told = model.staged_loss(rows, run.pipeline, documents=program.documents)
    else:
        _, told = model.loss(**rows, documents=program.documents)
    return told["nats"], jnp.sum(weights)


@dataclass(frozen=True)
class Program:
    """What a run computes: a model without its arrays, an optimizer, the shapes of both."""

    run: Run
    graph: nnx.GraphDef
    optimizer: Update
    schedule: Callable[[jax.Array], jax.Array]  # step's number to learning rate
    roles: Any = None  # of the parameters
    state: State = None  # shapes and shardings

    @property
    def documents(self) -> int:
        """The most documents of a row, as attention sees them; 0: any number."""
        return 1 if self.run.data.across else self.run.data.documents

    @property
    def rows(self) -> NamedSharding:
        """Where the rows of a batch live."""
        return NamedSharding(jax.sharding.get_mesh(), self.run.layout.spec("batch", "sequence"))

    @property
    def sums(self) -> Axes:
        """The mesh axes over which gradients are summed after the backward pass, not in it: those
        that split the optimizer's state, and where micro-batches go through stages all, so that
        they are summed once."""
        layout = self.run.layout
        rows = axes_of(layout.batch) + axes_of(layout.sequence)
        staged = stage_count() > 1
        return tuple(axis for axis in rows if staged or axis in axes_of(layout.optimizer))

    def gradient(self, loss: Any, params: Any, *args: Any) -> tuple[Any, Any]:
        """`jax.value_and_grad(loss, has_aux=True)`, summed to where the optimizer's part lies."""

        def given(weight: jax.Array, role: Any) -> jax.Array:
            return weight if role.kind == "vector" else lent(weight, self.sums)

        params = jax.tree.map(given, params, self.roles)
        found, grads = jax.value_and_grad(loss, has_aux=True)(params, *args)
        sums = set(self.sums)
        return found, own(grads, tuple(a for a in axes_of(self.run.layout.optimizer) if a in sums))

    def batch(self) -> Batch:
        """The shapes of a batch."""
        shape = (self.run.data.batch, self.run.data.seq)
        array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows)
        return dict.fromkeys(("inputs", "targets", "positions", "segments"), array)

    def place(self, arrays: dict) -> Batch:
        """This process' rows as part of the batch on the mesh."""
        arrays = {name: self.lay(rows) for name, rows in arrays.items()}
        return meshes.place(arrays, self.rows, self.run.data.batch)

    def parts(self, batch: Batch) -> list[Batch]:
        """The micro-batches of a batch, each a batch."""
        count = self.run.optim.accumulate
        whole = jax.jit(lambda batch: micro_batches(batch, count))(batch)
        return [jax.tree.map(lambda rows, i=i: rows[i], whole) for i in range(count)]

    def lay(self, rows: np.ndarray) -> np.ndarray:
        """[rows, seq, ...] with the tokens of each row in the order that the mesh has them in."""
        return context.lay(rows, self.rows, self.run.model.arch.attention.causal)

    def jit(self, step: Any, **how: Any) -> Any:
        """`step` of this program, compiled when called."""
        return jax.jit(lambda *args: step(self, *args), **how)

    def fresh(self) -> State:
        """The state before the first step."""
        return self.first(lambda: init_state(self, self.run.seed))

    def begin(self, params: Any) -> State:
        """The state before the first step, of these parameters, whose memory it takes over."""

        def state(params: Any) -> State:
            params = offload.fetch(params)
            return State(jnp.int32(0), params, self.optimizer.init(params), Guard.fresh())

        return self.first(state, params, donate_argnums=0)

    def first(self, make: Callable[..., State], *args: Any, **how: Any) -> State:
        """The state that `make` gives of `args`, each array where it belongs."""
        home = self.state.opt_state

        def own(state: State) -> State:
            return dataclasses.replace(state, opt_state=offload.without(state.opt_state, home))

        where = jax.tree.map(lambda leaf: leaf.sharding, own(self.state))
        how |= {"out_shardings": where, "compiler_options": runtime.once()}
        state = jax.jit(lambda *args: own(make(*args)), **how)(*args)
        return dataclasses.replace(state, opt_state=offload.filled(state.opt_state, home))

    def evaluation(self) -> Any:
        """`eval_step`, of parameters and a batch."""
        return self.jit(eval_step)

    def compile(self) -> Any:
        """The train step, compiled; it takes over the memory of the state it is given."""
        return self.jit(train_step, donate_argnums=0).lower(self.state, self.batch()).compile()


def build(run: Run) -> Program:
    """The program of a run, its vocabulary resolved, on the mesh in use; allocates nothing."""
    graph, _, roles = transformer.abstract(run.model, run.layout)
    axes = axes_of(run.layout.optimizer)
    by_layer = "optimizer" in run.layout.host
    optimizer = make_update(run.optim, run.steps, roles, run.seed, axes, by_layer=by_layer)
    program = Program(run, graph, optimizer, make_schedule(run.optim, run.steps), roles)
    whole = NamedSharding(jax.sharding.get_mesh(), jax.P())

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = whole if leaf.sharding is None else NamedSharding(whole.mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    state = jax.tree.map(placed, jax.eval_shape(lambda: init_state(program, 0)))
    params, opt_state = offload.place(run.layout.host, state.params, state.opt_state)
    return dataclasses.replace(program, state=State(state.step, params, opt_state, state.guard))


# ---- the run -------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """The command, once its flags are a Run."""
    goodput = Goodput()
    runtime.prepare()
    if run.deterministic:
        runtime.deterministic()
    with command.user_input():
        watch = Watch(STEP.value)
    with watch, Lock() as lock:
        train_in(watch, lock, goodput, run)


def train_in(watch: Watch, lock: Lock, goodput: Goodput, run: Run) -> None:
    """`train`, watched, in a folder that the lock keeps from other runs."""
    with command.user_input():
        cluster = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
        watch.join(*cluster, run, timeout=CONNECT.value, heartbeat=HEARTBEAT.value)
        devices = jax.device_count()
        goodput.startup.lap("devices")
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(meshes.agree(int(time.time()))))
        workdir = Path(WORKDIR.value or f"runs/{run.name}-{stamp}")
        profile = Profile(workdir / "profile", PROFILE.value)
        run, weights = resolve(run, workdir, RESTORE.value)
        lock.take(workdir)
        with goodput.part("restore"):
            origin = Origin.find(run, workdir, RESTORE.value, weights)
        check(run, devices)
        twice.check(run)
        mesh = meshes.make(run.mesh)
        offload.check(run.layout.host, jax.local_devices())
        run, text = open_text(run, origin.tokenizer(), mesh)
        if meshes.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
        lock.take(workdir)  # if it was not there before
        if meshes.is_main():
            load.save(run, workdir / "config.json")
        goodput.startup.lap("text")
    with jax.set_mesh(mesh), text.loader, profile, Signals() as signals:
        program = build(run)
        with command.user_input(), goodput.part("restore"):
            origin, state = origin.restore(program, text.loader)
        goodput.startup.lap("state")
        with Loop(program, text, state, origin, workdir, watch, goodput) as loop:
            print_run(loop, workdir)
            loop.run_steps(signals, profile)
            finish(loop, workdir)


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
    runtime.keep_programs(cache.folder() / "programs")
    main()
