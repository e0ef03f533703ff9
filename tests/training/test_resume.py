"""Going on: the same command, another mesh, another run; on CPU resumed is uninterrupted, bit for
bit."""

import json
import os
import re
import shutil
import signal

import pytest

from checkpoint import store
from checkpoint.convert import convert
from checkpoint.pretrained import open_pretrained
from configs.load import load
from tests.tolerance import SAME
from tests.training.conftest import NO_SAMPLE


@pytest.fixture
def killed(finished, tmp_path):
    """The finished run as a SIGKILL after step 9 would have left it: saved at 8, logged past it."""
    run = tmp_path / "killed"
    shutil.copytree(finished.workdir, run)
    shutil.rmtree(run / "checkpoints" / "12")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    stale = json.loads(rows[5])
    assert stale["step"] == 10
    rows[5] = json.dumps(stale | {"loss": 99.0}) + "\n"
    (run / "metrics.jsonl").write_text("".join(rows[:6]) + '{"step": 12, "los')
    return run


def rows_of(ended):
    """What does not depend on the clock."""
    kept = ("step", "loss", "grad_norm", "lr", "tokens")
    return [[row[key] for key in kept] for row in ended.rows().values()]


def test_after_a_kill_the_same_command_ends_as_if_undisturbed(finished, killed, command_line):
    ended = command_line(workdir=killed)
    assert ended.code == 0, ended.err
    assert "restored   step 8" in ended.out and "the data goes on" in ended.out
    assert rows_of(ended) == rows_of(finished)
    assert ended.rows("eval_loss") == finished.rows("eval_loss")
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [2, 4, 6, 6, 8, 10, 12, 12]
    assert ended.state(12) == finished.state(12)
    assert [b.samples for b in ended.batches] == [b.samples for b in finished.batches[8:12]]


def test_no_piece_of_text_is_seen_twice(finished):
    samples = finished.samples()
    assert len(samples) == len(set(samples)) > 50


