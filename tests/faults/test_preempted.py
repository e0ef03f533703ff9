"""SIGTERM, and again while the run saves: all processes commit one step and say "preempted"."""

import random
import re
import signal
import time

import pytest

from checkpoint.store import Saved
from tests.faults.often import SEED, sometimes, within

pytestmark = pytest.mark.slow

ENDLESS = ("--config.steps=1000000", "--config.checkpoint.every=0", "--config.eval.every=0")


@pytest.mark.parametrize("count", [2, *sometimes([1, 4])])
def test_the_same_step_is_committed_by_all_in_10_s_and_the_run_goes_on_from_it(
    several, start, tmp_path, count
):
    draw, saved = random.Random(SEED), []
    for _ in range(2):
        together = several(count, *ENDLESS) if count > 1 else [start(tmp_path / "run", *ENDLESS)]
        for step in saved[-1:]:
            together[0].wait_for(f"restored   step {step} ")
        together[0].wait_for(rf"step +\d*{draw.choice((2, 4, 6))}/")
        with within(10):
            for _ in range(2):
                for process in together:
                    process.send_signal(signal.SIGTERM)
                time.sleep(draw.uniform(0, 0.2))
            ends = [process.end() for process in together]
        steps = set()
        for code, out, err in ends:
            assert code == 143, (out, err)
            said = r"stopped by SIGTERM, step (\d+) saved; the same command goes on"
            steps.add(int(re.search(said, err)[1]))
        (step,) = steps
        newest = Saved.open(tmp_path / "run" / "checkpoints")
        assert newest.step == step and newest.verify() > 0
        assert not saved or step > saved[-1]
        saved.append(step)
