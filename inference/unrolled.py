"""The layers of a model apart: one tree of weights for each, instead of stacks.

A scan over stacks takes each layer's weights out of them. Where that is a copy, as on CPU, a
decode step, which does little with a weight but read it, moves every weight three times.
"""

import dataclasses
from typing import Any

import jax
from jax import lax

from model.config import ModelConfig


def config(cfg: ModelConfig) -> ModelConfig:
    """The same model as a pattern as long as its layers, so that no layer repeats."""
    windows = tuple(map(cfg.window, range(cfg.layers)))
    attention = dataclasses.replace(cfg.arch.attention, windows=windows)
    return dataclasses.replace(cfg, arch=dataclasses.replace(cfg.arch, attention=attention))


def params(tree: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """The parameters of `cfg` as those of `config(cfg)`; it empties `tree` as it goes.

    Memory: one stacked array more than the parameters.
    """
    stacks, rest = tree.pop("blocks"), tree.pop("rest", {})
    layers: list[Any] = [None] * cfg.layers
    for place in list(stacks):
        numbers = range(place, cfg.layers - len(rest), cfg.places)
        leaves, structure = jax.tree.flatten(stacks.pop(place))
        parts: list[list[jax.Array]] = [[] for _ in numbers]
        while leaves:
            stacked = leaves.pop(0)
            for repetition, part in enumerate(parts):
                part.append(taken(stacked, repetition))
        for number, part in zip(numbers, parts, strict=True):
            layers[number] = jax.tree.unflatten(structure, part)
    for i in sorted(rest):
        layers[cfg.layers - len(rest) + i] = jax.tree.map(lambda a: a[None], rest[i])
    return {**tree, "blocks": dict(enumerate(layers))}


@jax.jit
def taken(stacked: jax.Array, repetition: int) -> jax.Array:
    """One repetition of a stacked array, alone in its stack."""
    return lax.dynamic_slice_in_dim(stacked, repetition, 1)
