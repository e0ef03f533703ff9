"""Mixtral: Mistral's shape, each feed-forward made of eight experts of which two work."""

from dataclasses import replace

from model.config import Arch, ModelConfig, Moe, Norm, Rope
from model.families import llama
from model.families.family import Family

SPARSE = Arch(norm=Norm(eps=1e-5), rope=Rope(theta=1_000_000.0), moe=Moe(experts=8, active=2))
SIZE_8X7B = ModelConfig(
    layers=32, embed=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32000, arch=SPARSE
)

FAMILY = Family(
    name="mixtral",
    published="Jiang et al. 2024, arXiv:2401.04088",
    architectures={"MixtralForCausalLM": "language", "MixtralModel": "none"},
    arch=Arch(),
    keys={
        **llama.KEYS,
        "num_local_experts": "arch.moe.experts",
        "num_experts_per_tok": "arch.moe.active",
    },
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
    },
    names={
        **llama.NAMES,
        "model.layers.{}.block_sparse_moe.gate.weight": "block.mlp.router.weight",
        "model.layers.{}.block_sparse_moe.experts.{}.w1.weight": (
            "block.mlp.gate_up.weight[expert][gate]"
        ),
        "model.layers.{}.block_sparse_moe.experts.{}.w3.weight": (
            "block.mlp.gate_up.weight[expert][up]"
        ),
        "model.layers.{}.block_sparse_moe.experts.{}.w2.weight": "block.mlp.down.weight[expert]",
    },
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    spellings={"num_experts": "num_local_experts"},
    gguf="llama",
    sizes={  # config.json of mistralai/NAME
        "Mixtral-8x7B-v0.1": SIZE_8X7B,
        "Mixtral-8x22B-v0.1": replace(SIZE_8X7B, layers=56, embed=6144, heads=48, mlp=16384),
    },
)
