"""Sentence embeddings against the published model's."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.pretrained import open_pretrained
from inference.embedding import Embedder, mean_of
from model import transformer
from sharding import mesh as meshes
from sharding.layout import Layout
from tests import assets

GOLDEN = Path(__file__).parents[1] / "golden" / "minilm_l6_v2.json"


def test_padding_counts_for_nothing_and_vectors_have_length_one():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    segments = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    ours = np.asarray(mean_of(jnp.asarray(x), jnp.asarray(segments)))
    for row, count in enumerate((4, 2)):
        mean = x[row, :count].mean(axis=0)
        np.testing.assert_allclose(ours[row], mean / np.linalg.norm(mean), rtol=1e-6)
    assert not ours[2].any()


@pytest.mark.assets
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_minilm_gives_the_published_embeddings(tmp_path, batch):
    golden = json.loads(GOLDEN.read_text())
    saved = open_pretrained(str(assets.minilm(tmp_path)))
    with jax.set_mesh(meshes.make(meshes.MeshConfig(), jax.devices()[:1])):
        graph, shapes, _ = transformer.abstract(saved.cfg, Layout())
        embed = Embedder(graph, saved.params(shapes), saved.cfg, Layout(), saved.tokenizer)
        ours = embed(golden["sentences"], batch=batch)
    for ids, text in zip(golden["input_ids"], golden["sentences"], strict=True):
        own = saved.tokenizer.prompt(text)
        assert own == ids[: len(own)] and not any(ids[len(own) :])
    np.testing.assert_allclose(ours, golden["embeddings"], atol=1e-5)
    np.testing.assert_allclose(ours @ ours.T, golden["cosine"], atol=1e-5)
