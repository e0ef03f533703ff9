"""train.py in processes of its own: signals from outside, and several processes of one run."""

import json
import re
import signal
import socket

import pytest

from tests.tolerance import SAME

slow = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def pair(start, tmp_path):
    """`pair(*args, environments=({}, {}))`: two processes of one run in the folder `run`."""

    def pair(*args: str, environments=({}, {})):
        at = f"--coordinator=127.0.0.1:{free_port()}"
        return [
            start(tmp_path / "run", *args, at, "--processes=2", f"--process={k}", **environment)
            for k, environment in enumerate(environments)
        ]

    return pair


def losses(folder) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def saved(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@slow
def test_ctrl_c_saves_and_ends_with_its_code(start, tmp_path):
    process = start(tmp_path / "run", "--config.steps=1000000", "--config.checkpoint.every=0")
    for line in process.stdout:
        if re.match(r"step +4/", line):
            break
    process.send_signal(signal.SIGINT)
    code, _, err = process.end(30)
    assert code == 130, err
    step = re.search(r"stopped by SIGINT, step (\d+) saved; the same command goes on", err)[1]
    assert saved(tmp_path / "run") == [step] and int(step) >= 4
    assert "Traceback" not in err


@slow
def test_a_checkpoints_folder_that_vanishes_is_not_taken_for_saved(start, tmp_path):
    process = start(tmp_path / "run", SPOIL_AT="6")
    code, out, err = process.end()
    assert code == 5, err
    assert "is not saved" in out and "step 12 could not be saved" in err


@slow
def test_two_processes_are_one_run_also_when_both_are_stopped_and_go_on(finished, pair, tmp_path):
    run, both = tmp_path / "run", ({"SIGNAL_AT": "3"}, {"SIGNAL_AT": "3"})
    before = pair(environments=both)
    ends = [process.end() for process in before]
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert saved(run) == ["4"]  # they agree at logged steps
    after = pair()
    ends = [process.end() for process in after]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert losses(run) == pytest.approx(finished.losses(), rel=SAME)
    assert saved(run) == ["12", "4", "8"]
    # Each reads its own half of every batch.
    first, last = (a.samples() + b.samples() for a, b in zip(before, after, strict=True))
    whole = [json.loads(json.dumps(batch.samples)) for batch in finished.batches]
    for a, b, rows in zip(first, last, whole, strict=True):
        assert len(a) == len(b) == 4 and a + b == rows
    # Only the first one speaks and writes.
    (_, out, _), (_, silence, _) = ends
    assert "step 12/12" in out and set(re.findall(r"(?m)^\S+", silence)) <= {"[Gloo]"}
    assert len(list((run / "tensorboard").iterdir())) == 2


@slow
def test_a_signal_to_one_of_two_stops_both_and_one_process_goes_on(
    finished, pair, tmp_path, command_line
):
    ends = [process.end() for process in pair(environments=({}, {"SIGNAL_AT": "5"}))]
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert "stopped by SIGTERM, step 6 saved" in ends[0][2]
    assert saved(tmp_path / "run") == ["4", "6"]
    ended = command_line(workdir=tmp_path / "run")
    assert ended.code == 0, ended.err
    assert losses(tmp_path / "run") == pytest.approx(finished.losses(), rel=SAME)
    assert [b.samples for b in ended.batches] == [b.samples for b in finished.batches[6:12]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--coordinator=127.0.0.1:1", "--processes=2"), "go together: give all three"),
        (("--processes=2", "--process=0"), "go together: give all three"),
        (("--process=0",), "go together: give all three"),
        (
            ("--coordinator=127.0.0.1:1", "--processes=2", "--process=2"),
            "--process=2 must be 0 to 1",
        ),
        (
            ("--coordinator=127.0.0.1:1", "--processes=2", "--process=-1"),
            "--process=-1 must be 0 to 1",
        ),
    ],
)
def test_processes_that_cannot_be_are_refused(command_line, args, message):
    ended = command_line(*args)
    assert ended.code == 2 and message in ended.err
    assert not ended.workdir.exists()
