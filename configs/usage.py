"""The text of --help."""

import os
import sys
import textwrap
from collections.abc import Sequence

from absl import flags

from configs import fields
from configs.arguments import Known
from configs.run import Run

_CONFIG_FLAGS = (
    ("--config=FILE", "recipe.py, recipe.py:ARG or a saved config.json; default {}"),
    ("--config.PATH=VALUE", "set one field of the run; all are listed below"),
)
_OTHER_FLAGS = (
    ("--verbosity=1", "show where an error came from"),
    ("--helpfull", "list the flags of every library as well"),
)
_CONFIG_EXAMPLES = (
    "",
    "--config={} --config.steps=500 --config.optim.lr=3e-4",
    "--config=runs/NAME/config.json",
)
_FIELDS_HEAD = "Fields and their defaults; lists are comma-separated, PATH is GROUP.FIELD:"


def text(doc: str, known: Known, recipe: str | None, examples: Sequence[str] = ()) -> str:
    """What the command is (`doc`), its flags, examples, and the fields of a Run."""
    entries = [_entry(known.values[name]) for name in known.own]
    if recipe is not None:
        entries = [(name, line.format(recipe)) for name, line in _CONFIG_FLAGS] + entries
        examples = examples or [line.format(recipe) for line in _CONFIG_EXAMPLES]
    entries += _OTHER_FLAGS
    width = max(len(name) for name, _ in entries) + 2
    parts = [doc.strip(), "\n".join(["Flags:", *(_wrapped(*entry, width) for entry in entries)])]
    if examples:
        lines = [f"  python {program()} {example}".rstrip() for example in examples]
        parts.append("\n".join(["Examples:", *lines]))
    if recipe is not None:
        parts.append("\n".join([_FIELDS_HEAD, *_field_lines()]))
    return "\n\n".join(part for part in parts if part)


def program() -> str:
    """What follows `python` on the command line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {spec.name}" if spec else os.path.basename(sys.argv[0])


def _entry(flag: flags.Flag) -> tuple[str, str]:
    default = "" if flag.default in (None, "", False) else f"; default {flag.default}"
    return f"--{flag.name}" + ("" if flag.boolean else "=VALUE"), f"{flag.help}{default}"


def _field_lines() -> list[str]:
    """Every field of a Run with its default, one paragraph per group."""
    groups: dict[str, list[str]] = {}
    for path, text in fields.spelled(Run()):
        group, _, name = path.rpartition(".")
        groups.setdefault(group, []).append(f"{name}={text}")
    width = max(map(len, groups)) + 2
    return [
        _wrapped(group or "(no group)", " ".join(words), width) for group, words in groups.items()
    ]


def _wrapped(name: str, words: str, width: int) -> str:
    lines = textwrap.wrap(words, 98 - width, break_long_words=False, break_on_hyphens=False)
    return f"\n  {' ' * width}".join([f"  {name:<{width}}" + "".join(lines[:1]), *lines[1:]])
