"""`python -m tools.compress quantize`: its receipt, and exit code 2 for what a user mends."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.pretrained import open_pretrained
from compressors import texts
from tests import assets
from tests.checkpoint import folders
from tests.commands import status
from tools import compress as tool

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the quick brown fox jumps over the lazy dog and walks away\n\n" * 20


@pytest.fixture
def model(tmp_path):
    folders.write(tmp_path / "hf")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[7:])
    return tmp_path


@pytest.mark.slow
def test_the_receipt_is_printed_and_saved(model, capsys):
    args = (f"--calibration={model / 'a.txt'}", f"--held_out={model / 'b.txt'}", "--tokens=256")
    assert (
        status(tool, f"--checkpoint={model / 'hf'}", "--scheme=w8", f"--out={model / 'w8'}", *args)
        == 0
    )
    out = capsys.readouterr().out
    receipt = json.loads((model / "w8" / "receipt.json").read_text())
    assert receipt["scheme"] == "w8" and receipt["method"] == "absmax"
    before, after = receipt["perplexity"].values()
    assert math.isclose(before, after, rel_tol=0.1) and before != after
    assert f"perplexity  {before:.4f} -> {after:.4f}" in out
    size = receipt["bytes"]
    assert size["after"] == open_pretrained(str(model / "w8")).bytes < 0.4 * size["before"]
    assert f"bytes       {size['before']:,} -> {size['after']:,}" in out
    assert all(rate > 0 for rate in receipt["decode_tokens_per_s"].values())
    assert len(receipt["layers"]) == 3 and len(out.splitlines()) < 17
    assert sum(receipt["stored"].values()) == receipt["parameters"]
    assert f"stored      {receipt['stored']['int8']:,} as int8, " in out


@pytest.mark.slow
def test_a_model_of_few_positions_and_huge_logits_is_measured(model, capsys):
    """Decoding is timed over what fits; a perplexity beyond a float is the largest."""
    values = folders.write(model / "few", "gpt2")
    values["transformer.wte.weight"] *= 1e4
    folders.save(model / "few", values)
    args = (f"--calibration={model / 'a.txt'}", f"--held_out={model / 'b.txt'}", "--tokens=128")
    out = f"--out={model / 'w8'}"
    assert status(tool, f"--checkpoint={model / 'few'}", "--scheme=w8", out, *args) == 0
    receipt = json.loads((model / "w8" / "receipt.json").read_text())
    assert all(1e50 < value < math.inf for value in receipt["perplexity"].values())
    assert all(rate > 0 for rate in receipt["decode_tokens_per_s"].values())
    assert max(map(len, capsys.readouterr().out.splitlines())) < 120


@pytest.mark.slow
def test_whoever_dies_while_measuring_leaves_a_checkpoint_with_a_receipt(model, monkeypatch):
    monkeypatch.setattr(tool, "measured", lambda *_: 1 / 0)
    args = (f"--calibration={model / 'a.txt'}", f"--held_out={model / 'b.txt'}", "--tokens=128")
    out = f"--out={model / 'w8'}"
    assert status(tool, f"--checkpoint={model / 'hf'}", "--scheme=w8", out, *args) == 1
    receipt = json.loads((model / "w8" / "receipt.json").read_text())
    assert "perplexity" not in receipt and receipt["bytes"]["after"] > 0
    assert sorted(path.name for path in (model / "w8").iterdir()) == ["checkpoints", "receipt.json"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--checkpoint is needed"),
        (("--checkpoint={hf}",), "--scheme is needed: How weights are stored: w8a8, w8, w4g64, fp"),
        (("--checkpoint={hf}", "--scheme=w3"), "--scheme=w3 is none of w8a8, w8, w4g64, fp8"),
        (("--checkpoint={hf}", "--scheme=w8", "--method=magic"), "--method=magic is none of absm"),
        (("--checkpoint={hf}", "--scheme=w8", "--tokens=1"), "--tokens=1 must be at least 2"),
        (
            ("--checkpoint={new}", "--scheme=w8"),
            "no such folder or file, and nothing is downloaded",
        ),
        (("--checkpoint={hf}", "--scheme=w8", "--calibration={new}"), "no such file or directory"),
        (("--checkpoint={hf}", "--scheme=w8", "--calibration={short}"), "is too short: 1 tokens"),
        (("--checkpoint={hf}", "--scheme=w8", "--calibration={bytes}"), "is no UTF-8 text"),
        (
            ("--checkpoint={hf}", "--scheme=w8", "--calibration={a}", "--held_out={a}"),
            "are the same text: nothing is held out",
        ),
        (("--checkpoint={hf}", "--scheme=w8", "--out={hf}", "--calibration={a}"), "is not empty"),
        (
            ("--checkpoint={hf}", "--scheme=w4g64", "--method=smoothquant", "--calibration={a}"),
            "w4g64 rounds none: it is for w8a8; take awq or gptq",
        ),
        (("--checkpoint={hf}", "--scheme=w8", "--calibration={empty}"), "is too short: 0 tokens"),
        (
            ("--checkpoint={hf}", "--scheme=w8", "--calibration={a}", "--held_out={empty}"),
            "empty is too short to measure on",
        ),
        (
            ("--checkpoint={hf}", "--scheme=w8", "--calibration={a}", "--out={short}/out"),
            "short: file exists",
        ),
        (("--checkpoint={mute}", "--scheme=w8"), "has no tokenizer"),
    ],
)
def test_what_a_user_mends_is_one_line_and_exit_code_2(args, message, model, capsys):
    folders.write(model / "mute", words=False)
    (model / "short").write_text("the")
    (model / "empty").write_text("")
    (model / "bytes").write_bytes(b"\xff\xfe\xfa")
    names = ("hf", "new", "mute", "short", "empty", "bytes")
    places = {name: model / name for name in names} | {"a": model / "a.txt"}
    assert status(tool, *(arg.format(**places) for arg in args)) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert not list(model.glob(".*")) and not list(model.glob("*-w*"))


def test_quantize_is_said_first():
    line = [sys.executable, "-m", "tools.compress", "--scheme=w8"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "tools.compress: error: write quantize first\n")


def test_the_built_in_texts_have_nothing_in_common():
    first, second = (texts.paragraphs(texts.reference(held)) for held in (False, True))
    assert not set(first) & set(second)
    for half in (first, second):
        assert sum(map(len, half)) > 100_000 and len(set(half)) == len(half)


def test_rows_come_from_all_over_the_text():
    class Letters:
        def prompt(self, text):
            return list(text.encode())

    text = "".join(chr(97 + i // 40) for i in range(400))
    found = texts.rows(Letters(), text, 10, 50, causal=True)
    assert [len(row) for row in found] == [10] * 5
    assert [chr(row[0]) for row in found] == ["a", "b", "d", "f", "h"]
    parts = texts.rows(Letters(), "a b c d e f\n\nlone\n\ng h i j k l m n", 12, 99, causal=False)
    assert [bytes(row).decode() for row in parts] == ["a b c d e f"]


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(
    ("scheme", "tokens", "most", "bytes_"),
    [("w8", 4096, 0.01, 0.26), ("w8a8", 8192, 0.01, 0.26), ("w4g64", 16_384, 0.06, 0.18)],
)
def test_smollm2_loses_little(scheme, tokens, most, bytes_, tmp_path):
    args = (f"--checkpoint={assets.smollm2()}", f"--scheme={scheme}", f"--tokens={tokens}")
    assert status(tool, *args, f"--out={tmp_path / 'small'}", "--held_out_tokens=4096") == 0
    receipt = json.loads((tmp_path / "small" / "receipt.json").read_text())
    before, after = receipt["perplexity"].values()
    assert after < before * (1 + most)
    assert receipt["bytes"]["after"] < bytes_ * receipt["bytes"]["before"]


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(("scheme", "least"), [("w8", 0.995), ("w4g64", 0.95)])
def test_minilm_keeps_its_embeddings(scheme, least, tmp_path):
    (tmp_path / "hf").mkdir()
    args = (f"--checkpoint={assets.minilm(tmp_path / 'hf')}", f"--scheme={scheme}")
    assert status(tool, *args, f"--out={tmp_path / 'small'}", "--tokens=4096") == 0
    receipt = json.loads((tmp_path / "small" / "receipt.json").read_text())
    assert receipt["embedding_cosine"]["least"] > least
