"""Tokenizers by name: bytes, a BPE trained here, or a published one from its files."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from text import cache, pretrained
from text.kinds import END_NAMES, MOST_IDS, Bytes, Published, Tokenizer
from text.pretrained import from_json

__all__ = ["Bytes", "Published", "Tokenizer", "from_json", "load", "train_bpe"]

SMALLEST_BPE = 257  # every byte, and the end

# Words with the one sign before them, numbers by three digits, signs with the line break and the
# indentation that follow them. On the standard library 6 % more bytes per token than GPT-2's.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*"
    r"|\s*[\r\n]+[ \t]*|\s+"
)
# Whole lines, so that tokens grow over several words: a fifth fewer tokens for the same size, and
# fewer bits per byte for small models of code; training takes longer.
LINES = r"\n[ \n]*|[^\n]{1,128}"  # pieces of bounded length: the cost of a piece grows faster
LONGEST_IN_LINE = 24  # characters
SPLITS = {"words": WORDS, "lines": LINES}


def train_bpe(texts: Iterable[str], size: int, split: str = "words") -> Tokenizer:
    """A byte-level BPE with at most `size` ids, the end among them; equal texts give equal ids.

    No token crosses a border of the `split`, "words" or "lines". `size` is at least 257.
    A small corpus runs out of pairs to merge and gives fewer ids.
    """
    if size < SMALLEST_BPE:
        raise ValueError(
            f"a BPE of {size} ids is too small: it needs {SMALLEST_BPE}, every byte and the end"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLITS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_IN_LINE if split == "lines" else None,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Published(tokenizer)


def _cached_bpe(texts: Sequence[str], size: int, split: str) -> Tokenizer:
    """`train_bpe`, kept in the cache by the texts, the size and the way of training."""
    key = hashlib.blake2b(digest_size=16)
    key.update(f"{size} {tokenizers.__version__} {SPLITS[split]} {len(texts)}".encode())
    for text in texts:
        key.update(hashlib.blake2b(text.encode()).digest())
    path = cache.folder() / f"bpe-{size}-{key.hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged
        return from_json(path.read_text(encoding="utf-8"))
    tokenizer = train_bpe(texts, size, split)
    with contextlib.suppress(OSError):  # the next run trains again
        cache.write(path, lambda part: part.write_text(tokenizer.to_json(), encoding="utf-8"))
    return tokenizer


def load(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of `spec`: "bytes", "bpe:SIZE[:lines]", a tokenizer.json, or its folder.

    `texts` gives the text that a BPE is trained on; it is called for that only. ValueError
    for a spec, a size or a file that will not do, FileNotFoundError for a missing file.
    """
    if spec == "bytes":
        return Bytes()
    if spec.startswith("bpe:"):
        size, _, split = spec.removeprefix("bpe:").partition(":")
        if not size.isdecimal():
            raise ValueError(f"tokenizer={spec!r}: {size!r} is no size; try 'bpe:4096'")
        if len(size) > len(str(MOST_IDS)) or int(size) > MOST_IDS:
            raise ValueError(f"tokenizer={spec!r} is too large: {MOST_IDS:,} ids are the most")
        if int(size) < SMALLEST_BPE:
            raise ValueError(
                f"tokenizer={spec!r} is too small: every byte and the end are {SMALLEST_BPE} ids"
            )
        if split and split not in SPLITS:
            raise ValueError(f"tokenizer={spec!r}: {split!r} is none of {', '.join(SPLITS)}")
        return _cached_bpe(list(texts()), int(size), split or "words")
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        raise FileNotFoundError(
            f"tokenizer={spec!r} is neither 'bytes' nor 'bpe:SIZE' nor a tokenizer.json that "
            "exists nor a folder that has one"
        )
    try:
        return pretrained.open_folder(path) if path.is_dir() else from_json(pretrained.read(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"tokenizer={spec!r}: {error}") from None
    except ValueError as error:
        raise ValueError(f"tokenizer={spec!r}: {error}") from None
