"""A process of several is killed, stopped, hangs or errs: the others end with code 4, naming it."""

import re
import signal
import socket
import time

import pytest

from sharding.cluster import join
from tests.faults.often import nightly, within
from tests.training.conftest import free_port

pytestmark = pytest.mark.slow

ENDLESS = ("--config.steps=1000000", "--config.checkpoint.every=0", "--config.eval.every=0")
HEARTBEAT = 10


def told(process, code: int = 4) -> str:
    """The last line that the process wrote, which ended with `code`."""
    ended, out, err = process.end()
    assert ended == code, (out, err)
    return err.splitlines()[-1]


@pytest.fixture
def training(several):
    """`training(count, *args)`: processes in the middle of training."""

    def training(count: int, *args: str, **kwargs):
        processes = several(count, *ENDLESS, f"--heartbeat={HEARTBEAT}", *args, **kwargs)
        processes[0].wait_for(r"step +4/")
        return processes

    return training


@pytest.mark.parametrize(
    ("count", "victim", "how", "why"),
    [
        (2, 0, signal.SIGKILL, "is gone: its connection closed, as when it is killed"),
        (3, 1, signal.SIGKILL, "is gone: its connection closed, as when it is killed"),
        (2, 0, signal.SIGSTOP, "has been silent for 1[0-9] s: it is stopped, hung or cut off"),
        (3, 1, signal.SIGSTOP, "has been silent for 1[0-9] s: it is stopped, hung or cut off"),
    ],
)
def test_the_others_name_who_is_lost_and_end(training, count, victim, how, why):
    processes = training(count, "--config.data.batch=6")
    gone = processes.pop(victim)
    with within(HEARTBEAT + 10):
        gone.send_signal(how)
        lines = [told(process) for process in processes]
    for line in lines:
        assert f"error: process {victim} (pid {gone.pid} on {socket.gethostname()}) " in line
        assert re.search(why, line) and line.endswith("the same command goes on from the last save")


def test_a_step_that_never_ends_names_who_hangs_and_shows_where(several):
    limit = 8
    processes = several(2, *ENDLESS, f"--step_timeout={limit}", each=[{}, {"HANG_AT": "5"}])
    processes[0].wait_for(r"step +4/")
    start = time.monotonic()
    with within(limit + 5 + 5):
        ends = [process.end() for process in processes]
    assert time.monotonic() - start > limit - 2
    for code, _, err in ends:
        assert code == 4
        assert f"error: no step has ended for {limit} s: still reading the data of step 5" in err
        assert f"are process 1 (pid {processes[1].pid} on {socket.gethostname()}), and" in err
    assert "in __next__" in ends[1][2] and "Thread 0x" in ends[1][2]


@nightly
def test_a_step_that_never_ends_ends_a_process_that_is_alone_too(start, tmp_path):
    process = start(tmp_path / "run", *ENDLESS, "--step_timeout=8", HANG_AT="5")
    process.wait_for(r"step +2/")
    with within(8 + 5 + 5):
        code, _, err = process.end()
    assert code == 4 and "in __next__" in err
    assert "no step has ended for 8 s: still reading the data of step 5; the same" in err


def test_an_error_of_one_is_told_by_the_others(several):
    first, second = several(2, *ENDLESS, each=[{}, {"FAIL_AT": "5"}])
    code, _, err = second.end()
    assert code == 1 and "RuntimeError: a fault of this process alone" in err
    line = told(first)
    assert (
        f"error: process 1 (pid {second.pid} on {socket.gethostname()}) ended with code 1: " in line
    )
    assert "a fault of this process alone" in line


def test_a_verdict_of_one_is_the_code_of_all_however_long_another_takes_to_end(several):
    """Else a script would start again what cannot go well, with exit code 4."""
    spikes = ("--config.guard.spike=0.01", "--config.guard.window=8", "--config.guard.stop=1")
    processes = several(2, *ENDLESS, *spikes, each=[{"LINGER": "5"}])
    lines = [told(process, code=3) for process in processes]
    for line in lines:
        assert "were skipped in a row (guard.stop=1)" in line
        assert "goes on from the last save" not in line
    assert f"error: process 1 (pid {processes[1].pid} on " in lines[0]


def test_processes_of_different_configurations_are_refused(several):
    processes = several(2, each=[{}, {"args": ("--config.optim.lr=1", "--config.seed=1")}])
    for process in processes:
        line = told(process, code=2)
        assert re.search(r"process [01] \(.*\) has another configuration than process [01]", line)
        assert "optim, seed differ" in line


def test_too_few_processes_are_told_by_name(several):
    processes = several(3, "--connect_timeout=15")
    processes.pop().kill()
    for process in processes:
        line = told(process, code=2)
        assert "2 of --processes=3 came within 15 s" in line and "No --process=2: start" in line


def test_an_unreachable_coordinator_is_told(start, tmp_path):
    port = free_port()
    flags = (f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=1")
    line = told(start(tmp_path / "run", *flags, "--connect_timeout=2"), code=2)
    assert f"no process 0 at --coordinator=127.0.0.1:{port} within 2 s: Connection refused" in line
    assert not (tmp_path / "run").exists()
    assert join.TYPED_S < 25  # half a minute in all, with the time to start
