"""What goes out is what transformers loads: the same model as it wrote, bit by bit."""

import json

import numpy as np
import pytest

from checkpoint.convert import convert
from checkpoint.pretrained import open_pretrained
from tests.checkpoint import folders, published

pytestmark = pytest.mark.parity
pytest.importorskip("transformers", reason="parity asks for the extra of that name")


# Stored beside the head's bias, which alone counts; equal in all files but random ones.
IDLE = {"bert-untied": ["cls.predictions.bias"]}


@pytest.mark.parametrize("name", published.MODELS)
def test_through_ours_to_the_same_model(tmp_path, name):
    theirs = published.make(name)
    theirs.save_pretrained(tmp_path / "hf")
    there = convert(open_pretrained(str(tmp_path / "hf")), tmp_path / "ours")
    back = convert(open_pretrained(str(tmp_path / "ours")), tmp_path / "back", to="hf")
    assert there["differ"] == IDLE.get(name, []) and back["round_trip_bit_equal"]
    if not there["unused"] and not there["differ"]:  # a larger model's files hold more
        before, after = (folders.files(tmp_path / folder) for folder in ("hf", "back"))
        assert before == {**before, **after}
    (kind,) = json.loads((tmp_path / "back" / "config.json").read_text())["architectures"]
    ids = np.random.default_rng(0).integers(3, 96, (2, 12))
    wanted, _ = published.run(theirs, ids)
    found, _ = published.run(published.load(tmp_path / "back", kind), ids)
    assert np.array_equal(found, wanted)


def test_in_half_precision(tmp_path):
    import torch

    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        published.make("llama3").to(dtype).save_pretrained(folder / "hf")
        convert(open_pretrained(str(folder / "hf")), folder / "ours")
        convert(open_pretrained(str(folder / "ours")), folder / "back", to="hf")
        assert folders.files(folder / "back") == folders.files(folder / "hf")
