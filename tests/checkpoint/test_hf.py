"""config.json: published ones give the published sizes, and what we cannot compute is refused."""

import dataclasses
import json

import pytest

from checkpoint.hf import family_of, read_config, write_config
from model.config import Arch, Attention, Head, Init, ModelConfig, Norm, Rope, Scaling
from model.families import FAMILIES, bert, gemma2, gemma3, llama, mistral, phi3, qwen2
from tests.checkpoint.hub import (
    GEMMA_2_27B,
    GEMMA_3_4B,
    GPT2,
    HUB,
    LLAMA_3_2_1B,
    MINILM,
    MISTRAL_7B,
    QWEN2_5_7B,
    QWEN3_30B,
    ROBERTA,
)

replace = dataclasses.replace


def rope_of(**values):
    return read_config({**LLAMA_3_2_1B, "rope_scaling": None, **values})[1].arch.rope


def windows_of(config, **values):
    cfg = read_config({**config, "num_hidden_layers": 8, **values})[1]
    return [cfg.window(layer) for layer in range(8)]


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_gives_the_published_size(name):
    family, cfg = read_config(HUB[name])
    dtype = "bfloat16" if HUB[name].get("torch_dtype") == "bfloat16" else "float32"
    assert cfg == replace(family.sizes[name], dtype=dtype, param_dtype=dtype)


@pytest.mark.parametrize("name", HUB)
def test_a_config_goes_back_out_as_it_came(name):
    config = write_config(*read_config(HUB[name]), HUB[name])
    own = {**HUB[name], **HUB[name].get("text_config", {})}
    changed = {key for key, value in config.items() if own.get(key) != value}
    assert changed <= {"torch_dtype", "architectures", "tie_word_embeddings"}
    assert json.loads(json.dumps(config)) == config


def test_a_changed_config_keeps_what_it_says_beyond_the_sizes():
    config = {**LLAMA_3_2_1B, "rope_scaling": None, "rope_parameters": {"rope_type": "default"}}
    family, cfg = read_config(config)
    written = write_config(family, replace(cfg, vocab=128_320), config)
    assert written["vocab_size"] == 128_320
    assert written["eos_token_id"] == 128001
    assert written["max_position_embeddings"] == 131072
    assert "rope_parameters" not in written
    assert read_config(written)[1] == replace(cfg, vocab=128_320)


def test_a_model_of_images_goes_out_as_its_language_part():
    written = write_config(*read_config(GEMMA_3_4B), GEMMA_3_4B)
    assert written["architectures"] == ["Gemma3ForCausalLM"]
    assert written["model_type"] == "gemma3_text"
    assert written["eos_token_id"] == [1, 106]
    assert "vision_config" not in written
    assert read_config(written) == read_config(GEMMA_3_4B)


def test_the_spelling_of_transformers_5_says_the_same():
    scaling = {**LLAMA_3_2_1B["rope_scaling"], "rope_theta": 500000.0}
    config = {**LLAMA_3_2_1B, "rope_parameters": scaling, "dtype": "bfloat16"}
    for key in ("rope_scaling", "rope_theta", "torch_dtype"):
        del config[key]
    assert read_config(config) == read_config(LLAMA_3_2_1B)
    assert write_config(*read_config(config), config) == config

    moe = {**QWEN3_30B, "num_local_experts": 128}
    del moe["num_experts"]
    assert read_config(moe) == read_config(QWEN3_30B)

    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = {**GEMMA_3_4B["text_config"], "rope_parameters": rope, "rope_scaling": None}
    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)]
    text |= {"layer_types": types, "_sliding_window_pattern": 6}
    assert read_config({**GEMMA_3_4B, "text_config": text}) == read_config(GEMMA_3_4B)


