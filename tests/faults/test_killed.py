"""SIGKILL at random moments: the same command ends with the same bits, rows and samples."""

import hashlib
import json
import random
import re
import signal
import threading
import time
from dataclasses import dataclass

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monitor.goodput import PARTS
from tests.faults.often import SEED, times
from tests.training.conftest import PATIENCE, Ended, Process, starting

pytestmark = pytest.mark.slow

STEPS = 200
ARGS = (
    f"--config.steps={STEPS}", "--config.log.every=1", "--config.checkpoint.every=10",
    "--config.checkpoint.keep=2", "--config.eval.every=50", "--config.sample.tokens=0",
)  # fmt: skip


@dataclass
class Life:
    """What one process of a run did before it ended."""

    process: Process
    restored: int  # step
    metrics: bytes  # metrics.jsonl as the process left it
    goodput: dict
    ended: float  # unix time


@dataclass
class Lives:
    run: Ended
    all: list[Life]
    since: float
    code: int

    def batches(self) -> list:
        """The samples of each step's batch, as the state has seen them."""
        seen = []
        for life in self.all:
            notes = life.process.notes  # none, if it read nothing
            lines = notes.read_text().splitlines(keepends=True) if notes.exists() else []
            read = [json.loads(line) for line in lines if line.endswith("\n")]
            assert not read or life.restored <= len(seen)  # no batch is left out
            seen = [*seen[: life.restored], *read] if read else seen
        return seen


def lived(process: Process, run: Ended, out: str) -> Life:
    """The life of a process that has ended."""
    restored = re.search(r"(?m)^restored   step (\d+) ", out)
    files = [run.workdir / name for name in ("metrics.jsonl", "goodput.json")]
    rows, sums = (file.read_bytes() if file.exists() else b"" for file in files)
    step = int(restored[1]) if restored else 0
    return Life(process, step, rows, json.loads(sums or "{}"), time.time())


def killed(process: Process, at: int | None, delay: float) -> str:
    """Kill it `delay` seconds after the line of a step, or after its start; what it printed."""
    lines = []
    late = threading.Timer(PATIENCE, process.kill)
    late.start()
    for line in process.stdout if at is not None else ():
        lines.append(line)
        found = re.match(rf"step +(\d+)/{STEPS}  loss", line)
        if found and int(found[1]) >= at:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    code, rest, err = process.end()
    late.cancel()
    assert code == -signal.SIGKILL, err  # it was still at work
    return "".join(lines) + rest


@pytest.fixture(scope="module")
def undisturbed(recipe, compiled, tmp_path_factory) -> Lives:
    folder = tmp_path_factory.mktemp("undisturbed")
    run, since = Ended(0, "", "", [], folder / "run"), time.time()
    with starting(recipe, compiled, folder) as start:
        process = start(run.workdir, *ARGS)
        code, out, _ = process.end()
    return Lives(run, [lived(process, run, out)], since, code)


@pytest.fixture(scope="module")
def disturbed(recipe, compiled, tmp_path_factory) -> Lives:
    """Killed at rising steps, and once while it starts; a second lies between two processes."""
    folder, draw = tmp_path_factory.mktemp("disturbed"), random.Random(SEED)
    run, since, lives = Ended(0, "", "", [], folder / "run"), time.time(), []
    moments = sorted(draw.randrange(1, STEPS - 15) for _ in range(times(4, 19)))
    moments.insert(draw.randrange(1, len(moments)), None)
    with starting(recipe, compiled, folder) as start:
        for at in moments:
            process = start(run.workdir, *ARGS)
            out = killed(process, at, draw.uniform(0, 0.03 if at else 4))
            lives.append(lived(process, run, out))
        time.sleep(1)
        process = start(run.workdir, *ARGS)
        code, out, err = process.end()
        assert code == 0, err
        lives.append(lived(process, run, out))
    return Lives(run, lives, since, code)


def test_losses_and_final_parameters_are_those_of_the_undisturbed_run(undisturbed, disturbed):
    assert undisturbed.code == disturbed.code == 0
    print([life.restored for life in disturbed.all])
    assert len(disturbed.all) == times(6, 21)
    right, found = (lives.run.losses() for lives in (undisturbed, disturbed))
    assert list(right) == list(range(1, STEPS + 1)) and found == right
    assert disturbed.run.rows("eval_loss") == undisturbed.run.rows("eval_loss")

    def digest(lives: Lives) -> str:
        state = lives.run.state(STEPS)
        assert any(name.startswith("params.") for name in state)
        return hashlib.sha256(b"".join(state[name] for name in sorted(state))).hexdigest()

    assert digest(disturbed) == digest(undisturbed)


def test_every_sample_is_seen_exactly_once(undisturbed, disturbed):
    right, found = undisturbed.batches(), disturbed.batches()
    assert len(right) == STEPS and found == right
    samples = [tuple(sample) for batch in found for row in batch for sample in row]
    assert len(samples) == len(set(samples)) > STEPS


def test_no_row_of_the_metrics_is_torn_and_no_step_is_there_twice(disturbed):
    for life in disturbed.all:
        rows = [json.loads(line) for line in life.metrics.splitlines()]
        assert life.metrics.endswith(b"\n") or not rows
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == list(range(1, len(steps) + 1))
    events = EventAccumulator(str(disturbed.run.workdir / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("train/loss")}
    assert len(events.Scalars("train/loss")) == len(points) == STEPS
    losses = disturbed.run.losses()
    assert points == pytest.approx(losses, rel=1e-6)


def test_the_parts_of_the_time_add_up_and_lost_steps_are_named(disturbed):
    final = disturbed.all[-1].goodput["spent"]
    assert set(final) == set(PARTS)
    # It begins when the first process has its flags, and ends when the last one closes.
    lock = disturbed.run.workdir / "lock"
    whole = disturbed.all[-1].ended - disturbed.since
    assert lock.exists() and 0.9 * whole - 15 < sum(final.values()) < whole
    lost, before = 0.0, {}
    for life in disturbed.all:
        if before and life.goodput != before:  # else it was killed before it came so far
            kept = before["saved"].get(str(life.restored), 0.0)
            lost += before["spent"]["steps"] - kept
        before = life.goodput
    assert final["lost"] == pytest.approx(lost, abs=1e-3) and lost > 0
    assert final["down"] > 1 and final["steps"] > 0 and final["save"] > 0
    last = disturbed.run.rows()[STEPS]
    assert 0 < last["goodput"] < 1
    assert last["spent_lost_s"] == pytest.approx(lost, abs=2e-3)
