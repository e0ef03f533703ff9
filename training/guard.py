"""Guard: whether a step may change the state, decided inside the compiled step.

The decision is made of the loss and of the global norm of the gradient, which every device has, so
all decide alike on any mesh and nobody asks the host.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from configs.run import WINDOW, GuardConfig

FLAT = 1e-3  # least deviation, as a share of the mean loss: else noise on a flat loss were a spike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """What the decision remembers: part of the state, of one size for all configs."""

    losses: jax.Array  # float32 [WINDOW], of the newest steps that were taken, the newest last
    skipped: jax.Array  # int32, steps so far that changed nothing
    in_row: jax.Array  # int32, of these the newest, up to this step

    @classmethod
    def fresh(cls) -> "Guard":
        """Before the first step."""
        return cls(jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.int32(0), jnp.int32(0))

    def judge(
        self, cfg: GuardConfig, loss: jax.Array, norm: jax.Array
    ) -> tuple[jax.Array, "Guard", dict[str, jax.Array]]:
        """(whether the step is taken, the next Guard, metrics); `norm` of the whole gradient.

        A step is taken if both numbers are finite and, with `cfg.spike`, the loss is at most so
        many standard deviations above the mean of the last `cfg.window` that were taken.
        """
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        told = {}
        if cfg.spike:
            last = self.losses[-cfg.window :]  # NaN, which no score exceeds, until it is full
            mean = jnp.mean(last)
            told["spike"] = (loss - mean) / jnp.maximum(jnp.std(last), FLAT * jnp.abs(mean))
            good &= ~(told["spike"] > cfg.spike)
        later = jnp.concatenate([self.losses[1:], loss.astype(jnp.float32)[None]])
        made = Guard(
            losses=lax.select(good, later, self.losses),
            skipped=self.skipped + ~good,
            in_row=lax.select(good, jnp.zeros_like(self.in_row), self.in_row + 1),
        )
        return good, made, {**told, "skipped": made.skipped, "in_row": made.in_row}


def rewound(state: Any, step: jax.Array) -> Any:
    """An earlier state of the run as that of `step`.

    What lies between counts as skipped, so that the schedule goes on where the state left it.
    """

    def count(guard: Guard, then: jax.Array, step: jax.Array) -> Guard:
        skipped = guard.skipped + step - then
        return dataclasses.replace(guard, skipped=skipped, in_row=jnp.zeros_like(skipped))

    guard = jax.jit(count)(state.guard, state.step, step)
    return dataclasses.replace(state, step=step, guard=guard)
