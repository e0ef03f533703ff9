"""A pipe, a device or a folder where a file belongs: refused by name, not waited for."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from checkpoint import manifest
from checkpoint.store import Saved
from data.config import DataConfig
from data.sources import open_sources
from monitor import metrics
from monitor.goodput import Goodput
from training.bundle import Bundle


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def saved_json(path: Path) -> None:
    (path.parent / "5" / "run").mkdir(parents=True)
    path.rename(path.parent / "5" / "run" / "metadata")
    Saved(path.parent, 5).json("run")


def one_source(path: Path) -> None:
    open_sources(DataConfig(sources=(str(path),)))


def folder_of_sources(path: Path) -> None:
    open_sources(DataConfig(sources=(str(path.parent),)))


READERS = {
    "manifest.json": lambda path: manifest.Manifest.read(path.parent),
    "metadata": saved_json,
    "metrics.jsonl": metrics.read,
    "912.json": Bundle.read,
    "book.txt": one_source,
    "one.txt": folder_of_sources,
}


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(name, make, tmp_path):
    make(tmp_path / name)
    late = threading.Timer(10, lambda: (tmp_path / name).open("w").close())  # lets a reader go
    late.start()
    with pytest.raises(ValueError, match=f"{name}.*(no file|must be a file|is a pipe)"):
        READERS[name](tmp_path / name)
    assert late.is_alive()
    late.cancel()


def test_sums_that_are_no_file_are_begun_anew(tmp_path):
    pipe(tmp_path / "goodput.json")
    goodput = Goodput()
    goodput.open(tmp_path, 3)
    goodput.write()
    assert (tmp_path / "goodput.json").is_file()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_whose_file_is_none_is_not_trained_in(name, finished, command_line, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    pipe(tmp_path / "run" / name)
    ended = command_line("--config.steps=14")
    assert ended.code == 2 and f"{tmp_path / 'run' / name} must be a file" in ended.err, ended.err
    assert not ended.batches


def test_a_workdir_that_is_a_file_is_refused(command_line, tmp_path):
    (tmp_path / "run").write_text("a year of work")
    ended = command_line()
    assert ended.code == 2 and f"--workdir={tmp_path / 'run'} is no folder" in ended.err
