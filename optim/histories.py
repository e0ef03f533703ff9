"""Histories: parameters named `history`, which no optimizer moves.

A layer with delayed scaling remembers what its last steps have seen, [..., N] with the newest
first. Its "gradient" is what this step sees, the same in all N places: nothing to add up, to clip
or to decay, but to be put in front (model/matmul/delayed.py).
"""

from typing import Any

import jax
import jax.numpy as jnp

NAME = "history"


def is_history(path: tuple) -> bool:
    """Whether the leaf of a tree of parameters at this path is one."""
    return bool(path) and getattr(path[-1], "key", None) == NAME


def weights(tree: Any) -> Any:
    """A tree of parameters without histories."""
    if not isinstance(tree, dict):
        return tree
    return {name: weights(own) for name, own in tree.items() if name != NAME}


def joined(tree: Any, like: Any) -> Any:
    """The histories of `like`, all else of `tree`."""
    if not isinstance(like, dict):
        return tree
    return {name: own if name == NAME else joined(tree[name], own) for name, own in like.items()}


def added(a: Any, b: Any) -> Any:
    """The sum of two trees of gradients; of what histories see, the larger."""

    def one(path: tuple, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b) if is_history(path) else a + b

    return jax.tree.map_with_path(one, a, b)


def rolled(good: jax.Array, seen: Any, params: Any) -> Any:
    """`params` with what a step saw in front of its histories, unless the step is not good."""

    def one(path: tuple, old: jax.Array, seen: jax.Array) -> jax.Array:
        if not is_history(path):
            return old
        # Devices talk over ZeRO-1's axes, if they split what was seen: the history's bytes.
        seen = jax.reshard(seen, jax.typeof(old).sharding.spec)[..., :1]
        found = jnp.concatenate([seen, old[..., :-1]], axis=-1)
        return jnp.where(good & jnp.isfinite(seen), found, old)

    return jax.tree.map_with_path(one, params, seen)
