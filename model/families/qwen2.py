"""Qwen 2 and 2.5: Llama's shape with biases on queries, keys and values."""

from dataclasses import replace

from model.config import Arch, Attention, Head, ModelConfig, Norm, Rope
from model.families import llama
from model.families.family import Family

# The windows that config.json can ask for, in the layers from `max_window_layers` on.
WINDOWS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

BIASED = Arch(norm=Norm(eps=1e-6), rope=Rope(theta=1_000_000.0), attention=Attention(qkv_bias=True))
TIED = replace(BIASED, head=Head(tied=True))
LARGE = replace(BIASED, norm=Norm(eps=1e-5))  # of 2.5, from 14B on

SIZE_0_5B = ModelConfig(
    layers=24, embed=896, heads=14, kv_heads=2, head_dim=64, mlp=4864, vocab=151_936, arch=TIED
)
SIZE_1_5B = ModelConfig(
    layers=28, embed=1536, heads=12, kv_heads=2, head_dim=128, mlp=8960, vocab=151_936, arch=TIED
)
SIZE_7B = ModelConfig(
    layers=28, embed=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocab=152_064, arch=BIASED
)
SIZE_72B = ModelConfig(
    layers=80, embed=8192, heads=64, kv_heads=8, head_dim=128, mlp=29568, vocab=152_064, arch=BIASED
)

FAMILY = Family(
    name="qwen2",
    published="Yang et al. 2024, arXiv:2407.10671; Qwen 2.5: arXiv:2412.15115",
    architectures={"Qwen2ForCausalLM": "language", "Qwen2Model": "none"},
    arch=Arch(attention=Attention(qkv_bias=True)),
    keys=llama.KEYS,
    defaults={
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rope_theta": 10_000.0,
        **WINDOWS,
    },
    names=llama.NAMES,
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf="qwen2",
    sizes={  # config.json of Qwen/NAME
        "Qwen2-0.5B": SIZE_0_5B,
        "Qwen2-1.5B": SIZE_1_5B,
        "Qwen2-7B": SIZE_7B,
        "Qwen2-72B": SIZE_72B,
        "Qwen2.5-0.5B": SIZE_0_5B,
        "Qwen2.5-1.5B": SIZE_1_5B,
        "Qwen2.5-3B": replace(SIZE_1_5B, layers=36, embed=2048, heads=16, mlp=11008),
        "Qwen2.5-7B": SIZE_7B,
        "Qwen2.5-14B": replace(
            SIZE_7B, layers=48, embed=5120, heads=40, kv_heads=8, mlp=13824, arch=LARGE
        ),
        "Qwen2.5-32B": replace(
            SIZE_7B, layers=64, embed=5120, heads=40, kv_heads=8, mlp=27648, arch=LARGE
        ),
        "Qwen2.5-72B": replace(SIZE_72B, arch=LARGE),
    },
)
