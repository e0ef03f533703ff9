import json

import numpy as np
import pytest

from data.config import DataConfig
from data.sources import open_sources


def opened(path, held_out, **changes):
    run = DataConfig(sources=(str(path),), held_out=held_out, **changes)
    return open_sources(run)[0]


def folder(tmp_path, texts):
    path = tmp_path / str(len(texts))
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03}.txt").write_text(text)
    return path


@pytest.mark.parametrize("held_out", [1e-9, 0.01, 0.2, 0.5, 0.999999])
def test_both_kinds_of_documents_exist_and_no_document_is_both(held_out, corpus):
    part = opened(corpus, held_out)
    assert len(part.train) and len(part.held_out)
    together = np.concatenate([part.train, part.held_out])
    assert sorted(together.tolist()) == list(range(40))


def test_the_share_held_out_is_about_what_was_asked(tmp_path):
    part = opened(folder(tmp_path, [f"document {i}" for i in range(600)]), 0.2)
    assert 90 < len(part.held_out) < 150


def test_a_document_stays_on_its_side_when_others_come(corpus):
    part = opened(corpus, 0.3)
    before = {part.source.text(i) for i in part.held_out}
    for i in range(30):
        (corpus / f"new{i}.txt").write_text(f"new {i}")
    part = opened(corpus, 0.3)
    assert before <= {part.source.text(i) for i in part.held_out}


def test_documents_of_equal_content_fall_on_the_same_side(tmp_path):
    part = opened(folder(tmp_path, ["a", "b"] * 10), 0.01)
    sides = [{part.source.text(i) for i in side} for side in (part.train, part.held_out)]
    assert sorted(sides, key=sorted) == [{"a"}, {"b"}]
    with pytest.raises(ValueError, match=r"all the same text.*held_out=0"):
        opened(folder(tmp_path, ["a"] * 3), 0.01)


def test_nothing_is_held_out_of_a_share_of_0(corpus):
    part = opened(corpus, 0)
    assert len(part.train) == 40 and len(part.held_out) == 0


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("lines", [10, 1000, 60_000])
def test_the_tail_of_a_lone_document_is_held_out_from_a_line_break_on(suffix, lines, tmp_path):
    text = "".join(f"line {i} ☃\n" for i in range(lines))
    path = tmp_path / f"one{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps({"text": text}))
    else:
        path.write_text(text)
    part = opened(path, 0.01)
    head, tail = ("".join(map(part.source.text, side)) for side in (part.train, part.held_out))
    assert head + tail == text
    assert head.endswith("\n") and tail.startswith("line ")
    size = len(text.encode())
    least = max(0.01 * size, min(512, size // 10))
    assert 0.4 * least < len(tail.encode()) < 1.6 * least
    if suffix == ".txt":
        line = int(part.source.name(part.held_out[0]).split(":")[-1])
        assert tail.startswith(f"line {line - 1} ")


def test_a_lone_document_without_line_breaks_is_cut_between_characters(tmp_path):
    (tmp_path / "one.txt").write_text("☃" * 1000)
    part = opened(tmp_path / "one.txt", 0.05)
    head, tail = part.source.text(0), part.source.text(1)
    assert head + tail == "☃" * 1000 and 90 <= len(tail) <= 110


def test_a_lone_document_too_short_to_cut_says_what_to_do(tmp_path):
    (tmp_path / "one.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"one.txt:1 .*9 bytes .*data.held_out=0"):
        opened(tmp_path / "one.txt", 0.01)
    assert len(opened(tmp_path / "one.txt", 0).train) == 1
