"""Damaged files of others give a result or a message, never a crash, a hang or much memory."""

import subprocess
import sys
import time

import numpy as np
import pytest

from configs.load import ROOT
from tests.faults.mutants import KINDS, harm
from tests.faults.often import SEED, times

pytestmark = pytest.mark.slow

EACH = times(250, 7500)  # of each kind: 1,000 and 30,000 together


@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_file_is_read_or_refused_by_name_in_a_second_and_100_mb(kind, tmp_path):
    folder = tmp_path / "some-model"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.faults.mutants", kind, str(EACH), str(SEED), folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * EACH)
    last = done.stdout.split()[-1:]
    assert done.returncode == 0, (done.returncode, last, done.stderr[-3000:], command)
    assert last == [str(EACH - 1)]


def grow():
    return np.empty(1 << 34, np.uint8)  # more than a process may have kept of what it freed


def work():
    begin = time.process_time()
    while time.process_time() < begin + 1.1:
        pass


def fail():
    raise KeyError("weights")


def whisper():
    raise ValueError("it is damaged")


@pytest.mark.parametrize(
    ("read", "found"),
    [(grow, "MemoryError"), (work, "took 1."), (fail, "KeyError: 'weights'"),
     (whisper, "does not name some-model"), (list, "")],
)  # fmt: skip
def test_what_would_be_harm_is_seen(read, found):
    told = harm(read, "some-model", 1000)
    assert found in told and bool(found) == bool(told)
