"""What GGUF metadata say of a model; what is wrong with it, by the names in the file."""

import contextlib
import math

import numpy as np
import pytest

from checkpoint.names import Names
from model.config import Rope, Scaling
from model.rope import frequencies
from tests.checkpoint.gguf_files import packed
from tests.checkpoint.gguf_models import (
    BY_NAME,
    CASES,
    EPS,
    cfg_of,
    drawn,
    opened,
    said,
    stored,
    write,
)

# Llama 3's RoPE, of which a file has the factors alone.


def factors(scaling, head_dim=64, theta=500_000.0):
    plain = frequencies(head_dim, theta, Scaling())
    return (plain / frequencies(head_dim, theta, scaling)).astype(np.float32)


STRETCHED = [
    Scaling("llama3", 8.0, trained=8192, low=1.0, high=4.0),
    Scaling("llama3", 32.0, trained=8192, low=1.0, high=4.0),
    Scaling("llama3", 4.0, trained=16384, low=1.0, high=8.0),
    Scaling("llama3", 16.0, trained=2048, low=1.0, high=2.5),
    Scaling("linear", 4.0),
    Scaling(),
]


@pytest.mark.parametrize("scaling", STRETCHED)
def test_llama3s_scaling_is_recovered_from_its_factors(scaling, tmp_path):
    cfg = cfg_of("llama", norm=EPS, rope=Rope(500_000.0), sizes={"head_dim": 64})
    tensors = stored(drawn(Names(BY_NAME["llama"], cfg).foreign()), cfg, "llama", "llama")
    tensors["rope_freqs.weight"] = factors(scaling)
    (tmp_path / "model.gguf").write_bytes(packed(said("llama", cfg), tensors))
    _, found, _ = opened(tmp_path / "model.gguf")
    assert found.arch.rope.scaling == scaling


def test_another_choice_of_turns_is_the_same_scaling(tmp_path):
    """low, high and trained are known up to a factor, which changes nothing."""
    twice = Scaling("llama3", 8.0, trained=16384, low=2.0, high=8.0)
    np.testing.assert_allclose(factors(twice), factors(STRETCHED[0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.linspace(1, 5, 32), "stretches RoPE in no known way"),
        (factors(STRETCHED[0])[::-1], "stretches RoPE in no known way"),
        (np.ones(31), "must be 32 factors"),
        (np.zeros(32), "must be 32 factors"),
        (np.full(32, np.nan), "must be 32 factors"),
        (np.full(32, np.inf), "must be 32 factors"),
    ],
)
def test_other_factors_are_refused(values, message, tmp_path):
    cfg = cfg_of("llama", norm=EPS, rope=Rope(500_000.0), sizes={"head_dim": 64})
    tensors = stored(drawn(Names(BY_NAME["llama"], cfg).foreign()), cfg, "llama", "llama")
    tensors["rope_freqs.weight"] = np.ascontiguousarray(values, np.float32)
    (tmp_path / "model.gguf").write_bytes(packed(said("llama", cfg), tensors))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "model.gguf")


