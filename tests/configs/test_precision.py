"""Precisions on the command line: presets by name, and fields on top of them."""

import json

import pytest

from configs.load import load
from configs.run import describe, from_json, to_json
from model.precision import BF16, INT8, Passes, Precision

RECIPE = "configs/quickstart.py"


def test_a_preset_is_set_by_name_and_fields_on_top_of_it_in_any_order():
    texts = {"precision": "int8", "precision.mlp.wgrad": "bf16", "model.heads": "2"}
    for order in (texts, dict(reversed(texts.items()))):
        found = load(RECIPE, {**order, "model.kv_heads": "2"}).model
        assert found.precision.mlp == Passes(INT8.forward, INT8.dgrad, "bf16")
        assert found.precision.attention == INT8
        assert found.heads == 2
    assert load(RECIPE).model.precision == Precision()


def test_one_kind_of_layer_takes_a_preset_too_after_the_preset_of_all():
    texts = {"precision.attention": "bf16", "precision": "int8"}
    found = load(RECIPE, texts).model.precision
    assert (found.attention, found.mlp) == (BF16, INT8)
    run = load(RECIPE, texts)
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    assert "precision.attention=bf16 precision.mlp=int8" in describe(run)
    assert " precision=int8 " in describe(load(RECIPE, {"precision": "int8"}))


def test_scaling_is_a_field_on_top_of_a_preset_and_in_one():
    texts = {"precision": "fp8", "precision.mlp.scaling": "delayed"}
    found = load(RECIPE, texts).model.precision
    assert (found.attention, found.mlp) == (Passes.by_name("fp8"), Passes.by_name("fp8_delayed"))
    assert found.delayed and not found.current.delayed
    assert found.current == load(RECIPE, {"precision": "fp8"}).model.precision


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"precision": "int9"}, "precision='int9' is no precision, did you mean int8? there are"),
        ({"precision.mlp.wgrad": "in8"}, "mlp: wgrad='in8' is no precision, did you mean int8?"),
        ({"precision.mlp.wgrad": "int8g1"}, "wgrad='int8g1' must have groups of 16 to 65536"),
        ({"precision.mlp.wgrad": "bf16g64"}, "wgrad='bf16g64' is no precision, did you mean bf16?"),
        ({"precision.mlp.dgrad": "w4"}, "dgrad='w4' is no precision; there are bf16, int8, fp8"),
        ({"precision.head.dgrad": "int8g64"}, "dgrad='int8g64' has groups, which are of hidden"),
        (
            {"precision.experts": "fp8"},
            "experts: forward='fp8' is none of bf16, int8",
        ),
        ({"precision.mlp.rounding": "stochastic"}, "is of int8 gradients, not of dgrad='bf16'"),
        (
            {"precision.mlp": "fp8", "precision.mlp.scaling": "later"},
            "mlp: scaling='later' is none of current, delayed",
        ),
        (
            {"precision": "int8", "precision.mlp.scaling": "delayed"},
            "mlp: scaling='delayed' is of passes in fp8 without groups, others in bf16, not of "
            "forward='int8', dgrad='int8', wgrad='int8'",
        ),
        ({"precision.mlp.scaling": "delayed"}, "others in bf16, not of forward='bf16'"),
        ({"precision.head": "fp8_delayed"}, "head: scaling='delayed' is of hidden layers"),
        (
            {"precision.mlp.bwd": "int8"},
            "no field model.precision.mlp.bwd, did you mean",
        ),
        ({"precison.mlp": "int8"}, "no field precison.mlp, did you mean precision.mlp?"),
        ({"precision": "int8", "model.precision": "bf16"}, "is short for model.precision, which"),
    ],
)
def test_what_is_no_precision_is_refused_with_the_nearest(texts, message):
    with pytest.raises(ValueError, match=r"^(model\.)?prec|^no field") as caught:
        load(RECIPE, texts)
    assert message in str(caught.value)
