"""OLMo 2: norms after each branch, and over all queries and all keys at once."""

from dataclasses import replace

from model.config import Arch, Attention, ModelConfig, Norm, Rope
from model.families import llama
from model.families.family import Family

ARCH = Arch(
    norm=Norm(eps=1e-6, placement="output"),
    rope=Rope(theta=500_000.0),
    attention=Attention(qk_norm="all"),
)
SIZE_7B = ModelConfig(
    layers=32, embed=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=100_352, arch=ARCH
)

FAMILY = Family(
    name="olmo2",
    published="OLMo Team 2024, arXiv:2501.00656",
    architectures={"Olmo2ForCausalLM": "language", "Olmo2Model": "none"},
    arch=Arch(norm=ARCH.norm, attention=ARCH.attention),
    keys={**llama.KEYS, "attention_bias": llama.BIAS},
    defaults={
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    },
    names={
        **llama.NAMES,
        **llama.QK_NAMES,
        "model.layers.{}.post_attention_layernorm.weight": "block.post1.scale",
        "model.layers.{}.post_feedforward_layernorm.weight": "block.post2.scale",
    },
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf="olmo2",
    sizes={  # config.json of allenai/NAME
        "OLMo-2-0425-1B": replace(SIZE_7B, layers=16, embed=2048, heads=16, kv_heads=16, mlp=8192),
        "OLMo-2-1124-7B": SIZE_7B,
        "OLMo-2-1124-13B": replace(
            SIZE_7B, layers=40, embed=5120, heads=40, kv_heads=40, mlp=13824
        ),
        "OLMo-2-0325-32B": replace(SIZE_7B, layers=64, embed=5120, heads=40, kv_heads=8, mlp=27648),
    },
)
