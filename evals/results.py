"""Results: what tasks found, as a table and as results.json."""

import importlib.metadata
import json
import os
import platform
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.task import Result


def versions() -> dict[str, str]:
    """Of what the figures may depend on."""
    try:
        own = importlib.metadata.version("meshlm")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        project = Path(__file__).parent.parent / "pyproject.toml"
        own = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    return {
        "meshlm": own,
        "jax": jax.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def to_json(model: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """results.json: `model` says what was scored, and how it was run."""
    return {
        **model,
        "versions": versions(),
        "tasks": {result.task: result.to_json() for result in results},
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def show(console: Console, results: Sequence[Result]) -> None:
    """Print a table with a row for each figure, and what was counted."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, side in (("task", "left"), ("figure", "left"), ("value", "right"), ("±", "right")):
        table.add_column(name, justify=side, overflow="fold")
    for result in results:
        for i, (name, figure) in enumerate(result.figures.items()):
            error = "" if figure.stderr is None else f"{figure.stderr:.4f}"
            table.add_row("" if i else escape(result.task), name, f"{figure.value:.4f}", error)
    console.print(table)
    for result in results:
        counts = ", ".join(f"{what} {n:,}" for what, n in result.counts.items())
        told = [f"{counts}; {result.seconds:.1f} s", *result.notes]
        for line in told:
            console.print(f"{result.task}: {line}", highlight=False, markup=False, soft_wrap=True)


def flat(results: Sequence[Result]) -> Iterator[tuple[str, float]]:
    """Every figure as (name, value), with its standard error as another."""
    for result in results:
        for name, figure in result.figures.items():
            yield f"{result.task}/{name}", figure.value
            if figure.stderr is not None:
                yield f"{result.task}/{name}_stderr", figure.stderr
