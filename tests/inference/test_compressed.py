"""Checkpoints of 8 and 4 bits: what is loaded stays small, and computes what the files mean."""

import dataclasses

import jax
import numpy as np
import pytest

from checkpoint.pretrained import open_pretrained
from compressors.compress import Recipe, compress
from inference.engine import Engine
from model import transformer
from model.matmul.stored import QArray
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from tests.checkpoint import folders
from tests.inference.tiny import ONE, full_logits, mesh_of
from tests.marks import mostly_slow
from tests.tolerance import assert_same

IDS = np.random.default_rng(1).integers(0, 300, 400)
ROWS = [list(map(int, IDS[i : i + 16])) for i in range(0, 400, 16)]
PROMPT = ROWS[0][:6]
CASES = {
    "w4g64": ("llama", "absmax"), "w4g64 of experts": ("mixtral", "absmax"),
    "w8": ("gemma2", "absmax"), "w8a8": ("llama", "smoothquant"), "fp8": ("gpt2", "absmax"),
}  # fmt: skip
MESH = MeshConfig(data=1, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(case)`: the checkpoint, made when it is asked for."""
    found = {}

    def make(case):
        if case not in found:
            kind, method = CASES[case]
            folder = tmp_path_factory.mktemp("compressed")
            folders.write(folder / "hf", kind, folders.MODELS[kind])
            with jax.set_mesh(mesh_of(ONE)):
                recipe = Recipe(case.partition(" ")[0], method)
                compress(open_pretrained(str(folder / "hf")), folder / "ours", recipe, ROWS)
            found[case] = open_pretrained(str(folder / "ours"))
        return found[case]

    return make


def engine_of(source, mesh=ONE, *, dequantize=False):
    """As generate.py makes it."""
    cfg = dataclasses.replace(source.cfg, dtype="float32", param_dtype="float32")
    with jax.set_mesh(mesh_of(mesh)):
        _, shapes, _ = transformer.abstract(cfg, Layout())
        params = source.params(shapes if dequantize else source.compressed(shapes))
        return Engine.unrolled(params, cfg, Layout(), source.tokenizer)


def is_stored(leaf):
    return isinstance(leaf, QArray)


@pytest.mark.parametrize("case", mostly_slow(CASES, "w4g64"))
def test_what_is_loaded_is_as_small_as_the_files_and_says_the_same(saved, case):
    source = saved(case)
    few, whole = engine_of(source), engine_of(source, dequantize=True)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(few.params)) == source.bytes
    assert source.bytes < 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    assert_same(full_logits(few, PROMPT), full_logits(whole, PROMPT))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["w4g64", "w8"])
def test_weights_in_parts_lie_split_on_a_mesh_and_say_the_same(saved, case):
    source = saved(case)
    few, whole = engine_of(source, MESH), engine_of(source, dequantize=True)
    ids = [PROMPT, PROMPT[:4]]
    assert_same(full_logits(few, PROMPT), full_logits(whole, PROMPT))
    stored = [w for w in jax.tree.leaves(few.params, is_leaf=is_stored) if is_stored(w)]
    shares = {w.values.addressable_shards[0].data.size / w.values.size for w in stored}
    assert min(shares) == 0.25
    told = [result.new_ids for result in few.generate(ids, max_tokens=4, ignore_eos=True).run()]
    right = [result.new_ids for result in whole.generate(ids, max_tokens=4, ignore_eos=True).run()]
    assert told == right
