import random

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path):
    """A folder of 40 text files of 1 to 2,000 bytes, with a few characters of several bytes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    draw = random.Random(0)
    for i in range(40):
        size = int(10 ** draw.uniform(0, 3.3))
        words = "".join(draw.choice("abc dé\n☃") for _ in range(size)) + "."
        (folder / f"{i:02}.txt").write_text(words, encoding="utf-8", newline="")
    return folder
