"""Parameters and FLOPs against published counts."""

import dataclasses

import numpy as np
import pytest

from costs.flops import flops_per_token, matmul_params, params, visible
from model.config import Arch, Attention, Embeddings, Head, ModelConfig, Norm, Rope


def decoder(layers, embed, heads, kv_heads, head_dim, mlp, vocab, **arch):
    return ModelConfig(
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        vocab=vocab,
        arch=Arch(**arch),
    )


LLAMA_1B = decoder(16, 2048, 32, 8, 64, 8192, 128_256)
TIED = Head(tied=True)
GPT2 = {
    "norm": Norm("layer", bias=True),
    "attention": Attention(qkv_bias=True, out_bias=True),
    "head": TIED,
    "activation": "gelu",
    "mlp_bias": True,
    "embeddings": Embeddings(positions=1024),
    "rope": Rope(0),
}
QK_NORM = Attention(qk_norm="head")
PUBLISHED = {
    "Llama-3-8B": (decoder(32, 4096, 32, 8, 128, 14_336, 128_256), 8_030_261_248),
    "Llama-3.2-1B, untied": (LLAMA_1B, 1_498_482_688),
    "Llama-3.2-1B": (decoder(16, 2048, 32, 8, 64, 8192, 128_256, head=TIED), 1_235_814_400),
    "Mistral-7B": (decoder(32, 4096, 32, 8, 128, 14_336, 32_000), 7_241_732_096),
    "SmolLM2-135M": (decoder(30, 576, 9, 3, 64, 1536, 49_152, head=TIED), 134_515_008),
    "Qwen2.5-0.5B": (
        decoder(24, 896, 14, 2, 64, 4864, 151_936, head=TIED, attention=Attention(qkv_bias=True)),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        decoder(
            28, 1024, 16, 8, 128, 3072, 151_936, head=TIED, attention=Attention(qk_norm="head")
        ),
        596_049_920,
    ),
    "GPT-2": (decoder(12, 768, 12, 12, 64, 3072, 50_257, **GPT2), 124_439_808),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name):
    config, published = PUBLISHED[name]
    assert params(config) == published


def test_matmul_parameters_hold_the_head_tied_or_not_but_no_lookup():
    embedding, norms = 128_256 * 2048, 33 * 2048
    assert matmul_params(LLAMA_1B) == 1_498_482_688 - embedding - norms
    tied = dataclasses.replace(LLAMA_1B, arch=Arch(head=TIED))
    assert matmul_params(tied) == matmul_params(LLAMA_1B)


def test_flops_give_the_mfu_that_was_published_for_the_peers():
    # torchtitan: 48,640 tokens/s of this shape at 8192 tokens on an H100 are 44.4 %.
    assert 48_640 * flops_per_token(LLAMA_1B, 8192) / 989.4e12 == pytest.approx(0.444, abs=5e-4)


def test_attention_flops_are_the_causal_half():
    heads_dims = LLAMA_1B.heads * LLAMA_1B.head_dim
    attention = flops_per_token(LLAMA_1B, 8192) - 6 * matmul_params(LLAMA_1B)
    assert attention == 12 * 16 * heads_dims * 8192 / 2


@pytest.mark.parametrize(("seq", "window"), [(1, 0), (8, 0), (9, 1), (9, 4), (9, 9), (9, 50)])
def test_visible_tokens_are_the_mean_of_the_mask_with_half_its_diagonal(seq, window):
    query, key = np.mgrid[:seq, :seq]
    mask = np.where(query == key, 0.5, (key < query) & (query - key < (window or seq)))
    assert visible(seq, window) == pytest.approx(mask.sum() / seq)


def test_windows_repeat_over_the_layers():
    arch = Arch(attention=Attention(windows=(128, 128, 0)))
    config = decoder(4, 64, 2, 2, 32, 128, 256)
    mixed = dataclasses.replace(config, arch=arch)
    attention = flops_per_token(mixed, 1024) - 6 * matmul_params(mixed)
    assert attention == 12 * 64 * (3 * visible(1024, 128) + visible(1024))
    assert flops_per_token(mixed, 128) == flops_per_token(config, 128)


def test_a_vocabulary_that_is_not_known_yet_is_refused():
    with pytest.raises(ValueError, match=r"vocab=0.*with_vocab"):
        params(ModelConfig())
