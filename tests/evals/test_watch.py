"""eval.py --watch: each checkpoint of a run is scored once, whatever happens meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as command_line
from configs.load import ROOT

TEXT = "A text of some words, to be scored."


@pytest.fixture
def task(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return f"perplexity:{tmp_path}/a.txt"


def rows(folder):
    path = folder.path / "evals" / "evals.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def points(folder, tag):
    events = EventAccumulator(str(folder.path / "evals" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_checkpoints_are_scored_as_they_come_until_the_last(call, run_folder, task):
    run_folder.begin(steps=30)
    run_folder.save(10)
    later = threading.Timer(0.5, run_folder.save, (20, 30))
    later.start()
    code, out, err = call(f"--watch={run_folder.path}", f"--tasks={task}", "--seq=16")
    later.join()
    assert (code, err) == (0, "")
    assert "step 30 was the last: done" in out
    found = rows(run_folder)
    assert [row["step"] for row in found] == [10, 20, 30]
    name = f"{task}/nats_per_token"
    assert len({row[name] for row in found}) == 3
    assert len({row["digest"] for row in found}) == 3
    seen = points(run_folder, f"eval/{name}")
    assert [step for step, _ in seen] == [10, 20, 30]
    assert [value for _, value in seen] == pytest.approx([row[name] for row in found])
    output = run_folder.path / "once.json"
    args = (f"--checkpoint={run_folder.path}@20", f"--tasks={task}", f"--output={output}")
    assert call(*args, "--seq=16")[0] == 0
    alone = json.loads(output.read_text())
    figure = alone["tasks"][task]["figures"]["nats_per_token"]
    assert figure["value"] == pytest.approx(found[1][name], rel=1e-6)
    assert alone["model"]["digest"] == found[1]["digest"]


@pytest.mark.slow
def test_what_was_scored_is_not_scored_again_and_other_tasks_are(call, run_folder, task):
    run_folder.begin(steps=30)
    run_folder.save(10, 20)
    watch = (f"--watch={run_folder.path}", f"--tasks={task}")
    code, out, _ = call(*watch, "--seq=16", "--idle=0.2")
    assert (code, "nothing came for 0.2 s: done" in out) == (0, True)
    before = rows(run_folder)
    assert call(*watch, "--seq=16", "--idle=0.2")[0] == 0
    assert rows(run_folder) == before
    run_folder.save(30)
    assert call(*watch, "--seq=16")[0] == 0
    assert rows(run_folder)[:2] == before
    assert [row["step"] for row in rows(run_folder)] == [10, 20, 30]
    assert call(*watch, "--seq=8")[0] == 0
    assert [row["step"] for row in rows(run_folder)] == [10, 20, 30] * 2


def test_a_point_without_its_row_is_void_and_comes_again(call, run_folder, task):
    """As a kill between the two leaves it."""
    run_folder.begin(steps=20)
    run_folder.save(10, 20)
    watch = (f"--watch={run_folder.path}", f"--tasks={task}")
    assert call(*watch)[0] == 0
    path = run_folder.path / "evals" / "evals.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    assert call(*watch)[0] == 0
    assert [row["step"] for row in rows(run_folder)] == [10, 20]
    assert [step for step, _ in points(run_folder, f"eval/{task}/perplexity")] == [10, 20]


def test_a_checkpoint_that_is_deleted_first_is_passed_over(call, run_folder, task, monkeypatch):
    run_folder.begin(steps=20)
    run_folder.save(10, 20)
    opened = command_line.open_pretrained

    def open_(name):
        if name.endswith("@10"):
            shutil.rmtree(run_folder.path / "checkpoints" / "10")
        return opened(name)

    monkeypatch.setattr(command_line, "open_pretrained", open_)
    code, out, err = call(f"--watch={run_folder.path}", f"--tasks={task}")
    assert (code, err) == (0, "")
    assert "step 10 was deleted before it was read" in out
    assert [row["step"] for row in rows(run_folder)] == [20]


def test_a_damaged_checkpoint_ends_the_watch_with_an_error(call, run_folder, task, monkeypatch):
    monkeypatch.setattr(command_line, "DELETED_S", 0.1)
    run_folder.begin(steps=20)
    run_folder.save(20)
    (run_folder.path / "checkpoints" / "20" / "tokenizer" / "metadata").write_text("{")
    code, _, err = call(f"--watch={run_folder.path}", f"--tasks={task}")
    assert code == 2
    assert "Traceback" not in err


@pytest.fixture
def start(run_folder, task, tmp_path):
    """`start()`: the watch in a process of its own."""
    running = []

    def start():
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        args = [f"--watch={run_folder.path}", f"--tasks={task}", "--seq=16"]
        running.append(
            subprocess.Popen(
                [sys.executable, "-u", str(ROOT / "eval.py"), *args],
                cwd=tmp_path,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(process, run_folder, count):
    path = run_folder.path / "evals" / "evals.jsonl"
    deadline = time.monotonic() + 300
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_ends_it_and_a_kill_loses_nothing(start, run_folder):
    run_folder.begin(steps=40)
    run_folder.save(10)
    first = start()
    wait_for(first, run_folder, 1)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 143, (out, err)
    assert "stopped by SIGTERM" in err
    second = start()
    run_folder.save(20)
    wait_for(second, run_folder, 2)
    second.kill()
    second.communicate()
    run_folder.save(30, 40)
    out, err = start().communicate(timeout=300)
    assert err == ""
    assert "step 40 was the last: done" in out
    assert [row["step"] for row in rows(run_folder)] == [10, 20, 30, 40]
