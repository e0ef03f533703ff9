"""The checks that span a Run's parts, and how a Run is shown."""

import jax
import pytest

from configs import fields
from configs.run import Run, check, describe


def run(**texts):
    return fields.override(Run(), {name.replace("__", "."): text for name, text in texts.items()})


@pytest.mark.parametrize(
    ("texts", "devices", "message"),
    [
        ({"mesh.data": "4"}, 6, "mesh: 6 devices do not divide into data=4"),
        ({"mesh.tensor": "4"}, 6, "mesh: 6 devices do not divide into tensor=4"),
        ({"mesh.data": "2"}, 8, "mesh: 8 devices do not divide into data=2: that takes 2"),
        ({}, 16, "data: batch=8 does not divide over data=16: it must be a multiple of 16"),
        ({"mesh.fsdp": "2", "data.batch": "6"}, 8, "batch=6 does not divide over data=4 x fsdp=2"),
        ({"optim.accumulate": "3"}, 1, "data: batch=8 does not divide over accumulate=3"),
        ({"optim.accumulate": "2"}, 8, "batch=8 does not divide over data=8 x accumulate=2"),
        ({"mesh.tensor": "8"}, 8, "model: kv_heads=4 does not divide over tensor=8"),
        ({"mesh.tensor": "8"}, 8, "a multiple of 8, or --config.layout.heads=none"),
        ({"mesh.fsdp": "8", "model.embed": "36"}, 8, "model: embed=36 does not divide over fsdp=8"),
        ({"mesh.tensor": "4", "model.mlp": "90"}, 4, "model: mlp=90 does not divide over tensor=4"),
        ({"mesh.tensor": "4", "model.vocab": "258"}, 4, "vocab=258 does not divide over tensor=4"),
    ],
)
def test_a_run_that_cannot_be_split_says_which_size_and_which_axis(texts, devices, message):
    with pytest.raises(ValueError, match=r"does not divide|do not divide") as caught:
        check(run(**texts), devices)
    assert message in str(caught.value)


EXPERTS = {"model.arch.moe.experts": "6", "mesh.expert": "2", "mesh.data": "1"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"mesh.expert": "4", "mesh.data": "1"},
            "expert=4 splits experts, and the model has none; ",
        ),
        ({"mesh.expert": "4", "mesh.data": "1"}, "data=4 or fsdp=4 split the rows of any model"),
        (
            EXPERTS | {"mesh.expert": "4"},
            "arch.moe.experts=6 does not divide over expert=4: it must",
        ),
        (EXPERTS | {"layout.batch": "data,fsdp"}, "experts on expert needs batch on expert too"),
    ],
)
def test_experts_that_cannot_be_split_say_why(texts, message):
    with pytest.raises(ValueError, match=r"expert") as caught:
        check(run(**texts), int(texts["mesh.expert"]))
    assert message in str(caught.value)


STAGES = {"mesh.stage": "2", "mesh.data": "1"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"model.layers": "3"}, "layers=3 does not divide over stage=2: it must"),
        (
            {"pipeline.schedule": "interleaved", "pipeline.repeats": "2", "model.layers": "6"},
            "layers=6 does not divide over stage=2 x repeats=2",
        ),
        (
            {"model.arch.attention.windows": "0,8", "model.layers": "6"},
            "layers=6 does not divide over stage=2 x layers of the pattern=2",
        ),
        ({"layout.layers": "none"}, "layers=none leaves nothing to do for mesh.stage=2"),
        ({"layout.layers": "fsdp"}, "layers='fsdp' must be stage, or none"),
        ({"layout.mlp": "tensor,stage"}, "mlp on stage cannot be: stages hold layers"),
    ],
)
def test_layers_that_stages_cannot_share_say_why(texts, message):
    with pytest.raises(ValueError, match=r"stage") as caught:
        check(run(**STAGES, **texts), 2)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"model.arch.head.kind": "masked"}, "arch.head.kind='masked' has no training loss"),
        ({"model.arch.attention.causal": "false"}, "causal=False sees the token that it is to"),
        ({"model.arch.embeddings.positions": "8"}, "is longer than the 8 positions that the model"),
    ],
)
def test_a_model_that_does_not_predict_the_next_token_of_these_rows_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        check(run(**texts), 1)


@pytest.mark.parametrize(
    ("texts", "devices"),
    [
        ({}, 1),
        ({}, 8),
        ({"mesh.tensor": "4"}, 8),
        ({"mesh.tensor": "8", "layout.heads": "none"}, 8),
        ({"mesh.tensor": "4", "model.vocab": "0"}, 4),
        (STAGES | {"optim.accumulate": "4"}, 2),
        (EXPERTS, 2),
        (EXPERTS | {"layout.experts": "none"}, 2),
        ({"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"}, 8),
        ({"optim.accumulate": "2", "data.batch": "16"}, 8),
    ],
)
def test_a_run_that_can_be_split_passes(texts, devices):
    check(run(**texts), devices)


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "-x", "~", "a\nb", "a\0b", "x" * 101, "/tmp"]
)
def test_the_name_of_a_run_is_a_plain_file_name(name):
    with pytest.raises(ValueError, match="name="):
        Run(name=name)


def test_a_seed_that_jax_would_take_for_another_is_refused():
    zero, other = (jax.random.key_data(jax.random.key(seed)) for seed in (0, 2**32))
    assert (zero == other).all(), "keys keep 32 bits: the bound rests on it"
    with pytest.raises(ValueError, match="seed=4294967296 must be"):
        Run(seed=2**32)
    assert Run(seed=2**32 - 1).seed == 2**32 - 1


def test_describe_shows_every_group_on_one_line_and_nested_fields_only_where_they_differ():
    lines = describe(Run()).splitlines()
    words = [line.split()[0] for line in lines]
    groups = "run model data optim mesh layout pipeline log eval checkpoint guard sample"
    assert " ".join(words) == groups
    assert "arch" not in describe(Run())
    text = describe(run(**{"model.arch.norm.kind": "layer", "layout.mlp": "none", "steps": "7"}))
    assert "arch.norm.kind=layer" in text
    assert "steps=7" in text
    assert "mlp=none" in text
