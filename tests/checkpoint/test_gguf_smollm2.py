"""SmolLM2-135M-Instruct out of its GGUF file, against what transformers computed of it."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoint.pretrained import open_pretrained
from model import transformer
from sharding import mesh as meshes
from tests import assets
from tests.model.tiny import WHOLE

pytestmark = pytest.mark.assets

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "smollm2_135m_instruct_q4_1.json").read_text(encoding="utf-8"))[
    "cases"
]
TOLERANCE = 1e-3  # of a logit, of which the largest are 20
SECONDS = 15  # to open and to load on two cores


@pytest.fixture(scope="module")
def loaded():
    """(a compiled forward pass: ids -> logits, hidden states of each layer; tokenizer; seconds)."""
    path = str(assets.smollm2())
    begin = time.monotonic()
    found = open_pretrained(path)
    cfg = dataclasses.replace(found.cfg, dtype="float32", param_dtype="float32")
    with jax.set_mesh(meshes.make(meshes.MeshConfig(), jax.devices()[:1])):
        graph, shapes, _ = transformer.abstract(cfg, WHOLE)
        params = jax.block_until_ready(found.params(shapes))
        seconds = time.monotonic() - begin

        @jax.jit
        def forward(params, ids_BT):
            model = nnx.merge(graph, params)
            positions_BT = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)[None]
            same = positions_BT, jnp.ones_like(ids_BT)
            x_BTD, parts = model.run(ids_BT, *same, keep=("hidden",))
            hidden = [extra["hidden"] for extra in transformer.by_layer(parts)]
            embedded = model.embed(ids_BT, positions_BT, None)
            return model.head.logits(x_BTD, model.table()), [embedded, *hidden[:-1], x_BTD]

        yield lambda ids: forward(params, jnp.asarray([ids], jnp.int32)), found, seconds


@pytest.mark.parametrize("case", CASES, ids=[case["kind"] for case in CASES])
def test_the_prompts_give_the_published_ids_logits_and_greedy_tokens(case, loaded):
    forward, found, _ = loaded
    assert found.tokenizer.prompt(case["prompt"]) == case["input_ids"]
    prompt, greedy = case["input_ids"], case["greedy_ids"]
    logits_TV = np.asarray(forward([*prompt, *greedy[:-1]])[0][0])
    last = logits_TV[len(prompt) - 1]
    np.testing.assert_allclose(last[case["top5_ids"]], case["top5_logits"], atol=TOLERANCE)
    np.testing.assert_allclose(last[:8], case["logits_last_first8"], atol=TOLERANCE)
    assert min(case["greedy_margin_top1_top2"]) > 2 * TOLERANCE
    assert logits_TV[len(prompt) - 1 :].argmax(-1).tolist() == greedy


def test_hidden_states_at_five_depths_and_all_logits_are_the_published(loaded):
    forward, _, _ = loaded
    golden = np.load(GOLDEN / "smollm2_case0_hidden.npz")
    logits, hidden = forward(golden["input_ids"].tolist())
    np.testing.assert_allclose(logits[0, -1], golden["logits_last"], atol=TOLERANCE)
    for layer, right in zip(golden["which"], golden["hidden"], strict=True):
        scale = max(1, np.abs(right).max() / 100)  # one feature grows to 20,000
        np.testing.assert_allclose(hidden[layer][0], right, atol=TOLERANCE * scale)


def test_it_loads_in_time(loaded):
    assert loaded[2] < SECONDS
