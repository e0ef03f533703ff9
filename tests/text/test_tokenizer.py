import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from text import cache, tokenizer

SAMPLE = ["def f(x):\n    return x  # größe ☃\r\n" * 20, "<|endoftext|> </s> 漢字 🙂\t\x00 end"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def word_level(**words) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, **words}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.mark.parametrize("made", [tokenizer.Bytes(), tokenizer.train_bpe(SAMPLE, 300)])
def test_any_text_comes_back_and_ids_stay_below_size(made):
    ids = made.encode([*SAMPLE, ""])
    assert [made.decode(part) for part in ids] == [*SAMPLE, ""]
    assert all(part.dtype == np.int32 and part.ndim == 1 for part in ids)
    assert all(part.min() >= 0 and part.max() < made.size for part in ids[:2])
    assert 0 <= made.end < made.size


@pytest.mark.parametrize("made", [tokenizer.Bytes(), tokenizer.train_bpe(SAMPLE, 300)])
def test_json_brings_back_the_same_tokenizer(made):
    again = tokenizer.from_json(made.to_json())
    assert (again.size, again.end, again.digest) == (made.size, made.end, made.digest)
    for a, b in zip(again.encode(SAMPLE), made.encode(SAMPLE), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("made", [tokenizer.Bytes(), tokenizer.train_bpe(SAMPLE, 300)])
def test_the_end_cannot_be_written_in_a_text(made):
    ids = made.encode(["<|endoftext|>"])[0]
    assert made.end not in ids
    assert made.decode([*ids, made.end, made.size, made.size + 5]) == "<|endoftext|>"


def test_training_twice_gives_the_same_ids_and_size_counts_the_end():
    texts = ["".join(f"word{i * k % 97} = value[{k}]\n" for i in range(50)) for k in range(50)]
    a, b = tokenizer.train_bpe(texts, 320), tokenizer.train_bpe(texts, 320)
    assert a.to_json() == b.to_json()
    assert a.size == 320


def test_indentation_is_one_token():
    texts = ["class A:\n" + "    def f(self):\n        return 1\n" * 50]
    made = tokenizer.train_bpe(texts, 400)
    assert [len(ids) for ids in made.encode(["):\n        ", "\n    "])] == [1, 1]


def test_a_trained_bpe_comes_from_the_cache_and_a_damaged_one_is_trained_again(
    cache_folder, monkeypatch
):
    first = tokenizer.load("bpe:300", lambda: SAMPLE)
    (path,) = cache_folder.iterdir()
    path.write_text(path.read_text()[:100])
    assert tokenizer.load("bpe:300", lambda: SAMPLE).digest == first.digest
    monkeypatch.setattr(tokenizer, "train_bpe", None)  # from here on only the cache can serve
    assert tokenizer.load("bpe:300", lambda: SAMPLE).digest == first.digest
    with pytest.raises(TypeError):
        tokenizer.load("bpe:300", lambda: [*SAMPLE, "other text"])


def test_an_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHLM_CACHE", str(tmp_path / "file" / "below"))
    assert tokenizer.load("bpe:300", lambda: SAMPLE).size <= 300


def test_truncation_and_padding_of_a_tokenizer_file_are_switched_off(tmp_path):
    made = word_level(a=1, b=2, **{"[SEP]": 3})
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(str(tmp_path), list)
    assert loaded.encode(["a b a b a b", "a"])[0].tolist() == [1, 2, 1, 2, 1, 2]
    assert loaded.encode(["a b a b a b", "a"])[1].tolist() == [1]
    assert (loaded.end, loaded.size) == (3, 4)


def test_a_tokenizer_without_a_known_end_gets_one_as_a_new_id(tmp_path):
    word_level(a=1).save(str(tmp_path / "words.json"))
    loaded = tokenizer.load(str(tmp_path / "words.json"), list)
    assert (loaded.end, loaded.size) == (2, 3)
    again = tokenizer.from_json(loaded.to_json())
    assert (again.end, again.size, again.digest) == (2, 3, loaded.digest)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:256", "257"),
        ("bpe:lots", "'lots' is no size"),
        ("bpe:", "is no size"),
        ("bpe:-5", "is no size"),
        ("bpe:16777217", "is too large: 16,777,216 ids are the most"),
        (f"bpe:{'9' * 5000}", "is too large"),
        ("gpt2", "neither 'bytes' nor 'bpe:SIZE'"),
        ("", "neither"),
    ],
)
def test_a_wrong_spec_is_named(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tokenizer.load(spec, list)


@pytest.mark.parametrize("text", ["", "{", json.dumps({"model": 1}), '{"meshlm": "words"}'])
def test_a_damaged_tokenizer_file_is_named(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer='.*' ?: not a tokenizer.json"):
        tokenizer.load(str(tmp_path / "tokenizer.json"), list)


def test_a_file_that_is_not_written_to_its_end_never_appears(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.write(tmp_path / "whole", fail)
    assert not list(tmp_path.iterdir())
