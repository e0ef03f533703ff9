"""SmolLM2-135M-Instruct from GGUF to a Hugging Face directory, which transformers loads."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from checkpoint.convert import convert
from checkpoint.pretrained import open_pretrained
from tests import assets

pytestmark = pytest.mark.assets
transformers = pytest.importorskip("transformers", reason="reads what was exported")

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "smollm2_135m_instruct_q4_1.json"
TOLERANCE = 1e-3  # of a logit, of which the largest are 20


def test_transformers_gives_the_published_ids_and_logits(tmp_path):
    import torch

    receipt = convert(open_pretrained(str(assets.smollm2())), tmp_path / "hf", to="hf")
    assert receipt["round_trip_bit_equal"] and receipt["parameters"] == 134_515_008
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 8192
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", dtype=torch.float32
        )
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]:
        assert words(case["prompt"])["input_ids"] == case["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([case["input_ids"]])).logits[0, -1].numpy()
        found = np.argsort(-logits, kind="stable")[:5]
        assert found.tolist() == case["top5_ids"]
        np.testing.assert_allclose(logits[found], case["top5_logits"], rtol=0, atol=TOLERANCE)
