"""Progress: what a person at the terminal sees while a run goes on.

A bar on a terminal, a line per logged step elsewhere. Nothing that happens to the terminal ends
the run: once nobody reads any more, output is dropped.
"""

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

REFRESH_S = 0.2  # least time between two drawings of the bar
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a sample must not drive the terminal

Row = Mapping[str, Any]


class Progress:
    """Shows steps `start` to `steps`. Only the `main` process shows anything."""

    def __init__(
        self, steps: int, start: int = 0, *, stream: TextIO | None = None, main: bool = True
    ):
        self._steps = steps
        self._stream = (sys.stdout if stream is None else stream) if main else None
        self._eta = Eta(steps)
        self._figures = ""
        self._drawn = 0.0
        self._bar = self._task = None
        if self._stream is not None:
            self._show(lambda: self._start_bar(start))

    def step(self, step: int) -> None:
        """Step `step` is done: moves the bar."""
        if self._bar is not None and time.monotonic() - self._drawn > REFRESH_S:
            self._show(lambda: self._draw(step))

    def log(self, row: Row) -> None:
        """The figures of a training row (monitor.metrics.TRAIN)."""
        step = row["step"]
        eta = self._eta.after(step, row["step_s"], time.monotonic())
        self._figures = f"{figures(row)}  ETA {clock(eta)}"
        if self._bar is not None:
            self._show(lambda: self._draw(step))
        else:
            self.print(f"{self._place(step)}  {self._figures}")

    def eval(self, row: Row) -> None:
        """The figures of an evaluation row (monitor.metrics.EVAL)."""
        loss, bits = row["eval_loss"], row["eval_bits_per_byte"]
        self.print(f"{self._place(row['step'])}  held-out loss {loss:.3f}  {bits:.3f} bits/byte")

    def print(self, text: str) -> None:
        """A line or more of other text, above the bar."""
        text = CONTROL.sub("?", text)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self._bar is not None:
            self._show(lambda: self._bar.console.out(text, highlight=False))
        else:
            self._show(lambda: print(text, file=self._stream, flush=True))

    def close(self) -> None:
        """Leave the bar as it is last."""
        bar, self._bar = self._bar, None
        if bar is not None:
            self._show(bar.stop)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _place(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"

    def _start_bar(self, start: int) -> None:
        if not self._stream.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
            return
        from rich import progress  # 0.1 s
        from rich.console import Console

        class RaisingConsole(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich would exit the program

        console = RaisingConsole(file=self._stream)
        columns = [progress.TextColumn("{task.description}", markup=False)]
        if console.width >= 80:
            columns.append(progress.BarColumn(bar_width=None))
        # No thread redraws the bar: an error there could not be caught here.
        self._bar = progress.Progress(*columns, console=console, auto_refresh=False, expand=True)
        text = f"{self._place(start)}  compiling"
        self._task = self._bar.add_task(text, total=self._steps, completed=start)
        self._bar.start()

    def _draw(self, step: int) -> None:
        self._drawn = time.monotonic()
        text = f"{self._place(step)}  {self._figures}"
        self._bar.update(self._task, completed=step, description=text, refresh=True)

    def _show(self, show: Callable[[], None]) -> None:
        """Call `show`; if the stream is gone, show nothing from here on."""
        if self._stream is None:
            return
        try:
            show()
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and not self._stream.closed:
                raise
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                # Else the interpreter fails when it flushes the stream at exit.
                os.dup2(nowhere.fileno(), self._stream.fileno())
            bar, self._bar, self._stream = self._bar, None, None
            if bar is not None:
                with contextlib.suppress(OSError, ValueError):
                    bar.stop()


class Eta:
    """Seconds to the last step, from the time between logged steps, evaluations included."""

    def __init__(self, steps: int):
        self._steps = steps
        self._first: tuple[int, float] | None = None  # the first log ends the compilation

    def after(self, step: int, step_s: float, now: float) -> float:
        """Seconds from `now` to the end, `step` having been logged now."""
        if self._first is None:
            self._first = step, now
        first, then = self._first
        pace = (now - then) / (step - first) if step > first else step_s
        return (self._steps - step) * pace


def figures(row: Row) -> str:
    """Loss and speed of a training row, of constant width while the run goes on."""
    if row["mfu"] is not None:
        share = f"  {100 * row['mfu']:4.1f} % MFU"
    elif row["matmul_fraction"] is not None:
        share = f"  {100 * row['matmul_fraction']:2.0f} % of matmul rate"
    else:
        share = ""
    return f"loss {row['loss']:.3f}  {count(row['tokens_per_s']):>5} tok/s{share}"


def count(number: float) -> str:
    """Three digits and a unit: 12.3k, 4.57M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """0:58, 1:02:03, 3d 4h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
