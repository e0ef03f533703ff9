"""Exit codes and what is printed with them, through real processes."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from configs import command
from tests.commands import python_path

SCRIPT = '''"""A command for tests."""

import atexit
import signal
import time

from absl import flags

from configs import command

WAYS = ["well", "user", "ours", "lost", "wait"]
HOW = flags.DEFINE_enum("how", "well", WAYS, "how it ends")
flags.DEFINE_string("note", None, "something to remember")


def go(run):
    print("steps", run.steps, flush=True)
    how = HOW.value
    if how == "user":
        with command.user_input():
            open("absent.txt")
    if how == "ours":
        raise ValueError("shape mismatch inside the step")
    if how == "lost":
        atexit.register(time.sleep, 60)
        raise command.LostPeer("process 1 on host b does not answer")
    if how == "wait":
        def stop(signum, frame):
            raise command.Stopped(signum, "stopped by SIGTERM; step 3 is saved")
        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        time.sleep(60)


if __name__ == "__main__":
    command.run(go, recipe="recipe.py")
'''
RECIPE = "from configs.run import Run\ndef get_config():\n    return Run(steps=3)\n"


@pytest.fixture
def start(tmp_path):
    (tmp_path / "go.py").write_text(SCRIPT)
    (tmp_path / "recipe.py").write_text(RECIPE)
    env = {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}

    def start(*args):
        return subprocess.Popen(
            [sys.executable, "go.py", *args],
            cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 0, ""),
        (["--how=user"], 2, "go.py: error: absent.txt: no such file or directory\n"),
        (["--how=lost"], 4, "go.py: error: process 1 on host b does not answer\n"),
        (["--config.stps=4"], 2, "did you mean steps?"),
    ],
)
def test_each_way_to_end_has_its_code_and_one_message(start, args, code, message):
    began = time.monotonic()
    process = start(*args)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert message in err
    assert err.count("\n") == (1 if message else 0), err
    assert ("steps 3" in out) == ("--config.stps=4" not in args)
    assert time.monotonic() - began < 10


def test_a_fault_of_ours_shows_where_it_happened(start):
    process = start("--how=ours")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in err
    assert 'raise ValueError("shape mismatch inside the step")' in err
    assert err.rstrip().endswith("please report the lines above")


def test_a_signal_ends_the_command_in_order_with_128_plus_its_number(start):
    process = start("--how=wait")
    assert process.stdout.readline() == "steps 3\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err == "go.py: stopped by SIGTERM; step 3 is saved\n"


def test_help_fits_a_screen_and_shows_the_flags_of_the_script_alone(start):
    process = start("--help")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("A command for tests.\n")
    assert "--note=VALUE" in out
    assert "python go.py --config=recipe.py --config.steps=500" in out
    assert "stderrthreshold" not in out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (command.UserError("x"), 2),
        (command.Unhealthy("x"), 3),
        (command.LostPeer("x"), 4),
        (command.Unsaved("x"), 5),
        (command.Stopped(signal.SIGINT), 130),
        (command.Stopped(signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
        (ValueError("x"), 1),
        (OSError("x"), 1),
    ],
)
def test_the_exception_decides_the_code(error, code, capsys):
    def main():
        raise error

    assert command.status(main, []) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (code == 1)


def test_a_message_that_quotes_a_whole_file_is_cut_in_its_middle(capsys):
    def main():
        raise command.UserError(f"model.json: {'[' * 10**6}; it must be an object")

    assert command.status(main, []) == 2
    err = capsys.readouterr().err
    assert "model.json: [" in err and err.endswith("it must be an object\n") and len(err) < 3100


def test_verbosity_shows_where_an_error_of_the_users_came_from(capsys, monkeypatch):
    def main():
        with command.user_input():
            int("seven")

    assert command.status(main, []) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(flags.FLAGS["verbosity"], "_value", 1)
    assert command.status(main, []) == 2
    assert 'int("seven")' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("batch=3 is odd"), "batch=3 is odd"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: no such file or"),
        (PermissionError(13, "Permission denied", "b.txt"), "b.txt: permission denied"),
        (OSError("no file matches data/*.txt"), "no file matches data/*.txt"),
        (ValueError(), "ValueError()"),
    ],
)
def test_the_set_up_turns_errors_of_values_and_files_into_the_users(error, text):
    with pytest.raises(command.UserError) as caught, command.user_input():
        raise error
    assert text in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [command.Unhealthy("x"), TypeError("x"), KeyError("x")])
def test_the_set_up_leaves_other_errors_as_they_are(error):
    with pytest.raises(type(error)) as caught, command.user_input():
        raise error
    assert caught.value is error


@pytest.fixture
def unread(monkeypatch):
    """`unread(name, buffering)` lets the name of sys lead to a pipe that nobody reads."""
    with contextlib.ExitStack() as opened:

        def unread(name, buffering=-1):
            read, write = os.pipe()
            os.close(read)
            raw = opened.enter_context(open(write, "wb", buffering))
            text = io.TextIOWrapper(raw, write_through=not buffering)
            monkeypatch.setattr(sys, name, opened.enter_context(text))

        yield unread


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_command_whose_reader_has_left_ends_quietly_as_others_do(buffering, unread, capsys):
    unread("stdout", buffering)
    assert command.status(lambda: print("a line"), []) == command.UNREAD == 141
    assert capsys.readouterr().err == ""


def test_a_command_that_nobody_reads_keeps_the_code_of_its_error(unread):
    unread("stdout")
    unread("stderr")

    def main():
        print("a line")
        raise command.UserError("x")

    assert command.status(main, []) == 2


def test_a_pipe_that_breaks_elsewhere_is_a_fault(capsys):
    def main():
        raise BrokenPipeError(32, "Broken pipe")

    assert command.status(main, []) == 1
    assert "fault of the program" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_told(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command.status(lambda: print("a line"), []) == 2
    told = "error: cannot write the output: no space left on device\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.slow
def test_a_process_whose_reader_has_left_says_nothing_at_exit_either(start):
    with start("--help") as process:
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""
