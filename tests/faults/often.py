"""How often, and at which moments, faults come: FAULTS_SEED=N for other ones, FAULTS_NIGHTLY=1 for
many of them."""

import os
from collections.abc import Sequence
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
