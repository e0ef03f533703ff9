"""Gemma 2: sandwich norms, soft-caps, and windows in every other layer."""

from dataclasses import replace

from model.config import Arch, Attention, Embeddings, Head, ModelConfig, Norm, Rope
from model.families import llama
from model.families.family import GATED_CURVES, Family, Key

NAMES = {
    **llama.NAMES,
    "model.layers.{}.post_attention_layernorm.weight": "block.post1.scale",
    "model.layers.{}.pre_feedforward_layernorm.weight": "block.norm2.scale",
    "model.layers.{}.post_feedforward_layernorm.weight": "block.post2.scale",
}
KEYS = {
    **{key: field for key, field in llama.KEYS.items() if key != "hidden_act"},
    "hidden_activation": Key(("arch.activation",), GATED_CURVES),
    "attention_bias": llama.BIAS,
    "query_pre_attn_scalar": Key(("arch.attention.scale",), power=-0.5),
    "attn_logit_softcapping": "arch.attention.softcap",
    "final_logit_softcapping": "arch.head.softcap",
}

ARCH = Arch(
    norm=Norm(eps=1e-6, offset=1.0, placement="sandwich"),
    rope=Rope(theta=10_000.0),
    attention=Attention(windows=(4096, 0), softcap=50.0, scale=256**-0.5),
    head=Head(tied=True, softcap=30.0),
    embeddings=Embeddings(scale=True),
    activation="geglu",
)
SIZE_2B = ModelConfig(
    layers=26, embed=2304, heads=8, kv_heads=4, head_dim=256, mlp=9216, vocab=256_000, arch=ARCH
)

FAMILY = Family(
    name="gemma2",
    published="Gemma Team 2024, arXiv:2408.00118",
    architectures={"Gemma2ForCausalLM": "language", "Gemma2Model": "none"},
    arch=Arch(norm=ARCH.norm, embeddings=ARCH.embeddings),
    keys=KEYS,
    defaults={
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "layer_types": None,
    },
    names=NAMES,
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
    only={"use_bidirectional_attention": (None, False)},
    gguf="gemma2",
    sizes={  # config.json of google/NAME
        "gemma-2-2b": SIZE_2B,
        "gemma-2-9b": replace(SIZE_2B, layers=42, embed=3584, heads=16, kv_heads=8, mlp=14336),
        "gemma-2-27b": replace(
            SIZE_2B,
            layers=46,
            embed=4608,
            heads=32,
            kv_heads=16,
            head_dim=128,
            mlp=36864,
            arch=replace(ARCH, attention=replace(ARCH.attention, scale=144**-0.5)),
        ),
    },
)
