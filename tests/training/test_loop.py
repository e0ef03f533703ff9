"""A run from its command line to its last file."""

import json
import math
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from checkpoint import store
from configs.load import load
from monitor.metrics import EVAL, TRAIN
from sharding import mesh as meshes
from tests.training.conftest import NO_SAMPLE


def test_the_loss_falls_and_every_row_has_its_keys(finished):
    lines = (finished.workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [2, 4, 6, 6, 8, 10, 12, 12]
    for row in rows:
        keys = EVAL if "eval_loss" in row else TRAIN
        assert set(keys) <= set(row) and next(iter(row)) == "step"
    losses = finished.losses()
    assert losses[2] == pytest.approx(math.log(384), rel=0.05) and losses[12] < losses[2] - 0.2


def test_tokens_are_the_targets_without_padding(finished):
    seen = np.cumsum([np.count_nonzero(b.arrays["segments"]) for b in finished.batches])
    for step, row in finished.rows().items():
        assert row["tokens"] == seen[step - 1]


def test_the_logged_rate_is_that_of_the_step(finished):
    run = load(str(finished.workdir / "config.json"))
    schedule = train.make_schedule(run.optim, run.steps)
    for step, row in finished.rows().items():
        assert row["lr"] == pytest.approx(float(schedule(step - 1)), rel=1e-6)


def test_times_are_positive_and_agree(finished):
    for row in finished.rows().values():
        assert row["step_s"] > 0 and 0 <= row["data_wait_s"] <= row["step_s"] + 1
        assert row["tokens_per_s"] * row["step_s"] <= 8 * 32 + 1e-6
        assert row["mfu"] is None and 0 < row["matmul_fraction"] < 1
        assert row["peak_mem_bytes"] > 2**26


def test_bits_per_byte_are_the_held_out_nats_over_the_bytes(finished):
    (held,) = re.findall(r"(\d+) held out", finished.out)
    assert int(held) >= 1
    rows = finished.rows("eval_loss")
    assert list(rows) == [6, 12] and rows[12]["eval_loss"] < rows[6]["eval_loss"]
    # Of bytes: a target for each byte and one for each document's end.
    for row in rows.values():
        targets = row["eval_bits_per_byte"] * math.log(2) / row["eval_loss"]
        assert 1 < targets < 1.2


def test_tensorboard_has_the_scalars_the_sample_and_the_config(finished):
    events = EventAccumulator(str(finished.workdir / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    assert scalars == pytest.approx(finished.losses())
    tags = " ".join(events.Tags()["tensors"])
    assert "sample" in tags and "config" in tags


def test_the_report_is_one_page_with_the_run_and_its_sample(finished):
    page = (finished.workdir / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", page)
    assert "<svg" in page and "optim.warmup" in page
    assert str(finished.workdir / "report.html") in finished.out


def test_the_sample_goes_on_from_the_prompt(finished):
    assert re.search(r"^A", finished.out, re.MULTILINE)


def test_the_start_says_what_will_run(finished):
    for part in ("run        name=tiny steps=12", "256 tokens a step", "data=8", "parameters "):
        assert part in finished.out
    assert finished.err == ""


def test_checkpoints_are_those_that_were_asked_for(finished):
    assert finished.steps_saved() == [4, 8, 12]


@pytest.mark.slow
def test_the_saved_config_repeats_the_run_bit_for_bit_and_a_trace_changes_nothing(
    finished, command_line
):
    saved = finished.workdir / "config.json"
    again = command_line("--profile=2:3", config=saved)
    assert again.code == 0, again.err
    assert again.losses() == finished.losses()
    assert again.rows("eval_loss") == finished.rows("eval_loss")
    assert again.state(12) == finished.state(12)
    assert (again.workdir / "config.json").read_bytes() == saved.read_bytes()
    traces = [path.name for path in (again.workdir / "profile").rglob("*")]
    assert any(name.endswith(".xplane.pb") for name in traces)
    assert any("perfetto_trace" in name for name in traces)


@pytest.mark.slow
def test_how_often_a_run_speaks_changes_nothing_in_it(finished, command_line):
    ended = command_line(
        "--config.log.every=1", "--config.eval.every=0", "--config.checkpoint.every=0",
        NO_SAMPLE,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert list(ended.rows()) == [*range(1, 13)] and list(ended.rows("eval_loss")) == [12]
    assert ended.steps_saved() == [12]
    assert {step: ended.losses()[step] for step in finished.losses()} == finished.losses()
    assert ended.state(12) == finished.state(12)


def test_a_transfer_that_nobody_asked_for_ends_the_run(command_line, monkeypatch):
    def careless(program, arrays):
        return arrays  # NumPy arrays, which jit would move by itself

    monkeypatch.setattr(train.Program, "place", careless)
    ended = command_line("--config.eval.every=0", NO_SAMPLE)
    assert ended.code == 1 and "isallowed host-to-device transfer" in ended.err


@pytest.mark.slow
def test_what_stays_not_finite_ends_the_run(command_line):
    ended = command_line("--config.optim.lr=1e30", "--config.optim.clip=0")
    assert ended.code == 3
    assert re.search(r"(the loss|gradient) is (nan|inf)", ended.err) and "optim.lr" in ended.err
    last = ended.rows()[12]
    assert last["grad_norm"] is None and "grad_norm" in last["nonfinite"] and last["skipped"] >= 10


# ---- a state that cannot be saved ----


def failing(store, steps):
    """Store.save, which fails at these steps."""
    save = store.Store.save

    def fail(self, step, *args):
        if step in steps:
            raise OSError(28, "No space left on device")
        save(self, step, *args)

    return fail


def test_the_last_state_unsaved_is_an_exit_code_of_its_own(command_line, monkeypatch):
    monkeypatch.setattr(store.Store, "save", failing(store, {8, 10, 12}))
    ended = command_line(NO_SAMPLE)
    assert ended.code == 5 and "step 12 could not be saved" in ended.err
    assert "step 8 is not saved: [Errno 28] No space left on device" in ended.out
    assert ended.steps_saved() == [4]
    assert list(ended.rows()) == [2, 4, 6, 8, 10, 12]  # it trained on


@pytest.mark.slow
def test_a_save_that_fails_on_the_way_is_told_and_forgiven(command_line, monkeypatch):
    monkeypatch.setattr(store.Store, "save", failing(store, {4}))
    ended = command_line(NO_SAMPLE)
    assert ended.code == 0 and "step 4 is not saved" in ended.out
    assert ended.steps_saved() == [6, 8, 12]  # it tried again before the next was due


def test_a_workdir_that_cannot_be_made_is_the_users_fault(command_line, tmp_path):
    (tmp_path / "file").write_text("")
    ended = command_line(workdir=tmp_path / "file")
    assert ended.code == 2 and "file" in ended.err and "Traceback" not in ended.err
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("a file")
    ended = command_line(workdir=run)
    assert ended.code == 2 and "checkpoints" in ended.err and "Traceback" not in ended.err


def test_a_profile_of_no_steps_is_refused_before_anything_is_written(command_line):
    for steps in ("3", "3:", "5:4", "0:2", "a:b"):
        ended = command_line(f"--profile={steps}")
        assert ended.code == 2 and f"--profile={steps}" in ended.err
        assert not ended.workdir.exists()


def test_the_mesh_is_that_of_the_flags(command_line):
    ended = command_line("--config.mesh.data=3")
    assert ended.code == 2 and "8 devices do not divide into data=3" in ended.err
    assert meshes.is_main() and not ended.workdir.exists()
