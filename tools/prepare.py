"""Tokenize sources once, into a folder of shards that trains like the text itself.

A run takes that folder as both: train.py --config.data.sources=books --config.data.tokenizer=books
"""

import sys
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from configs import command
from data import shards
from data.config import DataConfig
from data.sources import open_sources
from data.split import sample
from text import tokenizer

DEFAULT = DataConfig()
FLAGS = flags.FlagValues()
flags.DEFINE_list("sources", list(DEFAULT.sources), "What to read", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", DEFAULT.tokenizer, "As data.tokenizer", flag_values=FLAGS)
flags.DEFINE_string("target", None, "The folder to write", flag_values=FLAGS, required=True)
flags.DEFINE_string("field", DEFAULT.field, "Of JSONL and Parquet rows", flag_values=FLAGS)
flags.DEFINE_float("held_out", DEFAULT.held_out, "Share kept for evaluation", flag_values=FLAGS)
flags.DEFINE_float("bad_rows", DEFAULT.bad_rows, "Share that may be unusable", flag_values=FLAGS)
flags.DEFINE_integer("seq", DEFAULT.seq, "Tokens a row, if over 32,768", flag_values=FLAGS)


def prepare(config: DataConfig, target: Path, console: Console) -> dict:
    """Write `target`; returns its manifest. ValueError or OSError for what the user can mend."""
    splits = open_sources(config)
    for part in splits:
        console.print(part.describe(), highlight=False)
    words = tokenizer.load(config.tokenizer, lambda: sample(splits))
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(int(part.source.sizes.sum()) for part in splits))
        return shards.write(
            target, splits, words, config, lambda done: bar.update(task, completed=done)
        )


def main() -> None:
    """Write the folder, and say what is in it."""
    with command.user_input():
        config = DataConfig(
            sources=tuple(FLAGS.sources),
            tokenizer=FLAGS.tokenizer,
            held_out=FLAGS.held_out,
            seq=FLAGS.seq,
            field=FLAGS.field,
            bad_rows=FLAGS.bad_rows,
        )
        done = prepare(config, Path(FLAGS.target).expanduser(), Console())
    print(
        f"{FLAGS.target}: {done['documents']:,} documents, {done['tokens']:,} tokens of "
        f"{done['bytes'] / max(done['tokens'], 1):.2f} bytes, {done['held_out_documents']:,} "
        f"documents held out, {done['bad_rows']:,} bad rows left out"
    )


if __name__ == "__main__":
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            examples=("--sources=books.jsonl.zst --tokenizer=bpe:32768 --target=books",),
            values=FLAGS,
        )
    )
