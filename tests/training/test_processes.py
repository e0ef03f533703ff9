"""train.py in processes of its own: signals from outside, and several processes of one run."""

import json
import os
import re
import shutil
import signal

import pytest

from tests.tolerance import SAME
from tests.training.conftest import NO_SAMPLE, Ended, Process

slow = pytest.mark.slow


@pytest.fixture
def run(tmp_path) -> Ended:
    """What several processes leave in their folder."""
    return Ended(0, "", "", [], tmp_path / "run")


def all_end(processes, code: int = 0) -> list[tuple[str, str]]:
    """(stdout, stderr) of each, once they have ended with `code`."""
    ends = [process.end() for process in processes]
    assert [end[0] for end in ends] == [code] * len(ends), ends
    assert not any("Traceback" in err for _, _, err in ends), ends
    return [(out, err) for _, out, err in ends]


def up_to(finished, step: int, folder) -> None:
    """The folder of the undisturbed run, as if it had been killed at a step."""
    shutil.copytree(finished.workdir, folder)
    for later in (folder / "checkpoints").iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)


@slow
def test_ctrl_c_saves_and_ends_with_its_code(start, run):
    process = start(run.workdir, "--config.steps=1000000", "--config.checkpoint.every=0")
    process.wait_for(r"step +4/")
    process.send_signal(signal.SIGINT)
    code, _, err = process.end()
    assert code == 130, err
    step = re.search(r"stopped by SIGINT, step (\d+) saved; the same command goes on", err)[1]
    assert run.steps_saved() == [int(step)] and int(step) >= 4
    assert "Traceback" not in err


@slow
def test_the_command_keeps_its_programs_and_tells_how_it_began(recipe, tmp_path):
    """The same run again compiles nothing, and its losses are the same bits."""
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "MESHLM_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    losses, kept = [], []
    for name in "ab":
        args = [f"--config={recipe}", f"--workdir={tmp_path / name}", NO_SAMPLE]
        more = ["--config.steps=2", "--config.checkpoint.every=0"]
        code, out, err = Process(["train.py", *args, *more], tmp_path, env).end()
        assert code == 0, err
        parts = r"imports .* s, devices .*, text .*, state .*, compile .*, step .* s"
        assert re.search(rf"start +[\d.]+ s to the end of the first step: {parts}", out), out
        losses.append(Ended(0, "", "", [], tmp_path / name).losses())
        kept.append({path.name for path in tmp_path.glob("programs/*/*-cache")})
    assert kept[0] == kept[1] != set()
    assert losses[0] == losses[1] != {}


@slow
def test_a_checkpoints_folder_that_vanishes_is_not_taken_for_saved(start, run):
    process = start(run.workdir, SPOIL_AT="6")
    code, out, err = process.end()
    assert code == 5, err
    assert "is not saved" in out and "step 12 could not be saved" in err


@pytest.mark.slow
def test_two_processes_are_one_run(finished, several, run):
    processes = several(2, NO_SAMPLE)
    (out, _), (silence, _) = all_end(processes)
    assert run.losses() == pytest.approx(finished.losses(), rel=SAME)
    assert run.steps_saved() == finished.steps_saved()
    # Each reads its own half of every batch.
    whole = [json.loads(json.dumps(batch.samples)) for batch in finished.batches]
    a, b = (process.samples() for process in processes)
    assert len(a[0]) == len(b[0]) == 4
    assert [x + y for x, y in zip(a, b, strict=True)] == whole
    # Only the first one speaks and writes.
    assert "step 12/12" in out and set(re.findall(r"(?m)^\S+", silence)) <= {"[Gloo]"}
    assert len(list((run.workdir / "tensorboard").iterdir())) == 1


@slow
def test_what_four_processes_save_one_restores(finished, several, run, command_line, tmp_path):
    all_end(several(4, "--config.mesh.data=2", "--config.mesh.fsdp=2"))
    assert run.losses() == pytest.approx(finished.losses(), rel=SAME)
    for step in (4, 8, 12):
        folder = run.workdir / "checkpoints" / str(step)
        assert {file.name for file in (folder / "state").glob("ocdbt.process_*")} >= {
            f"ocdbt.process_{k}" for k in range(2)
        }
    copy = tmp_path / "copy"
    up_to(run, 8, copy)
    ended = command_line(workdir=copy)
    assert ended.code == 0 and re.search(r"restored   step 8 ", ended.out), ended.err
    assert ended.losses() == pytest.approx(finished.losses(), rel=SAME)
    assert [b.samples for b in ended.batches] == [b.samples for b in finished.batches[8:12]]


@slow
def test_what_one_process_saves_four_restore(finished, several, run):
    up_to(finished, 4, run.workdir)
    processes = several(4, "--config.mesh.tensor=2", "--config.mesh.data=2")
    (out, _), *_ = all_end(processes)
    assert re.search(r"restored   step 4 ", out)
    assert run.losses() == pytest.approx(finished.losses(), rel=SAME)
    # The two that share rows read the same ones.
    a, b, c, d = (process.samples() for process in processes)
    whole = [json.loads(json.dumps(batch.samples)) for batch in finished.batches[4:12]]
    assert a == b and c == d and [x + y for x, y in zip(a, c, strict=True)] == whole


@slow
def test_two_processes_of_two_devices_are_one_run(finished, several, run):
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    all_end(several(2, NO_SAMPLE, "--config.mesh.context=4", each=[{"XLA_FLAGS": flags}] * 2))
    assert run.losses() == pytest.approx(finished.losses(), rel=SAME)


@slow
def test_a_signal_to_one_stops_both_at_one_step_and_they_go_on_from_it(finished, several, run):
    ends = all_end(several(2, each=[{}, {"SIGNAL_AT": "5"}]), code=143)
    for _, err in ends:
        step = int(re.search(r"stopped by SIGTERM, step (\d+) saved; the same", err)[1])
    assert 5 <= step <= 7 and run.steps_saved() == sorted({4, step})
    # One of them finds that save damaged; they fall back to the same one.
    files = (run.workdir / "checkpoints" / str(step)).glob("state/**/d/*")
    os.truncate(max(files, key=os.path.getsize), 9)
    (out, _), (other, _) = all_end(several(2, NO_SAMPLE))
    assert f"bad save   step {step}" in out + other and re.search(r"restored   step 4 ", out)
    losses = finished.losses()
    assert {k: v for k, v in run.losses().items() if k in losses} == pytest.approx(losses, rel=SAME)


@slow
def test_a_save_that_one_process_has_no_room_for_is_told_and_costs_no_other(several, run):
    (out, _), _ = all_end(several(2, NO_SAMPLE, each=[{}, {"NO_ROOM_AT": "4"}]), code=5)
    told, *_ = re.findall(r"step \d+ is not saved: .*", out)
    assert "No space left for another process; training goes on" in told
    assert run.steps_saved() == []
