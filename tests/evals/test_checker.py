"""Checker: a program passes if it comes to its end, and what it may not do it cannot."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from evals.checker import check, check_all


def run(program, timeout=5.0, memory=1024):
    return check(program, timeout, memory)


CONFINED = run("pass").confined
isolated = pytest.mark.skipif("namespaces" not in CONFINED, reason="the kernel grants none")
locked = pytest.mark.skipif("landlock" not in CONFINED, reason="the kernel has no Landlock")


@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert sum(range(5)) == 10",
        "import math, typing, collections, re",
        "for _ in range(10**5): print('x' * 100)",
        "open('own.txt', 'w').write('a'); assert open('own.txt').read() == 'a'",
        "assert __name__ != '__main__'",
        "import os; assert os.listdir('.') == []",
        "open('/dev/null', 'w').write('x')",
    ],
)
def test_what_comes_to_its_end_passes(program):
    verdict = run(program)
    assert (verdict.passed, verdict.why) == (True, "")
    assert "limits" in verdict.confined


@pytest.mark.parametrize(
    "program, why",
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import sys; sys.exit()", "SystemExit"),
        ("import os; os._exit(0)", "it ended before its checks"),
        ("import os; os.abort()", "killed by signal 6"),
        ("import os; os.close(0), os.closerange(3, 99); x = 1", "it ended before its checks"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
        ("'\\ud800'.encode()", "UnicodeEncodeError"),
        ("raise ValueError('\\ud800')", "ValueError: "),
        ("bytearray(1 << 32)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 26))", "OSError: [Errno 27] File too large"),
    ],
)
def test_what_does_not_fails_and_says_why(program, why):
    verdict = run(program)
    assert not verdict.passed
    assert verdict.why.startswith(why)
    assert len(verdict.why) < 300


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_what_takes_too_long_is_killed(program):
    started = time.monotonic()
    assert run(program, timeout=0.5).why == "timed out after 0.5 s"
    assert time.monotonic() - started < 5


def test_a_program_cannot_pass_by_writing_what_a_verdict_looks_like():
    forge = 'import os\nfor fd in range(3, 20):\n  try: os.write(fd, b\'{"key": "", "why": ""}\')\n'
    forge += "  except OSError: pass\nassert False"
    assert not run(forge).passed


def test_memory_is_what_was_given():
    assert run("bytearray(300 << 20)", memory=512).passed
    assert run("bytearray(300 << 20)", memory=256).why == "MemoryError"


STARTS = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(7654)
    os._exit(0)
"""


def command_lines():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append((path.parent.name, path.read_bytes()))
        except OSError:
            continue
    return {pid for pid, line in found if b"confine.py" in line}


@isolated
@pytest.mark.parametrize("end", ["", "time.sleep(60)", "os._exit(0)"])
def test_what_it_starts_ends_with_it(end):
    before = command_lines()
    run(STARTS + end, timeout=0.5)
    left = command_lines() - before
    deadline = time.monotonic() + 5
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left &= command_lines()
    assert not left


BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


@isolated
def test_a_program_that_only_forks_is_stopped():
    started = time.monotonic()
    assert not run(BOMB, timeout=1).passed
    assert time.monotonic() - started < 10


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('127.0.0.1', 9))",
    ],
)
def test_there_is_no_network(program):
    assert run(program).why.split(":")[0] in ("PermissionError", "OSError")


@isolated
def test_processes_outside_cannot_be_signalled():
    program = f"import os; os.kill({os.getpid()}, 0)"
    assert run(program).why.startswith("ProcessLookupError")


@locked
@pytest.mark.parametrize(
    "program",
    ["open({0!r}, 'a')", "os.remove({0!r})", "os.truncate({0!r}, 0)", "os.mkdir({0!r} + 'x')"],
)
def test_nothing_outside_its_folder_can_be_written(program, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    os.chmod(tmp_path, 0o777)
    file.chmod(0o666)
    why = run("import os; " + program.format(str(file))).why
    assert why.startswith("PermissionError")
    assert file.read_text() == "kept"
    assert os.listdir(tmp_path) == ["file"]


def test_its_folder_is_gone_afterwards_and_its_environment_is_bare(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os; assert 'SECRET' not in os.environ").passed
    folder = run("import os; raise ValueError(os.getcwd())").why.removeprefix("ValueError: ")
    assert folder.startswith(os.path.realpath("/")) and not os.path.exists(folder)


def test_many_are_judged_in_their_order():
    verdicts = check_all(["pass", "assert False", "pass", "1 / 0"], 5, 512)
    assert [verdict.passed for verdict in verdicts] == [True, False, True, False]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="a Python that all may read")
def test_for_an_ordinary_user_it_is_the_same():
    names, home = ("checker.py", "confine.py"), Path(__file__).parents[2] / "evals"
    programs = ["pass", "assert False", BOMB, STARTS]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in names:
            (Path(folder) / name).write_bytes((home / name).read_bytes())
        go = f"import checker; print([checker.check(p, 1.0, 512).passed for p in {programs!r}])"
        done = subprocess.run(
            ["/usr/bin/python3", "-B", "-c", go], cwd=folder, user=12345, group=12345,
            extra_groups=[], capture_output=True, text=True, timeout=60, env={},
        )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("[True, False, False, True]", "")
