"""Startup: from the start of the process to the end of its first step, part by part."""

import os
import time
from pathlib import Path


class Startup:
    """A clock that runs since the process began."""

    def __init__(self):
        self._since = self._born = time.monotonic() - age()
        self.parts: dict[str, float] = {}  # seconds of each, in order
        self.lap("imports")

    def lap(self, name: str) -> None:
        """What was done since the last lap is `name`."""
        now = time.monotonic()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._since
        self._since = now

    def told(self) -> str:
        """The parts in a line."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.parts.items())
        return f"{self._since - self._born:.1f} s to the end of the first step: {parts}"


def age() -> float:
    """Seconds since this process began; where the system does not tell, those that it computed."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # man 5 proc, field 22: after boot
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - began, 0.0)
    except (OSError, AttributeError, IndexError, ValueError):
        return time.process_time()
