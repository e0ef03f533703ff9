"""Engines behind one signature each; the plain one is the oracle of the others."""

from model.kernels import attention, blocks, engine

__all__ = ["attention", "blocks", "engine"]
