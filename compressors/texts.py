"""Texts: what calibrates a model and what it is measured on, where the user gives neither.

The language reference that comes with Python, as `pydoc_data`; no topic is in both.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

SEQ = {True: 512, False: 128}  # tokens of a row, of a model that reads forward only, or both ways


class Words(Protocol):
    """What is asked of a tokenizer."""

    def prompt(self, text: str) -> list[int]: ...


def reference(held_out: bool) -> str:
    """Half of the topics, without what stands in the other half too.

    ValueError if this Python came without them.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ValueError(
            "this Python has no pydoc_data, the built-in text: give --calibration=FILE and "
            "--held_out=FILE"
        ) from None
    halves = [
        {" ".join(part.split()): part for name in names for part in topics[name].split("\n\n")}
        for names in (sorted(topics)[::2], sorted(topics)[1::2])
    ]
    if not held_out:
        return "\n\n".join(part for key, part in halves[0].items() if key not in halves[1])
    return "\n\n".join(halves[1].values())


def paragraphs(text: str) -> list[str]:
    """The parts of a text between empty lines that have a few words."""
    parts = (" ".join(part.split()) for part in text.split("\n\n"))
    return [part for part in parts if part.count(" ") >= 4]


def rows(words: Words, text: str, seq: int, tokens: int, *, causal: bool) -> list[list[int]]:
    """Rows of at most `seq` ids, about `tokens` in all, from all over the text.

    For a model that reads both ways a row is a paragraph, with what the tokenizer puts around it.
    """
    if causal:
        ids = words.prompt(text)
        each = [ids[i : i + seq] for i in range(0, len(ids), seq)]
        each = each[:-1] if len(each) > 1 else each  # the last may be short
    else:
        each = [ids for part in paragraphs(text) if len(ids := words.prompt(part)) <= seq]
    total = sum(map(len, each))
    return spaced(each, min(len(each), -(-tokens * len(each) // max(total, 1))))


def spaced(items: Sequence, count: int) -> list:
    """So many of the items, as far apart as they can be."""
    return [items[i * len(items) // count] for i in range(count)]
