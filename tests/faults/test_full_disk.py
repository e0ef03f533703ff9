"""A disk that is full or read-only when a run saves."""

import os
import re
import subprocess
import time

import jax
import numpy as np
import pytest

from checkpoint import manifest
from checkpoint.store import Saved, Store
from tests.training.conftest import NO_SAMPLE, PATIENCE


@pytest.fixture
def disk(tmp_path):
    """`disk(folder, size)` mounts a disk of so many bytes there; only root may."""
    mounted = []

    def disk(folder, size=1 << 20):
        folder.mkdir(parents=True, exist_ok=True)
        made = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(made, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def fill(folder) -> None:
    """Leave no room."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == 28


def once(folder, call) -> None:
    """Call when the folder of the save that was just asked for is there."""
    for _ in range(1000):
        if folder.is_dir():
            return call()
        time.sleep(0.01)
    raise TimeoutError(folder)


def lines_of(ended, pattern: str) -> list[str]:
    return [line for line in ended.out.splitlines() if re.search(pattern, line)]


def test_a_full_disk_is_told_and_once_there_is_room_the_run_saves_again(
    finished, command_line, disk, tmp_path
):
    folder = disk(tmp_path / "run" / "checkpoints", 16 << 20)
    at = {3: lambda: fill(folder), 5: (folder / "ballast").unlink}
    ended = command_line(NO_SAMPLE, at=at)
    assert ended.code == 0, ended.err
    (told,) = lines_of(ended, "step 4 is not saved")
    assert re.search("No space left on device", told), told
    assert "training goes on and tries again" in told
    assert ended.steps_saved() == [6, 8, 12]
    assert [saved.verify() > 0 for saved in Saved.all(folder)] == [True] * 3
    assert ended.state(12) == finished.state(12)
    assert "Traceback" not in ended.err, ended.err


@pytest.mark.slow  # tests/training/test_loop.py has the same of a Store that fails
def test_a_disk_that_stays_full_ends_a_run_with_code_5_after_its_last_step(
    finished, command_line, disk, tmp_path
):
    folder = disk(tmp_path / "run" / "checkpoints", 16 << 20)
    ended = command_line(NO_SAMPLE, at={5: lambda: once(folder / "4", lambda: fill(folder))})
    assert ended.code == 5 and "step 12 could not be saved" in ended.err
    assert f"see that {folder} has room, then the same command goes on from step 4" in ended.err
    assert lines_of(ended, "step 12 is not saved") and ended.steps_saved() == [4]
    assert ended.losses() == finished.losses()
    assert not list(folder.glob("*tmp*"))  # what a failed save wrote is given back
    assert "Traceback" not in ended.err, ended.err


@pytest.mark.slow
def test_without_room_for_the_report_either_the_run_ends_with_code_5(command_line, disk, tmp_path):
    folder = disk(tmp_path / "run", 16 << 20)
    saved = folder / "checkpoints" / "4"
    ended = command_line(NO_SAMPLE, at={5: lambda: once(saved, lambda: fill(folder))})
    assert ended.code == 5 and "step 12 could not be saved" in ended.err
    assert lines_of(ended, "report.html cannot be written: No space left on device")
    assert "Traceback" not in ended.err, ended.err


@pytest.mark.slow  # a full disk above is told and forgiven on the same way
def test_a_folder_that_becomes_read_only_is_told_and_forgiven(
    finished, command_line, disk, tmp_path
):
    folder = disk(tmp_path / "run" / "checkpoints", 16 << 20)

    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    at = {6: lambda: once(folder / "4", lambda: remount("ro")), 11: lambda: remount("rw")}
    ended = command_line(NO_SAMPLE, at=at)
    assert ended.code == 0, ended.err
    (told,) = lines_of(ended, "step 8 is not saved")
    assert "Read-only file system" in told
    assert ended.steps_saved() == [4, 12] and ended.state(12) == finished.state(12)
    assert "Traceback" not in ended.err, ended.err


def test_a_workdir_that_cannot_be_written_is_refused_before_training(command_line, disk, tmp_path):
    folder = disk(tmp_path / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    ended = command_line()
    assert ended.code == 2 and "read-only file system" in ended.err and not ended.batches


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore
def test_a_disk_that_fills_up_while_a_save_is_written_is_told_and_costs_no_other(disk, tmp_path):
    folder = disk(tmp_path / "checkpoints", 4 << 20)
    draw, made = np.random.default_rng(0), Store(folder, keep=1)

    def save(step):
        state = {"a": draw.standard_normal((2 << 18,), np.float32)}  # 2 MiB
        made.save(step, jax.device_put(state), {"run": {}}, {})
        made.wait()

    save(1)
    with open(folder / "ballast", "wb") as file:
        file.write(bytes(600 << 10))  # leaves more than the half of 2 MiB, and less than all
    for step in (2, 3):
        with pytest.raises(Exception, match=r"No space left|RESOURCE_EXHAUSTED"):
            save(step)
        assert sorted(path.name for path in folder.iterdir()) == ["1", "ballast"]
    (folder / "ballast").unlink()
    save(4)
    made.close()
    assert [path.name for path in folder.iterdir()] == ["4"] and Saved.open(folder).verify()


@pytest.mark.slow
def test_an_error_beside_the_run_is_told_before_the_next_save(command_line, monkeypatch):
    write = manifest.write

    def fail(folder, step, *args):
        if step == 4:
            raise OSError(28, "No space left on device")
        write(folder, step, *args)

    monkeypatch.setattr(manifest, "write", fail)
    ended = command_line(NO_SAMPLE, at={6: lambda: time.sleep(1)})  # in which the writer fails
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    (told,) = [i for i, line in enumerate(lines) if "step 4 is not saved: [Errno 28]" in line]
    (later,) = [i for i, line in enumerate(lines) if re.match(r"step +8/12 +loss", line)]
    assert told < later
    assert ended.steps_saved() == [6, 8, 12]
    assert "Traceback" not in ended.err, ended.err


@pytest.mark.slow
def test_a_run_outlives_whoever_reads_what_it_prints(start, tmp_path):
    run = start(tmp_path / "run", NO_SAMPLE)
    run.stdout.close()  # before its first line
    assert run.wait(PATIENCE) == 0, run.stderr.read()
    assert "Traceback" not in run.stderr.read()
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()
