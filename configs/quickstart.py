"""A small decoder that learns Python from the interpreter's own standard library."""

from configs.run import CheckpointConfig, EvalConfig, LogConfig, Run, SampleConfig
from data.config import DataConfig
from model.config import Arch, Attention, Head, ModelConfig
from optim.config import OptimConfig


def get_config() -> Run:
    """About a minute on a laptop.

    python train.py
    """
    return Run(
        steps=300,
        model=ModelConfig(
            layers=4,
            embed=256,
            heads=4,
            kv_heads=4,
            head_dim=64,
            mlp=768,
            vocab=2048,
            dtype="float32",
            unroll=4,
            arch=Arch(attention=Attention(qk_norm=True), head=Head(tied=True)),
        ),
        data=DataConfig(tokenizer="bpe:2048", held_out=0.03, batch=8, seq=256),
        optim=OptimConfig(name="muon", lr=0.01, schedule="linear", final=0.0, warmup=10, b1=0.95),
        log=LogConfig(every=10),
        eval=EvalConfig(every=150, bytes=200_000),
        checkpoint=CheckpointConfig(every=0),
        sample=SampleConfig(prompt="import os\n\n\ndef "),
    )
