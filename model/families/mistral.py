"""Mistral: Llama's shape with a sliding window, which later releases switch off."""

from dataclasses import replace

from model.config import Arch, Attention, ModelConfig, Norm, Rope
from model.families import llama
from model.families.family import Family

WINDOWED = Arch(norm=Norm(eps=1e-5), attention=Attention(windows=(4096,)))
FULL = Arch(norm=Norm(eps=1e-5), rope=Rope(theta=1_000_000.0))

SIZE_7B = ModelConfig(
    layers=32, embed=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32000, arch=WINDOWED
)

FAMILY = Family(
    name="mistral",
    published="Jiang et al. 2023, arXiv:2310.06825",
    architectures={"MistralForCausalLM": "language", "MistralModel": "none"},
    arch=Arch(),
    keys=llama.KEYS,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131_072,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
    names=llama.NAMES,
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf="llama",
    sizes={  # config.json of mistralai/NAME
        "Mistral-7B-v0.1": SIZE_7B,
        "Mistral-7B-Instruct-v0.2": replace(SIZE_7B, arch=FULL),
        "Mistral-7B-v0.3": replace(SIZE_7B, vocab=32768, arch=FULL),
        "Mistral-Nemo-Base-2407": replace(SIZE_7B, layers=40, embed=5120, vocab=131_072, arch=FULL),
        "Mistral-Small-24B-Base-2501": replace(
            SIZE_7B,
            layers=40,
            embed=5120,
            mlp=32768,
            vocab=131_072,
            arch=replace(FULL, rope=Rope(theta=100_000_000.0)),
        ),
    },
)
