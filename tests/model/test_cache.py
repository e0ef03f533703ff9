"""Decoding with a cache gives what the whole text gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import cache as caches
from model import transformer
from sharding import mesh as meshes
from sharding.layout import Layout
from tests.marks import mostly_slow
from tests.meshes import hybrid
from tests.model.test_decoder import MODELS, config
from tests.model.tiny import WHOLE, decoder, random_params
from tests.tolerance import assert_same

CAUSAL = [name for name in MODELS if config(name).arch.head.kind == "language"]
COUNTS = [[5, 3], [1, 4], [2, 1]]  # tokens that each of two rows gets in each call


def texts(cfg, rows=2, tokens=8):
    return np.random.default_rng(1).integers(0, cfg.vocab, size=(rows, tokens))


def pieces(ids):
    """The texts cut into calls: (ids [B, 5] with padding that would be noticed, counts)."""
    done = np.zeros(len(ids), int)
    for counts in COUNTS:
        part = np.full((len(ids), 5), 7)
        for row, count in enumerate(counts):
            part[row, :count] = ids[row, done[row] : done[row] + count]
        done += counts
        yield jnp.asarray(part, jnp.int32), jnp.asarray(counts, jnp.int32)


@pytest.mark.parametrize("name", mostly_slow(CAUSAL, "gemma2", "mixtral"))
def test_a_text_in_pieces_has_the_hidden_states_of_the_whole(one_device, name):
    cfg = config(name)
    model, ids = decoder(cfg, random_params(cfg)), texts(cfg)
    positions = np.broadcast_to(np.arange(8), ids.shape)
    whole = jax.jit(model.__call__)(*map(jnp.asarray, (ids, positions, np.ones_like(ids))))
    extend = jax.jit(model.extend, static_argnames="fresh")
    for fresh in (True, False):
        cache, done = caches.empty(cfg, WHOLE, 2, 8), np.zeros(2, int)
        for i, (part, counts) in enumerate(pieces(ids)):
            x, cache = extend(part, counts, cache, fresh=fresh and i == 0)
            for row, count in enumerate(np.asarray(counts)):
                assert_same(x[row, :count], whole[row, done[row] : done[row] + count])
            done += np.asarray(counts)
        np.testing.assert_array_equal(cache.lengths, [8, 8])


def test_nothing_is_written_beyond_the_cache(one_device):
    cfg = config("llama")
    model = decoder(cfg, random_params(cfg))
    full = jnp.full((1, 6), 3, jnp.int32)
    extend = jax.jit(model.extend, static_argnames="fresh")
    _, cache = extend(full, jnp.array([6]), caches.empty(cfg, WHOLE, 1, 8), fresh=True)
    _, after = extend(full, jnp.array([2]), cache)
    (keys, values), (now_keys, now_values) = cache.layers[0], after.layers[0]
    np.testing.assert_array_equal(keys[..., :6], now_keys[..., :6])
    np.testing.assert_array_equal(values[..., :6, :], now_values[..., :6, :])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 2)])
def test_a_mesh_decodes_what_one_device_decodes(one_device, sizes):
    cfg = dataclasses.replace(config("gemma2"), heads=4, kv_heads=2, layers=5)
    ids, rows = texts(cfg, rows=4), 4
    params = random_params(cfg)

    def decode(mesh, layout):
        with jax.set_mesh(mesh):
            graph, shapes, _ = transformer.abstract(cfg, layout)
            placed = jax.tree.map(
                lambda leaf, shape: jax.device_put(
                    np.asarray(leaf), jax.NamedSharding(mesh, shape.sharding.spec)
                ),
                params,
                shapes,
            )

            def step(params, part, counts, cache):
                return nnx.merge(graph, params).extend(part, counts, cache)

            step = jax.jit(step)
            cache, out = caches.empty(cfg, layout, rows, 8), []
            for at in (slice(0, 5), slice(5, 6), slice(6, 8)):
                where = jax.NamedSharding(mesh, layout.spec("batch", None))
                part = jax.device_put(ids[:, at].astype(np.int32), where)
                counts = np.full(rows, part.shape[1], np.int32)
                counts = jax.device_put(counts, jax.NamedSharding(mesh, layout.spec("batch")))
                x, cache = step(placed, part, counts, cache)
                out.append(np.asarray(x))
            return np.concatenate(out, axis=1)

    alone = decode(meshes.make(meshes.MeshConfig(), jax.devices()[:1]), Layout())
    mesh = meshes.make(hybrid(*sizes), jax.devices()[: int(np.prod(sizes))])
    assert_same(decode(mesh, Layout()), alone)
