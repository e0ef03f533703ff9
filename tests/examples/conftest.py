"""The tiny run of tests/training, for scripts that start it."""

from tests.training.conftest import recipe  # noqa: F401
