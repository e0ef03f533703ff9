"""Whole tiny Transformers against NumPy, its parameters counted, its config's messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from costs import flops
from model import transformer
from model.config import (
    Arch,
    Attention,
    Embeddings,
    Head,
    Init,
    ModelConfig,
    Moe,
    Norm,
    Rope,
    Scaling,
)
from tests.model import reference
from tests.model.tiny import TINY, WHOLE, decoder, random_params
from tests.tolerance import assert_formula

BIASES = {"norm": Norm("layer", bias=True), "mlp_bias": True}


def bert(head, types=2, first=0, **how):
    return Arch(
        norm=Norm("layer", eps=1e-12, bias=True, placement="post"),
        rope=Rope(0),
        embeddings=Embeddings(positions=12, first=first, types=types, norm=True),
        attention=Attention(causal=False, qkv_bias=True, out_bias=True),
        head=Head(head, **how),
        activation="gelu_erf",
        mlp_bias=True,
    )


MODELS = {
    "llama": {},
    "tied": {"arch": Arch(head=Head(tied=True))},
    "gpt2": {
        "kv_heads": 4,
        "arch": Arch(
            rope=Rope(0),
            embeddings=Embeddings(positions=8),
            attention=Attention(qkv_bias=True, out_bias=True),
            head=Head(tied=True),
            activation="gelu",
            **BIASES,
        ),
    },
    "qwen2": {"arch": Arch(attention=Attention(qkv_bias=True))},
    "qwen3": {"arch": Arch(attention=Attention(qk_norm="head", scale=0.2))},
    "gemma2": {
        "layers": 4,
        "arch": Arch(
            attention=Attention(windows=(3, 0), softcap=2.0),
            head=Head(tied=True, softcap=1.5),
            norm=Norm(offset=1.0, placement="sandwich"),
            activation="geglu",
            embeddings=Embeddings(scale=True),
        ),
    },
    "gemma3": {
        "layers": 5,
        "kv_heads": 1,
        "arch": Arch(rope=Rope(1e6, 1e4), attention=Attention(windows=(2, 2, 0), qk_norm="head")),
    },
    "olmo2": {
        "arch": Arch(norm=Norm(placement="output"), attention=Attention(qk_norm="all")),
    },
    "mixtral": {"arch": Arch(moe=Moe(experts=4))},
    "experts in every other layer": {
        "layers": 5,
        "arch": Arch(
            attention=Attention(windows=(3, 0)),
            moe=Moe(experts=3, active=2, every=2, mlp=7, normalize=False),
        ),
    },
    "bert, masked": {"kv_heads": 4, "arch": bert("masked", tied=True)},
    "roberta, masked, its own table": {"arch": bert("masked", first=2)},
    "bert, classifier": {"arch": bert("classifier", labels=3, curve="relu")},
    "bert, pooler": {"arch": bert("pooler")},
    "bert, nothing": {"arch": bert("none", types=0)},
    "one layer of a longer pattern": {
        "layers": 1,
        "arch": Arch(attention=Attention(windows=(2, 0)), norm=Norm("layer"), activation="relu2"),
    },
    "relu, biases on what is split": {
        "heads": 2,
        "arch": Arch(attention=Attention(qkv_bias=True), activation="relu", mlp_bias=True),
    },
}


def config(name):
    return dataclasses.replace(TINY, **MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_its_formulas_say(one_device, name):
    cfg = config(name)
    params = random_params(cfg)
    segments = np.array([[1] * 4 + [2] * 5 + [0]])
    positions = np.array([[*range(4), *range(5), 0]])
    ids = np.random.default_rng(1).integers(0, cfg.vocab, size=(1, 10))
    rows = ids, positions, segments, (ids % 2 if cfg.arch.embeddings.types else 0 * ids)
    ours = jax.jit(decoder(cfg, params).logits)(*map(jnp.asarray, rows))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    assert_formula(ours[0], reference.logits(exact, cfg, *(row[0] for row in rows)))


def test_every_field_of_a_model_changes_its_logits(one_device):
    """What both sides ignored would pass the test above."""
    cfg, ids = config("gemma2"), np.arange(10)
    exact = jax.tree.map(np.asarray, random_params(cfg))

    def value(**arch):
        other = dataclasses.replace(cfg, arch=dataclasses.replace(cfg.arch, **arch))
        return float(reference.logits(exact, other, ids, ids, np.ones(10)).sum())

    attention = cfg.arch.attention
    values = [
        value(),
        value(attention=dataclasses.replace(attention, windows=(0, 3))),
        value(attention=dataclasses.replace(attention, softcap=0.0)),
        value(attention=dataclasses.replace(attention, scale=1.0)),
        value(head=Head(tied=True)),
        value(embeddings=Embeddings()),
        value(activation="swiglu"),
        value(rope=Rope(1e4, 10.0)),
        value(norm=Norm(eps=0.5)),
    ]
    assert len({round(v, 3) for v in values}) == len(values)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_as_many_parameters_as_costs_counts(one_device, name):
    cfg = config(name)
    _, shapes, _ = transformer.abstract(cfg, WHOLE)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == flops.params(cfg)


def test_eight_billion_parameters_are_made_without_one_of_them(one_device):
    cfg = ModelConfig(
        layers=32, embed=4096, heads=32, kv_heads=8, head_dim=128, mlp=14_336, vocab=128_256
    )
    _, shapes, _ = transformer.abstract(cfg, WHOLE)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 8_030_261_248


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_parameters_have_the_dtype_that_was_asked_for(one_device, param_dtype):
    cfg = dataclasses.replace(config("gpt2"), param_dtype=param_dtype)
    _, shapes, _ = transformer.abstract(cfg, WHOLE)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(param_dtype)}


def test_bfloat16_compute_gives_float32_logits_near_the_exact_ones(one_device):
    cfg = config("llama")
    params = random_params(cfg)
    rows = jnp.arange(10)[None], jnp.arange(10)[None], jnp.ones((1, 10), jnp.int32)
    exact = jax.jit(decoder(cfg, params).logits)(*rows)
    rough = jax.jit(decoder(dataclasses.replace(cfg, dtype="bfloat16"), params).logits)(*rows)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(np.subtract(rough, exact)) / np.linalg.norm(exact)
    assert 1e-4 < error < 2**-5  # bfloat16 was used, and rounds to 2^-9 a matmul


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ModelConfig(heads=6, kv_heads=4), "heads=6 must be a multiple of kv_heads=4"),
        (lambda: ModelConfig(head_dim=5), "head_dim=5 must be even"),
        (lambda: ModelConfig(layers=0), "layers=0 must be at least 1"),
        (lambda: ModelConfig(vocab=-1), "vocab=-1 must be at least 0"),
        (lambda: ModelConfig(dtype="float16"), "dtype='float16' is none of float32, bfloat16"),
        (
            lambda: ModelConfig(remat="some"),
            "remat='some' is none of none, dots, mlp, attention, full",
        ),
        (lambda: ModelConfig(vocab=100).with_vocab(256), "vocab=100 is smaller than .* 256 ids"),
        (lambda: Arch(activation="silu"), "activation='silu' is none of swiglu"),
        (lambda: Norm("batch"), "kind='batch' is none of rms, layer"),
        (lambda: Norm("rms", bias=True), "bias=True needs kind='layer'"),
        (lambda: Norm(eps=0.0), "eps=0.0 must be positive"),
        (lambda: Norm(placement="before"), "placement='before' is none of pre, post, output"),
        (lambda: Rope(theta=-1.0), "theta=-1.0 must be at least 0"),
        (lambda: Scaling("ntk"), "kind='ntk' is none of none, linear, llama3, yarn"),
        (lambda: Scaling(factor=0.5), "factor=0.5 must be at least 1"),
        (lambda: Scaling(low=4.0), "low=4.0 must be positive and below high=4.0"),
        (lambda: Scaling(beta_fast=1.0), "beta_slow=1.0 must be positive and below beta_fast=1.0"),
        (lambda: Embeddings(first=2, positions=2), "first=2 must be below positions=2"),
        (lambda: Attention(causal=False, windows=(4,)), "windows=.4,. need causal=True"),
        (lambda: Attention(qk_norm="heads"), "qk_norm='heads' is none of none, head, all"),
        (lambda: Moe(experts=2, active=3), "active=3 must be 1 to experts=2"),
        (lambda: Arch(moe=Moe(4), mlp_bias=True), "experts=4 need a gated activation without"),
        (lambda: Head("causal"), "kind='causal' is none of language, masked, classifier"),
        (lambda: Rope(local_theta=-1.0), "local_theta=-1.0 must be at least 0"),
        (lambda: Attention(windows=()), "windows is empty"),
        (lambda: Attention(windows=(4, -1)), "windows=-1 must be at least 0"),
        (lambda: Attention(softcap=float("nan")), "softcap=nan must be at least 0"),
        (lambda: Head(chunk=0), "chunk=0 must be at least 1"),
        (lambda: Init(embed=-1.0), "embed=-1.0 must be at least 0"),
    ],
)
def test_an_impossible_model_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_the_vocabulary_is_the_tokenizers_rounded_up_to_128():
    assert ModelConfig().with_vocab(257).vocab == 384
    assert ModelConfig().with_vocab(256).vocab == 256
    assert ModelConfig(vocab=300).with_vocab(257).vocab == 300
