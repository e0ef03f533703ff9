"""Parameters and FLOPs of a Transformer, counted from its sizes.

Sizes: D embed, N heads, K kv_heads, H head_dim, F mlp, L layers, V vocab, T sequence.
"""

from model.config import ModelConfig

GATED = ("swiglu", "geglu")


def matmul_params(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the head, tied or not, but no lookup."""
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim * config.embed
    gates = 2 if config.arch.activation in GATED else 1
    mlp = (gates + 1) * config.mlp * config.embed
    return config.layers * (attention + mlp) + _vocab(config) * config.embed


def params(config: ModelConfig) -> int:
    """All parameters, exactly."""
    arch, D = config.arch, config.embed
    norm = D * (2 if arch.norm.bias else 1)
    gates = 2 if arch.activation in GATED else 1
    layer = 2 * norm
    if arch.attention.qk_norm:
        layer += 2 * config.head_dim
    if arch.attention.qkv_bias:
        layer += (config.heads + 2 * config.kv_heads) * config.head_dim
    if arch.attention.out_bias:
        layer += D
    if arch.mlp_bias:
        layer += gates * config.mlp + D
    embedding = 0 if arch.head.tied else _vocab(config) * D
    return matmul_params(config) + config.layers * layer + norm + embedding


def visible(seq: int, window: int = 0) -> float:
    """Tokens that a token of a `seq` long row sees on average, itself counted half.

    Half of itself, so that full attention is T/2, as published figures count it.
    """
    window = min(window or seq, seq)
    return window - window * (window - 1) / (2 * seq) - 0.5


def flops_per_token(config: ModelConfig, seq: int) -> float:
    """FLOPs of forward and backward pass per token: the model's, so recomputation is not counted.

    6 per matmul weight (Kaplan et al. 2020, arXiv:2001.08361) and 12 N H per visible token and
    layer (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, with causal attention counted half).
    Rows packed from short documents see less than this.
    """
    windows = config.arch.attention.windows
    seen = sum(visible(seq, windows[i % len(windows)]) for i in range(config.layers))
    return 6.0 * matmul_params(config) + 12.0 * config.heads * config.head_dim * seen


def _vocab(config: ModelConfig) -> int:
    if not config.vocab:
        raise ValueError("vocab=0: give the config its size first, ModelConfig.with_vocab(tokens)")
    return config.vocab
