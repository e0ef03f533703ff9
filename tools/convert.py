"""Convert a checkpoint: a Hugging Face directory, a GGUF file or ours, to ours or Hugging Face's.

Tensor by tensor, so a model larger than the memory converts. A receipt says what was written, and
whether what came in can be had back from it bit by bit; receipt.json in the target holds it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from checkpoint.convert import DTYPES, RECEIPT, TARGETS, convert
from checkpoint.pretrained import open_pretrained
from configs import command

SHOWN = 12  # files that are listed

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "source",
    None,
    "DIR[@STEP] of ours, a Hugging Face directory or a .gguf file",
    flag_values=FLAGS,
)
flags.DEFINE_string("target", None, "The folder to make", flag_values=FLAGS)
flags.DEFINE_string(
    "to", "meshlm", f"The format of the target: {', '.join(TARGETS)}", flag_values=FLAGS
)
flags.DEFINE_string("dtype", "same", f"Of the target: same, {', '.join(DTYPES)}", flag_values=FLAGS)
flags.DEFINE_integer(
    "shard_bytes", 5_000_000_000, "The most that a file of Hugging Face's holds", flag_values=FLAGS
)


def main() -> None:
    """Convert and print the receipt."""
    jax.config.update("jax_platforms", "cpu")  # nothing is computed; leave other devices alone
    with command.user_input():
        for name in ("source", "target"):
            if not FLAGS[name].value:
                raise ValueError(f"--{name} is needed: {FLAGS[name].help}")
        for name, allowed in (("to", TARGETS), ("dtype", ("same", *DTYPES))):
            if FLAGS[name].value not in allowed:
                raise ValueError(f"--{name}={FLAGS[name].value} is none of {', '.join(allowed)}")
        if FLAGS.shard_bytes < 1:
            raise ValueError(f"--shard_bytes={FLAGS.shard_bytes} must be at least 1")
        source = open_pretrained(FLAGS.source)
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        ) as bar:
            tasks: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)

            receipt = convert(
                source,
                Path(FLAGS.target),
                to=FLAGS.to,
                dtype=FLAGS.dtype,
                shard_bytes=FLAGS.shard_bytes,
                progress=show,
            )
    print(described(receipt, FLAGS.target))


def described(receipt: Mapping[str, Any], target: str) -> str:
    """The receipt on a few lines."""

    def kinds(side: str) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in receipt["dtypes"][side].items())

    files = receipt["files"]
    shown = list(files.items()) if len(files) <= SHOWN else []
    back = (
        "yes" if receipt["round_trip_bit_equal"] else f"no, {receipt['differing']:,} tensors differ"
    )
    lines = [
        f"source      {receipt['source']['name']}: {kinds('source')}",
        f"target      {target}: {kinds('target')}, {receipt['bytes']:,} bytes of values",
        f"model       {receipt['family'] or 'ours'}, {receipt['parameters']:,} parameters",
        f"unused      {_some(receipt['unused'])}",
        f"missing     {_some(receipt['missing'])}",
        f"tokenizer   {receipt['tokenizer'] or 'none'}",
        f"values      sha256 {receipt['values_sha256']['target']}",
        *(f"file        {name}: sha256 {file['sha256']}" for name, file in shown),
        *([] if shown else [f"files       {len(files)}, with their sha256 in {RECEIPT}"]),
        f"round trip  bit-equal: {back}",
    ]
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    few = ", ".join(names[:3])
    return f"{len(names)} ({few}{', ...' if len(names) > 3 else ''})" if names else "none"


if __name__ == "__main__":
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            examples=(
                "--source=SmolLM2-135M --target=smol",
                "--source=model.Q4_K_M.gguf --target=model --to=hf --dtype=bfloat16",
                "--source=runs/mine@2000 --target=mine --to=hf",
            ),
            values=FLAGS,
        )
    )
