"""Offline commands, run as `python -m tools.X`."""
