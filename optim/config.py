"""OptimConfig: which optimizer, at which learning rate, when."""

from dataclasses import dataclass

OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule, clipping and accumulation."""

    name: str = "adamw"
    lr: float = 3e-4  # peak
    schedule: str = "cosine"
    warmup: int = 0  # steps from 0 to `lr`
    decay: float = 0.2  # "wsd": last share of the steps, over which lr falls
    final: float = 0.1  # lr at the last step, as a share of `lr`
    weight_decay: float = 0.1  # of matrices, not of norms and biases
    clip: float = 1.0  # global norm of the gradient; 0: off
    accumulate: int = 1  # micro-batches per step
    b1: float = 0.9  # momentum of every optimizer
    b2: float = 0.95
    adam_lr: float = 0.0  # "muon": of tables, norms and biases; 0 means `lr`

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name={self.name!r} is none of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is none of {', '.join(SCHEDULES)}")
        for name in ("lr", "warmup", "weight_decay", "clip", "adam_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share between 0 and 1")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1")
