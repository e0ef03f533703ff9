import json
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.config import DataConfig
from data.held_out import held_out_batches
from data.loader import Loader
from data.packing import ARRAYS
from data.sources import open_sources
from tests.commands import status
from text import tokenizer
from text.tokenizer import Bytes, train_bpe
from tools import prepare


def config(*sources, **changes) -> DataConfig:
    return DataConfig(sources=tuple(map(str, sources)), seq=32, batch=4, **changes)


def written(run, target, words, **kwargs) -> Path:
    shards.write(target, open_sources(run), words, run, **kwargs)
    return target


def batches(run, words, count=40):
    with Loader(run, words, open_sources(run), seed=3, rows=range(4), window=2000) as made:
        return [next(made) for _ in range(count)]


@pytest.fixture
def words(corpus):
    return train_bpe([path.read_text() for path in corpus.iterdir()], 300)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_shards_give_the_rows_of_the_text(kind, corpus, words, tmp_path):
    words = Bytes() if kind == "bytes" else words
    run = config(corpus)
    folder = written(run, tmp_path / "shards", words, shard=1000)
    assert len(list(folder.glob("tokens-*.bin"))) > 2
    again = tokenizer.load(str(folder), list)
    for a, b in zip(batches(config(folder), again), batches(run, words), strict=True):
        assert a.samples == b.samples
        for name in ARRAYS:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_shards_of_two_sources_give_the_rows_of_both(corpus, words, tmp_path):
    (tmp_path / "one.txt").write_text("a line\n" * 500)  # a lone document: cut in two
    run = config(corpus, tmp_path / "one.txt")
    folder = written(run, tmp_path / "shards", words)
    for a, b in zip(batches(config(folder), words), batches(run, words), strict=True):
        np.testing.assert_array_equal(a.arrays["targets"], b.arrays["targets"])


def test_shards_hold_out_the_same_documents(corpus, words, tmp_path):
    run = config(corpus, held_out=0.3)
    folder = written(run, tmp_path / "shards", words)
    prepared = config(folder, held_out=0.3)
    found = [
        held_out_batches(c, words, open_sources(c), bytes=10**6, rows=range(4))
        for c in (run, prepared)
    ]
    assert found[0].bytes == found[1].bytes
    for a, b in zip(found[0].batches, found[1].batches, strict=True):
        np.testing.assert_array_equal(a["targets"], b["targets"])
    part = held_out_batches(prepared, words, open_sources(prepared), bytes=500, rows=range(4))
    assert 400 <= part.bytes <= 500
    assert len(open_sources(config(folder, held_out=0))[0].train) == 40
    with pytest.raises(ValueError, match=r"prepared with held_out=0.3, not 0.1"):
        open_sources(config(folder, held_out=0.1))


def test_another_tokenizer_is_refused(corpus, words, tmp_path):
    folder = written(config(corpus), tmp_path / "shards", words)
    run = config(folder)
    message = rf"another tokenizer \({words.size} ids\).*\(257 ids\).*data.tokenizer={folder}"
    with pytest.raises(ValueError, match=message):
        Loader(run, Bytes(), open_sources(run), seed=0, rows=range(4))
    with pytest.raises(ValueError, match=message):
        held_out_batches(run, Bytes(), open_sources(run), bytes=9, rows=range(4))
    with pytest.raises(ValueError, match="holds tokens, no text to train a tokenizer on"):
        list(prepare.sample(open_sources(run)))


def test_a_large_vocabulary_takes_wider_tokens(corpus, words, tmp_path):
    folder = written(config(corpus), tmp_path / "16", words)
    words.size = (1 << 16) + 1
    wide = written(config(corpus), tmp_path / "32", words)
    sizes = [(f / "tokens-00000.bin").stat().st_size for f in (folder, wide)]
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokens-00000.bin").write_bytes(b"1234"),
        lambda folder: (folder / "documents.npy").write_bytes(b"1234"),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ],
)
def test_a_damaged_folder_is_named(damage, corpus, tmp_path):
    folder = written(config(corpus), tmp_path / "shards", Bytes())
    damage(folder)
    with pytest.raises(ValueError, match=r"shards' is a damaged folder of shards"):
        open_sources(config(folder))


def test_the_command_writes_a_folder_and_says_what_is_in_it(corpus, tmp_path, capsys):
    target = tmp_path / "shards"
    arguments = (f"--sources={corpus}", "--tokenizer=bpe:300", f"--target={target}")
    assert status(prepare, *arguments) == 0
    assert "40 documents" in capsys.readouterr().out
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["documents"] == 40 and manifest["sources"] == [str(corpus)]
    assert status(prepare, *arguments) == 2
    assert "already holds shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sources=stdlib"], "--target=VALUE is required: The folder to write"),
        (["--sources=nowhere", "--target=out"], "'nowhere' does not exist"),
        (["--tokens=5", "--target=out"], "no flag --tokens, did you mean"),
        (["--held_out=2", "--target=out"], "held_out=2.0"),
        (["--tokenizer=words", "--target=out"], "tokenizer='words'"),
        (["out"], "'out' stands without a flag"),
    ],
)
def test_the_command_leaves_with_2_and_one_message(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert status(prepare, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 2
