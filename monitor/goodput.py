"""Goodput: where the time of a run went, summed over all processes that worked on it.

The parts add up to the time since the first of them began. What a killed process did after its last
logged step is not known, and counts as down, as do the start and the imports of the next one.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monitor.startup import Startup

NAME = "goodput.json"
PARTS = {  # in the order in which a moment belongs to them
    "steps": "steps that are part of the state",
    "lost": "steps that a kill or a rewind undid",
    "down": "no process was at work, that is known",
    "compile": "XLA compiled the step",
    "data": "waiting for a batch",
    "save": "waiting for a save",
    "restore": "reading and verifying a save, or making the first state",
    "eval": "the held-out loss",
    "check": "steps computed again, to see what was wrong or whether anything is",
    "other": "start, sample, report",
}


class Goodput:
    """A clock that always runs, for one part of the time or another; of process 0."""

    def __init__(self):
        self.startup = Startup()
        self._born, self._since = time.time(), time.monotonic()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._stack = ["other"]
        self._saved: dict[int, float] = {}  # seconds of useful steps in the save of a step
        self._path: Path | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time of a part; what is entered within it is the inner one's."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def open(self, workdir: Path, step: int | None) -> None:
        """Go on with the sums in `workdir`, whose save of `step` is restored; None: none is."""
        self._path = workdir / NAME
        before = _read(self._path)
        if before:
            for name in PARTS:
                self._spent[name] += before["spent"][name]
            self._spent["down"] += max(self._born - before["seen"], 0.0)
            self._saved = {int(at): spent for at, spent in before["saved"].items()}
            self.back_to(step)
        self.write()

    def saved(self, step: int) -> None:
        """The state of this step is being saved."""
        self._charge()
        self._saved[step] = self._spent["steps"]

    def back_to(self, step: int | None) -> None:
        """The state is that of an earlier save, or of the beginning: steps since are lost."""
        self._charge()
        kept = 0.0 if step is None else self._saved.get(step, 0.0)
        lost = max(self._spent["steps"] - kept, 0.0)
        self._spent["steps"] -= lost
        self._spent["lost"] += lost
        self._saved = {at: spent for at, spent in self._saved.items() if at <= (step or 0)}

    def figures(self) -> dict[str, float]:
        """`goodput`, the share of the time in useful steps, and the seconds of every part."""
        self._charge()
        whole = sum(self._spent.values())
        parts = {f"spent_{name}_s": round(seconds, 3) for name, seconds in self._spent.items()}
        return {"goodput": self._spent["steps"] / max(whole, 1e-9), **parts}

    def told(self) -> str:
        """The figures in a line."""
        share, whole = self.figures()["goodput"], sum(self._spent.values())
        rest = sorted(((s, name) for name, s in self._spent.items() if name != "steps"))[::-1]
        parts = ", ".join(f"{name} {_seconds(s)}" for s, name in rest if s >= 0.05)
        return f"{share:.1%} of {_seconds(whole)} in useful steps; {parts}"

    def write(self) -> None:
        """Keep the sums for the next process; a disk that refuses costs no more than that."""
        if self._path is None:
            return
        self._charge()
        plain = {"seen": time.time(), "spent": self._spent, "saved": self._saved}
        part = self._path.with_name(f"{NAME}.part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(plain) + "\n", encoding="utf-8")
            os.replace(part, self._path)

    def _charge(self) -> None:
        now = time.monotonic()
        self._spent[self._stack[-1]] += now - self._since
        self._since = now


def _read(path: Path) -> dict[str, Any] | None:
    """What an earlier process wrote; None if there is nothing, or it is damaged."""
    try:
        if not path.is_file():  # a pipe would never end
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        spent = {name: float(found["spent"][name]) for name in PARTS}
        saved = {int(step): float(seconds) for step, seconds in found["saved"].items()}
        return {"seen": float(found["seen"]), "spent": spent, "saved": saved}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _seconds(s: float) -> str:
    """Seconds, minutes from two on, hours from two on."""
    amount, unit = (s, "s") if s < 120 else (s / 60, "min") if s < 7200 else (s / 3600, "h")
    return f"{amount:.1f} {unit}"
