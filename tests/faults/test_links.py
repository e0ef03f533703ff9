"""Links among the saves of a run: nothing behind them is changed or deleted."""

import shutil

import pytest


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, saved at 4, 8 and 12."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    return tmp_path / "run"


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_save_that_is_a_link_is_refused_before_the_run_would_delete_it(
    run, command_line, tmp_path
):
    elsewhere, link = tmp_path / "elsewhere" / "checkpoints" / "4", run / "checkpoints" / "4"
    shutil.copytree(link, elsewhere)
    shutil.rmtree(link)
    link.symlink_to(elsewhere)
    before = files(elsewhere)
    ended = command_line("--config.steps=14")
    assert ended.code == 2 and f"{link} is a link" in ended.err and not ended.batches
    assert f"--restore={elsewhere.parent}@4 in another --workdir" in ended.err
    assert files(elsewhere) == before


@pytest.mark.slow
def test_a_link_that_looks_like_a_partial_save_costs_nothing_behind_it(run, command_line, tmp_path):
    behind = tmp_path / "behind"
    (behind / "state").mkdir(parents=True)
    (behind / "state" / "book").write_text("a year of work")
    (run / "checkpoints" / "13.orbax-checkpoint-tmp").symlink_to(behind)
    ended = command_line("--config.steps=14", "--config.checkpoint.keep=1")
    assert ended.code == 0 and ended.steps_saved() == [14], ended.err
    assert files(behind) == {behind / "state" / "book": b"a year of work"}


@pytest.mark.slow
def test_a_run_whose_saves_lie_on_another_disk_goes_on(run, command_line, tmp_path):
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    shutil.rmtree(tmp_path / "disk" / "12")
    ended = command_line()
    assert ended.code == 0 and "restored   step 8" in ended.out, ended.err
    assert ended.steps_saved() == [4, 8, 12]
