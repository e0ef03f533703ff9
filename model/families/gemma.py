"""Gemma: embeddings scaled up, norms that store what they add to one, wide heads."""

from dataclasses import replace

from model.config import Arch, Embeddings, Head, ModelConfig, Norm, Rope
from model.families import llama
from model.families.family import GATED_CURVES, Family, Key

ARCH = Arch(
    norm=Norm(eps=1e-6, offset=1.0),
    rope=Rope(theta=10_000.0),
    head=Head(tied=True),
    embeddings=Embeddings(scale=True),
    activation="geglu",
)
SIZE_7B = ModelConfig(
    layers=28, embed=3072, heads=16, kv_heads=16, head_dim=256, mlp=24576, vocab=256_000, arch=ARCH
)

FAMILY = Family(
    name="gemma",
    published="Gemma Team 2024, arXiv:2403.08295",
    architectures={"GemmaForCausalLM": "language", "GemmaModel": "none"},
    arch=Arch(norm=ARCH.norm, embeddings=ARCH.embeddings),
    keys={
        **llama.KEYS,
        # The first release says "gelu" and means the curve with tanh.
        "hidden_act": Key(("arch.activation",), {**GATED_CURVES, "gelu": "geglu"}),
        "attention_bias": llama.BIAS,
    },
    defaults={
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "max_position_embeddings": 8192,
        "rope_theta": 10_000.0,
    },
    names=llama.NAMES,
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    only={
        "use_bidirectional_attention": (None, False),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
    },
    gguf="gemma",
    sizes={  # config.json of google/NAME
        "gemma-2b": replace(SIZE_7B, layers=18, embed=2048, heads=8, kv_heads=1, mlp=16384),
        "gemma-7b": SIZE_7B,
    },
)
