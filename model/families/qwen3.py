"""Qwen 3: queries and keys normed per head, heads whose size is a choice of its own."""

from dataclasses import replace

from model.config import Arch, Attention, Head, ModelConfig, Norm, Rope
from model.families import llama, qwen2
from model.families.family import Family

NORMED = Arch(
    norm=Norm(eps=1e-6), rope=Rope(theta=1_000_000.0), attention=Attention(qk_norm="head")
)
TIED = replace(NORMED, head=Head(tied=True))

SIZE_0_6B = ModelConfig(
    layers=28, embed=1024, heads=16, kv_heads=8, head_dim=128, mlp=3072, vocab=151_936, arch=TIED
)
SIZE_8B = ModelConfig(
    layers=36, embed=4096, heads=32, kv_heads=8, head_dim=128, mlp=12288, vocab=151_936, arch=NORMED
)

FAMILY = Family(
    name="qwen3",
    published="Yang et al. 2025, arXiv:2505.09388",
    architectures={"Qwen3ForCausalLM": "language", "Qwen3Model": "none"},
    arch=Arch(attention=Attention(qk_norm="head")),
    keys={**llama.KEYS, "attention_bias": llama.BIAS},
    defaults={
        **qwen2.FAMILY.defaults,
        "head_dim": 128,
        "attention_bias": False,
    },
    names={**llama.NAMES, **llama.QK_NAMES},
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf="qwen3",
    sizes={  # config.json of Qwen/NAME
        "Qwen3-0.6B": SIZE_0_6B,
        "Qwen3-1.7B": replace(SIZE_0_6B, embed=2048, mlp=6144),
        "Qwen3-4B": replace(SIZE_8B, embed=2560, mlp=9728, arch=TIED),
        "Qwen3-8B": SIZE_8B,
        "Qwen3-14B": replace(SIZE_8B, layers=40, embed=5120, heads=40, mlp=17408),
        "Qwen3-32B": replace(SIZE_8B, layers=64, embed=5120, heads=64, mlp=25600),
    },
)
