import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data import formats, sources
from data.config import DataConfig
from data.sources import open_sources
from data.split import sample

TEXTS = ["first\r\nline", "größe ☃ 漢字", "x" * 300, "{not json", " tail \n"]


def opened(*specs, **changes):
    changes = {"held_out": 0.0, **changes}
    return open_sources(DataConfig(sources=tuple(map(str, specs)), **changes))


def texts(*specs, **changes) -> list[str]:
    return [part.source.text(i) for part in opened(*specs, **changes) for i in part.train]


def json_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path, rows: list, field: str = "text") -> Path:
    table = pyarrow.table({field: rows, "other": [1] * len(rows)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


PACKINGS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_lines_give_their_field(suffix, packing, tmp_path):
    path = tmp_path / f"rows{suffix}{packing}"
    path.write_bytes(PACKINGS[packing](json_lines({"body": text, "n": 1} for text in TEXTS)))
    assert texts(path, field="body") == TEXTS
    (part,) = opened(path, field="body")
    assert [part.source.name(i) for i in part.train] == [f"{path}:{k}" for k in range(1, 6)]
    assert part.source.sizes.tolist() == [len(text.encode()) for text in TEXTS]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.unknown", "a.b.txt"])
def test_a_named_file_is_one_document_whatever_its_suffix(name, packing, tmp_path):
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKINGS[packing](TEXTS[0].encode()))
    assert texts(path) == [TEXTS[0]]


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_parquet_rows_give_their_column(room, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", room)
    path = parquet(tmp_path / "rows.parquet", TEXTS, "body")
    for _ in range(2):  # the second time from the cache, if there is no room
        assert texts(path, field="body") == TEXTS


@pytest.mark.parametrize("writable", [True, False])
def test_unpacked_files_too_large_for_memory_go_to_disk(writable, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 10)
    if not writable:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MESHLM_CACHE", str(tmp_path / "file" / "below"))
    path = tmp_path / "rows.jsonl.gz"
    for rows in (TEXTS, [*TEXTS, "more"]):  # a changed file is unpacked again
        path.write_bytes(gzip.compress(json_lines({"text": text} for text in rows)))
        for _ in range(2):
            assert texts(path) == rows


def test_the_table_of_a_large_file_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "WORTH_CACHING", 0)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines({"text": text} for text in TEXTS) + b"broken\n")
    (first,) = opened(path, bad_rows=0.5)
    monkeypatch.setattr(formats, "_scan_lines", None)
    (again,) = opened(path, bad_rows=0.5)
    assert [again.source.text(i) for i in again.train] == TEXTS
    assert again.source.bad == first.source.bad and again.source.bad.count == 1
    np.testing.assert_array_equal(again.source.hashes, first.source.hashes)


def test_a_folder_is_read_with_its_folders_but_without_hidden_and_unknown_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.jsonl", ".hidden.txt", ".git/x.txt", "c.bin", "d.json"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if path.suffix == ".jsonl" else name)
    assert sorted(texts(tmp_path / "in")) == ["a/y.jsonl", "a/z.md", "b.txt"]


def test_a_glob_reaches_into_folders_and_takes_any_suffix(corpus, tmp_path):
    (corpus / "deep").mkdir()
    (corpus / "deep" / "one.log").write_text("log")
    assert texts(f"{tmp_path}/**/*.log") == ["log"]
    assert len(texts(f"{corpus}/*.txt")) == 40


def test_the_order_is_not_that_of_the_folder(corpus, monkeypatch):
    before = texts(corpus)
    walk = os.walk

    def backwards(top):
        for folder, folders, files in walk(top):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert texts(corpus) == before


def test_the_standard_library_is_its_modules_without_tests():
    (part,) = opened("stdlib", held_out=0.01)
    names = [part.source.name(i) for i in range(len(part.source))]
    assert len(part.source) > 400 and part.source.sizes.sum() > 5e6
    assert any(name.endswith("/argparse.py:1") for name in names)
    assert not [name for name in names if "/test/" in name or "-packages/" in name]
    i = next(i for i, name in enumerate(names) if name.endswith("/textwrap.py:1"))
    assert part.source.text(i).encode() == Path(names[i][:-2]).read_bytes()


def test_a_long_document_is_read_in_sections_cut_at_line_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SECTION", 100)
    text = "".join(f"line {i} with ☃\n" for i in range(60)) + "☃" * 100
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_bytes(json_lines([{"text": "short"}, {"text": text}]))
    plain = texts(tmp_path / "a.txt", seq=1)
    assert "".join(plain) == text and len(plain) > 10
    assert all(part.endswith("\n") for part in plain[:8])
    assert max(len(part.encode()) for part in plain) < 130
    assert texts(tmp_path / "b.jsonl", seq=1) == ["short", *plain]
    (part,) = opened(tmp_path / "a.txt", seq=1)
    name = part.source.name(2)
    assert text.split("\n")[int(name.split(":")[-1]) - 1] == part.source.text(2).split("\n")[0]
    assert len(set(part.source.hashes.tolist())) == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}\n')
    assert texts(tmp_path) == ["text", "row"]


