"""Hugging Face directories of tiny models with random values, made without transformers."""

import functools
import json

import numpy as np

from checkpoint import hf, safetensors
from checkpoint.names import Names
from checkpoint.tensors import Tensor
from model.config import (
    Arch,
    Attention,
    Embeddings,
    Head,
    ModelConfig,
    Moe,
    Norm,
    Rope,
)
from model.families import FAMILIES
from text.tokenizer import train_bpe

BY_NAME = {family.name: family for family in FAMILIES}
LLAMA = ModelConfig(
    layers=3, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=24, vocab=320, dtype="float32"
)
LEARNED = Arch(
    norm=Norm("layer", bias=True),
    rope=Rope(theta=0.0),
    attention=Attention(qkv_bias=True, out_bias=True),
    head=Head(tied=True),
    embeddings=Embeddings(positions=32),
    activation="gelu",
    mlp_bias=True,
)
WIDE = {"kv_heads": 4, "head_dim": 4}
# A model of each kind of naming: fused, turned, of experts, with layers left after the pattern.
MODELS = {
    "llama": LLAMA,
    "gpt2": ModelConfig(**{**vars(LLAMA), **WIDE, "arch": LEARNED}),
    "mixtral": ModelConfig(**{**vars(LLAMA), "arch": Arch(moe=Moe(experts=3))}),
    "phi3": LLAMA,
    "gemma2": ModelConfig(
        **{
            **vars(LLAMA),
            "arch": Arch(
                norm=Norm(eps=1e-6, offset=1.0, placement="sandwich"),
                attention=Attention(windows=(3, 0), softcap=50.0, scale=8**-0.5),
                head=Head(tied=True, softcap=30.0),
                embeddings=Embeddings(scale=True),
                activation="geglu",
            ),
        }
    ),
}


@functools.cache
def tokenizer():
    """A BPE of 300 ids or fewer."""
    return train_bpe(["the quick brown fox jumps over the lazy dog " * 3] * 3, 300)


def write(folder, family="llama", cfg=None, dtype="F32", shard_bytes=10**9, words=True):
    """The tensors that were written, by name."""
    cfg, family = cfg or MODELS[family], BY_NAME[family]
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    kind = safetensors.DTYPES[dtype]
    values = {
        name: draw.standard_normal(shape).astype(kind)
        for name, shape in Names(family, cfg).foreign().items()
    }
    save(folder, values, shard_bytes)
    config = {**hf.write_config(family, cfg), "torch_dtype": kind.name, "extra": [1, 2]}
    files = {"config.json": json.dumps(config, indent=1)}
    if words:
        files |= tokenizer().files()
        files["generation_config.json"] = '{"do_sample": false}'
    for name, text in files.items():
        (folder / name).write_text(text)
    return values


def save(folder, values, shard_bytes=10**9):
    """These tensors as the folder's only ones."""
    for path in folder.glob("model*safetensors*"):
        path.unlink()
    tensors = {
        name: Tensor(array.shape, safetensors.NAMES[array.dtype]) for name, array in values.items()
    }
    safetensors.write(folder, tensors, values.__getitem__, shard_bytes)


def files(folder):
    """The bytes of every file, but for the receipt."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "receipt.json"
    }
