"""Parameters and FLOPs of a Transformer, counted from its sizes.

Sizes: D embed, N heads, K kv_heads, H head_dim, F mlp, L layers, V vocab, T sequence.
"""

from model.config import GATED, ModelConfig


def _mlp(config: ModelConfig, layer: int, active: bool) -> int:
    """Matmul weights of one feed-forward; of experts, all or those of one token."""
    moe, gates = config.arch.moe, 2 if config.arch.activation in GATED else 1
    if not config.sparse(layer):
        return (gates + 1) * config.mlp * config.embed
    used = moe.active if active else moe.experts
    return used * (gates + 1) * (moe.mlp or config.mlp) * config.embed + moe.experts * config.embed


def _head(config: ModelConfig) -> int:
    """Matmul weights of the head, the table over the vocabulary among them."""
    head, D = config.arch.head, config.embed
    over_vocab = _vocab(config) * D
    sizes = {"language": over_vocab, "masked": over_vocab + D * D, "none": 0, "pooler": D * D}
    return sizes.get(head.kind, D * D + head.labels * D)


def matmul_params(config: ModelConfig, *, active: bool = True) -> int:
    """Weights that every token is multiplied with: the head, tied or not, but no lookup.

    Of experts those of one token, or all with `active=False`.
    """
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim * config.embed
    mlp = sum(_mlp(config, layer, active) for layer in range(config.layers))
    return config.layers * attention + mlp + _head(config)


def params(config: ModelConfig) -> int:
    """All parameters, exactly."""
    arch, head, D = config.arch, config.arch.head, config.embed
    norm = D * (2 if arch.norm.bias else 1)
    gates = 2 if arch.activation in GATED else 1
    layer = (4 if arch.norm.placement == "sandwich" else 2) * norm
    if arch.attention.qk_norm == "head":
        layer += 2 * config.head_dim
    if arch.attention.qk_norm == "all":
        layer += (config.heads + config.kv_heads) * config.head_dim
    if arch.attention.qkv_bias:
        layer += (config.heads + 2 * config.kv_heads) * config.head_dim
    if arch.attention.out_bias:
        layer += D
    if arch.mlp_bias:
        layer += gates * config.mlp + D
    embeddings = arch.embeddings
    rows = _vocab(config) + embeddings.positions + embeddings.types
    if head.kind in ("language", "masked") and head.tied:
        rows -= _vocab(config)  # counted with the head
    last = 0 if arch.norm.placement == "post" else norm
    extra = {"language": 0, "none": 0, "masked": D + norm + _vocab(config), "pooler": D}
    biases = extra.get(head.kind, D + head.labels)
    own = rows * D + last + biases + (norm if embeddings.norm else 0)
    return matmul_params(config, active=False) + config.layers * layer + own


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
    causal = config.arch.attention.causal
    seen = sum(
        visible(seq, config.window(layer)) if causal else seq for layer in range(config.layers)
    )
    return 6.0 * matmul_params(config) + 12.0 * config.heads * config.head_dim * seen


def _vocab(config: ModelConfig) -> int:
    if not config.vocab:
        raise ValueError("vocab=0: give the config its size first, ModelConfig.with_vocab(tokens)")
    return config.vocab
