import json
import os

import pytest
import tokenizers

from tests.text import small
from text import pretrained, tokenizer
from text.kinds import MOST_IDS, Bytes, Published

TEMPLATE = "{{ messages[0]['content'] }}"
CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def chat_folder(folder, **config):
    """As published chat models come: byte-level, ends in three files."""
    small.write(
        folder,
        tokenizer_json=small.byte_level(),
        tokenizer_config_json=CHATML | {"chat_template": TEMPLATE} | config,
        generation_config_json={"eos_token_id": [2, 5]},
        config_json={"eos_token_id": 7},
    )
    return pretrained.open_folder(folder)


def test_a_prompt_reads_special_tokens_and_a_document_does_not(tmp_path):
    made = chat_folder(tmp_path)
    text = "<|im_start|>user\nhi<|im_end|>"
    prompt, document = made.prompt(text), made.encode([text])[0].tolist()
    assert prompt[0] == 1 and prompt[-1] == 2 and prompt.count(1) == 1
    assert 1 not in document and 2 not in document
    assert (made.decode(prompt), made.decode(document)) == ("user\nhi", text)
    assert made.prompt(text) == prompt  # in either order, however often
    assert made.encode([text])[0].tolist() == document


def test_a_prompt_begins_with_a_token_only_if_the_post_processor_says_so(tmp_path):
    """add_bos_token beside a tokenizer.json counts for nothing, as in transformers 5."""
    for first, asked in (("<|endoftext|>", False), ("<|endoftext|>", True), (None, True)):
        small.write(
            tmp_path,
            tokenizer_json=small.byte_level(first=first),
            tokenizer_config_json={"bos_token": "<|endoftext|>", "add_bos_token": asked},
        )
        made = pretrained.open_folder(tmp_path)
        plain = made.encode(["hi"])[0].tolist()
        assert made.prompt("hi") == ([0] if first else []) + plain
        assert made.prompt("hi", whole=False) == plain
    assert Bytes().prompt("hi<|endoftext|>") == list(b"hi<|endoftext|>")


@pytest.mark.parametrize(("asked", "begins"), [(True, [256]), (False, []), (None, [])])
def test_older_files_ask_for_a_first_token_in_the_config(asked, begins, tmp_path):
    vocabulary = json.loads(small.byte_level(specials=()).to_str())["model"]
    assert len(vocabulary["vocab"]) > 256 and "<|endoftext|>" not in vocabulary["vocab"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary["merges"])]
    ids = vocabulary["vocab"] | {"<|endoftext|>": len(vocabulary["vocab"])}
    config = {} if asked is None else {"add_bos_token": asked}
    small.write(
        tmp_path,
        vocab_json=ids,
        merges_txt="\n".join(merges) + "\n",
        tokenizer_config_json={"bos_token": "<|endoftext|>", **config},
    )
    made = pretrained.open_folder(tmp_path)
    begins = [made.end for _ in begins]
    assert made.prompt("hi") == begins + made.encode(["hi"])[0].tolist()


def test_ends_are_what_any_file_names(tmp_path):
    assert chat_folder(tmp_path).ends == (0, 2, 5, 7)
    assert chat_folder(tmp_path).end == 0
    (tmp_path / "generation_config.json").unlink()
    small.write(tmp_path, config_json={"text_config": {"eos_token_id": [3]}, "eos_token_id": None})
    assert pretrained.open_folder(tmp_path).ends == (0, 2, 3)
    small.write(tmp_path, config_json={"eos_token_id": -1}, special_tokens_map_json={})
    assert pretrained.open_folder(tmp_path).ends == (0, 2)
    assert Bytes().ends == (256,)
    assert tokenizer.train_bpe(small.SAMPLE, 300).ends == (0,)


