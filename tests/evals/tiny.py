"""A scorer of a tiny model with random parameters, on any mesh; or of a checkpoint."""

import functools
import math

import jax
import numpy as np
from flax import nnx

from checkpoint.pretrained import open_pretrained
from evals.scorer import Scorer
from inference.decode import Model
from model import transformer
from model.config import ModelConfig
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from text.tokenizer import Bytes

CFG = ModelConfig(
    layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=24, vocab=384, dtype="float32"
)

ONE = MeshConfig(data=1)


def tiny_scorer(cfg=CFG, mesh=ONE, tokenizer=None, **how):
    """A Scorer of random parameters, norms and biases too."""
    made = meshes.make(mesh, jax.devices()[: math.prod(vars(mesh).values())])
    tokenizer = tokenizer or Bytes()
    with jax.set_mesh(made):
        graph, shapes, _ = transformer.abstract(cfg, Layout())
        draw = np.random.default_rng(0)

        def leaf(path, shape):
            values = (path[-1].key == "scale") + 0.3 * draw.normal(size=shape.shape)
            where = jax.NamedSharding(made, shape.sharding.spec)
            return jax.device_put(values.astype(shape.dtype), where)

        params = jax.tree.map_with_path(leaf, shapes)
    model = Model(graph, cfg, Layout(), tokenizer.size, made)
    return Scorer(model, params, tokenizer, **how)


def open_scorer(path, **how):
    """A Scorer of a checkpoint, on one device."""
    source = open_pretrained(str(path))
    mesh = meshes.make(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graph, shapes, _ = transformer.abstract(source.cfg, Layout())
        params = source.params(shapes)
    model = Model(graph, source.cfg, Layout(), source.tokenizer.size, mesh)
    return Scorer(model, params, source.tokenizer, **how)


LONGEST = 128  # ids of `log_softmax`


@functools.cache
def full_forward(graph):
    return jax.jit(lambda params, *arrays: nnx.merge(graph, params).logits(*arrays))


def log_softmax(scorer, ids):
    """[T, V] float64: log-probabilities after each id, by the whole softmax of the full forward."""
    rows = np.zeros((scorer.model.ways, LONGEST), np.int32)
    rows[:, : len(ids)] = ids
    places = np.broadcast_to(np.arange(LONGEST, dtype=np.int32), rows.shape)
    with jax.set_mesh(scorer.model.mesh):
        arrays = map(scorer.model.place, (rows, places, np.ones_like(rows)))
        z = full_forward(scorer.model.graph)(scorer.params, *arrays)
    z = np.asarray(z, np.float64)[0, : len(ids)]
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
