"""OptimConfig: which optimizer, at which learning rate, when."""

from dataclasses import dataclass

OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
MOMENTS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Muon:
    """What Muon adds: it turns hidden matrices, and leaves the other parameters to Adam."""

    momentum: float = 0.95
    iterations: int = 5  # of Newton-Schulz
    embed_lr: float = 0.0  # Adam's, peak, for the embedding table; 0 here and below: `optim.lr`
    head_lr: float = 0.0
    vector_lr: float = 0.0  # norms and biases

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1")
        if not 1 <= self.iterations <= 20:
            raise ValueError(f"iterations={self.iterations} must be 1 to 20")
        for name in ("embed_lr", "head_lr", "vector_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


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
    b1: float = 0.9  # momentum of adamw, sgd, lion, adafactor, and of Muon's Adam
    b2: float = 0.95
    moments: str = "float32"  # of adamw: how each is kept; "int8": a byte, and a scale a block
    block: int = 256  # numbers of a weight's row that share a scale
    muon: Muon = Muon()

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name={self.name!r} is none of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is none of {', '.join(SCHEDULES)}")
        for name in ("lr", "warmup", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share between 0 and 1")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.moments not in MOMENTS:
            raise ValueError(f"moments={self.moments!r} is none of {', '.join(MOMENTS)}")
        if self.moments != "float32" and self.name != "adamw":
            raise ValueError(
                f"moments={self.moments} needs name=adamw, not {self.name}, which keeps float32; "
                f"adafactor's second moment is small by itself: a row and a column of each matrix"
            )
        if self.block < 8:
            raise ValueError(f"block={self.block} must be at least 8: a scale takes 4 bytes")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1")
