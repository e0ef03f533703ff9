"""SIGKILL while a checkpoint is written: what was committed restores bit by bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from checkpoint.store import Saved
from configs.load import ROOT
from tests.commands import python_path
from tests.faults.often import SEED

WRITER = """
import sys
import jax
import numpy as np
from checkpoint.store import Saved, Store
from tests.faults.test_kill_while_saving import state

folder = sys.argv[1]
made = Store(folder, keep=2)
step = made.latest() or 0
print("ready", flush=True)
while True:
    step += 1
    print("save", step, flush=True)
    made.save(step, jax.device_put(state(step)), {"run": {}, "step": step}, {})
    made.wait()
    print("saved", step, flush=True)
"""


def state(step: int) -> dict[str, np.ndarray]:
    """What is saved at a step; 8 MB in 9 arrays."""
    draw = np.random.default_rng(step)
    return {f"params.{i}": draw.standard_normal((250, 1000), np.float32) for i in range(9)}


def killed(folder, notes, share: float) -> list[str]:
    """Start a writer, kill it in its second save, after this share of what the first one took; its
    lines."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, env=environment,
        stderr=notes, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        lines, times = [], []
        for line in process.stdout:
            lines.append(line.strip())
            times.append(time.monotonic())
            if sum(line.startswith("save ") for line in lines) == 2:
                time.sleep(share * (times[-1] - times[-3]))
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    return lines


def partial(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.isdecimal()]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [30])
def test_what_was_committed_survives_every_kill(tmp_path, kills):
    draw, torn, folder = random.Random(SEED), 0, tmp_path / "checkpoints"
    folder.mkdir()
    with open(tmp_path / "errors", "w") as notes:
        for _ in range(kills):
            lines = killed(folder, notes, draw.uniform(0, 1))
            done = [int(line.split()[1]) for line in lines if line.startswith("saved ")]
            newest = Saved.open(folder)
            assert newest.step >= done[-1], (tmp_path / "errors").read_text()
            assert newest.verify() > 8_000_000
            found = {name: newest.read(name) for name in newest.arrays()}
            assert found.keys() == state(newest.step).keys()
            for name, values in state(newest.step).items():
                assert found[name].tobytes() == values.tobytes()
            assert newest.json("run")["step"] == newest.step
            # What the kill before left was cleaned up at this start: one at most is there.
            assert len(partial(folder)) <= 1
            torn += len(partial(folder))
    assert torn >= kills / 5  # else the kills came too early or too late to tell anything
    print(json.dumps({"kills": kills, "torn": torn}))


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_and_leaves_no_partial_folder(
    finished, start, command_line, tmp_path
):
    run = tmp_path / "run"
    first = start(run)
    for line in first.stdout:
        if re.match(r"step +8/12 ", line):
            break
    first.send_signal(signal.SIGKILL)
    first.end()
    (run / "checkpoints" / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    ended = command_line(workdir=run)
    assert ended.code == 0, ended.err
    assert re.search(r"restored   step [48] ", ended.out) and "bad save" not in ended.out
    assert not partial(run / "checkpoints")
    assert ended.losses().keys() == finished.losses().keys()
