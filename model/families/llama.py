"""Llama 2, 3, 3.1, 3.2 and 3.3, and SmolLM, which has their shape."""

from dataclasses import replace

from model.config import Arch, Head, ModelConfig, Norm, Rope, Scaling
from model.families.family import GATED_CURVES, Family, Key

# The tables that most decoders share.
KEYS = {
    "vocab_size": "vocab",
    "hidden_size": "embed",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "hidden_act": Key(("arch.activation",), GATED_CURVES),
    "rms_norm_eps": "arch.norm.eps",
    "tie_word_embeddings": "arch.head.tied",
}
BIAS = Key(("arch.attention.qkv_bias", "arch.attention.out_bias"))

NAMES = {
    "model.embed_tokens.weight": "embedding.table",
    "model.layers.{}.input_layernorm.weight": "block.norm1.scale",
    "model.layers.{}.self_attn.q_proj.weight": "block.attention.qkv.weight[q]",
    "model.layers.{}.self_attn.k_proj.weight": "block.attention.qkv.weight[k]",
    "model.layers.{}.self_attn.v_proj.weight": "block.attention.qkv.weight[v]",
    "model.layers.{}.self_attn.q_proj.bias": "block.attention.qkv.bias[q]",
    "model.layers.{}.self_attn.k_proj.bias": "block.attention.qkv.bias[k]",
    "model.layers.{}.self_attn.v_proj.bias": "block.attention.qkv.bias[v]",
    "model.layers.{}.self_attn.o_proj.weight": "block.attention.out.weight",
    "model.layers.{}.self_attn.o_proj.bias": "block.attention.out.bias",
    "model.layers.{}.post_attention_layernorm.weight": "block.norm2.scale",
    "model.layers.{}.mlp.gate_proj.weight": "block.mlp.gate_up.weight[gate]",
    "model.layers.{}.mlp.up_proj.weight": "block.mlp.gate_up.weight[up]",
    "model.layers.{}.mlp.gate_proj.bias": "block.mlp.gate_up.bias[gate]",
    "model.layers.{}.mlp.up_proj.bias": "block.mlp.gate_up.bias[up]",
    "model.layers.{}.mlp.down_proj.weight": "block.mlp.down.weight",
    "model.layers.{}.mlp.down_proj.bias": "block.mlp.down.bias",
    "model.norm.weight": "norm.scale",
}
HEADS = {"language": {"lm_head.weight": "head.table"}}
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED = ("*.rotary_emb.inv_freq",)  # what RoPE computes, stored by old releases
QK_NAMES = {
    "model.layers.{}.self_attn.q_norm.weight": "block.attention.q_norm.scale",
    "model.layers.{}.self_attn.k_norm.weight": "block.attention.k_norm.scale",
}

TIED = Head(tied=True)
LLAMA2 = Arch(norm=Norm(eps=1e-5), rope=Rope(theta=10_000.0))
LLAMA3 = replace(LLAMA2, rope=Rope(theta=500_000.0))
STRETCHED = Scaling("llama3", factor=8.0, trained=8192, low=1.0, high=4.0)
LLAMA31 = replace(LLAMA2, rope=Rope(theta=500_000.0, scaling=STRETCHED))
LLAMA32 = replace(
    LLAMA2, head=TIED, rope=Rope(theta=500_000.0, scaling=replace(STRETCHED, factor=32.0))
)
SMOLLM = replace(LLAMA2, head=TIED)
SMOLLM2 = replace(SMOLLM, rope=Rope(theta=100_000.0))
SMOLLM2_LARGE = replace(SMOLLM, rope=Rope(theta=130_000.0))

SIZE_7B = ModelConfig(
    layers=32, embed=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000, arch=LLAMA2
)
SIZE_8B = ModelConfig(
    layers=32, embed=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=128256, arch=LLAMA3
)
SIZE_70B = ModelConfig(
    layers=80, embed=8192, heads=64, kv_heads=8, head_dim=128, mlp=28672, vocab=128256, arch=LLAMA3
)
SMOL_135M = ModelConfig(
    layers=30, embed=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, vocab=49152, arch=SMOLLM
)
SMOL_360M = ModelConfig(
    layers=32, embed=960, heads=15, kv_heads=5, head_dim=64, mlp=2560, vocab=49152, arch=SMOLLM
)
SMOL_1_7B = ModelConfig(
    layers=24, embed=2048, heads=32, kv_heads=32, head_dim=64, mlp=8192, vocab=49152, arch=SMOLLM
)

FAMILY = Family(
    name="llama",
    published="Touvron et al. 2023, arXiv:2307.09288; Llama 3: Grattafiori et al. 2024, "
    "arXiv:2407.21783; SmolLM2: Ben Allal et al. 2025, arXiv:2502.02737",
    architectures={"LlamaForCausalLM": "language", "LlamaModel": "none"},
    arch=Arch(),
    keys={**KEYS, "attention_bias": BIAS, "mlp_bias": "arch.mlp_bias"},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    },
    names=NAMES,
    heads=HEADS,
    copies=COPIES,
    prefix="model.",
    ignored=IGNORED,
    gguf="llama",
    sizes={  # config.json of meta-llama/NAME and HuggingFaceTB/NAME
        "Llama-2-7b-hf": SIZE_7B,
        "Llama-2-13b-hf": replace(SIZE_7B, layers=40, embed=5120, heads=40, kv_heads=40, mlp=13824),
        "Llama-2-70b-hf": replace(SIZE_70B, vocab=32000, arch=LLAMA2),
        "Meta-Llama-3-8B": SIZE_8B,
        "Meta-Llama-3-70B": SIZE_70B,
        "Llama-3.1-8B": replace(SIZE_8B, arch=LLAMA31),
        "Llama-3.1-70B": replace(SIZE_70B, arch=LLAMA31),
        "Llama-3.1-405B": replace(
            SIZE_70B, layers=126, embed=16384, heads=128, mlp=53248, arch=LLAMA31
        ),
        "Llama-3.2-1B": replace(
            SIZE_8B, layers=16, embed=2048, head_dim=64, mlp=8192, arch=LLAMA32
        ),
        "Llama-3.2-3B": replace(SIZE_8B, layers=28, embed=3072, heads=24, mlp=8192, arch=LLAMA32),
        "Llama-3.3-70B-Instruct": replace(SIZE_70B, arch=LLAMA31),
        "SmolLM-135M": SMOL_135M,
        "SmolLM-360M": SMOL_360M,
        "SmolLM-1.7B": SMOL_1_7B,
        "SmolLM2-135M": replace(SMOL_135M, arch=SMOLLM2),
        "SmolLM2-360M": replace(SMOL_360M, arch=SMOLLM2),
        "SmolLM2-1.7B": replace(SMOL_1_7B, arch=SMOLLM2_LARGE),
    },
)
