"""Engines of tiny models: with random parameters, or with an answer that is known beforehand."""

import dataclasses
import itertools
import math

import jax
import numpy as np
from flax import nnx

from inference.engine import Engine
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


def mesh_of(config=ONE):
    return meshes.make(config, jax.devices()[: math.prod(vars(config).values())])


def engine_of(cfg=CFG, mesh=ONE, params=None, apart=False, tokenizer=None, **how):
    """An engine of `params` or random ones, with its mesh in use; the layers apart or not."""
    tokenizer, layout = tokenizer or Bytes(), Layout()
    with jax.set_mesh(mesh_of(mesh)):
        graph, shapes, _ = transformer.abstract(cfg, layout)
        params = placed(random_params(shapes) if params is None else params, shapes)
        if apart:
            return Engine.unrolled(params, cfg, layout, tokenizer, **how)
        return Engine(graph, params, cfg, layout, tokenizer, **how)


def random_params(shapes):
    """NumPy parameters of these shapes; none is one or zero."""
    draw = np.random.default_rng(0)

    def leaf(path, shape):
        values = (path[-1].key == "scale") + 0.3 * draw.normal(size=shape.shape)
        return values.astype(shape.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def placed(params, shapes):
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda a, shape: jax.device_put(a, jax.NamedSharding(mesh, shape.sharding.spec)),
        params,
        shapes,
    )


def chain(next_of: dict[int, int], mesh=ONE, **how):
    """An engine that goes on from each id with the one that `next_of` names, by a wide margin."""
    cfg = dataclasses.replace(CFG, layers=1, embed=CFG.vocab)
    with jax.set_mesh(mesh_of(mesh)):
        _, shapes, _ = transformer.abstract(cfg, Layout())
    params = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)
    params["norm"]["scale"] += 1
    params["embedding"]["table"] += np.eye(cfg.vocab, dtype=np.float32)
    for a, b in next_of.items():
        params["head"]["table"][b, a] = 1
    return engine_of(cfg, mesh, params, **how)


def spelled(text: str) -> dict[int, int]:
    """Links for `chain` from each character to the next; they must differ."""
    assert len(set(text)) == len(text)
    ids = [256 if c == "$" else ord(c) for c in text]  # $ is the end
    return dict(itertools.pairwise(ids))


def full_logits(engine, ids):
    """[T, V]: what the model says of a whole text without a cache."""
    model = engine.model
    rows = np.tile(np.int32([ids]), (model.ways, 1))
    places = np.tile(np.arange(len(ids), dtype=np.int32), (model.ways, 1))
    with jax.set_mesh(model.mesh):
        batch = [model.place(a) for a in (rows, places, np.ones_like(rows))]
        run = jax.jit(lambda params, *batch: nnx.merge(model.graph, params).logits(*batch))
        return np.asarray(run(engine.params, *batch))[0]