def test_a_word_of_the_vocabulary_is_no_end_if_a_special_token_is_one(tmp_path):
    """Gemma's vocabulary has </s>, from HTML."""
    made = small.byte_level(specials=("<pad>", "<eos>", "<bos>"))
    made.add_tokens([tokenizers.AddedToken("</s>", special=False)])
    assert Published(made).end == 1
    small.write(
        tmp_path,
        tokenizer_json=small.byte_level(specials=("<|begin|>", "<|end|>")),
        tokenizer_config_json={"eos_token": {"content": "<|end|>", "lstrip": False}},
    )
    made = pretrained.open_folder(tmp_path)
    assert (made.end, made.size) == (1, 400)  # no id is added to the vocabulary


def test_a_token_that_only_the_config_calls_special_is_special(tmp_path):
    made = small.byte_level(specials=())
    made.add_tokens([tokenizers.AddedToken(name, special=False) for name in small.CHATML])
    small.write(
        tmp_path,
        tokenizer_json=made,
        tokenizer_config_json={
            "eos_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>"],
            "added_tokens_decoder": {str(made.get_vocab_size() - 1): small.special("<|im_end|>")},
        },
    )
    opened = pretrained.open_folder(tmp_path)
    ids = opened.prompt("<|im_start|><|im_end|><|endoftext|>")
    assert len(ids) == 3 and opened.decode(ids) == ""
    assert opened.size == made.get_vocab_size()
    assert opened.decode(opened.encode(["<|im_end|>"])[0]) == "<|im_end|>"


def test_truncation_and_padding_are_switched_off(tmp_path):
    small.write(tmp_path, tokenizer_json=small.word_piece())
    made = pretrained.open_folder(tmp_path)
    assert len(made.prompt("the fox is in the world.")) == 9
    assert made.prompt("the fox") == [2, 7, 8, 3]


def test_a_pair_has_the_token_types_of_the_post_processor(tmp_path):
    small.write(tmp_path, tokenizer_json=small.word_piece())
    made = pretrained.open_folder(tmp_path)
    ids, types = made.pair("the fox", "hello")
    assert ids == [2, 7, 8, 3, 5, 3]
    assert types == [0, 0, 0, 0, 1, 1]
    assert Bytes().pair("ab", "c") == ([97, 98, 99], [0, 0, 1])


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config_json": {"chat_template": "A"}}, "A"),
        ({"tokenizer_config_json": {"chat_template": "A"}, "chat_template_jinja": "B"}, "B"),
        (
            {
                "tokenizer_config_json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "T"},
                        {"name": "default", "template": "D"},
                    ]
                }
            },
            "D",
        ),
        ({}, None),
    ],
)
def test_the_chat_template_is_found_wherever_it_is(files, template, tmp_path):
    small.write(tmp_path, tokenizer_json=small.byte_level(), **files)
    assert pretrained.open_folder(tmp_path).template == template


def test_json_keeps_all_that_the_files_say(tmp_path):
    made = chat_folder(tmp_path)
    again = tokenizer.from_json(json.dumps(json.loads(made.to_json())))
    assert again.ends == (0, 2, 5, 7) and again.template == TEMPLATE
    assert again.specials == made.specials == CHATML
    assert (again.size, again.end, again.digest) == (made.size, made.end, made.digest)
    assert again.prompt("<|im_start|>a") == made.prompt("<|im_start|>a")
    small.write(tmp_path / "ours", tokenizer_json=made.to_json())  # as prepared tokens keep it
    assert tokenizer.load(str(tmp_path / "ours"), list).ends == made.ends


def test_the_digest_is_a_matter_of_the_ids_alone(tmp_path):
    made = chat_folder(tmp_path)
    assert made.digest == tokenizer.load(str(tmp_path / "tokenizer.json"), list).digest
    assert made.digest == chat_folder(tmp_path, model_max_length=5).digest
    small.write(tmp_path, tokenizer_json=small.byte_level(size=350))
    assert made.digest != pretrained.open_folder(tmp_path).digest
    ends = []
    for name in ("<a>", "<b>"):
        small.write(
            tmp_path / "named",
            tokenizer_json=small.byte_level(specials=("<a>", "<b>")),
            tokenizer_config_json={"eos_token": name},
        )
        ends.append(pretrained.open_folder(tmp_path / "named"))
    assert [made.end for made in ends] == [0, 1]
    assert ends[0].digest != ends[1].digest


