"""The progress bar and its lines: what is shown, and that no terminal ends the run."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from monitor.progress import Eta, Progress, clock, count

ROW = {
    "step": 50,
    "loss": 4.1234,
    "tokens_per_s": 12_345.0,
    "step_s": 0.5,
    "mfu": None,
    "matmul_fraction": 0.41,
}
RUN = """
from monitor.progress import Progress
row = {"loss": 4.1, "tokens_per_s": 12345.0, "step_s": 0.5, "mfu": 0.444, "matmul_fraction": 0.6}
with Progress(4) as progress:
    for step in range(1, 5):
        progress.step(step)
        progress.log(row | {"step": step})
        print("plain print", step)
    progress.eval({"step": 4, "eval_loss": 3.2, "eval_bits_per_byte": 1.9})
    progress.print("[bold]sample[/bold] é \\ud800 \\x1b[2J")
print("the end")
"""


def run(stdout, **environment):
    """Run RUN with this stdout; its process. stderr is captured."""
    command = [sys.executable, "-W", "error", "-c", RUN]
    others = ("PYTHONIOENCODING", "COLUMNS", "LINES")  # pytest-xdist sets the size of a terminal
    environment = {k: v for k, v in os.environ.items() if k not in others} | environment
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, env=environment)


def on_terminal(columns=100, term="xterm", **environment):
    """What RUN writes to a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = run(theirs, TERM=term, **environment)
    os.close(theirs)
    output = b""
    try:
        while block := os.read(ours, 65536):
            output += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    _, errors = child.communicate()
    assert child.returncode == 0 and errors == b"", errors
    return output.decode()


def lines(**options):
    stream = io.StringIO()
    return stream, Progress(400, stream=stream, **options)


def test_a_logged_step_is_one_short_line_where_there_is_no_terminal():
    stream, progress = lines()
    progress.step(50)
    progress.log(ROW)
    assert stream.getvalue() == (
        "step  50/400  loss 4.123  12.3k tok/s  41 % of matmul rate  ETA 2:55\n"
    )


def test_mfu_is_shown_where_a_peak_is_known_and_nothing_where_no_rate_is():
    stream, progress = lines()
    progress.log(ROW | {"mfu": 0.444})
    progress.log(ROW | {"step": 400, "matmul_fraction": None})
    assert "  44.4 % MFU  ETA" in stream.getvalue()
    assert stream.getvalue().endswith("12.3k tok/s  ETA 0:00\n")


def test_a_loss_that_is_not_finite_is_shown():
    stream, progress = lines()
    progress.log(ROW | {"loss": float("nan")})
    assert "loss nan" in stream.getvalue()


def test_the_first_logged_step_does_not_count_the_compilation():
    eta = Eta(100)
    assert eta.after(10, step_s=0.5, now=60.0) == 45.0
    assert eta.after(30, step_s=0.5, now=80.0) == 70.0  # 1 s a step since then


def test_a_terminal_gets_a_bar_and_every_other_line_whole():
    output = on_terminal()
    assert "━" in output and "44.4 % MFU" in output
    for line in ("plain print 1", "plain print 4", "held-out loss 3.200  1.900 bits/byte"):
        assert re.search(rf"{re.escape(line)}\r\n", output)
    assert "[bold]sample[/bold] é ? ?[2J\r\n" in output
    assert output.endswith("the end\r\n")


def test_a_narrow_terminal_gets_the_figures_without_the_bar():
    output = on_terminal(columns=50)
    assert "━" not in output and "step 4/4  loss 4.100" in output


@pytest.mark.parametrize("environment", [{"term": "dumb"}, {"term": "dumb", "FORCE_COLOR": "1"}])
def test_a_dumb_terminal_gets_lines(environment):
    output = on_terminal(**environment)
    assert "\x1b" not in output and output.count("loss 4.100") == 4


def test_a_terminal_without_utf8_gets_ascii():
    output = on_terminal(PYTHONIOENCODING="ascii")
    assert output.isascii() and "sample[/bold] ? ? ?[2J" in output


def test_a_pipe_whose_reader_leaves_does_not_end_the_run():
    ours, theirs = os.pipe()
    child = run(theirs)
    os.close(theirs)
    os.close(ours)
    _, errors = child.communicate()
    assert child.returncode == 0 and errors == b"", errors


def test_a_terminal_that_goes_away_does_not_end_the_run():
    ours, theirs = pty.openpty()
    child = run(theirs, TERM="xterm")
    os.close(theirs)
    os.close(ours)
    _, errors = child.communicate()
    assert child.returncode == 0 and errors == b"", errors


def test_a_closed_stream_and_a_missing_one_show_nothing(monkeypatch):
    stream, progress = lines()
    stream.close()
    progress.log(ROW)
    progress.print("x")
    monkeypatch.setattr(sys, "stdout", None)
    with Progress(400) as progress:
        progress.log(ROW)
        progress.print("x")


def test_only_the_main_process_shows_anything():
    stream, progress = lines(main=False)
    progress.log(ROW)
    progress.print("x")
    progress.close()
    assert stream.getvalue() == ""


def test_numbers_have_three_digits_and_times_are_clocks():
    numbers = (0, 7, 999, 999.6, 1000, 12_345, 999_600, 4_567_890, 8.03e9, 2e15)
    assert [count(n) for n in numbers] == [
        *("0", "7", "999", "1.00k", "1.00k", "12.3k", "1.00M", "4.57M", "8.03B", "2000T")
    ]
    times = (0, 58.4, 60, 3723, 100_000, -1, float("inf"))
    assert [clock(t) for t in times] == ["0:00", "0:58", "1:00", "1:02:03", "1d 3h", "0:00", "?"]
