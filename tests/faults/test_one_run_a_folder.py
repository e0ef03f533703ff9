"""Two runs in one folder: the second refuses and names the first."""

import errno
import fcntl
import os
import re
import signal
import socket

import pytest

from training.lock import Lock


def test_a_folder_that_is_taken_names_its_owner_and_is_free_again_after(tmp_path):
    with Lock() as first:
        first.take(tmp_path)
        first.take(tmp_path)  # twice does no harm
        with Lock() as second, pytest.raises(ValueError) as caught:
            second.take(tmp_path)
        for part in (str(tmp_path), f"pid {os.getpid()} on {socket.gethostname()} since 20"):
            assert part in str(caught.value)
        assert "another --workdir" in str(caught.value)
        with Lock() as third, pytest.raises(ValueError, match="in use"):  # the second let go
            third.take(tmp_path)
    with Lock() as later:
        later.take(tmp_path)


def test_a_folder_that_is_not_there_is_neither_taken_nor_made(tmp_path):
    with Lock() as lock:
        lock.take(tmp_path / "absent")
        assert not (tmp_path / "absent").exists()
        (tmp_path / "absent").mkdir()
        lock.take(tmp_path / "absent")
        with Lock() as other, pytest.raises(ValueError, match="in use"):
            other.take(tmp_path / "absent")


def test_where_nothing_can_be_locked_the_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Lock() as lock:
        lock.take(tmp_path)
    assert "No locks available; see that no other run uses the folder" in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_run_refuses_while_the_first_one_lives_and_not_after_its_kill(
    start, command_line, tmp_path
):
    run = tmp_path / "run"
    first = start(run, "--config.steps=1000000", "--config.checkpoint.every=0")
    for line in first.stdout:
        if re.match(r"step +2/", line):
            break

    def files():  # but what the first run goes on writing
        return {path for path in run.rglob("*") if not path.name.startswith("goodput.json")}

    before = files()
    second = command_line("--config.steps=1000000", "--config.checkpoint.every=0")
    assert second.code == 2 and not second.batches
    assert (
        f"{run} is in use by another run: pid {first.pid} on {socket.gethostname()}" in second.err
    )
    assert files() == before
    first.send_signal(signal.SIGKILL)
    first.end(30)
    third = command_line("--config.steps=12", "--config.checkpoint.every=0")
    assert third.code == 0, third.err
