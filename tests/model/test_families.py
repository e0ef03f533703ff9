"""Families are data: published sizes have published counts, and no file has a function."""

import ast
import math
from pathlib import Path

import pytest

from checkpoint.hf import family_of, read_config, write_config
from checkpoint.names import SLOT, Names
from costs import flops
from model import families
from model.families import FAMILIES, by_architecture
from model.families.family import Key

# Parameters as published, shared ones once; of a model with images the language part: the whole
# less SigLIP's 416,866,032 and a projector's 2,950,272.
PUBLISHED = {
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-13b-hf": 13_015_864_320,
    "Llama-2-70b-hf": 68_976_648_192,
    "Meta-Llama-3-8B": 8_030_261_248,
    "Meta-Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "SmolLM-135M": 134_515_008,
    "SmolLM-360M": 361_821_120,
    "SmolLM-1.7B": 1_711_376_384,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-Base-2407": 12_247_782_400,
    "Mistral-Small-24B-Base-2501": 23_572_403_200,
    "Qwen2-0.5B": 494_032_768,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2-72B": 72_706_203_648,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-pt": 999_885_952,
    "gemma-3-4b-pt": 4_300_079_472 - 416_866_032 - 2_950_272,
    "OLMo-2-0425-1B": 1_484_916_736,
    "OLMo-2-1124-7B": 7_298_617_344,
    "OLMo-2-1124-13B": 13_716_198_400,
    "OLMo-2-0325-32B": 32_234_279_936,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Mixtral-8x22B-v0.1": 140_620_634_112,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-3-medium-4k-instruct": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "bert-base-uncased": 109_514_298,
    "bert-large-uncased": 335_174_458,
    "all-MiniLM-L6-v2": 22_713_216,
    "all-MiniLM-L12-v2": 33_360_000,
    "roberta-base": 124_697_433,
    "distilbert-base-uncased": 66_985_530,
}
SIZES = {name: (family, cfg) for family in FAMILIES for name, cfg in family.sizes.items()}


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_has_its_published_parameters(name):
    family, cfg = SIZES[name]
    count = sum(map(math.prod, Names(family, cfg).foreign().values()))
    assert count == flops.params(cfg) == PUBLISHED.get(name, count)


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_survives_its_config(name):
    family, cfg = SIZES[name]
    again = read_config(write_config(family, cfg))
    assert (again[0], again[1].arch) == (family, cfg.arch)
    assert Names(*again).foreign() == Names(family, cfg).foreign()
    assert read_config(write_config(family_of(cfg), cfg))[1] == again[1]


def test_names_of_sizes_are_of_one_family_each():
    assert len(SIZES) == sum(len(family.sizes) for family in FAMILIES)
    assert PUBLISHED.keys() <= SIZES.keys()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_whole(family):
    """Each row of its tables can be read, and each key has what to take in its absence."""
    rows = {**family.names, **{k: v for rows in family.heads.values() for k, v in rows.items()}}
    assert all(SLOT.fullmatch(slot) for slot in rows.values())
    assert all(("{}" in name) == slot.startswith("block.") for name, slot in rows.items())
    assert family.keys.keys() <= family.defaults.keys()
    assert family.copies.keys() <= rows.keys()
    assert set(family.copies.values()) <= rows.keys()
    assert family.sizes and family.published
    for key, rule in family.keys.items():
        if isinstance(rule, Key) and rule.values:
            assert family.defaults[key] in rule.values


def test_each_architecture_has_its_family():
    for family in FAMILIES:
        for architecture in family.architectures:
            assert by_architecture(architecture) is family


def test_an_unknown_architecture_meets_the_known_ones():
    message = r"'T5ForConditionalGeneration' is none of LlamaForCausalLM, .*, DistilBertModel$"
    with pytest.raises(ValueError, match=message):
        by_architecture("T5ForConditionalGeneration")


def test_family_files_hold_data_only():
    folder = Path(families.__file__).parent
    code = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef | ast.If | ast.For
    found = {
        path.name
        for path in folder.glob("*.py")
        if path.name not in ("__init__.py", "family.py")
        if any(isinstance(node, code) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert not found
