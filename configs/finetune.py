"""Train a published model further: `--restore` names it, and gives sizes and tokenizer."""

from configs.run import CheckpointConfig, EvalConfig, Run
from data.config import DataConfig
from model.config import ModelConfig
from optim.config import OptimConfig


def get_config() -> Run:
    """AdamW at a low rate over all parameters; matmuls in bfloat16, which a CPU does slowly.

    python train.py --config=configs/finetune.py --restore=DIR --config.data.sources=book.txt
    On a CPU with --config.model.dtype=float32.
    """
    return Run(
        steps=500,
        model=ModelConfig(dtype="bfloat16", param_dtype="float32", remat="dots"),
        data=DataConfig(batch=8, seq=1024),
        optim=OptimConfig(name="adamw", lr=2e-5, warmup=25, clip=1.0),
        eval=EvalConfig(every=100),
        checkpoint=CheckpointConfig(every=250),
    )
