"""Tokenizers: text to ids and back.

Ids are int32 in [0, size). `end` is the id that starts and ends every document; `encode` adds
neither it nor any other special token.
"""

import abc
import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from text import cache

END_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)
BYTES_JSON = '{"meshlm": "bytes"}'
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


class Tokenizer(abc.ABC):
    """What every tokenizer can do."""

    size: int
    end: int

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]; the texts are shared out over threads."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens and ids past the vocabulary give nothing."""

    @abc.abstractmethod
    def to_json(self) -> str:
        """All of the tokenizer as text, for `from_json`."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of `to_json`: equal for tokenizers that give equal ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class Bytes(Tokenizer):
    """The UTF-8 bytes themselves, 0 to 255; the end is 256."""

    size = 257
    end = 256

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def to_json(self) -> str:
        return BYTES_JSON


class Published(Tokenizer):
    """Any tokenizer of the `tokenizers` library, without its truncation and padding.

    The name of a special token inside a text is encoded as plain text, except where the
    vocabulary itself lists the name as an ordinary piece (SentencePiece unigram models may).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        ids = (tokenizer.token_to_id(name) for name in END_NAMES)
        end = next((i for i in ids if i is not None), None)
        if end is None:
            tokenizer.add_special_tokens([END_NAMES[0]])
            end = tokenizer.token_to_id(END_NAMES[0])
        self._tokenizer = tokenizer
        self.end = end
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in map(int, ids) if i < self.size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def to_json(self) -> str:
        return self._tokenizer.to_str()


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` gave, or that a tokenizer.json holds; ValueError if neither."""
    if text.strip() == BYTES_JSON:
        return Bytes()
    try:
        return Published(tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ValueError(f"not a tokenizer.json: {error}") from None


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
    """The tokenizer of `spec`: "bytes", "bpe:SIZE[:lines]", or the path of a tokenizer.json.

    `texts` gives the text that a BPE is trained on; it is called for that only. ValueError
    for a spec, a size or a file that will not do, FileNotFoundError for a missing file.
    """
    if spec == "bytes":
        return Bytes()
    if spec.startswith("bpe:"):
        size, _, split = spec.removeprefix("bpe:").partition(":")
        if not size.isdecimal():
            raise ValueError(f"tokenizer={spec!r}: {size!r} is no size; try 'bpe:4096'")
        if int(size) < SMALLEST_BPE:
            raise ValueError(
                f"tokenizer={spec!r} is too small: every byte and the end are {SMALLEST_BPE} ids"
            )
        if split and split not in SPLITS:
            raise ValueError(f"tokenizer={spec!r}: {split!r} is none of {', '.join(SPLITS)}")
        return _cached_bpe(list(texts()), int(size), split or "words")
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer={spec!r} is neither 'bytes' nor 'bpe:SIZE' nor a tokenizer.json that exists"
        )
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer={spec!r}: {error}") from None
