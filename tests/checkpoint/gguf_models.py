"""Tiny models of every architecture, stored as llama.cpp's converter stores them."""

import re
from dataclasses import replace

import numpy as np

from checkpoint.gguf import Gguf
from checkpoint.gguf_config import read_config
from checkpoint.gguf_names import Named
from checkpoint.names import Names
from model.config import Attention, Embeddings, Head, ModelConfig, Moe, Norm, Rope, Scaling
from model.families import FAMILIES
from tests.checkpoint.gguf_files import packed

BY_NAME = {family.name: family for family in FAMILIES}
SIZES = {"layers": 3, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48, "vocab": 40}

# Published name -> GGUF's, as llama.cpp's converter has them.
LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICH = LLAMA | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
BERT = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "pooler.dense": "cls",
    "classifier": "cls.output",
}
RENAMES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3moe": LLAMA | {"mlp.gate": "ffn_gate_inp"},
    "mixtral": LLAMA
    | {
        "block_sparse_moe.gate": "ffn_gate_inp",
        "w1": "ffn_gate_exps",
        "w2": "ffn_down_exps",
        "w3": "ffn_up_exps",
    },
    "gemma": LLAMA,
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "olmo2": SANDWICH,
    "phi3": LLAMA | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    "bert": BERT,
    "distilbert": {
        "embeddings.word_embeddings": "token_embd",
        "embeddings.position_embeddings": "position_embd",
        "embeddings.LayerNorm": "token_embd_norm",
        "attention.q_lin": "attn_q",
        "attention.k_lin": "attn_k",
        "attention.v_lin": "attn_v",
        "attention.out_lin": "attn_output",
        "sa_layer_norm": "attn_output_norm",
        "ffn.lin1": "ffn_up",
        "ffn.lin2": "ffn_down",
        "output_layer_norm": "layer_output_norm",
    },
}
EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def permuted(weight, heads):
    """How llama.cpp's converter stores the rows of a llama's queries and keys."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stored(tensors, cfg, arch, family):
    """The tensors of a family as a GGUF file holds them."""
    renames = RENAMES[family if family in RENAMES else arch]
    found, experts = {}, {}
    for name, tensor in tensors.items():
        layer = re.search(r"(?:layers?|h)\.(\d+)\.(.*)\.(weight|bias)", name)
        stem, kind = (layer[2], layer[3]) if layer else name.rsplit(".", 1)
        prefix = f"blk.{layer[1]}." if layer else ""
        if one := re.search(r"experts\.(\d+)\.(\w+)", stem):
            to = f"{prefix}{(EXPERT | renames)[one[2]]}.weight"
            experts.setdefault(to, {})[int(one[1])] = tensor
            continue
        if arch == "llama" and re.search("[qk]_proj", stem):
            tensor = permuted(tensor, cfg.heads if "q_proj" in stem else cfg.kv_heads)
        if arch.startswith("gemma") and "norm" in stem:
            tensor = tensor + np.float32(1)
        if arch == "gpt2" and ".c_" in stem and kind == "weight":
            tensor = tensor.T
        stem = stem.removeprefix("bert.").removeprefix("distilbert.")
        found[f"{prefix}{renames[stem]}.{kind}"] = np.ascontiguousarray(tensor)
    for name, each in experts.items():
        found[name] = np.stack([each[e] for e in range(len(each))])
    return found


def said(arch, cfg, **more):
    """The metadata that llama.cpp's converter writes for a model of these sizes."""
    rms = "rms_" if cfg.arch.norm.kind == "rms" else ""
    keys = {
        "block_count": cfg.layers,
        "embedding_length": cfg.embed,
        "feed_forward_length": cfg.mlp,
        "attention.head_count": cfg.heads,
        "attention.head_count_kv": cfg.kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        f"attention.layer_norm_{rms}epsilon": cfg.arch.norm.eps,
        **({"rope.freq_base": cfg.arch.rope.theta} if cfg.arch.rope.theta else {}),
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return {
        "general.architecture": arch,
        **{f"{arch}.{key}": value for key, value in keys.items()},
    }


def drawn(shapes):
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def cfg_of(family, *, sizes=None, **arch):
    return ModelConfig(**SIZES | (sizes or {}), arch=replace(BY_NAME[family].arch, **arch))


ROPE = Rope(theta=1000.0)
EPS = Norm(eps=1e-6)
GEMMA = replace(BY_NAME["gemma2"].arch.norm, eps=1e-6)
LAYER = replace(BY_NAME["gpt2"].arch.norm, eps=1e-5)
POST = replace(BY_NAME["bert"].arch.norm, eps=1e-12)
FULL = {"kv_heads": 4}
TIED = Head(tied=True)
BERT_LIKE = BY_NAME["bert"].arch.attention

# (GGUF architecture, family, config, what the metadata say besides the sizes)
CASES = {
    "llama": ("llama", "llama", cfg_of("llama", norm=EPS, rope=ROPE), {}),
    "llama tied": (
        "llama", "llama", cfg_of("llama", norm=EPS, head=TIED, sizes={"head_dim": 16}), {},
    ),
    "llama biases": (
        "llama",
        "llama",
        cfg_of(
            "llama", norm=EPS, mlp_bias=True, attention=Attention(qkv_bias=True, out_bias=True)
        ),
        {},
    ),
    "llama linear": (
        "llama",
        "llama",
        cfg_of("llama", norm=EPS, rope=Rope(1000.0, scaling=Scaling("linear", 4.0))),
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "llama older linear": (
        "llama",
        "llama",
        cfg_of("llama", norm=EPS, rope=Rope(1000.0, scaling=Scaling("linear", 4.0))),
        {"rope__scale_linear": 4.0},
    ),
    "mistral": (
        "llama",
        "mistral",
        cfg_of("mistral", norm=EPS, rope=ROPE, attention=Attention(windows=(5,))),
        {"attention__sliding_window": 5},
    ),
    "mixtral": (
        "llama",
        "mixtral",
        cfg_of("mixtral", norm=EPS, rope=ROPE, moe=Moe(experts=5, active=2)),
        {"expert_count": 5, "expert_used_count": 2},
    ),
    "qwen2 yarn": (
        "qwen2",
        "qwen2",
        cfg_of(
            "qwen2",
            norm=EPS,
            head=TIED,
            rope=Rope(1e6, scaling=Scaling("yarn", 4.0, trained=32768)),
        ),
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 32768,
        },
    ),
    "qwen3": ("qwen3", "qwen3", cfg_of("qwen3", norm=EPS, rope=ROPE, sizes={"head_dim": 12}), {}),
    "qwen3 moe": (
        "qwen3moe",
        "qwen3_moe",
        cfg_of("qwen3_moe", norm=EPS, rope=ROPE, moe=Moe(experts=6, active=3, mlp=24)),
        {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 24},
    ),
    "gemma": (
        "gemma",
        "gemma",
        cfg_of(
            "gemma",
            norm=replace(GEMMA, placement="pre"),
            rope=ROPE,
            activation="geglu",
            head=TIED,
            sizes={"head_dim": 16},
        ),
        {},
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        cfg_of(
            "gemma2",
            norm=GEMMA,
            rope=ROPE,
            activation="geglu",
            head=Head(tied=True, softcap=30.0),
            attention=Attention(windows=(7, 0), softcap=50.0, scale=8**-0.5),
        ),
        {
            "attention__sliding_window": 7,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma2 27B": (
        "gemma2",
        "gemma2",
        cfg_of(
            "gemma2",
            norm=GEMMA,
            rope=ROPE,
            activation="geglu",
            head=TIED,
            attention=Attention(windows=(4096, 0), scale=32**-0.5),
            sizes={"layers": 46, "heads": 2, "head_dim": 16, "embed": 64},
        ),
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        cfg_of(
            "gemma3_text",
            norm=GEMMA,
            rope=Rope(1e6, 10_000.0, Scaling("linear", 8.0)),
            activation="geglu",
            head=TIED,
            attention=Attention(windows=(5,) * 5 + (0,), qk_norm="head", scale=8**-0.5),
            sizes={"layers": 8},
        ),
        {
            "attention__sliding_window": 5,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0,
        },
    ),
    "olmo2": (
        "olmo2",
        "olmo2",
        cfg_of("olmo2", norm=replace(BY_NAME["olmo2"].arch.norm, eps=1e-6), rope=ROPE),
        {},
    ),
    "olmo3": (  # whose windowed layers are not stretched
        "olmo2",
        "olmo2",
        cfg_of(
            "olmo2",
            norm=replace(BY_NAME["olmo2"].arch.norm, eps=1e-6),
            rope=Rope(1e3, 1e3, Scaling("yarn", 8.0, 64, beta_fast=16.0, magnitude=1.2)),
            attention=Attention(windows=(9, 0), qk_norm="all"),
        ),
        {
            "attention__sliding_window": 9,
            "attention__sliding_window_pattern": np.array([True, False, True]),
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 8.0,
            "rope__scaling__original_context_length": 64,
            "rope__scaling__yarn_beta_fast": 16.0,
            "rope__scaling__yarn_attn_factor": 1.2,
        },
    ),
    "phi3": (
        "phi3",
        "phi3",
        cfg_of("phi3", norm=EPS, rope=ROPE, attention=Attention(windows=(5,))),
        {"attention__sliding_window": 5, "rope__dimension_count": 8},
    ),
    "gpt2": (
        "gpt2",
        "gpt2",
        cfg_of("gpt2", norm=LAYER, embeddings=Embeddings(positions=16), sizes=FULL),
        {},
    ),
    "bert": (
        "bert",
        "bert",
        cfg_of(
            "bert",
            norm=POST,
            embeddings=Embeddings(positions=16, types=2, norm=True),
            head=Head("none"),
            sizes=FULL,
        ),
        {"attention__causal": False, "pooling_type": 1},
    ),
    "bert classifier": (
        "bert",
        "bert",
        cfg_of(
            "bert",
            norm=POST,
            embeddings=Embeddings(positions=16, types=2, norm=True),
            head=Head("classifier", labels=3),
            sizes=FULL,
        ),
        {"attention__causal": False},
    ),
    "distilbert": (
        "bert",
        "distilbert",
        cfg_of(
            "distilbert",
            norm=POST,
            embeddings=Embeddings(positions=16, norm=True),
            head=Head("none", curve="relu"),
            sizes=FULL,
        ),
        {"attention__causal": False},
    ),
}  # fmt: skip


def write(path, case, change=lambda tensors: tensors, **more):
    """The GGUF file of a case; the family's tensors that went into it."""
    arch, family, cfg, metadata = CASES[case]
    tensors = drawn(Names(BY_NAME[family], cfg).foreign())
    metadata = said(arch, cfg, **metadata | more)
    path.write_bytes(packed(metadata, change(stored(tensors, cfg, arch, family))))
    return tensors


def opened(path):
    file = Gguf(path)
    family, cfg = read_config(file)
    return family, cfg, Named(file, family, cfg)
