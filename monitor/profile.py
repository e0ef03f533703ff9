"""A trace of some steps of a run, for TensorBoard's profiler or Perfetto."""

import re
from pathlib import Path
from typing import Any


class Profile:
    """Writes the trace of steps START to STOP, both included, to a folder."""

    def __init__(self, folder: str | Path, steps: str | None):
        """`steps`: "START:STOP", or None for no trace. ValueError if it is neither."""
        self._folder, self._running = Path(folder), False
        self._first = self._last = -1
        if steps is None:
            return
        if not re.fullmatch(r"\d+:\d+", steps):
            raise ValueError(f"--profile={steps} is not START:STOP, two steps, such as 10:12")
        self._first, self._last = map(int, steps.split(":"))
        if not 1 <= self._first <= self._last:
            raise ValueError(f"--profile={steps} must rise from 1 or more")

    def before(self, step: int) -> None:
        """Step `step` is about to start."""
        if step == self._first:
            import jax

            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Step `step` was started; `result` is what it computes."""
        if self._running and step >= self._last:
            import jax

            jax.block_until_ready(result)
            self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        """Write what was traced so far."""
        if self._running:
            import jax

            self._running = False
            jax.profiler.stop_trace()
