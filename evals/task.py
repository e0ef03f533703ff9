"""What an evaluation is: settings, a task that scores a model, and the figures it finds."""

import abc
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.scorer import Scorer
from model.config import ModelConfig, at_least

SEQ = 2048  # tokens of a row, unless a setting or the model says less


@dataclass(frozen=True)
class Settings:
    """What can be set of every task; each uses what concerns it."""

    limit: int = 0  # documents, questions or prompts, the first of a file; 0: all
    seq: int = 0  # tokens that the model sees at one time; 0: 2048, or its learned positions
    stride: int = 0  # tokens between two windows; 0: seq / 2
    field: str = "text"  # of JSONL and Parquet rows, for perplexity
    held_out: float = 0.0  # perplexity of this share of the documents, as training holds it out
    delimiter: str = " "  # between a context and a choice
    max_tokens: int = 256  # of an answer
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    chat: bool = False  # put prompts to the model as its chat template does
    samples: int = 1  # answers for each prompt
    stop: tuple[str, ...] = ()  # texts that end an answer; empty: what the task's format says
    seed: int = 0
    timeout: float = 10.0  # seconds that a program may take
    memory: int = 1024  # MiB that it may take
    allow_code_execution: bool = False

    def __post_init__(self):
        for name in ("limit", "seq", "stride", "temperature"):
            at_least(name, getattr(self, name), 0)
        for name in ("max_tokens", "samples"):
            at_least(name, getattr(self, name), 1)
        if self.seq == 1:
            raise ValueError("seq=1 leaves no token to predict: at least 2")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be at least 0 and below 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 < self.timeout <= 3600:
            raise ValueError(f"timeout={self.timeout} must be above 0 and at most 3600 seconds")
        at_least("memory", self.memory, 64)
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples={self.samples} need a temperature: greedy ones are the same")

    def window(self, cfg: ModelConfig) -> int:
        """Tokens that a model of this config is given at one time."""
        extra = cfg.arch.embeddings
        most = extra.positions - extra.first if extra.positions else 0
        if most and self.seq > most:
            raise ValueError(f"seq={self.seq} is more than the {most} positions that it learned")
        return self.seq or min(SEQ, most or SEQ)


@dataclass(frozen=True)
class Figure:
    """A number that was found, and its standard error; None where one observation gave it."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"{self.value:.4f}{error}"


def mean(values: Sequence[float]) -> Figure:
    """The mean of independent observations; its standard error from their sample variance."""
    n, array = len(values), np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Figure(float(array.mean()), error)


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Figure:
    """sum(tops) / sum(bottoms) over independent units, such as nats and tokens of documents.

    The standard error is that of the ratio estimator, to first order: Cochran, Sampling
    Techniques, 1977, 6.3.
    """
    a, b = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    value, n = float(a.sum() / b.sum()), len(a)
    if n < 2:
        return Figure(value)
    spread = float(np.sum((a - value * b) ** 2))
    return Figure(value, math.sqrt(n / (n - 1) * spread) / float(b.sum()))


@dataclass(frozen=True)
class Result:
    """What a task found."""

    task: str
    hash: str  # SHA-256 of the task's content and of the settings that it used
    figures: dict[str, Figure]
    counts: dict[str, int]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()  # what a reader of the figures must know
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it."""
        figures = {
            name: {"value": figure.value, "stderr": figure.stderr}
            for name, figure in self.figures.items()
        }
        return {**vars(self), "figures": figures, "notes": list(self.notes)}


class Task(abc.ABC):
    """Something to score a model on, its content read."""

    name: str  # as the user named it

    @abc.abstractmethod
    def prepare(self, scorer: Scorer) -> None:
        """Turn the content into tokens; ValueError if this model cannot be scored on it."""

    @abc.abstractmethod
    def run(self, scorer: Scorer) -> Result:
        """Score the parameters that the scorer has, after `prepare` of one with this tokenizer."""


def digest(content: bytes, settings: dict[str, Any]) -> str:
    """SHA-256 of a task: what it asks, and with which settings."""
    spelled = json.dumps(settings, sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(content).digest() + spelled).hexdigest()


def needs_decoder(name: str, scorer: Scorer) -> None:
    """ValueError unless the model tells of each token from those before it."""
    arch = scorer.model.cfg.arch
    if arch.head.kind != "language" or not arch.attention.causal:
        raise ValueError(
            f"{name} needs a causal language model, and this is an encoder with head "
            f"{arch.head.kind!r}: there is no likelihood of a text, and no pseudo-likelihood is "
            f"offered in its place"
        )
