"""Llama-3-like decoders for real hardware: 124M, 350M, 1B, 8B, and 8B on one card of 80 GB."""

import dataclasses

from configs.run import CheckpointConfig, EvalConfig, LogConfig, Run
from data.config import DataConfig
from model.config import Arch, Head, ModelConfig, Rope
from optim.config import OptimConfig
from sharding.mesh import MeshConfig

SMALL = Arch(head=Head(tied=True))
# Grattafiori et al. 2024, arXiv:2407.21783, table 3. Logits in bfloat16 and large chunks: half the
# traffic of the softmax, fewer passes over the head's gradient.
LLAMA3 = Arch(rope=Rope(theta=500_000.0), head=Head(chunk=8192, logits="bfloat16"))

# 124M and 350M take the widths of GPT-2 small and medium, for comparison with it; 1B is
# Llama-3.2-1B with a head of its own; 8B is Llama-3-8B.
MODELS = {
    "124M": ModelConfig(
        layers=12, embed=768, heads=12, kv_heads=12, mlp=2048, vocab=50_304, arch=SMALL
    ),
    "350M": ModelConfig(
        layers=24, embed=1024, heads=16, kv_heads=16, mlp=2816, vocab=50_304, remat="dots",
        arch=SMALL,
    ),
    "1B": ModelConfig(
        layers=16, embed=2048, heads=32, kv_heads=8, mlp=8192, vocab=128_256, remat="dots",
        unroll=16,  # 4 % faster than a loop on an H100, 4 s more to compile
        arch=LLAMA3,
    ),
    "8B": ModelConfig(
        layers=32, embed=4096, heads=32, kv_heads=8, head_dim=128, mlp=14_336, vocab=128_256,
        remat="dots", arch=LLAMA3,
    ),
}  # fmt: skip
# For one card of 80 GB: as fast as it goes, and as large (docs/memory.md counts the bytes).
MODELS["1B-80GB"] = MODELS["1B"]
MODELS["8B-80GB"] = dataclasses.replace(MODELS["8B"], param_dtype="bfloat16", remat="mlp")
SEQ = {"124M": 1024, "350M": 2048}  # the others: 8,192
BATCH = {"124M": 64, "350M": 64, "1B": 8, "8B": 8, "1B-80GB": 6, "8B-80GB": 2}
DOCUMENTS = {"124M": 8, "350M": 8}  # of a row at most, for flash attention; the others: 16
LR = {"124M": 6e-4, "350M": 4e-4}  # the others: 3e-4
MOMENTS = {"8B-80GB": "int8"}


def get_config(size: str = "124M") -> Run:
    """A Llama-3-like decoder of SIZE parameters on text of your own.

    python train.py --config=configs/llama.py:1B --config.data.sources=DIR \\
        --config.data.tokenizer=tokenizer.json

    Weights and optimizer are split over all devices (fsdp). The default text is the standard
    library's, which is enough to see it run, and far too little to train it.
    """
    if size not in MODELS:
        raise ValueError(f"size {size!r} is none of {', '.join(MODELS)}")
    return Run(
        steps=20_000,
        model=MODELS[size],
        data=DataConfig(
            tokenizer="bpe:32768",
            batch=BATCH[size],
            seq=SEQ.get(size, 8192),
            documents=DOCUMENTS.get(size, 16),
        ),
        optim=OptimConfig(lr=LR.get(size, 3e-4), warmup=500, moments=MOMENTS.get(size, "float32")),
        mesh=MeshConfig(data=1, fsdp=-1),
        log=LogConfig(every=10),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
