"""SentencePiece models: a bounded reader of tokenizer.model, and the same tokenizer from it.

Kudo and Richardson 2018, arXiv:1808.06226. The file is a protocol buffer: fields of a number, a
kind and a value, nested. Every length is held against the bytes left before it is used.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from text.kinds import MOST_IDS

SPACE = "▁"
# Kinds of field and of piece, types of model: the numbers of the published .proto file.
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
TRAINER = {3: "type", 24: "suffix", 35: "byte_fallback", 46: "bos", 47: "eos"}
NORMALIZER = {2: "charsmap", 3: "dummy_prefix", 4: "extra_spaces"}
FLAGS = ("suffix", "byte_fallback", "dummy_prefix", "extra_spaces")

Value = int | bytes


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a tokenizer.model says. Its defaults are those of the format."""

    pieces: Sequence[Piece]
    type: int = UNIGRAM
    bos: str = "<s>"
    eos: str = "</s>"
    byte_fallback: bool = False
    suffix: bool = False  # a space belongs to the word before it
    charsmap: bytes = b""
    dummy_prefix: bool = True  # a text begins with a space
    extra_spaces: bool = True  # are removed


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields (number, value) of a message, in order. ValueError if it is damaged."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind in (EIGHT_BYTES, BYTES, FOUR_BYTES):
            size = {EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(kind)
            if size is None:
                size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError(f"a field of {size} bytes where {len(data) - at} are left")
            value, at = bytes(data[at : at + size]), at + size
        else:
            raise ValueError(f"a field of kind {kind}")
        yield number, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("a number without an end")


def read(data: bytes) -> Model:
    """What a tokenizer.model holds; ValueError if it is none."""
    try:
        return _read(data)
    except (ValueError, TypeError, struct.error) as error:  # a TypeError: another kind of value
        raise ValueError(f"tokenizer.model is no SentencePiece model: {error}") from None


def _read(data: bytes) -> Model:
    pieces, found = [], {}
    for number, value in fields(memoryview(data)):
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:  # trainer
            found |= {TRAINER[n]: v for n, v in fields(memoryview(value)) if n in TRAINER}
        elif number == 3:  # normalizer
            found |= {NORMALIZER[n]: v for n, v in fields(memoryview(value)) if n in NORMALIZER}
        if len(pieces) > MOST_IDS:
            raise ValueError(f"more than {MOST_IDS} pieces")
    if not pieces:
        raise ValueError("it has no pieces")
    found |= {name: str(found[name], "utf-8") for name in ("bos", "eos") if name in found}
    found |= {name: bool(found[name]) for name in FLAGS if name in found}
    model = Model(pieces, **found)
    if model.type not in (UNIGRAM, BPE) or model.suffix:
        raise ValueError("neither unigram nor BPE with the space before the word")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError("the same piece twice")
    return model


def _piece(data: Value) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in fields(memoryview(data)):
        if number == 1:
            text = value
        elif number == 2:
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = value
    if not abs(score) < float("inf"):
        raise ValueError(f"score {score}")
    return Piece(str(text, "utf-8"), score, kind)


def convert(
    model: Model, scheme: str, added: Mapping[int, AddedToken]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer that gives the ids of `model`, and its special tokens.

    `scheme` says which pieces of a text between special tokens get the dummy prefix, if the model
    has one: "always", "first" (what begins the text, unless with a space), "never".
    `added` are tokens of other files; one with the id of a piece takes its place.
    """
    pieces = [
        Piece(added[i].content, piece.score, CONTROL if added[i].special else USER_DEFINED)
        if i in added
        else piece
        for i, piece in enumerate(model.pieces)
    ]
    past = sorted(i for i in added if i >= len(pieces))
    ids = {piece.text: i for i, piece in enumerate(pieces)} | {added[i].content: i for i in past}
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    unk = pieces[unknown].text if unknown is not None else None
    if model.type == BPE:
        options = {"unk_token": unk, "fuse_unk": True, "byte_fallback": model.byte_fallback}
        made = tokenizers.Tokenizer(models.BPE(ids, merges(pieces), **options))
    else:
        scores = [(piece.text, piece.score) for piece in pieces]
        made = tokenizers.Tokenizer(models.Unigram(scores, unknown, model.byte_fallback))
    scheme = scheme if model.dummy_prefix else "never"
    _spaces(made, model, scheme)
    special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    for piece in pieces:
        if piece.kind in special:
            # They are found in the text as it is, but those of spaces where spaces are written ▁.
            late = piece.kind == USER_DEFINED and SPACE in piece.text and scheme == "never"
            made.add_tokens([AddedToken(piece.text, normalized=late, special=special[piece.kind])])
    made.add_tokens([added[i] for i in past])
    names = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": unk}
    return made, {kind: name for kind, name in names.items() if name in ids}


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the highest score first.

    SentencePiece merges, of all neighbours, the two whose union has the highest score; a list of
    pairs by rank says the same. Control and other special pieces are never made by merging.
    """
    normal = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == NORMAL}
    ranked = []
    for text, i in normal.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                ranked.append((-pieces[i].score, i, normal[left], normal[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _spaces(made: tokenizers.Tokenizer, model: Model, scheme: str) -> None:
    """Let `made` read and write spaces as `model` does."""
    steps = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.extra_spaces:
        steps.append(normalizers.Replace(tokenizers.Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if scheme == "always":
        steps.append(normalizers.Prepend(SPACE))
    if scheme == "first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    else:
        steps.append(normalizers.Replace(" ", SPACE))
    made.normalizer = normalizers.Sequence(steps)
    written = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "never":
        written.append(decoders.Strip(" ", left=1))
    made.decoder = decoders.Sequence(written)
