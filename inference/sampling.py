"""Sampling: one token after another from a model's logits.

Shapes: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.gather import axes_of

Logits = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def choose(logits_V: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    """The id drawn from softmax(logits / temperature); temperature 0: the likeliest."""
    if temperature == 0:
        return jnp.argmax(logits_V)
    return jax.random.categorical(key, logits_V / temperature)


def sample(
    logits: Logits,
    params: Any,
    prompt: Sequence[int],
    *,
    tokens: int,
    vocab: int,
    where: jax.sharding.NamedSharding,
    key: jax.Array,
    temperature: float = 1.0,
    end: int | None = None,
) -> list[int]:
    """The prompt's continuation, `tokens` ids at most, up to `end` if it comes.

    `logits(params, ids, positions, segments)` gives [B, T, V]. The whole text goes through the
    model for each token: for samples beside training, where the rows are short. `where` splits
    [B, T]; all B rows compute the same. Ids of `vocab` and above are never drawn.
    """
    rows = math.prod(where.mesh.shape[axis] for axis in axes_of(where.spec[0]))
    length = len(prompt) + tokens
    ids = np.zeros((length,), np.int32)
    ids[: len(prompt)] = prompt

    def next_id(params: Any, ids_T: jax.Array, at: jax.Array, key: jax.Array) -> jax.Array:
        def on_rows(a_T: jax.Array) -> jax.Array:
            return jax.reshard(jnp.broadcast_to(a_T, (rows, length)), where)

        positions = jnp.arange(length, dtype=jnp.int32)
        z_BTV = logits(params, on_rows(ids_T), on_rows(positions), on_rows(jnp.ones_like(ids_T)))
        z_TV = jax.reshard(z_BTV, jax.P())[0]
        return choose(z_TV[at, :vocab], jax.random.fold_in(key, at), temperature)

    step = jax.jit(next_id)
    for at in range(len(prompt), length):
        ids[at] = step(params, ids, at - 1, key)
        if ids[at] == end:
            return ids[len(prompt) : at].tolist()
    return ids[len(prompt) :].tolist()
