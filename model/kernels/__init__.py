"""Engines behind one signature each; the plain one is the oracle of the others."""

from model.kernels import attention, blocks, engine, int8, quantize

__all__ = ["attention", "blocks", "engine", "int8", "quantize"]
