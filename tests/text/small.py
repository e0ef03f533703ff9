"""Small tokenizers of every kind, as the files that published ones come in."""

import json
import struct

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SAMPLE = [
    "Hello world! I'm 12345 years old; it's 3.14159. Hello again, the world.",
    "def f(x):\n    return x**2  # größe\r\n\r\n",
    "naïve café — “quotes” … 日本語テスト 日本 😀😀 \t tab",
    "the quick brown fox jumps over the lazy dog, and then the fox rests in the shade " * 3,
]
TEXTS = [
    *SAMPLE,
    "",
    " ",
    " leading",
    "  two  spaces\tand tab\n\nnewline",
    "trailing ",
    "it was not. do not! n't 's , '",
    "🙂漢字☃\x00\x7f end",
    "<s>inside</s> and <|im_start|>user\nhi<|im_end|> [SEP] [MASK] x",
]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(specials=CHATML, first=None, size=400) -> tokenizers.Tokenizer:
    """GPT-2's kind of BPE; prompts begin with the token `first`."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(SAMPLE, trainer)
    if first is not None:
        made.post_processor = processors.TemplateProcessing(
            single=[first, "$A"],
            pair=[first, "$A", f"{first}:1", "$B:1"],
            special_tokens=[(first, made.token_to_id(first))],
        )
    return made


WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "the", "fox", "rest", "##s",
    "in", "##ing", "do", "not", "it", "is", "##is", "cafe", *"'.,!;nts",
    *"abcdefghijklmopqruvwxyz0123456789",
    *(f"##{c}" for c in "abcdefghijklmnopqrtuvwxyz0123456789"),
)  # fmt: skip


def word_piece() -> tokenizers.Tokenizer:
    """BERT's, with the truncation and padding that MiniLM's file switches on."""
    made = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(list(WORDS[:5]))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.enable_truncation(6)
    made.enable_padding(length=6)
    return made


PIECES = (
    "▁", "t", "h", "e", "▁t", "he", "▁the", "o", "l", "w", "r", "d", "▁w", "or", "ld", "▁wor",
    "▁world", "H", "▁H", "ll", "llo", "ello", "▁Hello", "▁▁", "a", "n", "s", "i", "▁a", "an",
    "in", "▁in", ".", ",", "!", "'", "1", "2", "x", "f", "▁fox", "(", ")", ":", "日", "本",
    "\n", "\t",
)  # fmt: skip


def _field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def sentencepiece(
    pieces=PIECES, user=("<mark>",), control=("<unk>", "<s>", "</s>"), prefix=True, kind=2
) -> bytes:
    """A tokenizer.model: control pieces, the bytes, `user` ones, then `pieces` by rank."""
    listed = [(control[0], 0.0, 2), *((name, 0.0, 3) for name in control[1:])]
    listed += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    listed += [(name, 0.0, 4) for name in user]
    listed += [(piece, -float(rank), 1) for rank, piece in enumerate(pieces)]
    data = b"".join(
        _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind))
        for piece, score, kind in listed
    )
    names = b"".join(_field(45 + i, name.encode()) for i, name in enumerate(control[:3]))
    trainer = _field(3, kind) + _field(35, 1) + _field(40, 0) + names
    normalizer = _field(1, b"identity") + _field(3, int(prefix)) + _field(4, 0) + _field(5, 1)
    return data + _field(2, trainer) + _field(3, normalizer)


def special(content: str, **options) -> dict:
    """An entry of added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **flags, "special": True, **options}


def write(folder, **files) -> None:
    """Files by their names with _ for the dot; what is no text or bytes is written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem}.{suffix}"
        if isinstance(value, tokenizers.Tokenizer):
            value = value.to_str()
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(
                value if isinstance(value, str) else json.dumps(value), encoding="utf-8"
            )
