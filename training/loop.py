"""Loop: the steps of a run, and between them its logs, evaluations, saves, its end."""

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from checkpoint import store
from configs import command
from configs.run import to_json
from costs import devices
from costs.speed import Speed
from data.loader import Batch
from monitor.goodput import Goodput
from monitor.metrics import Metrics
from monitor.profile import Profile
from monitor.progress import Progress
from monitor.signals import Signals
from sharding import mesh as meshes
from training import guard
from training.bundle import Bundle
from training.health import Health, older
from training.origin import Origin
from training.second_pass import SecondPass
from training.text import Text
from training.twice import Twice
from training.watch import COMPUTES, READS, Watch


class Pending(NamedTuple):
    """A step whose metrics are on the device."""

    metrics: dict[str, jax.Array]
    waited_s: float  # for its batch
    batch: Batch  # of this process' rows


class Loop:
    """The steps of a run, with all that happens between them."""

    def __init__(
        self, program: Any, text: Text, state: Any, origin: Origin, workdir: Path, watch: Watch,
        goodput: Goodput,
    ):  # fmt: skip
        """`program` is a train.Program, `state` its train.State."""
        run = program.run
        self.watch, self.goodput = watch, goodput
        self.program, self.run, self.text, self.state = program, run, text, state
        self.step = origin.step
        self.tokens = origin.note.get("tokens", 0)
        self.saved_step = origin.step if origin.own else -1  # unless it fails yet: see `check`
        self.retry_from: int | None = None  # after a save that failed
        self.saves = store.Store(
            workdir / "checkpoints", keep=run.checkpoint.keep, keep_every=run.checkpoint.keep_every
        )
        with command.user_input():
            last = origin.step if origin.own else None
            self.metrics = Metrics(workdir, last, main=meshes.is_main())
        self.metrics.text("config", json.dumps(to_json(run), indent=2))
        self.progress = Progress(run.steps, origin.step, main=meshes.is_main())
        self.speed = Speed(run.model, run.data.seq)
        goodput.startup.lap("matmul rate")
        self.pending: list[Pending] = []
        self.health = Health(run.guard, workdir, self.progress)
        self.second_pass = SecondPass(program)
        self.rewinds = origin.note.get("rewinds", 0)
        self.began = origin.note.get("began", origin.name)
        self.evaluate_batch = program.evaluation()
        if meshes.is_main():
            goodput.open(workdir, origin.step if origin.own else None)

    def run_steps(self, signals: Signals, profile: Profile) -> None:
        """Up to the last step, or to the end of the step in which a signal comes."""
        run = self.run
        self.text.loader.start()  # reads while XLA compiles
        with self.goodput.part("compile"):
            compiled = self.program.compile()
        self.goodput.startup.lap("compile")
        self.goodput.write()
        train_batch = Twice(compiled, run.guard.twice, partial(self.aside, "check"), self.progress)
        self.speed.start()
        with self.goodput.part("steps"), jax.transfer_guard("disallow"):
            first = self.step + 1
            for step in range(first, run.steps + 1):
                profile.before(step)
                self.watch.at(step, READS)
                with self.goodput.part("data"):
                    batch = next(self.text.loader)
                self.watch.at(step, COMPUTES)
                rows = self.program.place(batch.arrays)
                self.state, metrics = train_batch(step, self.state, rows)
                if step == first:
                    self.started(metrics)
                if self.step % run.log.every == 0:
                    self.log()  # the step before, while the device works on this one
                profile.after(step, metrics)
                self.step = step
                self.pending.append(Pending(metrics, self.text.loader.waited_s, batch))
                self.progress.step(step)
                if due(step, run.eval.every) and step < run.steps:
                    self.evaluate()
                stop = self.watch.stop(step, signals.received)
                self.check_saves()
                back = self.health.failed and self.rewind()
                ends = bool(stop or self.health.failed or step == run.steps)
                if due(step, run.checkpoint.every) or ends or back or self.retry():
                    self.save(wait=ends)
                if stop:
                    self.stop(stop)
                if self.health.failed and ends:
                    self.give_up()
            self.evaluate()
        self.watch.done()

    def started(self, metrics: dict[str, jax.Array]) -> None:
        """Tell how long it took until the first step was done."""
        jax.block_until_ready(metrics)
        self.goodput.startup.lap("step")
        self.progress.print(f"start      {self.goodput.startup.told()}")

    def log(self) -> None:
        """Fetch the metrics of the steps since the last log and write the last one's row."""
        if not self.pending:
            return
        fetched = jax.device_get([step.metrics for step in self.pending])
        tokens = sum(int(metrics["tokens"]) for metrics in fetched)
        self.tokens += tokens
        last = fetched[-1]
        row = {
            "step": self.step,
            "loss": float(last["loss"]),
            "grad_norm": float(last["grad_norm"]),
            "lr": float(last["lr"]),
            **{key: float(value) for key, value in last.items() if key.startswith("router_")},
            "tokens": self.tokens,
            **self.speed.over(len(fetched), tokens),
            "data_wait_s": sum(step.waited_s for step in self.pending) / len(self.pending),
            "peak_mem_bytes": devices.peak_memory(),
            **self.goodput.figures(),
            "skipped": int(last["skipped"]),
        }
        self.metrics.train(row)
        self.progress.log(row)
        first = self.step - len(fetched) + 1
        for step, (metrics, pending) in enumerate(zip(fetched, self.pending, strict=True), first):
            if self.health.see(step, metrics, pending.batch.samples):
                self.look_again(step, pending.batch)
        self.pending.clear()
        self.goodput.write()

    @contextlib.contextmanager
    def aside(self, part: str) -> Iterator[None]:
        """A part of the time that belongs to no step."""
        with self.goodput.part(part), self.speed.pause():
            yield

    def look_again(self, step: int, batch: Batch) -> None:
        """Name what was not finite in a step, and write the bundle that repeats it."""
        with self.aside("check"), self.watch.rest(), jax.transfer_guard("allow"):
            try:
                rows = self.program.place(batch.arrays)
                found = self.second_pass.first_bad(self.state.params, rows)
                found = found or f"nothing, with the parameters of step {self.step}"
            except Exception as error:  # whatever a compiler raises: the run can do without
                found = f"not known: {brief(error)}"
            earlier = [saved for saved in self.saves.steps() if saved < step]
            bundle = Bundle(
                step, self.health.why, *self.health.numbers, found, batch.samples, self.run.seed,
                self.run, jax.device_count(), str(self.saves.path), max(earlier, default=0),
                self.began,
            )  # fmt: skip
            self.health.name(step, found, bundle)

    def evaluate(self) -> None:
        """The held-out loss."""
        self.log()
        if not self.text.held_out.batches:
            return
        with self.aside("eval"), self.watch.rest():
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
        """Save the state, `wait` for the disk; an error is told, and the exit code if it stays.

        Not while steps are skipped, if the run may go back: such saves, of the same parameters,
        would take the place of the one that it goes back to.
        """
        self.log()
        if self.health.skipping and self.rewinds < self.run.guard.rewind and not wait:
            return
        note = {
            "run": to_json(self.run), "data": self.text.loader.state(), "tokens": self.tokens,
            "rewinds": self.rewinds, "began": self.began,
        }  # fmt: skip
        error = None
        with self.aside("save"), self.watch.rest():
            self.goodput.saved(self.step)
            try:
                tokenizer = json.loads(self.text.tokenizer.to_json())
                self.saves.save(self.step, self.state, note, tokenizer)
                if wait:
                    self.saves.wait()
            except Exception as raised:  # whatever the file system and its libraries raise
                error = raised
            failed = meshes.agree(int(error is not None))
        self.check_saves(always=True)  # of the save before
        self.saved_step = self.step
        self.retry_from = None
        if failed:
            self.unsaved(self.step, error)

    def check_saves(self, *, always: bool = False) -> None:
        """Tell of a save that failed while the run went on; processes agree at logged steps."""
        if jax.process_count() > 1 and not (always or due(self.step, self.run.log.every)):
            return
        step = 0
        while step >= 0:
            step, error = self.saves.failed() or (-1, None)
            step = meshes.agree(step)
            if step >= 0:
                self.unsaved(step, error)

    def unsaved(self, step: int, error: Exception | None) -> None:
        """Tell of it, and save again at a logged step a tenth of checkpoint.every later."""
        if self.saved_step == step:
            self.saved_step = -1
        self.retry_from = step + max(self.run.checkpoint.every // 10, 1)
        why = brief(error) if error else "another process could not write it"
        more = "" if self.step == self.run.steps else "; training goes on and tries again"
        self.progress.print(f"step {step} is not saved: {why}{more}")

    def retry(self) -> bool:
        """Whether to save for an earlier save that failed."""
        waited = self.retry_from is not None and self.step >= self.retry_from
        return waited and due(self.step, self.run.log.every)

    def rewind(self) -> bool:
        """Go back to the state of a save from before the skipped steps; the data does not.

        False if the run may not, or has no such save.
        """
        self.log()
        if self.rewinds >= self.run.guard.rewind:
            return False
        with self.aside("restore"), self.watch.rest(), jax.transfer_guard("allow"):
            self.saves.wait()
            to = older(self.saves.steps(), self.health.first)
            if to < 0:
                return False
            saved = store.Saved.open(self.saves.path, to)
            saved.verify(jax.process_index(), jax.process_count())
            step, self.state = self.state.step, None  # two states may be more than fits
            self.state = guard.rewound(saved.restore(self.program.state), step)
            self.goodput.back_to(to)
        self.rewinds += 1
        self.health.forgive()
        self.progress.print(
            f"rewound    to the state of step {to}, past the batches up to step {self.step} "
            f"({self.rewinds} of guard.rewind={self.run.guard.rewind})"
        )
        return True

    def give_up(self) -> None:
        """End the command after too many skipped steps."""
        saved = f"step {self.step} is saved" if self.saved_step == self.step else (
            f"step {self.step} could not be saved; {self.remains()}"
        )  # fmt: skip
        raise command.Unhealthy(f"{self.health.verdict()}; {saved}")

    def stop(self, signum: int) -> None:
        """End the command."""
        text = f"stopped by {signal.Signals(signum).name}, step {self.step}"
        if self.saved_step != self.step:
            raise command.Unsaved(f"{text} could not be saved; {self.remains()}")
        raise command.Stopped(signum, f"{text} saved; the same command goes on")

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.progress.close()
        self.metrics.close()
        with self.goodput.part("save"):
            self.saves.close()
        self.goodput.write()
        self.progress.print(f"goodput    {self.goodput.told()}")
        if error is None and self.saved_step != self.step:
            raise command.Unsaved(
                f"the state of step {self.step} could not be saved; {self.remains()}"
            )

    def remains(self) -> str:
        """What a user can do whose last state is lost."""
        try:
            where = f"from step {store.Saved.open(self.saves.path).step}"
        except OSError:
            where = "from the beginning, for there is no save"
        return f"see that {self.saves.path} has room, then the same command goes on {where}"


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps, 0 for never, is due."""
    return every > 0 and step % every == 0


def brief(error: Exception) -> str:
    """The error in one line, without the places in the source that tensorstore lists."""
    text = " ".join(str(error).partition(" [source locations")[0].split())
    return text or repr(error)
