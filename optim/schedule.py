"""Learning-rate schedules: step to learning rate."""

import jax
import jax.numpy as jnp
import optax

from optim.config import OptimConfig


def make_schedule(cfg: OptimConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """The learning rate of steps 0 to `steps - 1`; `peak` instead of `cfg.lr` if given.

    It rises linearly over `cfg.warmup` steps, then goes to `cfg.final` of the peak along a half
    cosine (Loshchilov & Hutter 2016), a line, or not before the last `cfg.decay` of the steps
    ("wsd": warmup, stable, decay. Hu et al. 2024, arXiv:2404.06395), or stays ("constant").
    """
    peak = cfg.lr if peak is None else peak
    start = steps * (1 - cfg.decay) if cfg.schedule == "wsd" else cfg.warmup

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = (step + 1) / cfg.warmup if cfg.warmup else 1.0
        done = jnp.clip((step + 1 - start) / max(steps - start, 1), 0, 1)
        if cfg.schedule == "constant":
            left = 1.0
        elif cfg.schedule == "cosine":
            left = cfg.final + (1 - cfg.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            left = 1 - (1 - cfg.final) * done
        return peak * jnp.minimum(rise, left)

    return schedule
