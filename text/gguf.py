"""The tokenizer inside a GGUF file, from the file's metadata.

A file tells the vocabulary, what kind each token is, how to merge, and which tokens are special.
How a text is cut into words before that, it only names, so such names are known here or refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from text import pretrained, sentencepiece, vocabularies
from text.kinds import Tokenizer, library_errors
from text.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Piece
from text.vocabularies import QWEN

PREFIX = "tokenizer.ggml."
NO_ID = 2**32 - 1

# Qwen 2's words, with up to three digits together. Llama 3, arXiv:2407.21783, after OpenAI's GPT-4.
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Capitals begin a word. Mistral Nemo's tekken.json.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Words:
    """How a byte-level BPE cuts a text into words."""

    pattern: str = ""  # "": GPT-2's
    digits: bool = False  # each digit is a word, before the pattern
    nfc: bool = False  # the text is composed first
    whole: bool = False  # a word that is a token is not merged from its parts
    bos: bool = False  # prompts begin with the first token, if the file does not say
    eos: bool = False  # and end with the last


GPT2, DIGITS = Words(), Words(digits=True)
LLAMA = Words(LLAMA3, whole=True, bos=True)
WORDS = {
    "default": GPT2, "gpt-2": GPT2, "mpt": GPT2, "olmo": Words(nfc=True),
    "roberta-bpe": Words(bos=True, eos=True),
    "smollm": DIGITS, "starcoder": DIGITS, "refact": DIGITS,
    "llama-bpe": LLAMA, "llama3": LLAMA, "llama-v3": LLAMA, "pixtral": LLAMA,
    "dbrx": Words(LLAMA3), "smaug-bpe": Words(LLAMA3),
    "qwen2": Words(QWEN, nfc=True), "deepseek-r1-qwen": Words(QWEN, nfc=True),
    "tekken": Words(TEKKEN, whole=True, bos=True),
}  # fmt: skip

SPECIALS = {  # key of the metadata -> name in tokenizer_config.json
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
    "seperator_token_id": "sep_token",  # the format's own spelling
    "cls_token_id": "cls_token",
    "mask_token_id": "mask_token",
}
PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")  # the others take spaces along
# Ends of a turn or of a text by what they are called: files name one or two of a model's several.
ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<end_of_turn>",
)  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """What the metadata say of the tokenizer, each checked when it is asked for."""

    values: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any) -> Any:
        found = self.values.get(PREFIX + key, default)
        if found is not default and type(found) is not kind:
            raise ValueError(f"{PREFIX}{key} is {_short(found)}, where a {kind.__name__} belongs")
        return found

    def numbers(self, key: str, count: int, default: float) -> np.ndarray:
        """An array with a number for each token."""
        found = self.get(key, np.ndarray, None)
        if found is None:
            return np.full(count, default)
        if len(found) < count:
            raise ValueError(f"{PREFIX}{key} has {len(found)} entries for {count} tokens")
        return found[:count]

    def strings(self, key: str) -> list[str]:
        found = self.get(key, list, None)
        if not found or not all(type(text) is str for text in found):
            raise ValueError(f"{PREFIX}{key} holds no list of texts, which a tokenizer needs")
        return found

    def tokens(self) -> tuple[list[str], list[int]]:
        """The text of each token and its kind, without those that only fill the table."""
        texts = self.strings("tokens")
        kinds = self.numbers("token_type", len(texts), NORMAL).tolist()
        while kinds[-1] == UNUSED and texts[len(kinds) - 1] == f"[PAD{len(kinds) - 1}]":
            del kinds[-1]
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts[: len(kinds)])]
        if len(set(texts)) < len(texts):
            first = {text: i for i, text in reversed(list(enumerate(texts)))}
            again = next(i for i, text in enumerate(texts) if first[text] < i)
            raise ValueError(
                f"{PREFIX}tokens has {_short(texts[again])} twice, as {first[texts[again]]} "
                f"and {again}"
            )
        return texts, kinds

    def special(self, key: str, texts: Sequence[str], default: int = NO_ID) -> str | None:
        """The text of the token whose id the metadata hold under `key`."""
        i = self.get(key, int, default)
        if 0 <= i < len(texts):
            return texts[i]
        if i != NO_ID and key in ("bos_token_id", "eos_token_id"):
            raise ValueError(f"{PREFIX}{key} is {i}, of {len(texts)} tokens")
        return None

    def specials(
        self, texts: Sequence[str], usual: Mapping[str, int] = MappingProxyType({})
    ) -> dict[str, str]:
        """The special tokens by their names in tokenizer_config.json; `usual` ids by key."""
        named = {
            name: self.special(key, texts, usual.get(key, NO_ID)) for key, name in SPECIALS.items()
        }
        return {name: text for name, text in named.items() if text is not None}


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file; ValueError if it is of an unknown kind, or damaged."""
    found = Metadata(metadata)
    kind = found.get("model", str, "")
    if kind not in KINDS:
        raise ValueError(f"{PREFIX}model {_short(kind)} is none of {', '.join(KINDS)}")
    texts, kinds = found.tokens()
    made, specials, (bos, eos) = KINDS[kind](found, texts, kinds)
    if made.post_processor is None:
        around = []
        for key, usual in {"bos": bos, "eos": eos}.items():
            wanted = found.get(f"add_{key}_token", bool, usual)
            name = specials.get(f"{key}_token")
            if wanted and name is None:
                raise ValueError(f"{PREFIX}add_{key}_token asks for a token that the file lacks")
            around.append(name if wanted else None)
        if any(name is not None for name in around):
            vocabularies.add_around(made, *around)
    named = [found.special(key, texts) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    control = {text for text, kind in zip(texts, kinds, strict=True) if kind == CONTROL}
    ends = {*named, *control.intersection(ENDS)} - {None}
    return pretrained.from_files(
        _files(
            made, specials, sorted(map(texts.index, ends)), metadata.get("tokenizer.chat_template")
        )
    )


def _files(
    made: tokenizers.Tokenizer, specials: Mapping[str, str], ends: list[int], template: Any
) -> dict[str, str]:
    """The files of a Hugging Face directory that say the same."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps(config | specials, indent=2, ensure_ascii=False) + "\n",
    }
    if ends:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends}) + "\n"
    if isinstance(template, str):
        files["chat_template.jinja"] = template
    return files


Made = tuple[tokenizers.Tokenizer, dict[str, str], tuple[bool, bool]]


def _byte_level(found: Metadata, texts: list[str], kinds: list[int]) -> Made:
    """A byte-level BPE, its special tokens, and whether prompts have one before and after."""
    name = found.get("pre", str, "default")
    if name not in WORDS:
        raise ValueError(f"{PREFIX}pre {_short(name)} is none of {', '.join(WORDS)}")
    words = WORDS[name]
    ids = {text: i for i, text in enumerate(texts)}
    pairs = []
    for merge in found.strings("merges"):
        left, _, right = merge.partition(" ")
        if not (left in ids and right in ids and left + right in ids):
            raise ValueError(f"{PREFIX}merges has {_short(merge)}, no two tokens that make a third")
        pairs.append((left, right))
    made = tokenizers.Tokenizer(models.BPE(ids, pairs, ignore_merges=words.whole))
    if words.nfc:
        made.normalizer = normalizers.NFC()
    prefix = found.get("add_space_prefix", bool, False)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if words.digits else []
    if words.pattern:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(words.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not words.pattern))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    _add(made, texts, kinds)
    return made, found.specials(texts), (words.bos, words.eos)


def _sentencepiece(found: Metadata, texts: list[str], kinds: list[int]) -> Made:
    """SentencePiece's BPE, as text/sentencepiece.py makes it of a tokenizer.model."""
    scores = found.numbers("scores", len(texts), 0.0).tolist()
    # Files hold the spaces of added tokens as spaces, those of others as the model writes them.
    texts = [
        text.replace(" ", SPACE) if kind == USER_DEFINED else text
        for text, kind in zip(texts, kinds, strict=True)
    ]
    if found.get("precompiled_charsmap", np.ndarray, None) is not None:
        raise ValueError(f"{PREFIX}precompiled_charsmap is not supported beside model 'llama'")
    model = sentencepiece.Model(
        [Piece(*one) for one in zip(texts, scores, kinds, strict=True)],
        type=sentencepiece.BPE,
        byte_fallback=BYTE in kinds,
        dummy_prefix=found.get("add_space_prefix", bool, True),
        extra_spaces=found.get("remove_extra_whitespaces", bool, False),
    )
    with library_errors("a damaged SentencePiece tokenizer"):
        made, _ = sentencepiece.convert(model, "always", {})
    if found.values.get("general.architecture") == "phi3":
        # No file says so: Phi-3's added tokens take along the spaces after them.
        taking = [NORMAL if t in PHI3_PLAIN else k for t, k in zip(texts, kinds, strict=True)]
        _add(made, texts, taking, rstrip=True)
    usual = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return made, found.specials(texts, usual), (True, False)


def _word_piece(found: Metadata, texts: list[str], kinds: list[int]) -> Made:
    """BERT's WordPiece. A file marks the pieces that begin a word, BERT those that do not."""
    if any(text.startswith(SPACE) for text in texts):
        texts = [
            text if kind == CONTROL else text[1:] if text.startswith(SPACE) else f"##{text}"
            for text, kind in zip(texts, kinds, strict=True)
        ]
    cased = any(text != text.lower() and not text.startswith("[") for text in texts)
    names = found.specials(texts)
    if "bos_token" in names:
        names.setdefault("cls_token", names.pop("bos_token"))
    config = names | {
        "do_lower_case": found.get("normalizer.lowercase", bool, not cased),
        "strip_accents": found.get("normalizer.strip_accents", bool, None),
    }
    made, names = vocabularies.word_piece("\n".join(texts), config, {})
    _add(made, texts, kinds)
    return made, names, (False, False)


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _word_piece}


def _add(made: tokenizers.Tokenizer, texts: list[str], kinds: list[int], **how: bool) -> None:
    """Let `made` find in a text, before all else, the tokens that are there for that."""
    special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    made.add_tokens(
        [
            AddedToken(text, normalized=False, special=special[kind], **how)
            for text, kind in zip(texts, kinds, strict=True)
            if kind in special
        ]
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
