"""A family's tensors, stored as GGUF stores them, come back by their own names, config and all."""

import dataclasses

import numpy as np
import pytest

from checkpoint.gguf_config import ARCHITECTURES
from checkpoint.names import Names
from model.families import FAMILIES
from tests.checkpoint.gguf_models import CASES, opened, write

PREFIXES = ("bert.", "distilbert.")  # that models without a head leave out


def same(named, tensors, offset):
    names = {name.removeprefix(prefix) for name in named.tensors for prefix in PREFIXES}
    assert tensors.keys() <= names | named.tensors.keys()
    for name, right in tensors.items():
        name = next(p + name for p in ("", *PREFIXES) if p + name in named.tensors)
        found = named.read(name)
        assert found.shape == named.tensors[name].shape and found.flags.c_contiguous
        if offset and "norm" in name:
            np.testing.assert_allclose(found, right, atol=3e-7)
        else:
            assert (found == right).all(), name
        assert (named.rows(name, 1, 2) == found[1:2]).all()


@pytest.mark.parametrize("case", CASES)
def test_the_config_and_every_tensor_come_back(case, tmp_path):
    tensors = write(tmp_path / "model.gguf", case)
    family, cfg, named = opened(tmp_path / "model.gguf")
    _, right, wanted, _ = CASES[case]
    assert family.name == right
    assert dataclasses.asdict(cfg) == dataclasses.asdict(wanted)
    same(named, tensors, cfg.arch.norm.offset)
    Names(family, cfg).locate(named.tensors)  # nothing else is there


def test_the_cases_are_all_the_architectures():
    assert {case[0] for case in CASES.values()} == ARCHITECTURES.keys()
    assert ARCHITECTURES.keys() == {family.gguf for family in FAMILIES} - {""}


def single(tensors):
    """Experts as files had them before they were stacked."""
    found = {}
    for name, tensor in tensors.items():
        if "_exps" in name:
            stem, _, kind = name.rpartition(".")
            for e, each in enumerate(tensor):
                found[f"{stem.removesuffix('_exps')}.{e}.{kind}"] = each
        else:
            found[name] = tensor
    return found


def fused(tensors):
    """Queries, keys and values in one tensor, and gate and up of experts, as files can be."""
    found = dict(tensors)
    for name in tensors:
        if ".attn_q." in name:
            own = [found.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            found[name.replace("attn_q", "attn_qkv")] = np.concatenate(own)
        if ".ffn_gate_exps" in name:
            own = [found.pop(name.replace("gate", part)) for part in ("gate", "up")]
            found[name.replace("gate", "gate_up")] = np.concatenate(own, axis=1)
    return found


def apart(tensors):
    """What Phi-3 has in one tensor, in several."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if "attn_qkv" in name:
            del found[name]
            for part, rows in zip("qkv", np.split(tensor, [32, 48]), strict=True):
                found[name.replace("qkv", part)] = rows
        if "ffn_up" in name:
            gate, found[name] = np.split(tensor, 2)
            found[name.replace("up", "gate")] = gate
    return found


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("mixtral", single), ("qwen3 moe", single), ("mixtral", fused), ("qwen3 moe", fused),
        ("llama", fused), ("llama biases", fused), ("phi3", apart),
    ],
)  # fmt: skip
def test_other_ways_to_store_the_same_tensors(case, change, tmp_path):
    tensors = write(tmp_path / "model.gguf", case, change)
    _, cfg, named = opened(tmp_path / "model.gguf")
    assert cfg == CASES[case][2]
    same(named, tensors, 0)


def test_expert_by_expert_reads_no_more_than_one(tmp_path):
    write(tmp_path / "model.gguf", "mixtral")
    _, _, named = opened(tmp_path / "model.gguf")
    asked = []
    named.file.rows = lambda name, start, stop, own=named.file.rows: (
        asked.append((name, stop - start)) or own(name, start, stop)
    )
    named.read("model.layers.1.block_sparse_moe.experts.3.w1.weight")
    assert asked == [("blk.1.ffn_gate_exps.weight", 1)]