# What is wrong.


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_(name, value):
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("case", "more", "message"),
    [
        ("llama", {"block_count": 0}, "llama.block_count=0 must be 1 to"),
        ("llama", {"block_count": 2**31}, "block_count=2147483648 must be 1 to 30"),
        ("llama", {"block_count": "3"}, "block_count is '3': it must be a int"),
        ("llama", {"embedding_length": 2**32 - 1}, "embedding_length=4294967295"),
        ("llama", {"attention__head_count_kv": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ("llama", {"attention__head_count": np.array([4, 4, 2])}, "differs from layer to layer"),
        ("llama", {"attention__layer_norm_rms_epsilon": -1.0}, "must be a number from 0 on"),
        ("llama", {"attention__layer_norm_rms_epsilon": math.nan}, "must be a number from 0 on"),
        ("llama", {"rope__dimension_count": 4}, "rope.dimension_count must be 8"),
        ("llama", {"attention__value_length": 4}, "value_length must be 8"),
        ("llama", {"rope__scaling__type": "longrope"}, "'longrope' is not supported: none, linear"),
        ("llama", {"rope__scaling__type": "linear", "rope__scaling__factor": 0.5}, "must be 1 or"),
        ("llama", {"expert_count": 4, "expert_used_count": 9}, "active=9 must be 1 to experts=4"),
        ("llama", {"expert_count": 2**20}, "expert_count=1048576 must be 0 to 4096"),
        ("gemma2", {"expert_count": 4}, "a gemma2 with experts is not supported"),
        ("llama", {"logit_scale": 0.5}, "logit_scale=0.5 is not supported"),
        ("mixtral", {"expert_gating_func": 2}, "expert_gating_func=2 is not supported"),
        ("gemma2", {"attention__sliding_window_pattern": 0}, "pattern=0 is no period"),
        ("llama", {"vocab_size": 5, "feed_forward_length": 50}, "ffn_gate.weight has shape"),
    ],
)  # fmt: skip
def test_metadata_that_will_not_do_are_named(case, more, message, tmp_path):
    write(tmp_path / "model.gguf", case, **more)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blk.1.attn_q.weight"), r"has 1 tensors \(blk.1.attn_q.weight\) that the files"),
        (without("token_embd.weight"), "holds no token_embd.weight"),
        (with_("blk.3.attn_q.weight", np.zeros((2, 2), "f4")), "blk.3.attn_q.weight.*no place"),
        (with_("blk.1.attn_k.bias", np.zeros(16, "f4")), "blk.1.attn_k.bias.*no place"),
        (with_("output_norm.weight", np.zeros(31, "f4")), r"output_norm.weight has .*\(32,\)"),
        (with_("rope_factors_long.weight", np.ones(4, "f4")), "'longrope' is not supported"),
    ],
)  # fmt: skip
def test_tensors_that_will_not_do_are_named_as_the_file_names_them(change, message, tmp_path):
    write(tmp_path / "model.gguf", "llama", change)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["falcon", "clip", 7, None])
def test_an_unknown_architecture_is_told_the_known(name, tmp_path):
    metadata = {} if name is None else {"general.architecture": name}
    (tmp_path / "model.gguf").write_bytes(packed(metadata, {}))
    with pytest.raises(ValueError, match=f"{name!r} is none of llama, qwen2, .*, bert"):
        opened(tmp_path / "model.gguf")


def test_the_converters_own_keys_are_needed(tmp_path):
    write(tmp_path / "model.gguf", "llama")
    held = (tmp_path / "model.gguf").read_bytes()
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        name = f"llama.{key}".encode()
        (tmp_path / "model.gguf").write_bytes(held.replace(name, name[:-1] + b"X"))
        with pytest.raises(ValueError, match=f"llama.{key} is missing"):
            opened(tmp_path / "model.gguf")


VALUES = [
    0, 1, -1, 2**31, 2**32 - 1, math.nan, math.inf, -0.5, 1e-30, 1e30, "", "x", [], ["a"], True,
    np.array([], np.int32), np.array([1, 2], np.int32), np.full(3, math.nan, np.float32),
    np.array([True, False, True]), np.full(3, 2**63, np.uint64),
]  # fmt: skip


@pytest.mark.parametrize("case", ["olmo3", "mixtral", "gemma3", "bert classifier"])
def test_no_value_does_more_harm_than_a_message(case, tmp_path):
    arch, family, cfg, more = CASES[case]
    tensors = stored(drawn(Names(BY_NAME[family], cfg).foreign()), cfg, arch, family)
    right = said(arch, cfg, **more)
    keys = ("rope.freq_base_swa", "expert_count", "attention.scale", "final_logit_softcapping")
    for key in {*right, *(f"{arch}.{key}" for key in keys)}:
        for value in VALUES:
            (tmp_path / "model.gguf").write_bytes(packed({**right, key: value}, tensors))
            with contextlib.suppress(ValueError):
                opened(tmp_path / "model.gguf")