def test_files_come_back_unchanged(tmp_path):
    made = chat_folder(tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert made.files() == {name: (tmp_path / name).read_text() for name in names}
    assert tokenizer.from_json(made.to_json()).files() == made.files()


@pytest.mark.parametrize("made", [Bytes(), tokenizer.train_bpe(small.SAMPLE, 400)])
def test_the_files_of_a_tokenizer_made_here_give_its_ids(made):
    again = pretrained.from_files(made.files())
    assert (again.size, again.end, again.ends) == (made.size, made.end, made.ends)
    for text in small.TEXTS:
        assert again.encode([text])[0].tolist() == made.encode([text])[0].tolist()
        assert again.decode(made.encode([text])[0]) == text


def test_word_pieces_of_vocab_txt_are_those_of_the_tokenizer_json(tmp_path):
    small.write(tmp_path / "whole", tokenizer_json=small.word_piece())
    small.write(tmp_path / "words", vocab_txt="\n".join(small.WORDS) + "\n")
    whole, words = (pretrained.open_folder(tmp_path / name) for name in ("whole", "words"))
    for text in small.TEXTS:
        assert words.prompt(text) == whole.prompt(text)
        assert words.pair(text, "the") == whole.pair(text, "the")
    assert words.size == len(small.WORDS)
    assert words.files()["vocab.txt"] == (tmp_path / "words" / "vocab.txt").read_text()
    assert words.specials["mask_token"] == "[MASK]"
    small.write(tmp_path / "words", tokenizer_config_json={"do_lower_case": False})
    cased = pretrained.open_folder(tmp_path / "words")
    assert cased.prompt("The") == [2, 1, 3] and words.prompt("The") == [2, 7, 3]


def test_a_byte_level_vocabulary_of_older_files_is_that_of_the_tokenizer_json(tmp_path):
    whole = small.byte_level()
    model = json.loads(whole.to_str())["model"]
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    added = {str(i): small.special(name) for i, name in enumerate(small.CHATML)}
    words = {piece: i for piece, i in model["vocab"].items() if piece not in small.CHATML}
    small.write(
        tmp_path,
        vocab_json=words,
        merges_txt=merges,
        tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added},
    )
    made = pretrained.open_folder(tmp_path)
    whole = Published(whole)
    for text in small.TEXTS:
        assert made.prompt(text) == whole.prompt(text)
        assert made.encode([text])[0].tolist() == whole.encode([text])[0].tolist()
    assert made.joins_bytes
    del added["2"]
    small.write(
        tmp_path,
        tokenizer_config_json={"tokenizer_class": "Qwen2TokenizerFast"},
        added_tokens_json={name: i for i, name in enumerate(small.CHATML)},
        special_tokens_map_json={
            "eos_token": "<|im_end|>",
            "pad_token": {"content": "<|endoftext|>"},
        },
    )
    qwen = pretrained.open_folder(tmp_path)
    assert qwen.prompt("<|im_start|>12\u0065\u0301<|im_end|>")[0] == 1
    assert len(qwen.prompt("123")) == 3 and qwen.prompt("e\u0301") == qwen.prompt("é")
    assert qwen.ends == (0, 2)
    assert qwen.decode(qwen.prompt("<|im_start|>a")) == "<|im_start|>a"  # in no file special