def test_a_signal_saves_the_step_and_the_same_command_goes_on(finished, command_line):
    before = signal.getsignal(signal.SIGTERM)
    kill = {5: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    stopped = command_line(NO_SAMPLE, at=kill)
    assert stopped.code == 143
    assert "stopped by SIGTERM, step 5 saved; the same command goes on" in stopped.err
    assert stopped.steps_saved() == [4, 5]
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (stopped.workdir / "report.html").exists()
    ended = command_line(NO_SAMPLE)
    assert ended.code == 0, ended.err
    assert ended.state(12) == finished.state(12)
    losses = ended.losses()  # step 5 is a row too: it was the last before the signal
    assert {step: losses[step] for step in finished.losses()} == finished.losses()
    seen = stopped.batches[:5] + ended.batches
    assert [b.samples for b in seen] == [b.samples for b in finished.batches]


def test_a_signal_whose_state_cannot_be_saved_is_no_clean_stop(command_line, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Store, "save", fail)
    stopped = command_line(NO_SAMPLE, at={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert stopped.code == 5 and "stopped by SIGTERM, step 2 could not be saved" in stopped.err
    assert "the same command goes on from the beginning, for there is no save" in stopped.err
    assert len(stopped.batches) == 2


def test_a_finished_run_has_nothing_to_do_and_says_how_to_go_on(finished, command_line):
    before = sorted(finished.workdir.rglob("*"))
    again = command_line(workdir=finished.workdir)
    assert again.code == 2
    assert "is at step 12 of steps=12: nothing to do" in again.err
    assert "--config.steps=24" in again.err
    assert sorted(finished.workdir.rglob("*")) == before


@pytest.mark.slow
def test_a_finished_run_trains_longer_when_asked(finished, command_line, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "run")
    longer = command_line("--config.steps=14")
    assert longer.code == 0, longer.err
    assert list(longer.rows()) == [2, 4, 6, 8, 10, 12, 14]
    assert len(longer.batches) >= 2
    assert not set(longer.samples()[:20]) & set(finished.samples())


def test_another_run_in_the_folder_is_refused_and_what_differs_is_named(finished, command_line):
    before = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    other = command_line(
        "--config.optim.lr=1", "--config.data.seq=64", "--config.seed=3", workdir=finished.workdir
    )
    assert other.code == 2
    for part in (
        "holds another run",
        "optim.lr=0.01 there, 1.0 here",
        "data.seq=32 there, 64 here",
        "seed=0 there, 3 here",
        f"--restore={finished.workdir}",
    ):
        assert part in other.err
    after = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    assert after == before


def test_another_run_is_refused_by_its_saves_where_its_config_is_gone(
    finished, command_line, tmp_path
):
    shutil.copytree(finished.workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    other = command_line("--config.optim.lr=1", "--config.steps=14")
    assert other.code == 2 and "optim.lr=0.01 there, 1.0 here" in other.err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_the_same_losses_and_samples(
    finished, killed, command_line
):
    sizes = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    ended = command_line(*mesh, workdir=killed)
    assert ended.code == 0, ended.err
    for step, loss in finished.losses().items():
        assert ended.losses()[step] == pytest.approx(loss, rel=SAME)
    assert [b.samples for b in ended.batches] == [b.samples for b in finished.batches[8:12]]
    assert load(str(killed / "config.json")).mesh.fsdp == 2
    written = [re.search(r"\n\nA.*\n", found.out) for found in (ended, finished)]
    assert written[0][0] == written[1][0], "the sample"
    before, after = (found.rows("eval_loss")[12]["eval_loss"] for found in (finished, ended))
    assert after == pytest.approx(before, rel=SAME)


@pytest.mark.slow
def test_a_run_leaves_its_stages_and_goes_on_with_the_same_losses_and_sample(
    command_line, tmp_path
):
    same = ("--config.model.layers=2", "--config.optim.schedule=constant")
    right = command_line(*same, "--config.steps=6", workdir=tmp_path / "right")
    mesh = {"stage": 2, "data": 4}
    staged = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    staged += ["--config.optim.accumulate=2", "--config.steps=4"]
    first = command_line(*same, *staged, workdir=tmp_path / "moved")
    assert first.code == 0, first.err
    assert (
        "pipeline   1f1b, 2 stages, 2 micro-batches (optim.accumulate): bubble 33.3%" in first.out
    )
    then = command_line(*same, "--config.steps=6", workdir=tmp_path / "moved")
    assert then.code == 0, then.err
    losses = first.losses() | then.losses()
    assert losses == pytest.approx(right.losses(), rel=SAME)
    written = [re.search(r"\n\nA.*\n", found.out) for found in (then, right)]
    assert written[0][0] == written[1][0], "the sample"
    before, after = (found.rows("eval_loss")[6]["eval_loss"] for found in (right, then))
    assert after == pytest.approx(before, rel=SAME)


def test_restore_starts_a_run_of_its_own_from_a_step_of_another(finished, command_line):
    args = f"--restore={finished.workdir}@4", "--config.checkpoint.every=0"
    ended = command_line(*args, NO_SAMPLE)
    assert ended.code == 0, ended.err
    assert "restored   step 4" in ended.out and "the data goes on" in ended.out
    assert rows_of(ended) == rows_of(finished)[2:]  # tokens included
    assert ended.state(12) == finished.state(12)
    assert ended.steps_saved() == [12] and finished.steps_saved() == [4, 8, 12]


@pytest.mark.slow
def test_restore_with_other_data_begins_it_anew(finished, command_line):
    ended = command_line(f"--restore={finished.workdir}@8", "--config.seed=5")
    assert ended.code == 0, ended.err
    assert "the data begins anew: data or seed differ" in ended.out
    assert ended.losses()[12] < finished.losses()[4]  # not from the beginning


@pytest.mark.slow
def test_a_published_model_begins_a_run_with_its_own_sizes_and_tokenizer(
    finished, command_line, tmp_path
):
    folder = tmp_path / "published"
    convert(open_pretrained(f"{finished.workdir}@12"), folder)
    changes = "--config.model.layers=9", "--config.optim.warmup=0", NO_SAMPLE
    flags = f"--restore={folder}", *changes
    ended = command_line(*flags)
    assert ended.code == 0, ended.err
    assert f"weights    {folder}, with a fresh optimizer" in ended.out
    run, before = (load(str(each / "config.json")) for each in (ended.workdir, finished.workdir))
    assert (run.model, run.data.tokenizer) == (before.model, str(folder))
    assert ended.losses()[2] < finished.losses()[2] - 0.5
    again = command_line(*flags, workdir=ended.workdir)
    assert again.code == 2 and "nothing to do" in again.err


@pytest.mark.slow
def test_in_a_workdir_with_saves_of_its_own_restore_does_not_begin_again(
    finished, killed, command_line
):
    ended = command_line(f"--restore={finished.workdir}@4", workdir=killed)
    assert ended.code == 0 and "restored   step 8" in ended.out
    assert ended.state(12) == finished.state(12)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--restore={run}@5",), "holds no step 5, but 4, 8, 12"),
        (("--restore={run}@x",), "'x' is no step"),
        (("--restore={run}/absent",), "absent: there is no such folder or file"),
        (("--restore={run}",), "nothing to do"),
        (("--restore={run}@4", "--config.model.mlp=64"), "mlp"),
        (("--restore={run}@4", "--config.optim.name=sgd"), "optimizer differ"),
        (("--restore={run}@4", "--config.data.tokenizer=bpe:300"), "data.tokenizer='bpe:300'"),
    ],
)
def test_what_cannot_be_restored_is_the_users_to_mend(finished, command_line, args, message):
    ended = command_line(*(arg.format(run=finished.workdir) for arg in args))
    assert ended.code == 2 and message in ended.err
    assert "Traceback" not in ended.err
