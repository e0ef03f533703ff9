"""Health: what is told of steps that were skipped, and when a run has had too many of them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from configs.run import GuardConfig
from monitor.append import AppendFile
from monitor.progress import Progress
from sharding import mesh as meshes
from training.bundle import Bundle

LOOKS = 3  # at most, of a process: each takes the time of a few steps


class Health:
    """Judges the fetched metrics of a run's steps.

    A skipped step is a line at the terminal and one in WORKDIR/skipped.jsonl, with the ids of the
    samples of its batch: source, epoch, document, first token; by row. Each process writes those of
    its own rows, others than the first into skipped-PROCESS.jsonl.
    """

    def __init__(self, cfg: GuardConfig, workdir: Path, progress: Progress):
        self.cfg, self._progress = cfg, progress
        own = f"-{jax.process_index()}" if jax.process_index() else ""
        self.path = workdir / f"skipped{own}.jsonl"
        self.first = self.last = 0  # of too many skipped steps in a row, once there were
        self.why, self.numbers = "", ("", "")  # of the last one; its loss and gradient norm
        self.found = ""  # by the second pass
        self.skipping = False  # whether the newest step that was seen was skipped
        self._begun = self._looked = 0

    @property
    def failed(self) -> bool:
        """Whether `guard.stop` steps in a row were skipped."""
        return self.last > 0

    def see(self, step: int, metrics: dict[str, Any], samples: Sequence[Any]) -> bool:
        """Whether to look again at a step, with these metrics, on the host, and samples: of its
        rows in this process. The first of a row of steps that were not finite is worth it."""
        in_row = int(metrics["in_row"])
        self.skipping = in_row > 0
        if not in_row:
            return False
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self.why = reason(loss, norm, float(metrics.get("spike", 0)))
        self.numbers = f"{loss:g}", f"{norm:g}"
        row = {"step": step, "why": self.why, "loss": f"{loss:g}", "grad_norm": f"{norm:g}"}
        place = self._write({**row, "samples": samples})
        self._progress.print(f"skipped    step {step}: {self.why}; its samples: {place}")
        if in_row >= self.cfg.stop:
            self.first, self.last = step - in_row + 1, step
        beyond = not (math.isfinite(loss) and math.isfinite(norm))
        begun, self._begun = self._begun, step - in_row + 1
        if not beyond or begun == self._begun or self._looked == LOOKS:
            return False
        self._looked += 1
        return True

    def _write(self, row: dict[str, Any]) -> str:
        """Append a line; where it is."""
        try:
            file = AppendFile(self.path)
        except OSError as error:  # the run goes on without
            return f"{self.path} cannot be written: {error.strerror}"
        file.write(json.dumps(row).encode() + b"\n")
        file.close()
        return str(self.path)

    def name(self, step: int, found: str, bundle: Bundle) -> None:
        """What the second pass found in a step, and the bundle that repeats it."""
        self.found = found
        if not meshes.is_main():
            return
        try:
            again = (
                f"python -m tools.replay {bundle.write(self.path.parent / 'bundles')} repeats it"
            )
        except OSError as error:
            again = f"no bundle could be written: {error.strerror}"
        self._progress.print(f"not finite step {step}: first {found}; {again}")

    def forgive(self) -> None:
        """The run has gone back to where it was well."""
        self.first = self.last = 0
        self.skipping = False

    def verdict(self) -> str:
        """Why the run ends, and what would help."""
        found = f"; first not finite: {self.found}" if self.found else ""
        spike = "gradient" not in self.why and "not finite" not in self.why
        lever = "a higher guard.spike" if spike else "a longer optim.warmup"
        back = (
            f"more than guard.rewind={self.cfg.rewind}, with a save from before step {self.first} "
            f"kept (checkpoint.keep)"
            if self.cfg.rewind
            else "guard.rewind=1, to go on from an earlier save with later batches"
        )
        return (
            f"steps {self.first} to {self.last} were skipped in a row (guard.stop={self.cfg.stop}):"
            f" at the last {self.why}{found}. Parameters and moments are as before step "
            f"{self.first}; the samples are in {self.path}. A lower optim.lr, {lever} or {back}, "
            f"may help"
        )


def reason(loss: float, norm: float, spike: float) -> str:
    """Why a step of this loss, gradient norm and score was skipped."""
    if not math.isfinite(loss):
        return f"the loss is {loss}, not finite"
    if not math.isfinite(norm):
        return f"the norm of the gradient is {norm}, the loss {loss:.4g}"
    return f"the loss {loss:.4g} is {spike:.1f} deviations above the mean"


def older(steps: Sequence[int], first: int) -> int:
    """The newest of the saved steps before `first`, -1 if there is none, in all processes."""
    return meshes.agree(max((step for step in steps if step < first), default=-1))
