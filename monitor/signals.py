"""Ctrl-C and SIGTERM as a wish to stop, which the run grants between two steps."""

import signal
from typing import Any


class Signals:
    """While entered, the first SIGINT or SIGTERM sets `received`; a second SIGINT interrupts."""

    def __init__(self):
        self.received = 0  # number of the signal

    def __enter__(self) -> "Signals":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum
