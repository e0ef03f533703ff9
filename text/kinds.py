"""The kinds of tokenizer: bytes, and whatever the `tokenizers` library can run.

Ids are int32 in [0, size). `end` is the id that starts and ends every document of a corpus.
A text is read in one of two ways. `encode` is for documents: the name of a special token in it is
plain text, and nothing is added. `prompt` is for what a person types: such a name is the special
token, and what the tokenizer's own file adds (a first token, say) is added.
"""

import abc
import contextlib
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

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
# What may separate documents where no token is known as an end, by the names of config files.
SEPARATORS = ("sep_token", "cls_token", "bos_token", "pad_token", "unk_token")
BYTES_JSON = '{"meshlm": "bytes"}'
MOST_IDS = 1 << 24
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a byte


class Tokenizer(abc.ABC):
    """What every tokenizer can do."""

    size: int
    plain: int  # ids of documents are below it: special tokens may lie beyond
    end: int
    ends: tuple[int, ...]  # ids that end a generation, `end` among them
    template: str | None = None  # the chat template, Jinja
    specials: Mapping[str, str] = {}  # "bos_token" -> "<s>", as chat templates know them
    joins_bytes: bool  # a text is its tokens' bytes joined, then read as UTF-8

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each document, int32 [tokens]; the texts are shared out over threads."""

    @abc.abstractmethod
    def prompt(self, text: str, *, whole: bool = True) -> list[int]:
        """Ids of a prompt. Not `whole`: without what the tokenizer's file adds around a text."""

    @abc.abstractmethod
    def pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Ids of two prompts as one, and the token type of each id."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens and ids past the vocabulary give nothing."""

    @abc.abstractmethod
    def spell(self, i: int) -> bytes | None:
        """The bytes that id `i` stands for by itself; None if it stands for text.

        b"" for what `decode` leaves out. With `joins_bytes` never None.
        """

    @abc.abstractmethod
    def to_json(self) -> str:
        """All of the tokenizer as text, for `from_json`."""

    @abc.abstractmethod
    def files(self) -> dict[str, str]:
        """The files of a Hugging Face directory that hold it; those it came from, unchanged."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the ids: equal for tokenizers that give equal ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class Bytes(Tokenizer):
    """The UTF-8 bytes themselves, 0 to 255; the end is 256."""

    size = plain = 257
    end = 256
    ends = (256,)
    joins_bytes = True

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def prompt(self, text: str, *, whole: bool = True) -> list[int]:
        return list(text.encode())

    def pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        a, b = self.prompt(first), self.prompt(second)
        return a + b, [0] * len(a) + [1] * len(b)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.spell, ids)).decode(errors="replace")

    def spell(self, i: int) -> bytes:
        return bytes([i]) if 0 <= i < 256 else b""

    def to_json(self) -> str:
        return BYTES_JSON

    def files(self) -> dict[str, str]:
        """A byte-level BPE without merges gives the same ids."""
        made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(_letters())}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens([END_NAMES[0]])
        return Published(made).files()


class Published(Tokenizer):
    """Any tokenizer of the `tokenizers` library, without its truncation and padding.

    As `encode` reads a text, the name of a special token is encoded as plain text, except where
    the vocabulary itself lists the name as an ordinary piece (SentencePiece unigram models may).
    `came` are the files it came from; `ends` what they name besides `end`.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        came: Mapping[str, str] | None = None,
        specials: Mapping[str, str] | None = None,
        ends: Sequence[int] = (),
        template: str | None = None,
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._readers: dict[bool, tokenizers.Tokenizer] = {}
        self._lock = threading.Lock()
        self._came = dict(came or {})
        self._named = tuple(ends)
        self.specials = dict(specials or {})
        self.template = template
        added = tokenizer.get_added_tokens_decoder()
        self._silent = {i: token.content for i, token in added.items() if token.special}
        end = self._find_end(self.specials)
        if end is None:
            tokenizer.add_special_tokens([END_NAMES[0]])
            end = tokenizer.token_to_id(END_NAMES[0])
            self._silent[end] = END_NAMES[0]
        self.end = end
        self.ends = tuple(sorted({end, *ends}))
        known = tokenizer.get_vocab(with_added_tokens=True).values()
        self.size = 1 + max(known)
        self.plain = 1 + max({*known} - self._silent.keys() | {end})
        decoders = _names(tokenizer.decoder)
        self.joins_bytes = decoders == {"ByteLevel"}
        self._has_byte_pieces = "ByteFallback" in decoders
        self._check()

    def _find_end(self, specials: Mapping[str, str]) -> int | None:
        """The id between documents. A name that is no special token may be a word of the text."""
        names = [
            *(name for name in END_NAMES if name in self._silent.values()),
            specials.get("eos_token"),
            *END_NAMES,
            *(specials.get(kind) for kind in SEPARATORS),
        ]
        ids = (self._tokenizer.token_to_id(name) for name in names if name is not None)
        return next((i for i in ids if i is not None), None)

    def _check(self) -> None:
        """Raise ValueError for ids past the vocabulary; the library finds them when it runs."""
        if self.size > MOST_IDS:
            raise ValueError(f"a tokenizer with id {self.size - 1}; they must be below {MOST_IDS}")
        with library_errors("a damaged tokenizer"):
            around = self._tokenizer.encode("").ids + self._tokenizer.encode("", "").ids
        wrong = [i for i in around if i >= self.size]
        if wrong:
            raise ValueError(f"a damaged tokenizer: it adds id {wrong[0]}, of {self.size} ids")

    def _reader(self, special: bool) -> tokenizers.Tokenizer:
        """The library's tokenizer that reads special tokens by name, or does not.

        It is one setting of a shared object, so who wants both, which few do, gets a copy.
        """
        with self._lock:
            if special not in self._readers:
                reader = self._tokenizer
                if self._readers:
                    reader = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
                reader.encode_special_tokens = not special
                self._readers[special] = reader
            return self._readers[special]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        reader = self._reader(special=False)
        with library_errors("no ids for this text"):
            encodings = reader.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def prompt(self, text: str, *, whole: bool = True) -> list[int]:
        with library_errors("no ids for this text"):
            return self._reader(special=True).encode(text, add_special_tokens=whole).ids

    def pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        with library_errors("no ids for these texts"):
            encoding = self._reader(special=True).encode(first, second)
        return encoding.ids, encoding.type_ids

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def spell(self, i: int) -> bytes | None:
        piece = self._tokenizer.id_to_token(i) if 0 <= i < self.size else None
        if piece is None or i in self._silent:
            return b""
        if self.joins_bytes:
            return _bytes(piece)
        byte = self._has_byte_pieces and BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else None

    def to_json(self) -> str:
        """A tokenizer.json, or the files that it came from in one."""
        if not self._came:
            return self._tokenizer.to_str()
        said = {"files": self._came, "ends": self._named, "specials": self.specials}
        return json.dumps({"meshlm": "files", **said})

    @functools.cached_property
    def digest(self) -> str:
        decides = self._tokenizer.to_str()
        if self.end != self._find_end({}):  # then it is a matter of the other files
            decides += f" end={self.end}"
        return hashlib.sha256(decides.encode()).hexdigest()

    def files(self) -> dict[str, str]:
        if self._came:
            return dict(self._came)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": self._tokenizer.id_to_token(self.end),
        }
        config = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer.json": self._tokenizer.to_str(), "tokenizer_config.json": config}


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever the library raises as a ValueError: bare Exceptions, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {error}") from None
        raise


def _names(decoder: tokenizers.decoders.Decoder | None) -> set[str]:
    """The kinds of decoders that a decoder is, or is a sequence of."""
    state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    return {part["type"] for part in state.get("decoders", [state])}


@functools.cache
def _letters() -> tuple[str, ...]:
    """The character that byte-level vocabularies write for each byte 0 to 255.

    Printable ones of Latin-1 for themselves, the others in order from U+0100. Radford et al. 2019.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(b if b in printable else next(others)) for b in range(256))


@functools.cache
def _values() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(_letters())}


def _bytes(piece: str) -> bytes:
    """The bytes of a piece of a byte-level vocabulary; a piece in other letters is plain text."""
    try:
        return bytes(_values()[letter] for letter in piece)
    except KeyError:
        return piece.encode()