def test_roberta_reads_and_pairs_as_its_class_does(tmp_path):
    whole = small.byte_level(specials=("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    model = json.loads(whole.to_str())["model"]
    small.write(
        tmp_path,
        vocab_json=model["vocab"],
        merges_txt="\n".join(f"{a} {b}" for a, b in model["merges"]),
        tokenizer_config_json={"tokenizer_class": "RobertaTokenizer"},
    )
    made = pretrained.open_folder(tmp_path)
    a, b = (made.encode([text])[0].tolist() for text in ("hi", "you"))
    assert made.prompt("hi") == [0, *a, 2]
    assert made.pair("hi", "you") == ([0, *a, 2, 2, *b, 2], [0] * (len(a) + len(b) + 4))
    assert made.prompt("hi <mask>", whole=False) == [*a, 4]  # it takes the space before it along
    for one in (made, tokenizer.from_json(made.to_json())):
        assert (one.end, one.specials["cls_token"]) == (2, "<s>")


def test_a_tokenizer_must_fit_the_model():
    made = tokenizer.train_bpe(small.SAMPLE, 300)
    pretrained.fits(made, 300)
    pretrained.fits(made, 50257)
    with pytest.raises(ValueError, match="of 300 ids for a model whose vocabulary is 299"):
        pretrained.fits(made, 299)


def test_a_special_token_may_lie_beyond_the_models_vocabulary():
    """As <image_soft_token>, 262,144, of a Gemma 3 that reads no images."""
    library = tokenizers.Tokenizer.from_str(tokenizer.train_bpe(small.SAMPLE, 300).to_json())
    library.add_special_tokens(["<image_soft_token>"])
    made = Published(library)
    assert (made.size, made.plain) == (301, 300)
    pretrained.fits(made, 300)
    library.add_tokens(["word"])
    with pytest.raises(ValueError, match="of 302 ids for a model whose vocabulary is 300"):
        pretrained.fits(Published(library), 300)


def test_a_folder_without_a_tokenizer_says_what_it_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError,
        match=r"tokenizer='.*': .* has no tokenizer: neither tokenizer.json, vocab.json with "
        r"merges.txt, vocab.txt or tokenizer.model",
    ):
        tokenizer.load(str(tmp_path), list)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        pretrained.open_folder(tmp_path / "missing")


VOCAB = {"a": 0, "<|endoftext|>": 1}


def adding(tokens):
    return {"tokenizer_config_json": {"added_tokens_decoder": tokens}}


DAMAGED = {
    "half a config": ({"tokenizer_config_json": "{"}, "tokenizer_config.json is damaged"),
    "a list": ({"tokenizer_config_json": []}, "tokenizer_config.json must be a JSON object"),
    "deep": ({"generation_config_json": "[" * 100_000}, "generation_config.json is damaged"),
    "half a config.json": ({"config_json": "{"}, "config.json is damaged"),
    "half": ({"tokenizer_json": '{"model": '}, "not a tokenizer.json"),
    "no text": ({"tokenizer_json": b"\xff\xfe"}, "is not UTF-8"),
    "no added token": (
        {"tokenizer_config_json": {"added_tokens_decoder": {"x": 1}}},
        "added tokens",
    ),
    "no added tokens": ({"tokenizer_config_json": {"added_tokens_decoder": 5}}, "added tokens"),
    "far": (
        {"tokenizer_config_json": {"added_tokens_decoder": {"99999999999": small.special("<x>")}}},
        "added token '<x>' with id 99999999999",
    ),
}


@pytest.mark.parametrize(("files", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(files, message, tmp_path):
    small.write(tmp_path, **{"tokenizer_json": small.byte_level(), **files})
    with pytest.raises(ValueError, match=message):
        pretrained.open_folder(tmp_path)


OLDER = {
    "vocab.json of text": ({"vocab_json": {"a": "0"}, "merges_txt": ""}, "pieces and their ids"),
    "negative": ({"vocab_json": {"a": -1}, "merges_txt": ""}, "id -1 of 'a'"),
    "large": ({"vocab_json": {"a": MOST_IDS}, "merges_txt": ""}, f"id {MOST_IDS} of 'a'"),
    "merge of three": ({"vocab_json": VOCAB, "merges_txt": "a a a"}, "'a a a' is no pair"),
    "merge of others": ({"vocab_json": VOCAB, "merges_txt": "a b"}, "out of vocabulary"),
    "another class": (
        {
            "vocab_json": VOCAB,
            "merges_txt": "",
            "tokenizer_config_json": {"tokenizer_class": "CLIPTokenizer"},
        },
        "of a CLIPTokenizer say too little",
    ),
    "no BERT": ({"vocab_txt": "a\nb\n"}, r"vocab.txt lacks '\[UNK\]', '\[CLS\]', '\[SEP\]'"),
    "no RoBERTa": (
        {
            "vocab_json": VOCAB,
            "merges_txt": "",
            "tokenizer_config_json": {"tokenizer_class": "RobertaTokenizer"},
        },
        "no <s> and </s>",
    ),
    "no pieces": ({"tokenizer_model": b"IQ== 0\nIg== 1\n"}, "no SentencePiece model"),
}


@pytest.mark.parametrize(("files", "message"), OLDER.values(), ids=OLDER)
def test_a_damaged_older_file_is_named(files, message, tmp_path):
    small.write(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        pretrained.open_folder(tmp_path)


def test_only_regular_files_of_a_sane_size_are_read(tmp_path, monkeypatch):
    small.write(tmp_path, tokenizer_json=small.byte_level())
    monkeypatch.setattr(pretrained, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"tokenizer.json has \d+ bytes; .* over 1000"):
        pretrained.open_folder(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="must be a file"):
        pretrained.open_folder(tmp_path)
    path.unlink()
    path.symlink_to("tokenizer.json")
    with pytest.raises(OSError, match="symbolic links"):
        pretrained.open_folder(tmp_path)
    path.unlink()
    path.symlink_to("elsewhere")
    with pytest.raises(FileNotFoundError, match="is a link to a file that is not there"):
        pretrained.open_folder(tmp_path)


def changed(**parts):
    """A small tokenizer.json with other parts."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    return json.dumps(json.loads(made.to_str()) | parts)


FIRST = {"SpecialToken": {"id": "<s>", "type_id": 0}}
A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
ADDS = {"type": "TemplateProcessing", "single": [FIRST, A], "pair": [A, B]}
UNKNOWN = {"<s>": {"id": "<s>", "ids": [99], "tokens": ["<s>"]}}
HOSTILE = {
    "adds what it has not": (
        changed(post_processor=ADDS | {"special_tokens": UNKNOWN}),
        "it adds id 99, of 3 ids",
    ),
    "adds what it does not say": (
        changed(post_processor=ADDS | {"special_tokens": {}}),
        "a damaged tokenizer",
    ),
    "a huge id": (
        changed(model={"type": "BPE", "vocab": {"a": 0, "</s>": 4_000_000_000}, "merges": []}),
        "a tokenizer with id 4000000000",
    ),
    "a damaged map": (
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "not a tokenizer.json",
    ),
    "our own without files": ('{"meshlm": "files"}', "not a tokenizer.json"),
    "our own with wrong parts": (
        json.dumps({"meshlm": "files", "files": {"tokenizer.json": changed()}, "specials": 5}),
        "a damaged tokenizer",
    ),
    "our own with one file": ('{"meshlm": "files", "files": {"a": 1}}', "not a tokenizer.json"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_is_an_error_before_it_is_used(text, message, tmp_path, capfd):
    small.write(tmp_path, tokenizer_json=text)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(str(tmp_path), list)
    with pytest.raises(ValueError, match=message):
        tokenizer.from_json(text)


def test_a_text_that_has_no_ids_is_an_error():
    made = Published(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1})))
    for wrong in ("b", "\ud800"):
        with pytest.raises(ValueError, match="no ids for this text"):
            made.prompt(wrong)
        with pytest.raises(ValueError, match="no ids for this text"):
            made.encode([wrong])
