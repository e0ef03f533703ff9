"""Phi-3 and Phi-4: Llama's shape with queries, keys and values in one tensor, gate and up too."""

from dataclasses import replace

from model.config import Arch, Attention, ModelConfig, Norm, Rope
from model.families import llama
from model.families.family import Family

WINDOWED = Arch(norm=Norm(eps=1e-5), attention=Attention(windows=(2047,)))
SIZE_MINI = ModelConfig(
    layers=32, embed=3072, heads=32, kv_heads=32, head_dim=96, mlp=8192, vocab=32064, arch=WINDOWED
)
SIZE_MEDIUM = ModelConfig(
    layers=40,
    embed=5120,
    heads=40,
    kv_heads=10,
    head_dim=128,
    mlp=17920,
    vocab=32064,
    arch=WINDOWED,
)

FAMILY = Family(
    name="phi3",
    published="Abdin et al. 2024, arXiv:2404.14219; Phi-4: arXiv:2412.08905",
    architectures={"Phi3ForCausalLM": "language", "Phi3Model": "none"},
    arch=Arch(),
    keys=llama.KEYS,
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
        "sliding_window": None,
    },
    names={
        "model.embed_tokens.weight": "embedding.table",
        "model.layers.{}.input_layernorm.weight": "block.norm1.scale",
        "model.layers.{}.self_attn.qkv_proj.weight": "block.attention.qkv.weight[q,k,v]",
        "model.layers.{}.self_attn.o_proj.weight": "block.attention.out.weight",
        "model.layers.{}.post_attention_layernorm.weight": "block.norm2.scale",
        "model.layers.{}.mlp.gate_up_proj.weight": "block.mlp.gate_up.weight[gate,up]",
        "model.layers.{}.mlp.down_proj.weight": "block.mlp.down.weight",
        "model.norm.weight": "norm.scale",
    },
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    scalings=("none",),
    gguf="phi3",
    sizes={  # config.json of microsoft/NAME
        "Phi-3-mini-4k-instruct": SIZE_MINI,
        "Phi-3-medium-4k-instruct": SIZE_MEDIUM,
        "phi-4": replace(
            SIZE_MEDIUM,
            vocab=100_352,
            arch=Arch(norm=Norm(eps=1e-5), rope=Rope(theta=250_000.0)),
        ),
    },
)
