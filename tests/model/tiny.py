"""A decoder small enough to compile in a second, with parameters that hide nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import transformer
from model.config import ModelConfig
from sharding.layout import Layout

WHOLE = Layout(batch=None, embed=None, heads=None, mlp=None, vocab=None)
TINY = ModelConfig(
    layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=24, vocab=32, dtype="float32"
)


def random_params(cfg, std=0.3):
    """Parameters of `cfg` drawn at random, norms and biases too: none is one or zero."""
    _, shapes, _ = transformer.abstract(cfg, WHOLE)
    draw = np.random.default_rng(0)

    def leaf(path, shape):
        values = (path[-1].key == "scale") + std * draw.normal(size=shape.shape)
        return jnp.asarray(values, shape.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def decoder(cfg, params=None):
    """The Transformer of `cfg` with these parameters, or with random ones."""
    graph, _, _ = transformer.abstract(cfg, WHOLE)
    return nnx.merge(graph, random_params(cfg) if params is None else params)
