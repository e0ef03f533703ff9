"""A run made small, its structure kept: sizes, parameters and batches to compare devices by."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from configs.run import Run
from data.config import DataConfig
from model.config import Arch, ModelConfig, Moe
from optim.config import OptimConfig

WIDTH = 4  # of a head; a model's other sizes are multiples of it and of the devices
CHUNK = 20  # tokens per device whose logits exist at one time: a batch takes several
LR = 0.05  # of SGD: ten steps move the parameters by some per cent


def shrunk(cfg: ModelConfig, ways: int, width: int = WIDTH, line: int = 1) -> ModelConfig:
    """`cfg` so small that it compiles in seconds, every split size a multiple of `ways`.

    Kept: the kind of model, whether heads share keys, the pattern of windows and experts and its
    remainder, remat, and how the scan is unrolled. All of it in float32. `line`: the pattern
    repeats a multiple of so many times, for the stages of a pipeline.
    """
    every, rest = divmod(cfg.layers, cfg.places)
    partly = 1 < cfg.unroll < every
    repeats = line * math.ceil(min(every, 3 if partly else 2) / line)
    groups = 2 if cfg.heads > cfg.kv_heads else 1
    tokens = seq(ways)
    arch = cfg.arch
    windows = sorted({window for window in arch.attention.windows if window})
    sizes = {0: 0} | {window: 3 + 2 * i for i, window in enumerate(windows)}
    extra = arch.embeddings
    arch = dataclasses.replace(
        arch,
        attention=dataclasses.replace(
            arch.attention, windows=tuple(sizes[window] for window in arch.attention.windows)
        ),
        embeddings=dataclasses.replace(
            extra, positions=extra.first + tokens if extra.positions else 0
        ),
        head=dataclasses.replace(arch.head, chunk=CHUNK),
        moe=_fewer_experts(arch.moe, ways, width),
    )
    return dataclasses.replace(
        cfg,
        layers=repeats * cfg.places + min(rest, 1),
        embed=width * ways * (2 if ways < 4 else 1),
        heads=groups * ways,
        kv_heads=ways,
        head_dim=width,
        mlp=6 * width * ways // 4,
        vocab=2 * width * ways * (2 if ways < 4 else 1),
        dtype="float32",
        param_dtype="float32",
        unroll=min(cfg.unroll, 2 if partly else repeats),
        arch=arch,
    )


def _fewer_experts(moe: Moe, ways: int, width: int) -> Moe:
    if not moe.experts:
        return moe
    experts = ways * math.ceil(4 / ways)
    return dataclasses.replace(
        moe,
        experts=experts,
        active=min(moe.active, experts // 2),
        mlp=width * ways // 2 if moe.mlp else 0,
    )


def seq(ways: int) -> int:
    """Tokens of a shrunk row, at least 12: two pieces for each of `ways` devices."""
    return 2 * ways * math.ceil(6 / ways)


def shrunk_run(run: Run, ways: int, steps: int, width: int = WIDTH, stages: int = 1) -> Run:
    """`run` on a shrunk model for `steps` of plain SGD, which hides no factor of a gradient.

    Without momentum the optimizer's trace is the gradient. Where there are `stages`, at least as
    many micro-batches go through them, and at most twice as many.
    """
    accumulate = min(run.optim.accumulate, 2)
    line = 1
    if stages > 1:
        accumulate = min(max(run.optim.accumulate, stages), 2 * stages)
        line = stages * run.pipeline.repeats
    rows = ways * math.ceil(8 / ways) * accumulate
    return dataclasses.replace(
        run,
        steps=steps,
        model=shrunk(run.model, ways, width, line),
        data=DataConfig(batch=rows, seq=seq(ways)),
        optim=OptimConfig(
            name="sgd", lr=LR, schedule="constant", weight_decay=0.0, clip=0.0, b1=0.0,
            accumulate=accumulate,
        ),
    )  # fmt: skip


def batches(run: Run) -> Iterator[dict[str, np.ndarray]]:
    """A batch for each step: random tokens, two documents and some padding a row.

    Targets follow from the inputs, so that there is something to learn.
    """
    draw = np.random.default_rng(0)
    vocab, (B, T) = run.model.vocab, (run.data.batch, run.data.seq)
    place = np.arange(T, dtype=np.int32)[None]
    for _ in range(run.steps):
        inputs = draw.integers(0, vocab, (B, T), dtype=np.int32)
        first, end = draw.integers(1, 2 * T // 3, (B, 1)), draw.integers(3 * T // 4, T + 1, (B, 1))
        yield {
            "inputs": inputs,
            "targets": (inputs + 7) % vocab,
            "positions": np.where(place < first, place, place - first).astype(np.int32),
            "segments": ((1 + (place >= first)) * (place < end)).astype(np.int32),
        }


def parameters(cfg: ModelConfig, shapes: Any, roles: Any) -> Any:
    """Parameters drawn at random as NumPy arrays, of these shapes and roles (model's `abstract`).

    Norms and biases too, so that none is one or zero and hides a wrong placement. Where there are
    experts, every token stands near one of as many directions as there are experts, and a router
    prefers its A experts of a direction by a wide margin: no sum in another order moves a token to
    another expert.
    """
    draw = np.random.default_rng(1)
    arch, E = cfg.arch, cfg.arch.moe.experts
    branch = 0.05 if E else 0.2  # what one adds; little, so that tokens keep their directions
    directions_DE = np.linalg.qr(draw.normal(size=(cfg.embed, max(E, 1))))[0]

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct, role: Any) -> np.ndarray:
        names = [str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path]
        normal = draw.normal(size=shape.shape)
        if names[-1] == "history":
            values = np.zeros(shape.shape)
        elif "router" in names:
            values = _router(draw, normal, directions_DE, arch)
        elif role.kind == "matrix":
            values = normal / math.sqrt(math.prod(shape.shape[-role.inputs :]))
            values *= branch if {"out", "down"} & set(names) else 1.0
        elif role.kind == "head":
            values = normal / math.sqrt(cfg.embed)
        elif role.kind == "embedding":
            values = 0.1 * normal
            if names[0] == "embedding":
                ids = np.arange(len(values))
                near = math.sqrt(cfg.embed) * directions_DE.T[ids % E] if E else 0.5 * normal
                values = (near + values) / (cfg.embed**0.5 if arch.embeddings.scale else 1)
        elif names[-1] == "scale":
            values = (1 + 0.3 * normal) * (branch if {"post1", "post2"} & set(names) else 1.0)
            values -= arch.norm.offset
        else:
            values = 0.3 * normal
        return values.astype(shape.dtype)

    return jax.tree.map_with_path(leaf, shapes, roles)


def nudged(start: Any, seed: int) -> Any:
    """Parameters up or down by their last bit, at random."""
    draw = np.random.default_rng(seed)

    def leaf(values: np.ndarray) -> np.ndarray:
        way = np.where(draw.integers(0, 2, values.shape), np.inf, -np.inf).astype(values.dtype)
        return np.where(values == 0, values, np.nextafter(values, way))

    return jax.tree.map(leaf, start)


def _router(
    draw: np.random.Generator, normal: np.ndarray, directions_DE: np.ndarray, arch: Arch
) -> np.ndarray:
    """[..., E, D]: of each direction A experts, another choice in each layer, and some noise."""
    E, A, D = arch.moe.experts, arch.moe.active, len(directions_DE)
    weights = 0.3 * normal.reshape(-1, E, D)
    for own_ED in weights:
        turn = draw.permutation(E)
        chosen_EE = (np.arange(E)[:, None] - turn[None]) % E < A  # [expert, direction]
        own_ED += 6.0 * chosen_EE @ directions_DE.T
    return weights.reshape(normal.shape) / math.sqrt(D)
