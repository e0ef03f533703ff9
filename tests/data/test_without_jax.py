"""A machine without JAX, let alone a device, can make batches."""

import subprocess
import sys

import pytest

from configs.load import ROOT

CODE = """
import logging, sys
logging.disable()  # grain tells of its profiler
sys.modules["jax"] = None
from data.config import DataConfig
from data.loader import Loader
from data.sources import open_sources
from text.tokenizer import Bytes
run = DataConfig(sources=(sys.argv[1],), seq=16, batch=2)
with Loader(run, Bytes(), open_sources(run), seed=1, rows=range(2)) as loader:
    print(next(loader).arrays["inputs"].tolist())
"""


@pytest.mark.slow
def test_batches_are_made_where_jax_cannot_be_imported(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Tokens need no device.\n" * 40)
    command = [sys.executable, "-c", CODE, str(text)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    rows = eval(ended.stdout)
    assert [len(row) for row in rows] == [16, 16]
    assert "Tokens" in bytes(token for row in rows for token in row if token < 256).decode()
