"""Which values of a parametrized test the fast suite takes."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values, all but `fast` marked slow: they show the same of more kinds."""
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]
