"""metrics.jsonl and the TensorBoard events: whole lines, valid JSON, no step twice."""

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monitor.metrics import EVAL, TRAIN, Metrics, read


def train_row(step, **changes):
    row = dict.fromkeys(TRAIN, 0.5) | {"step": step, "tokens": 100 * step, "mfu": None}
    return row | changes


def eval_row(step, loss=3.0):
    return dict(zip(EVAL, (step, loss, 2.0), strict=True))


def write(workdir, rows, resume_step=None):
    metrics = Metrics(workdir, resume_step)
    for row in rows:
        metrics.train(row) if "loss" in row else metrics.eval(row)
    metrics.close()


def scalars(workdir, tag):
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_each_row_is_on_disk_as_one_line_before_the_next_statement(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (1, 2):
        metrics.train(train_row(step))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    assert tuple(json.loads(lines[0])) == TRAIN
    metrics.close()


def test_a_value_that_is_not_finite_is_null_and_named(tmp_path):
    write(tmp_path, [train_row(1, loss=math.nan, grad_norm=np.float32("inf"))])
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is None and row["grad_norm"] is None
    assert row["nonfinite"] == ["loss", "grad_norm"]
    assert math.isnan(scalars(tmp_path, "train/loss")[0][1])


def test_numpy_scalars_are_written_with_every_digit(tmp_path):
    value = np.float32(1) / np.float32(3)
    write(tmp_path, [train_row(1, loss=value, tokens=np.int64(7))])
    row = read(tmp_path / "metrics.jsonl")[0]
    assert np.float32(row["loss"]) == value and row["tokens"] == 7


def test_resuming_drops_the_rows_after_the_restored_step(tmp_path):
    write(tmp_path, [train_row(1), train_row(2), eval_row(2), train_row(3), eval_row(3)])
    write(tmp_path, [train_row(3, loss=9.0), train_row(4)], resume_step=2)
    rows = read(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("loss"), r.get("eval_loss")) for r in rows] == [
        (1, 0.5, None),
        (2, 0.5, None),
        (2, None, 3.0),
        (3, 9.0, None),
        (4, 0.5, None),
    ]
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 0.5), (3, 9.0), (4, 0.5)]
    assert scalars(tmp_path, "eval/loss") == [(2, 3.0)]


def test_a_run_from_the_beginning_drops_everything(tmp_path):
    write(tmp_path, [train_row(1), train_row(2)])
    write(tmp_path, [train_row(1, loss=9.0)])
    assert [row["loss"] for row in read(tmp_path / "metrics.jsonl")] == [9.0]
    assert scalars(tmp_path, "train/loss") == [(1, 9.0)]


def test_a_torn_last_line_and_a_garbled_line_are_dropped(tmp_path):
    write(tmp_path, [train_row(1), train_row(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'\x00\xff{"step"\n{"step": 2, "loss": 1.')
    assert [row["step"] for row in read(path)] == [1, 2]
    write(tmp_path, [train_row(3)], resume_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_resuming_leaves_the_lines_that_stay_as_they_were(tmp_path):
    write(tmp_path, [train_row(1, loss=math.nan), train_row(2, loss=0.1)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, [], resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_step_is_written_once_per_kind(tmp_path):
    write(tmp_path, [train_row(4), eval_row(4)])
    write(tmp_path, [eval_row(4, loss=2.0), train_row(4)], resume_step=4)
    rows = read(tmp_path / "metrics.jsonl")
    assert [row.get("eval_loss") for row in rows] == [None, 3.0]


def test_a_killed_writer_leaves_whole_lines_only(tmp_path):
    code = (
        "import sys; from monitor.metrics import TRAIN, Metrics\n"
        "metrics = Metrics(sys.argv[1])\n"
        "for step in range(10**9): metrics.train(dict.fromkeys(TRAIN, 0.25) | {'step': step})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd())
    path = tmp_path / "metrics.jsonl"
    while not path.exists() or path.stat().st_size < 100_000:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    content = path.read_bytes()
    assert content.endswith(b"\n")
    assert [json.loads(line)["step"] for line in content.splitlines()] == list(
        range(content.count(b"\n"))
    )


def test_a_full_disk_is_reported_once_and_loses_no_row(tmp_path, monkeypatch, caplog):
    metrics, write_, full = Metrics(tmp_path), os.write, [True]

    def half_of_it(fd, data):
        if not full[0]:
            return write_(fd, data)
        return write_(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half_of_it)
    with caplog.at_level(logging.ERROR):
        metrics.train(train_row(1))
        metrics.train(train_row(2))
    assert len([m for m in caplog.messages if "metrics.jsonl" in m]) == 1
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    full[0] = False
    metrics.train(train_row(3))
    metrics.close()
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3]


def test_tensorboard_shows_every_column_and_the_texts_as_they_are(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.train(train_row(5, mfu=0.25) | {"spent_save_s": 1.5})
    metrics.eval(eval_row(5))
    sample = "# not a title\n```\n<b>é</b> \ud800"
    metrics.text("sample", sample, step=5)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("train/loss", "train/grad_norm", "train/lr", "train/tokens"),
        *("perf/tokens_per_s", "perf/step_s", "perf/data_wait_s", "perf/mfu"),
        *("perf/matmul_fraction", "perf/peak_mem_bytes", "perf/goodput", "goodput/save_s"),
        *("eval/loss", "eval/bits_per_byte"),
    }
    [text] = events.Tensors("sample")
    assert text.step == 5
    shown = text.tensor_proto.string_val[0].decode()
    assert shown == "````\n" + sample.replace("\ud800", "?") + "\n````"
    assert events.SummaryMetadata("sample").plugin_data.plugin_name == "text"


def test_only_the_main_process_writes(tmp_path):
    metrics = Metrics(tmp_path, main=False)
    metrics.train(train_row(1))
    metrics.eval(eval_row(1))
    metrics.text("sample", "x")
    metrics.close()
    assert metrics.rows() == [] and list(tmp_path.iterdir()) == []


def test_a_row_without_a_column_is_refused(tmp_path):
    metrics = Metrics(tmp_path)
    with pytest.raises(AssertionError, match="grad_norm"):
        metrics.train({key: 1 for key in TRAIN if key != "grad_norm"})
    metrics.close()


def test_importing_the_package_loads_no_tensorboard_and_no_rich():
    code = (
        "import sys, monitor.metrics, monitor.progress, monitor.report\n"
        "print(*{'tensorboard', 'rich', 'jax', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
