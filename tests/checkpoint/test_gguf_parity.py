"""GGUF models as others read them: the names of the gguf package, the tensors of transformers."""

import importlib.util
import re
import warnings

import numpy as np
import pytest

from checkpoint.names import Names
from tests.checkpoint import published
from tests.checkpoint.gguf_models import BY_NAME, CASES, drawn, opened, stored, write

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="no gguf"),
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="no transformers"),
]


@pytest.mark.parametrize("case", CASES)
def test_the_gguf_package_gives_tensors_these_names(case):
    import gguf

    arch, family, cfg, _ = CASES[case]
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[arch], cfg.layers)
    theirs = set()
    for name in Names(BY_NAME[family], cfg).foreign():
        name = re.sub(r"^(bert|distilbert)\.", "", name)
        name = re.sub(r"model\.(.*)block_sparse_moe.experts\.\d+", r"\1feed_forward.experts", name)
        name = re.sub(r"experts\.\d+", "experts", name)
        # A classifier's last layer goes by another name in the converter.
        name = re.sub(r"^classifier\.(weight|bias)", r"classifier.out_proj.\1", name)
        theirs.add(table.get_name(name, try_suffixes=(".weight", ".bias")) or name)
    ours = stored(drawn(Names(BY_NAME[family], cfg).foreign()), cfg, arch, family)
    assert ours.keys() == {re.sub(r"^pooler\.dense", "cls", name) for name in theirs}


@pytest.mark.parametrize(
    "case", ["llama", "llama tied", "qwen2 yarn", "qwen3", "qwen3 moe", "gemma2", "gemma3", "gpt2"]
)
def test_transformers_reads_the_same_tensors(case, tmp_path):
    transformers, torch = published.library()
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path, cfg = tmp_path / "model.gguf", CASES[case][2]
    write(path, case, vocab_size=cfg.vocab, context_length=16, rope__dimension_count=cfg.head_dim)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
        model = transformers.AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    _, _, named = opened(path)
    theirs = {name: weight.numpy() for name, weight in held.items()}
    compared = 0
    for name in named.tensors:
        if "experts" in name:  # transformers keeps them stacked
            layer, e, part = re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)", name).groups()
            stem = f"model.layers.{layer}.mlp.experts."
            gate, up = np.split(theirs[f"{stem}gate_up_proj"][int(e)], 2)
            down = theirs[f"{stem}down_proj"][int(e)]
            right = {"gate_proj": gate, "up_proj": up, "down_proj": down}[part]
        else:
            right = theirs[name]
        np.testing.assert_allclose(named.read(name), right, atol=3e-7, err_msg=name)
        compared += 1
    assert compared == len(named.tensors) > 10
