"""Runs to be disturbed: the tiny run of tests/training, in this process and in others."""

from tests.training.conftest import (  # noqa: F401
    command_line,
    finished,
    recipe,
    session_command,
    several,
    start,
)
