"""Gemma 3, its language part: five windowed layers to a full one, each kind with its RoPE."""

from dataclasses import replace

from model.config import Arch, Attention, Embeddings, Head, ModelConfig, Norm, Rope, Scaling
from model.families import gemma2, llama
from model.families.family import Family

SMALL = Arch(
    norm=Norm(eps=1e-6, offset=1.0, placement="sandwich"),
    rope=Rope(theta=1_000_000.0, local_theta=10_000.0),
    attention=Attention(windows=(512,) * 5 + (0,), qk_norm="head", scale=256**-0.5),
    head=Head(tied=True),
    embeddings=Embeddings(scale=True),
    activation="geglu",
)
LARGE = replace(
    SMALL,
    rope=replace(SMALL.rope, scaling=Scaling("linear", factor=8.0)),
    attention=replace(SMALL.attention, windows=(1024,) * 5 + (0,)),
)
SIZE_1B = ModelConfig(
    layers=26, embed=1152, heads=4, kv_heads=1, head_dim=256, mlp=6912, vocab=262_144, arch=SMALL
)
# With 64 ids more, of images, which the language part's table holds too.
SIZE_4B = ModelConfig(
    layers=34, embed=2560, heads=8, kv_heads=4, head_dim=256, mlp=10240, vocab=262_208, arch=LARGE
)

FAMILY = Family(
    name="gemma3_text",
    published="Gemma Team 2025, arXiv:2503.19786",
    architectures={
        "Gemma3ForCausalLM": "language",
        "Gemma3ForConditionalGeneration": "language",
        "Gemma3TextModel": "none",
    },
    arch=Arch(norm=SMALL.norm, embeddings=SMALL.embeddings, attention=Attention(qk_norm="head")),
    keys=gemma2.KEYS,
    defaults={
        **gemma2.FAMILY.defaults,
        "vocab_size": 262_208,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    names={**gemma2.NAMES, **llama.QK_NAMES},
    heads=llama.HEADS,
    copies=llama.COPIES,
    prefix="model.",
    ignored=(
        *llama.IGNORED,
        "vision_tower.*",
        "multi_modal_projector.*",
        "model.vision_tower.*",
        "model.multi_modal_projector.*",
    ),
    aliases={
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "language_model.",
        "model.language_model.": "language_model.",
        "language_model.": "model.",
    },
    only={"use_bidirectional_attention": (None, False)},
    spellings={"_sliding_window_pattern": "sliding_window_pattern"},
    inner="text_config",
    outer="gemma3",
    gguf="gemma3",
    sizes={  # config.json of google/NAME
        "gemma-3-270m": replace(SIZE_1B, layers=18, embed=640, mlp=2048),
        "gemma-3-1b-pt": SIZE_1B,
        "gemma-3-4b-pt": SIZE_4B,
        "gemma-3-12b-pt": replace(SIZE_4B, layers=48, embed=3840, heads=16, kv_heads=8, mlp=15360),
        "gemma-3-27b-pt": replace(
            SIZE_4B,
            layers=62,
            embed=5376,
            heads=32,
            kv_heads=16,
            head_dim=128,
            mlp=21504,
            arch=replace(LARGE, attention=replace(LARGE.attention, scale=168**-0.5)),
        ),
    },
)