BAD_LINES = {
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "open': "broken JSON",
    b"[1]": "a JSON object is wanted, this is a list",
    b'{"body": "x"}': "no field 'text', but 'body'",
    b'{"text": 5}': "field 'text' is int, not a string",
    b'{"text": ""}': "field 'text' is empty",
    b'{"text": "\\ud800"}': "not UTF-8",
    b"[" * 100_000: "broken JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_is_counted_and_named_with_file_and_line(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"text": "good"}]) * 99 + b"\n" + line + b"\n")
    (part,) = opened(path)
    assert part.source.bad.count == 1
    assert part.source.bad.first[0].startswith(f"{path}:101: {BAD_LINES[line]}")
    assert str(path) in part.describe()
    with pytest.raises(ValueError, match=r"1 of 100 rows are bad, 1.00% .*bad_rows=0.001.*:101: "):
        opened(path, bad_rows=0.001)


BAD_FILES = {
    "latin.txt": ("gr\u00f6\u00dfe".encode("latin-1"), r"latin.txt:1: not UTF-8"),
    "later.txt": (b"a\nb\n\xff", r"later.txt:3: not UTF-8"),
    "empty.txt": (b"", r"empty.txt: empty"),
    "blank.txt": (b" \n\n", r"blank.txt: empty"),
    "empty.jsonl": (b"", r"empty.jsonl: empty"),
    "short.txt.gz": (gzip.compress(b"some text" * 99)[:-9], r"short.txt.gz: cannot be unpacked"),
    "none.txt.gz": (b"no gzip", r"none.txt.gz: cannot be unpacked"),
    "short.txt.zst": (zstandard.compress(os.urandom(99))[:-9], "short.txt.zst: cannot be unpacked"),
    "none.txt.zst": (b"no zstd", r"none.txt.zst: cannot be unpacked"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_alone_and_among_others(name, tmp_path):
    data, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"no usable document .*{message}"):
        opened(path)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(ValueError, match=f"1 of 2 rows are bad, 50.00% .*{message}"):
        opened(tmp_path)
    assert texts(tmp_path, bad_rows=0.5) == ["good"]


@pytest.mark.parametrize("room", [10, 1 << 20])
def test_a_truncated_file_of_rows_keeps_those_before_the_end(room, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", room)
    rows = [{"text": os.urandom(50).hex()} for _ in range(50)]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(rows))[:-600])
    for _ in range(2):
        (part,) = opened(path, bad_rows=0.5)
        found = [part.source.text(i) for i in part.train]
        assert 10 < len(found) < 50 and found == [row["text"] for row in rows[: len(found)]]
        assert "cannot be unpacked to its end" in part.source.bad.first[-1]


def test_only_the_first_bad_rows_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"broken\n" * 50 + json_lines([{"text": "good"}]))
    with pytest.raises(ValueError, match=r"50 of 51 rows .*:1: .*:20: .*; and 30 more"):
        opened(path)


def test_bad_parquet_rows_and_columns_are_named(tmp_path):
    path = parquet(tmp_path / "rows.parquet", ["good", None, "", "fine"])
    (part,) = opened(path, bad_rows=0.5)
    assert [part.source.text(i) for i in part.train] == ["good", "fine"]
    assert [line.split(": ")[0] for line in part.source.bad.first] == [f"{path}:2", f"{path}:3"]
    with pytest.raises(ValueError, match="no column 'body', but text, other"):
        opened(path, field="body")
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"rows.parquet is not a Parquet file"):
        opened(path)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("a.parquet", "pyarrow.parquet", "parquet"), ("a.txt.zst", "zstandard", "zstd")],
)
def test_a_missing_library_is_named_with_its_extra(name, module, extra, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"data")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install 'meshlm\[{extra}\]'"):
        opened(tmp_path / name)


def test_a_missing_path_is_named_with_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "shakespeare.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    for spec in (tmp_path / "shakespear.txt", "shakespear.txt"):
        with pytest.raises(FileNotFoundError, match=r"did you mean '.*shakespeare.txt'\?"):
            opened(spec)
    with pytest.raises(FileNotFoundError, match=r"'stdlb' does not exist; did you mean 'stdlib'\?"):
        opened("stdlb")
    with pytest.raises(FileNotFoundError, match=r"'no\*.txt' matches no file"):
        opened("no*.txt")


def test_a_folder_without_documents_says_what_it_looks_for(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of its 1 files ends in .*\.jsonl.*\.txt"):
        opened(tmp_path)


def test_a_file_that_cannot_be_read_is_a_bad_row(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    (part,) = opened(tmp_path, bad_rows=0.5)
    assert part.source.bad.first == [f"{tmp_path}/link.txt: No such file or directory"]


def test_the_sample_for_a_tokenizer_is_spread_and_free_of_held_out_text(corpus, tmp_path):
    splits = opened(corpus, held_out=0.2)
    held = {splits[0].source.text(i) for i in splits[0].held_out}
    whole = list(sample(splits, 10**9))
    assert len(whole) == len(splits[0].train) and not held & set(whole)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{i:07}\n" for i in range(100_000)))
    some = list(sample(opened(path), 80_000))
    assert 60_000 < sum(map(len, some)) <= 90_000
    begins = [int(text.split("\n")[1]) for text in some]
    assert begins == sorted(begins) and begins[0] < 15_000 and begins[-1] > 80_000
