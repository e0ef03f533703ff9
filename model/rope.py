"""Rotary position embedding. Su et al. 2021, arXiv:2104.09864.

Shapes: B rows, T tokens, N heads (any number of dims), H head size, h = H / 2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from model.config import Scaling

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, [B, T, h] float32


def frequencies(head_dim: int, theta: float, scaling: Scaling) -> np.ndarray:
    """Radians per position of each pair of a head, [h]: pair i turns by theta^(-2i / H), stretched.

    A stretched pair turns `factor` times slower, so that the angles of a longer text stay within
    those of training. "llama3" and "yarn" stretch the slow pairs and keep the fast ones.
    """
    plain_h = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns_h = scaling.trained * plain_h / (2 * math.pi)  # in a text as long as in training
    match scaling.kind:
        case "none":
            kept_h = np.ones_like(plain_h)
        case "linear":
            kept_h = np.zeros_like(plain_h)
        case "llama3":
            kept_h = np.clip((turns_h - scaling.low) / (scaling.high - scaling.low), 0, 1)
        case "yarn":
            # A ramp over the number of the pair, between the pairs that turn so often.
            border = [
                head_dim * math.log(scaling.trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            ]
            if scaling.truncate:
                border = [math.floor(border[0]), math.ceil(border[1])]
            first, last = max(border[0], 0), min(border[1], head_dim - 1)
            slope = max(last - first, 0.001)
            kept_h = 1 - np.clip((np.arange(head_dim // 2) - first) / slope, 0, 1)
    return plain_h * kept_h + plain_h / scaling.factor * (1 - kept_h)


NONE = Scaling()


def rotation(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: Scaling = NONE
) -> Rotation:
    """Cosines and sines of the angle of each position and pair."""
    frequency_h = jnp.asarray(frequencies(head_dim, theta, scaling), jnp.float32)
    angle_BTh = positions_BT[..., None].astype(jnp.float32) * frequency_h[None, None]
    size = 1.0
    if scaling.kind == "yarn":
        size = scaling.magnitude or 0.1 * math.log(scaling.factor) + 1
    return jnp.cos(angle_BTh) * size, jnp.sin(angle_BTh) * size


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn the pairs (i, i + h) of each head; in float32, back in x's dtype."""
    heads = x_BTNH.ndim - 3
    cos, sin = (jnp.expand_dims(part, tuple(range(2, 2 + heads))) for part in rotation)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
