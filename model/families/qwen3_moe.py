"""Qwen 3 with experts: each token's feed-forward is done by the few that a router prefers."""

from dataclasses import replace

from model.config import Arch, Attention, ModelConfig, Moe, Norm, Rope
from model.families import llama
from model.families.family import Family

NORMED = Arch(
    norm=Norm(eps=1e-6),
    rope=Rope(theta=1_000_000.0),
    attention=Attention(qk_norm="head"),
    moe=Moe(experts=128, active=8, mlp=768, normalize=True),
)
SIZE_30B = ModelConfig(
    layers=48, embed=2048, heads=32, kv_heads=4, head_dim=128, mlp=6144, vocab=151_936, arch=NORMED
)

FAMILY = Family(
    name="qwen3_moe",
    published="Yang et al. 2025, arXiv:2505.09388",
    architectures={"Qwen3MoeForCausalLM": "language", "Qwen3MoeModel": "none"},
    arch=Arch(attention=Attention(qk_norm="head")),
    keys={
        **llama.KEYS,
        "attention_bias": llama.BIAS,
        "num_experts": "arch.moe.experts",
        "num_experts_per_tok": "arch.moe.active",
        "moe_intermediate_size": "arch.moe.mlp",
        "decoder_sparse_step": "arch.moe.every",
        "norm_topk_prob": "arch.moe.normalize",
    },
    defaults={
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "max_position_embeddings": 32768,
        "rope_theta": 10_000.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    names={
        **llama.NAMES,
        **llama.QK_NAMES,
        "model.layers.{}.mlp.gate.weight": "block.mlp.router.weight",
        "model.layers.{}.mlp.experts.{}.gate_proj.weight": "block.mlp.gate_up.weight[expert][gate]",
        "model.layers.{}.mlp.experts.{}.up_proj.weight": "block.mlp.gate_up.weight[expert][up]",
        "model.layers.{}.mlp.experts.{}.down_proj.weight": "block.mlp.down.weight[expert]",
    },
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    only={"mlp_only_layers": (None, [])},
    spellings={"num_local_experts": "num_experts"},
    gguf="qwen3moe",
    sizes={  # config.json of Qwen/NAME
        "Qwen3-30B-A3B": SIZE_30B,
        "Qwen3-235B-A22B": replace(
            SIZE_30B,
            layers=94,
            embed=4096,
            heads=64,
            mlp=12288,
            arch=replace(NORMED, moe=replace(NORMED.moe, mlp=1536)),
        ),
    },
)
