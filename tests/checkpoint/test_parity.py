"""Every family against `transformers` on the CPU in float32: the values of import and of export."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoint import hf, safetensors
from checkpoint.convert import convert
from checkpoint.names import Names
from checkpoint.pretrained import open_pretrained
from checkpoint.tensors import Tensor
from model import transformer
from model.families import FAMILIES
from sharding import mesh as meshes
from tests.checkpoint import published
from tests.model.tiny import WHOLE

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="no transformers"),
]

PARITY = 1e-4  # float32, absolute; what is compared is of size 1 to 10
ROWS, TOKENS = 2, 16
PAD = 1  # RoBERTa knows its padding by this id


class Imported:
    """Our model of a folder that transformers wrote."""

    def __init__(self, folder):
        self.source = open_pretrained(str(folder))
        self.family, self.cfg = self.source.family, self.source.cfg
        self.mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.graph, shapes, _ = transformer.abstract(self.cfg, WHOLE)
            self.params = self.source.params(shapes)
        self.forward = jax.jit(self._forward)

    @property
    def encoder(self):
        return not self.cfg.arch.attention.causal

    @property
    def by_row(self):
        return self.cfg.arch.head.kind in ("pooler", "classifier")

    def _forward(self, params, ids, positions, segments, types):
        model = nnx.merge(self.graph, params)
        x, parts = model.run(ids, positions, segments, types, keep=("hidden",))
        hidden = [extra["hidden"] for extra in transformer.by_layer(parts)]
        if self.cfg.arch.norm.placement != "post":
            hidden[-1] = x  # transformers norms the last
        hidden = [model.embed(ids, positions, types), *hidden]
        return model.head.logits(x, model.table()), hidden

    def run(self, ids, positions=None, segments=None, types=None):
        """(logits or the like, hidden states: what goes into the layers, then after each)."""
        ids = np.asarray(ids)
        positions = np.arange(ids.shape[1]) if positions is None else positions
        inputs = (positions, 1 if segments is None else segments, 0 if types is None else types)
        inputs = (jnp.asarray(np.broadcast_to(each, ids.shape), jnp.int32) for each in inputs)
        with jax.set_mesh(self.mesh):
            out, hidden = self.forward(self.params, jnp.asarray(ids, jnp.int32), *inputs)
        return np.asarray(out), [np.asarray(state) for state in hidden]


@pytest.fixture(scope="module", params=published.MODELS)
def pair(request, tmp_path_factory):
    """(theirs, ours)."""
    folder = tmp_path_factory.mktemp("published")
    theirs = published.make(request.param)
    theirs.save_pretrained(folder)
    return theirs, Imported(folder)


def draw(*shape):
    return np.random.default_rng(0).integers(3, 96, shape)


def assert_parity(ours, theirs, where=slice(None)):
    """Logits and hidden states, at the tokens `where`, are within PARITY; logits None: skipped."""
    pairs = list(zip(ours[1], theirs[1], strict=True))
    pairs += [] if ours[0] is None else [(ours[0], theirs[0])]
    for i, (a, b) in enumerate(pairs):
        at = where if a.ndim == 3 else slice(None)
        np.testing.assert_allclose(a[at], b[at], rtol=0, atol=PARITY, err_msg=f"state {i}")


def test_logits_and_hidden_states(pair):
    theirs, ours = pair
    ids = draw(ROWS, TOKENS)
    types, more = None, {}
    if ours.cfg.arch.embeddings.types > 1:
        types = (np.arange(TOKENS) >= 9) * np.ones((ROWS, 1), int)
        more = {"token_type_ids": types}
    assert_parity(ours.run(ids, types=types), published.run(theirs, ids, **more))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows(pair, side):
    theirs, ours = pair
    first = np.array([[0], [TOKENS - 11]])
    mask = np.arange(TOKENS) >= first
    mask = mask if side == "left" else mask[:, ::-1]
    ids = np.where(mask, draw(ROWS, TOKENS), PAD)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    more = {} if ours.encoder else {"position_ids": positions}
    if ours.encoder and ours.family.name != "roberta":
        positions = np.arange(TOKENS)  # counted from the row's begin, over padding too
    there = published.run(theirs, ids, attention_mask=mask.astype(int), **more)
    here = ours.run(ids, positions, mask)
    if ours.by_row and side == "left":  # read from the first token, which is padding
        here = (None, here[1])
    assert_parity(here, there, mask)


def test_packed_documents(pair):
    """Two in one row give what each gives alone."""
    theirs, ours = pair
    ids = draw(ROWS, TOKENS)
    lengths = (7, TOKENS - 7)
    starts = np.repeat([0, 7], lengths)
    out, hidden = ours.run(ids, np.arange(TOKENS) - starts, 1 + (starts > 0))
    for at in (slice(0, 7), slice(7, TOKENS)):
        alone = published.run(theirs, ids[:, at])
        here = (None if ours.by_row else out[:, at], [state[:, at] for state in hidden])
        assert_parity(here, alone)


def test_transformers_loads_what_our_sizes_and_arrays_give(pair, tmp_path):
    """Without the config and the files that the model came from; the logits are equal."""
    theirs, ours = pair
    names = Names(ours.family, ours.cfg)
    kinds = {name: Tensor(shape, "F32") for name, shape in names.foreign().items()}
    safetensors.write(
        tmp_path, kinds, lambda name: names.decompose(name, ours.source.read), 1 << 30
    )
    config = hf.write_config(ours.family, ours.cfg)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = published.load(tmp_path, config["architectures"][0])
    ids = draw(ROWS, TOKENS)
    np.testing.assert_array_equal(published.run(again, ids)[0], published.run(theirs, ids)[0])


def test_files_come_back_as_they_were(pair, tmp_path):
    """Through a checkpoint of ours; but for tensors that the model does not need."""
    _, ours = pair
    folder, sources = Path(ours.source.name), ours.source.located.sources
    lost = set(convert(ours.source, tmp_path / "ours")["differ"])
    assert lost <= {"cls.predictions.bias"}  # of an untied BERT's two biases the one not used
    convert(open_pretrained(str(tmp_path / "ours")), tmp_path / "back", to="hf")
    before, after = (safetensors.Safetensors(at) for at in (folder, tmp_path / "back"))
    if not lost and not ours.source.located.unused:
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert before.tensors.keys() - sources.values() == set(ours.source.located.unused)
    for name in after.tensors.keys() - lost:
        bits = (each.view(np.uint32) for each in (after.read(name), before.read(sources[name])))
        np.testing.assert_array_equal(*bits, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_are_those_of_transformers(family):
    transformers, _ = published.library()
    kind = getattr(transformers, next(iter(family.architectures)))
    theirs = kind.config_class()
    rope = getattr(theirs, "rope_parameters", None) or {}
    full, windowed = (rope.get(key, rope) for key in ("full_attention", "sliding_attention"))
    said = {
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": windowed.get("rope_theta"),
    }
    for key, default in family.defaults.items():
        found = said.get(key, getattr(theirs, key, None))
        if default is not None and found is not None:
            assert found == default, key
