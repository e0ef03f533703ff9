"""Sampling: the likeliest or a draw, of the vocabulary, up to the end, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from inference.sampling import choose, sample
from model import transformer
from model.config import Arch, ModelConfig
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig

VOCAB, ROOM = 10, 16  # ids, and rows of the table
CFG = ModelConfig(
    layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32, vocab=ROOM, dtype="float32",
    arch=Arch(activation="relu2"),
)  # fmt: skip


def place(mesh) -> NamedSharding:
    return NamedSharding(mesh, Layout().spec("batch", None))


@pytest.fixture
def one():
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield place(mesh)


def follow(table_VV, ids_BT, positions_BT, segments_BT):
    """Logits of the next id that depend on the last id alone."""
    return table_VV.at[ids_BT].get(out_sharding=Layout().spec("batch", None, None))


def chain(*edges: tuple[int, int]) -> jax.Array:
    table = np.zeros((ROOM, ROOM), np.float32)
    for a, b in edges:
        table[a, b] = 50
    return jnp.asarray(table)


def test_greedy_takes_the_likeliest_step_by_step(one):
    table = chain((1, 2), (2, 5), (5, 3), (3, 1))
    key = jax.random.key(0)
    common = {"tokens": 6, "vocab": VOCAB, "where": one, "key": key}
    assert sample(follow, table, [4, 1], temperature=0, **common) == [2, 5, 3, 1, 2, 5]
    assert sample(follow, table, [4, 1], temperature=1e-3, **common) == [2, 5, 3, 1, 2, 5]


def test_it_stops_at_the_end_and_leaves_the_end_out(one):
    table = chain((1, 2), (2, 5), (5, 9))
    common = {"vocab": VOCAB, "where": one, "key": jax.random.key(0), "temperature": 0}
    assert sample(follow, table, [1], tokens=8, end=9, **common) == [2, 5]
    assert sample(follow, table, [5], tokens=8, end=9, **common) == []
    assert sample(follow, table, [1], tokens=2, end=9, **common) == [2, 5]
    assert sample(follow, table, [9, 1], tokens=2, end=9, **common) == [2, 5]  # in the prompt
    assert sample(follow, table, [1], tokens=0, **common) == []


def test_ids_beyond_the_vocabulary_are_never_drawn(one):
    table = chain(*((a, b) for a in range(ROOM) for b in range(VOCAB, ROOM)))
    common = {"tokens": 40, "vocab": VOCAB, "where": one, "key": jax.random.key(1)}
    for temperature in (0, 1.0, 10.0):
        found = sample(follow, table, [0], temperature=temperature, **common)
        assert len(found) == 40 and max(found) < VOCAB


def test_a_key_decides_and_another_key_differs(one):
    table = jnp.zeros((ROOM, ROOM))
    common = {"tokens": 30, "vocab": VOCAB, "where": one, "temperature": 1.0}
    first, again, other = (
        sample(follow, table, [0], key=jax.random.key(seed), **common) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) > 5  # a draw of its own for every place


def test_draws_have_the_probabilities_of_softmax():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    for temperature in (1.0, 0.5):
        drawn = jax.vmap(lambda key, t=temperature: choose(logits, key, t))(keys)
        share = np.bincount(drawn, minlength=3) / len(keys)
        wanted = np.array([0.1, 0.2, 0.7]) ** (1 / temperature)
        np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.012)  # 3 sigma


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), pytest.param(MeshConfig(fsdp=4, tensor=2), marks=pytest.mark.slow)]
)
def test_a_model_samples_what_its_full_forward_says_on_any_mesh(mesh):
    cfg = dataclasses.replace(CFG, arch=dataclasses.replace(CFG.arch, embed_scale=True))
    prompt, count, devices = [3, 1, 4], 6, 1 if mesh == MeshConfig() else 8
    made = meshes.make(mesh, jax.devices()[:devices])
    with jax.set_mesh(made):
        graph, shapes, _ = transformer.abstract(cfg, Layout())
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda s: jax.device_put(
                np.float32(rng.standard_normal(s.shape)), NamedSharding(made, s.sharding.spec)
            ),
            shapes,
        )

        def logits(params, *rows):
            return nnx.merge(graph, params).logits(*rows)

        kwargs = {"tokens": count, "vocab": VOCAB, "where": place(made), "key": jax.random.key(0)}
        found = sample(logits, params, prompt, temperature=0, **kwargs)
        # One pass over the whole text must have named each of its ids.
        text = np.tile(np.int32([*prompt, *found]), (8, 1))
        places = np.tile(np.arange(text.shape[1], dtype=np.int32), (8, 1))
        rows = (jax.device_put(a, place(made)) for a in (text, places, np.ones_like(text)))
        z = np.asarray(jax.jit(logits)(params, *rows))[0]
    assert found == z[len(prompt) - 1 : -1, :VOCAB].argmax(-1).tolist()
    assert len(set(found)) > 1