def test_rope_scalings():
    said = {"type": "linear", "factor": 2}
    assert rope_of(rope_scaling=said).scaling == Scaling("linear", factor=2.0)
    said = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    yarn = Scaling("yarn", factor=4.0, trained=32768)
    assert rope_of(rope_scaling=said).scaling == yarn
    del said["original_max_position_embeddings"]
    assert rope_of(rope_scaling=said).scaling == replace(yarn, trained=131072)
    said |= {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    expected = replace(
        yarn, trained=131072, magnitude=1.5, beta_fast=16.0, beta_slow=2.0, truncate=False
    )
    assert rope_of(rope_scaling=said).scaling == expected
    said = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert rope_of(rope_scaling=said).scaling.magnitude == 1.0


def test_windows_reach_the_layers_that_config_says():
    assert windows_of(MISTRAL_7B) == [4096] * 8
    assert windows_of(MISTRAL_7B, sliding_window=None) == [0] * 8
    assert windows_of(QWEN2_5_7B) == [0] * 8
    asked = {"use_sliding_window": True, "sliding_window": 7}
    assert windows_of(QWEN2_5_7B, **asked, max_window_layers=6) == [0] * 6 + [7] * 2
    assert windows_of(QWEN2_5_7B, **asked) == [0] * 8
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"] * 2
    assert windows_of(QWEN2_5_7B, **asked, layer_types=types) == [7, 0, 0, 7] * 2
    assert windows_of(GEMMA_2_27B) == [4096, 0] * 4
    gemma3 = {**GEMMA_3_4B["text_config"], "architectures": ["Gemma3ForCausalLM"]}
    assert windows_of(gemma3) == [1024] * 5 + [0] + [1024] * 2
    assert windows_of(gemma3, sliding_window_pattern=2) == [1024, 0] * 4


def test_a_pattern_of_windows_is_the_shortest():
    assert read_config(GEMMA_2_27B)[1].places == 2
    assert read_config(GEMMA_3_4B)[1].places == 6
    assert read_config(MISTRAL_7B)[1].places == 1


def test_heads_are_those_of_the_architecture():
    config = {**MINILM, "architectures": ["BertForSequenceClassification"]}
    assert read_config(config)[1].arch.head == Head("classifier")
    named = {**config, "id2label": {"0": "no", "1": "perhaps", "2": "yes"}}
    head = read_config(named)[1].arch.head
    assert head == Head("classifier", labels=3)
    assert write_config(*read_config(named), named)["id2label"] == named["id2label"]
    assert len(write_config(*read_config(named))["id2label"]) == 3
    bare = read_config({**MISTRAL_7B, "architectures": ["MistralModel"]})[1]
    assert bare.arch.head == Head("none")


def test_an_architecture_is_not_needed_where_the_model_type_says_it():
    config = {key: value for key, value in MISTRAL_7B.items() if key != "architectures"}
    assert read_config(config) == read_config(MISTRAL_7B)


REFUSED = {
    "unknown architecture": (
        {**MISTRAL_7B, "architectures": ["MambaForCausalLM"]},
        r"'MambaForCausalLM' is none of LlamaForCausalLM, ",
    ),
    "unknown model_type": ({"model_type": "mamba"}, r"model_type='mamba' is none of llama, "),
    "no model at all": ({}, r"model_type=None is none of llama, "),
    "model_type of another": (
        {**MISTRAL_7B, "model_type": "deepseek_v3"},
        r"model_type='deepseek_v3' must be 'mistral' where",
    ),
    "architectures no list": (
        {"architectures": {"a": 1}},
        r"architectures={'a': 1} must be a list",
    ),
    "curve": ({**MISTRAL_7B, "hidden_act": "xielu"}, r"hidden_act='xielu' .*: silu, swish, "),
    "curve no text": ({**MISTRAL_7B, "hidden_act": [1]}, r"hidden_act=\[1\] is not supported"),
    "curve of RoBERTa": ({**ROBERTA, "hidden_act": "relu"}, r"hidden_act='relu' .*: gelu are"),
    "positions": (
        {**MINILM, "position_embedding_type": "relative_key"},
        r"position_embedding_type='relative_key' is not supported, only None or 'absolute'",
    ),
    "decoder": ({**MINILM, "is_decoder": True}, r"is_decoder=True is not supported, only False"),
    "layers without experts": (
        {**QWEN3_30B, "mlp_only_layers": [0]},
        r"mlp_only_layers=\[0\] is not supported, only None or \[\]",
    ),
    "scale by layer": (
        {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        r"scale_attn_by_inverse_layer_idx=True is not supported",
    ),
    "both ways": (
        {**GEMMA_2_27B, "use_bidirectional_attention": True},
        r"use_bidirectional_attention=True is not supported",
    ),
    "quantized": (
        {**LLAMA_3_2_1B, "quantization_config": {"quant_method": "gptq"}},
        r"quantization_config={'quant_method': 'gptq'} is not supported",
    ),
    "partial rotation": (
        {**LLAMA_3_2_1B, "partial_rotary_factor": 0.5},
        r"partial_rotary_factor=0.5 is not supported",
    ),
    "partial rotation of 5": (
        {**LLAMA_3_2_1B, "rope_parameters": {"partial_rotary_factor": 0.5}},
        r"'partial_rotary_factor': 0.5.* is not supported: a llama turns whole heads",
    ),
    "rope type": (
        {**LLAMA_3_2_1B, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"'dynamic'.* not supported: .* rope_type default, linear, llama3, yarn",
    ),
    "longrope": (
        {
            **LLAMA_3_2_1B,
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        },
        r"'longrope'.* not supported: a phi3 turns whole heads, with rope_type default",
    ),
    "rope without factor": (
        {**LLAMA_3_2_1B, "rope_scaling": {"type": "linear"}},
        r"RoPE of {'type': 'linear'} lacks factor",
    ),
    "rope no object": (
        {**LLAMA_3_2_1B, "rope_scaling": [1]},
        r"rope_scaling=\[1\] must be an object",
    ),
    "windows too few": (
        {**QWEN2_5_7B, "use_sliding_window": True, "layer_types": ["full_attention"]},
        r"layer_types=\['full_attention'\] must be 28 of full_attention, sliding_attention",
    ),
    "heads": ({**GPT2, "n_head": 7}, r"embed=768 must be a multiple of heads=7"),
    "no number": ({**GPT2, "n_layer": "12"}, r"n_layer='12' must be a whole number, 1 to 67108864"),
    "negative": ({**GPT2, "n_embd": -1}, r"n_embd=-1 must be a whole number"),
    "huge": ({**GPT2, "vocab_size": 10**12}, r"vocab_size=10+ must be a whole number"),
    "null": ({**GPT2, "n_embd": None}, r"n_embd=None must be a whole number"),
    "many layers": ({**GPT2, "n_layer": 5000}, r"layers=5000 is more than 4096"),
    "epsilon": (
        {**GPT2, "layer_norm_epsilon": 0},
        r"layer_norm_epsilon=0 must be a number above 0",
    ),
    "not a number": ({**LLAMA_3_2_1B, "rope_theta": float("nan")}, r"rope_theta=nan must be"),
    "no truth": (
        {**GPT2, "tie_word_embeddings": 1},
        r"tie_word_embeddings=1 must be true or false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_cannot_compute_is_refused(case):
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_config(config)


def test_wrong_kinds_of_values_are_value_errors():
    """Whatever JSON has in the place of a value, reading it gives a config or a ValueError."""
    for config in HUB.values():
        for key in config:
            for wrong in (None, True, -1, 0, 1.5, "x", [], ["x"], {}, {"x": 1}, 10**400):
                try:
                    read_config({**config, key: wrong})
                except ValueError as error:
                    assert str(error)


TRAINED = ModelConfig(layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=128)


@pytest.mark.parametrize(
    ("family", "arch"),
    [
        (llama, Arch(init=Init(embed=1.0), head=Head(tied=True, z_loss=1e-4, chunk=8))),
        (mistral, Arch(attention=Attention(windows=(8,)))),
        (qwen2, Arch(attention=Attention(qkv_bias=True, windows=(8, 0)))),
        (gemma2, replace(gemma2.ARCH, head=Head(tied=True, softcap=9.0))),
        (gemma3, gemma3.SMALL),
        (bert, bert.ARCH),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_of_our_own_has_the_family_that_can_say_it(family, arch):
    cfg = replace(TRAINED, arch=arch)
    if family is bert:
        cfg = replace(cfg, kv_heads=4)
    assert family_of(cfg) is family.FAMILY
    again = read_config(write_config(family.FAMILY, cfg))[1]
    assert family_of(again) is family.FAMILY


def test_a_model_of_no_family_is_told_why():
    with pytest.raises(
        ValueError, match=r"no family has arch.activation='relu2'; without, .* llama"
    ):
        family_of(replace(TRAINED, arch=Arch(activation="relu2")))
    mixed = Arch(attention=Attention(windows=(8, 0)), norm=Norm(placement="sandwich"))
    message = r"no family has arch.norm.offset=0.0, arch.embeddings.scale=False; .* a gemma2$"
    with pytest.raises(ValueError, match=message):
        family_of(replace(TRAINED, arch=mixed))


def test_a_family_that_cannot_say_a_model_is_told_why():
    arch = Arch(rope=Rope(scaling=Scaling("linear", factor=2.0)))
    with pytest.raises(ValueError, match=r"'linear'.* not supported: a phi3 "):
        write_config(phi3.FAMILY, replace(TRAINED, arch=arch))
    with pytest.raises(ValueError, match=r"llama cannot say arch.attention.out_bias=False"):
        write_config(llama.FAMILY, replace(TRAINED, arch=qwen2.FAMILY.arch))


def test_every_family_reads_what_it_writes_for_each_of_its_heads():
    for family in FAMILIES:
        cfg = next(iter(family.sizes.values()))
        for kind in dict.fromkeys(family.architectures.values()):
            head = replace(cfg.arch.head, kind=kind, labels=3)
            own = replace(cfg, arch=replace(cfg.arch, head=head))
            assert read_config(write_config(family, own))[1].arch.head.kind == kind
