"""Engines of the same tiny model in every file: its programs are compiled once."""

from tests.kept import keeps_programs  # noqa: F401
