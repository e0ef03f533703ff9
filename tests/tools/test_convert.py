"""`python -m tools.convert`: its receipt, and exit code 2 with one line for what a user mends."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint import folders
from tests.commands import status
from tools import convert as tool

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    """The exit code of the command, in this process."""
    return status(tool, *args)


def test_the_receipt_is_printed_and_saved(tmp_path, capsys):
    folders.write(tmp_path / "hf", dtype="BF16")
    target = tmp_path / "ours"
    assert run(f"--source={tmp_path / 'hf'}", f"--target={target}") == 0
    out = capsys.readouterr().out
    receipt = json.loads((target / "receipt.json").read_text())
    assert f"source      {tmp_path / 'hf'}: 30 BF16" in out
    assert f"model       llama, {receipt['parameters']:,} parameters" in out
    assert f"values      sha256 {receipt['values_sha256']['target']}" in out
    assert "unused      none" in out and "round trip  bit-equal: yes" in out
    assert len(out.splitlines()) < 20


def test_what_does_not_come_back_is_printed(tmp_path, capsys):
    values = folders.write(tmp_path / "hf")
    args = (f"--source={tmp_path / 'hf'}", f"--target={tmp_path / 'half'}")
    assert run(*args, "--to=hf", "--dtype=float16", "--shard_bytes=9000") == 0
    out = capsys.readouterr().out
    assert f"round trip  bit-equal: no, {len(values)} tensors differ" in out
    assert "model.safetensors.index.json: sha256 " in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--source is needed"),
        (("--source={hf}",), "--target is needed"),
        (("--source={hf}", "--target={new}", "--to=gguf"), "--to=gguf is none of meshlm, hf"),
        (("--source={hf}", "--target={new}", "--dtype=int8"), "--dtype=int8 is none of same, fl"),
        (("--source={hf}", "--target={new}", "--shard_bytes=0"), "shard_bytes=0 must be at least"),
        (("--source={hf}", "--target={new}", "--dtype=float16"), "float16' is for to='hf'"),
        (("--source={hf}", "--target={hf}"), "is not empty: nothing is written over"),
        (("--source={new}", "--target={new}"), "no such folder or file, and nothing is downloaded"),
        (("--source={cut}", "--target={new}"), "model.safetensors: .* the file is cut short"),
        (("--sauce={hf}",), "sauce"),
    ],
)
def test_what_a_user_mends_is_exit_code_2_and_one_message(tmp_path, capsys, args, message):
    folders.write(tmp_path / "hf")
    folders.write(tmp_path / "cut")
    cut = tmp_path / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    places = {name: tmp_path / name for name in ("hf", "new", "cut")}
    assert run(*(arg.format(**places) for arg in args)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.splitlines()) <= 2
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_command_works_from_a_shell(tmp_path):
    folders.write(tmp_path / "hf")
    command = [sys.executable, "-m", "tools.convert"]
    helped = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0 and "--shard_bytes" in helped.stdout
    assert "python -m tools.convert --source=" in helped.stdout
    args = [f"--source={tmp_path / 'hf'}", f"--target={tmp_path / 'ours'}"]
    done = subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("round trip  bit-equal: yes\n")
    assert not done.stderr, done.stderr
