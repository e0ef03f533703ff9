"""Text: what a run reads, with its tokenizer."""

import dataclasses
from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding

from configs.run import Run, check
from data import split
from data.held_out import HeldOut, held_out_batches
from data.loader import Loader
from data.sources import open_sources
from sharding import mesh as meshes
from text import tokenizer as tokenizers


@dataclass(frozen=True)
class Text:
    """What a run reads."""

    sources: tuple[split.Split, ...]
    tokenizer: tokenizers.Tokenizer
    held_out: HeldOut
    loader: Loader


def open_text(run: Run, tokenizer: tokenizers.Tokenizer | None, mesh: Mesh) -> tuple[Run, Text]:
    """The run with its vocabulary resolved, and its text; `tokenizer`: that of a checkpoint."""
    sources = open_sources(run.data)
    if tokenizer is None:
        tokenizer = tokenizers.load(run.data.tokenizer, lambda: split.sample(sources))
    try:
        size = tokenizer.plain if run.model.vocab else tokenizer.size
        run = dataclasses.replace(run, model=run.model.with_vocab(size))
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    check(run, mesh.size)
    rows = meshes.own_rows(NamedSharding(mesh, run.layout.spec("batch")), run.data.batch)
    loader = Loader(run.data, tokenizer, sources, seed=run.seed, rows=rows)
    held_out = held_out_batches(run.data, tokenizer, sources, bytes=run.eval.bytes, rows=rows)
    return run, Text(sources, tokenizer, held_out, loader)
