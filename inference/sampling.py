"""Sampling: one id of each row from its logits, each row by its own settings.

Shapes: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.gather import axes_of

Logits = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
SIGN = 1 << 31


@dataclass(frozen=True)
class Sampling:
    """How the ids of one row are chosen."""

    temperature: float = 0.0  # divides the logits; 0: always the likeliest id
    top_k: int = 0  # of the likeliest ids only; 0: of all
    top_p: float = 1.0  # of the fewest likeliest ids that have this probability together
    min_p: float = 0.0  # of ids at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # makes ids of the text so far less likely; 1: off
    seed: int = 0
    stream: int = 0  # numbers the rows that share a seed: each has draws of its own

    def __post_init__(self):
        def check(name: str, good: bool, right: str) -> None:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} must be {right}")

        check("temperature", 0 <= self.temperature < math.inf, "at least 0; 0 is greedy")
        check("top_k", 0 <= self.top_k < SIGN, "at least 0; 0 keeps all ids")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1; 1 keeps all ids")
        check("min_p", 0 <= self.min_p <= 1, "0 to 1; 0 keeps all ids")
        penalty = self.repetition_penalty
        check("repetition_penalty", 0 < penalty < math.inf, "above 0; 1 is no penalty")
        check("seed", 0 <= self.seed < 2 * SIGN, f"0 to {2 * SIGN - 1}")
        check("stream", 0 <= self.stream < 2 * SIGN, f"0 to {2 * SIGN - 1}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """The Sampling of each row as arrays [B]: rows may differ, other values compile nothing."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array
    stream: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Settings":
        """On the host, as NumPy arrays."""
        kinds = {"top_k": np.int32, "seed": np.uint32, "stream": np.uint32}
        return cls(
            *(
                np.array([getattr(row, field.name) for row in rows], kinds.get(field.name, "f4"))
                for field in fields(cls)
            )
        )

    def keys(self, position_B: jax.Array) -> jax.Array:
        """The random key of each row's id at this position of its text, whatever its batch."""

        def key(seed: jax.Array, stream: jax.Array, position: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), position)

        return jax.vmap(key)(self.seed, self.stream, position_B)


def penalize(z_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Logits of the ids in `seen_BV` divided by the penalty if positive, else multiplied by it.

    Keskar et al. 2019, arXiv:1909.05858; an id counts once, however often it stands in the text.
    """
    penalty_B1 = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(z_BV > 0, z_BV / penalty_B1, z_BV * penalty_B1), z_BV)


def heaviest(z_BV: jax.Array, weight_BV: jax.Array, enough_B: jax.Array) -> jax.Array:
    """Which ids belong to the fewest of highest logit that weigh `enough_B` (positive) together.

    The border is found by bisection on the 32 bits of a float in the order of its values, some
    thirty times faster on CPU than a sort of a vocabulary. Ids that tie at the border stay.
    """
    bits_BV = lax.bitcast_convert_type(z_BV, jnp.uint32)
    sign = jnp.uint32(SIGN)
    order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def decide(i: jax.Array, border_B: jax.Array) -> jax.Array:
        higher_B = border_B | (sign >> i.astype(jnp.uint32))
        above_BV = order_BV >= higher_B[:, None]
        weight_B = jnp.sum(jnp.where(above_BV, weight_BV, 0), axis=-1)
        return jnp.where(weight_B >= enough_B, higher_B, border_B)

    border_B = lax.fori_loop(0, 32, decide, jnp.zeros_like(order_BV[:, 0]))
    return order_BV >= border_B[:, None]


def keep(z_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
    """Logits with those that are not kept at -inf."""
    return jnp.where(kept_BV, z_BV, -jnp.inf)


def keep_top(z_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """The `top_k` highest logits, and of these the fewest with probability `top_p`.

    Fan et al. 2018, arXiv:1805.04833; Holtzman et al. 2020, arXiv:1904.09751.
    """

    def both() -> jax.Array:
        k_B = jnp.where(top_k_B > 0, top_k_B, z_BV.shape[-1])
        z_k_BV = keep(z_BV, heaviest(z_BV, jnp.ones_like(z_BV), k_B.astype(jnp.float32)))
        in_p_BV = heaviest(z_k_BV, jax.nn.softmax(z_k_BV, axis=-1), top_p_B)
        return keep(z_k_BV, in_p_BV | (top_p_B >= 1)[:, None])

    return lax.cond(jnp.any((top_k_B > 0) | (top_p_B < 1)), both, lambda: z_BV)


def keep_likely(z_BV: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Ids at least `min_p` times as likely as the likeliest one.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    least_B1 = jnp.max(z_BV, axis=-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return keep(z_BV, z_BV >= least_B1)


def draw(
    z_BV: jax.Array, keys_B: jax.Array, settings: Settings, seen_BV: jax.Array | None = None
) -> jax.Array:
    """The id of each row, int32 [B].

    In the order of `transformers`: repetition penalty, temperature, top_k, top_p, min_p, then a
    draw. Work that no row asks for is not done.
    """
    if seen_BV is not None:
        z_BV = penalize(z_BV, seen_BV, settings.repetition_penalty)
    greedy_B = jnp.argmax(z_BV, axis=-1).astype(jnp.int32)
    random_B = settings.temperature > 0

    def drawn() -> jax.Array:
        temperature_B = jnp.where(random_B, settings.temperature, 1)
        # Below the highest first: a tiny temperature leaves that one and makes no inf of it.
        below_BV = z_BV - jnp.max(z_BV, axis=-1, keepdims=True)
        t_BV = below_BV / temperature_B[:, None]
        t_BV = keep_likely(keep_top(t_BV, settings.top_k, settings.top_p), settings.min_p)
        return jax.vmap(jax.random.categorical)(keys_B, t_BV).astype(jnp.int32)

    drawn_B = lax.cond(jnp.any(random_B), drawn, lambda: greedy_B)
    return jnp.where(random_B, drawn_B, greedy_B)


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
    model for each token: for samples beside training, where the rows are short, and the plain
    twin of the Engine. `where` splits [B, T]; all B rows compute the same. Ids of `vocab` and
    above are never drawn.
    """
    rows = math.prod(where.mesh.shape[axis] for axis in axes_of(where.spec[0]))
    length = len(prompt) + tokens
    ids = np.zeros((length,), np.int32)
    ids[: len(prompt)] = prompt
    settings = Settings.of([Sampling(temperature)])

    def next_id(params: Any, ids_T: jax.Array, at: jax.Array, key: jax.Array) -> jax.Array:
        def on_rows(a_T: jax.Array) -> jax.Array:
            return jax.reshard(jnp.broadcast_to(a_T, (rows, length)), where)

        positions = jnp.arange(length, dtype=jnp.int32)
        z_BTV = logits(params, on_rows(ids_T), on_rows(positions), on_rows(jnp.ones_like(ids_T)))
        z_TV = jax.reshard(z_BTV, jax.P())[0]
        return draw(z_TV[at, :vocab][None], jax.random.fold_in(key, at)[None], settings)[0]

    step = jax.jit(next_id)
    for at in range(len(prompt), length):
        ids[at] = step(params, ids, at - 1, key)
        if ids[at] == end:
            return ids[len(prompt) : at].tolist()
    return ids[len(prompt) :].tolist()
