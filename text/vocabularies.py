"""Tokenizers from the vocabulary files that came before tokenizer.json: GPT-2's and BERT's."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from text.kinds import MOST_IDS

# Yang et al. 2024, arXiv:2407.10671: each digit by itself, line breaks with the signs before them.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_CLASSES = ("", "GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer")
BERT_CLASSES = ("", "BertTokenizer", "DistilBertTokenizer")
BERT_SPECIALS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIALS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
GPT2_SPECIALS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")

Added = Mapping[int, AddedToken]


def byte_level(
    vocabulary: str, merges: str, config: dict[str, Any], added: Added
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A byte-level BPE from vocab.json and merges.txt, and its special tokens by default.

    How it splits words is in no file but known by `config`'s tokenizer_class: GPT-2's (also if
    there is none), Qwen 2's or RoBERTa's. ValueError for others, and for damaged files.
    """
    kind = _kind(config, BYTE_LEVEL_CLASSES, "vocab.json and merges.txt")
    ids = _ids(vocabulary)
    ids.update({token.content: i for i, token in added.items()})
    space = bool(config.get("add_prefix_space", False))
    made = tokenizers.Tokenizer(models.BPE(ids, _merges(merges)))
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    if kind == "Qwen2Tokenizer":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        )
    if kind != "RobertaTokenizer":
        return made, GPT2_SPECIALS if kind != "Qwen2Tokenizer" else {}
    ends = [(name, ids[name]) for name in ("</s>", "<s>") if name in ids]
    if len(ends) != 2:
        raise ValueError("vocab.json of a RobertaTokenizer has no <s> and </s>")
    made.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=space)
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    made.add_special_tokens([mask] if "<mask>" in ids else [])
    return made, ROBERTA_SPECIALS


def word_piece(
    vocabulary: str, config: dict[str, Any], added: Added
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """BERT's WordPiece from vocab.txt, a piece a line, and its special tokens by default.

    From `config`: do_lower_case (true), strip_accents (as lower case), tokenize_chinese_chars
    (true), and the names of special tokens.
    """
    _kind(config, BERT_CLASSES, "vocab.txt")
    ids = {line.rstrip("\r"): i for i, line in enumerate(vocabulary.rstrip("\n").split("\n"))}
    ids.update({token.content: i for i, token in added.items()})
    names = {kind: config.get(kind) or name for kind, name in BERT_SPECIALS.items()}
    names = {k: v["content"] if isinstance(v, dict) else v for k, v in names.items()}
    cls, sep, unk = (names[kind] for kind in ("cls_token", "sep_token", "unk_token"))
    missing = [name for name in (unk, cls, sep) if name not in ids]
    if missing:
        raise ValueError(f"vocab.txt lacks {', '.join(map(repr, missing))}; is it BERT's?")
    made = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=unk))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )
    return made, names


def add_around(made: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Let prompts begin and end with these tokens, as add_bos_token and add_eos_token ask."""
    before, after = ([name] if name is not None else [] for name in (first, last))
    made.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[
            *before,
            "$A",
            *after,
            *(f"{n}:1" for n in before),
            "$B:1",
            *(f"{n}:1" for n in after),
        ],
        special_tokens=[(name, made.token_to_id(name)) for name in {*before, *after}],
    )


def _kind(config: dict[str, Any], known: tuple[str, ...], files: str) -> str:
    """The tokenizer_class without "Fast", one of `known`."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind not in known:
        raise ValueError(
            f"no tokenizer.json, and {files} of a {kind} say too little: only those of a "
            f"{', '.join(filter(None, known))} are known"
        )
    return kind


def _ids(text: str) -> dict[str, int]:
    """vocab.json: {piece: id}."""
    found = json.loads(text)
    if not isinstance(found, dict) or not all(type(i) is int for i in found.values()):
        raise ValueError("vocab.json must be an object of pieces and their ids")
    wrong = next((p for p, i in found.items() if not 0 <= i < MOST_IDS), None)
    if wrong is not None:
        raise ValueError(f"vocab.json: id {found[wrong]} of {wrong!r} is not in 0..{MOST_IDS - 1}")
    return found


def _merges(text: str) -> list[tuple[str, str]]:
    """merges.txt: two pieces a line, the first merge first. Only line 1 may be a comment."""
    lines = text.split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"merges.txt: {' '.join(wrong)[:80]!r} is no pair of pieces")
    return pairs
