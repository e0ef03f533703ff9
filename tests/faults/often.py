"""How often, and at which moments, faults come: FAULTS_SEED=N for other ones, FAULTS_NIGHTLY=1 for
many of them. How soon a run must have answered."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

SEED = int(os.environ.get("FAULTS_SEED", "0"))
NIGHTLY = os.environ.get("FAULTS_NIGHTLY", "") not in ("", "0")
nightly = pytest.mark.skipif(not NIGHTLY, reason="FAULTS_NIGHTLY=1 runs it")


def times(often: int, many: int) -> int:
    """How many times to try: in CI, or in the nightly run."""
    return many if NIGHTLY else often


def sometimes(values: Sequence[Any]) -> list[Any]:
    """The values of a parametrized test that only the nightly run takes."""
    several = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=nightly) for value in several]


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done inside takes no longer than this on a machine that does nothing else; as many
    times longer as any work takes on one that does."""
    before, start = crowd(), time.monotonic()
    yield
    took = time.monotonic() - start
    assert took < seconds * max(before, crowd())


def crowd() -> float:
    """How many times longer than alone a process needs here for its work."""
    start, own = time.monotonic(), time.process_time()
    while time.process_time() - own < 0.1:
        pass
    return max((time.monotonic() - start) / 0.1, 1.0)
