"""Metrics: the figures of a run on disk, `metrics.jsonl` and TensorBoard events.

A training row has the keys of TRAIN, an evaluation row those of EVAL; more may follow. A value that
is not finite is null, and the row's `nonfinite` lists its key. A step is written once.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monitor.append import AppendFile

TRAIN = (
    "step",
    "loss",  # mean nats per target token of this step
    "grad_norm",  # before clipping
    "lr",
    "tokens",  # targets since the beginning of the run, without padding
    "tokens_per_s",
    "step_s",
    "data_wait_s",
    "mfu",  # share of the datasheet peak; null without one
    "matmul_fraction",  # share of the matmul rate measured at start
    "peak_mem_bytes",
    "goodput",  # share of the run's time so far in useful steps; seconds by part in spent_PART_s
)
EVAL = ("step", "eval_loss", "eval_bits_per_byte")
SPEED = frozenset(TRAIN[5:])  # the keys that TensorBoard shows under perf/
KINDS = ("loss", "eval_loss")  # the key that tells a row's kind

Row = Mapping[str, Any]


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, [] without one. A line that a kill tore is left out.

    ValueError if it is no file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError(f"{path} must be a file; move away what is there")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def encode(row: Row) -> bytes:
    """One line of JSON."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    bad = [k for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)]
    plain.update(dict.fromkeys(bad))
    if bad:
        plain["nonfinite"] = bad
    return json.dumps(plain, allow_nan=False).encode() + b"\n"


class Metrics:
    """Writes rows to `workdir`/metrics.jsonl and `workdir`/tensorboard/.

    `resume_step` is the step of the restored state, None for a run from the beginning: what an
    earlier process wrote after it is dropped. Only the `main` process writes.
    """

    def __init__(self, workdir: str | Path, resume_step: int | None = None, *, main: bool = True):
        self._main = main
        if not main:
            return
        from monitor.events import Events  # 0.3 s

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        last = -1 if resume_step is None else resume_step
        kept = _drop_after(self._path, last)
        self._last = {key: max((r["step"] for r in kept if key in r), default=-1) for key in KINDS}
        self._lines = AppendFile(self._path)
        self._events = Events(workdir / "tensorboard", last + 1)

    def train(self, row: Row) -> None:
        """A logged training step."""
        self._write("loss", TRAIN, row)

    def eval(self, row: Row) -> None:
        """A held-out evaluation."""
        self._write("eval_loss", EVAL, row)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """A text for TensorBoard: a sample, the resolved run."""
        if self._main:
            self._events.text(step, tag, text)

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run, those of earlier processes included."""
        return read(self._path) if self._main else []

    def close(self) -> None:
        """Close the files; every row is in them already."""
        if self._main:
            self._lines.close()
            self._events.close()

    def _write(self, kind: str, keys: tuple[str, ...], row: Row) -> None:
        missing = [key for key in keys if key not in row]
        assert not missing, f"row without {missing}"
        if not self._main or row["step"] <= self._last[kind]:
            return
        self._last[kind] = int(row["step"])
        self._lines.write(encode(row))
        numbers = {_tag(k): float(v) for k, v in row.items() if k != "step" and _is_number(v)}
        self._events.scalars(int(row["step"]), numbers)


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep of the file only its rows up to `step`, atomically; return them."""
    kept = [row for row in read(path) if row["step"] <= step]
    content = b"".join(encode(row) for row in kept)
    if path.exists() and path.read_bytes() != content:
        new = path.with_name(path.name + ".tmp")
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    return kept


def _tag(key: str) -> str:
    if key.startswith("eval_"):
        return "eval/" + key.removeprefix("eval_")
    if key.startswith("spent_"):
        return "goodput/" + key.removeprefix("spent_")
    return ("perf/" if key in SPEED else "train/") + key


def _is_number(value: Any) -> bool:
    return hasattr(value, "item") or (
        isinstance(value, int | float) and not isinstance(value, bool)
    )
