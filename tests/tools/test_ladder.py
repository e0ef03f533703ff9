"""The ladder's rungs: what each adds, what is left out, what is told of one that fails."""

import dataclasses
import itertools
import json

import pytest

from configs.load import load, save
from tests.commands import status
from tools import ladder

TINY = {
    "model.layers": "2", "model.embed": "16", "model.heads": "2", "model.kv_heads": "2",
    "model.head_dim": "8", "model.mlp": "16", "model.vocab": "64", "data.batch": "4",
    "data.seq": "32", "model.remat": "dots", "model.arch.head.chunk": "32",
}  # fmt: skip


@pytest.fixture
def run():
    return load("configs/llama.py:124M", TINY)


def test_each_rung_adds_one_thing_up_to_the_recipe_and_then_8_bits(run):
    climbed = list(ladder.rungs(run, 2, 3, cpu=False))
    assert [rung.name for rung in climbed] == [
        "operation by operation, float32",
        "compiled and fused",
        "a loop over the layers",
        "bfloat16",
        "flash attention",
        "fused projections",
        "logits in chunks",
        "remat: dots",
        "state taken over",
        "packed rows",
        "4 rows",
        "matmuls in int8",
    ]
    for before, rung in itertools.pairwise(climbed):
        old, more = before.fields | before.flags, rung.fields | rung.flags
        assert sum(old[name] != more[name] for name in old | more) == 1

    def of(rung):
        fields = {name: str(value) for name, value in rung.fields.items()}
        return load("configs/llama.py:124M", TINY | fields)

    assert of(climbed[-2]) == run
    assert of(climbed[-1]).model.precision.mlp.wgrad == "int8"
    assert climbed[-1].flags == {
        "eager": False, "fused_projections": True, "donate": True, "packed": True, "documents": 3,
        "option": [],
    }  # fmt: skip


def test_what_changes_nothing_is_left_out(run):
    model = dataclasses.replace(run.model, dtype="float32", remat="none", unroll=2)
    run = dataclasses.replace(run, model=model)
    names = [rung.name for rung in ladder.rungs(run, 0, 1, cpu=True)]
    assert names[1:] == [
        "compiled and fused", "a loop over the layers",
        "fused projections", "logits in chunks", "state taken over",
        "packed rows", "2 layers a round",
    ]  # fmt: skip


def test_options_of_the_compiler_are_the_last_rungs(run):
    words = ["xla_a=true", "xla_b=3"]
    *_, last, first_option, second = ladder.rungs(run, 0, 1, cpu=True, options=words)
    assert (first_option.name, second.name) == tuple(words)
    assert [rung.flags["option"] for rung in (last, first_option, second)] == [
        [], ["xla_a=true"], words
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "told", "failed"),
    [
        (1, "RESOURCE_EXHAUSTED: Out of memory allocating", "out of memory"),
        (-9, "", "out of memory"),
    ],
)
def test_a_rung_that_does_not_fit_is_told_as_such(run, code, told, failed, tmp_path, monkeypatch):
    done = dataclasses.make_dataclass("Done", ["returncode", "stderr"])(code, told)
    monkeypatch.setattr(ladder.subprocess, "run", lambda *_, **__: done)
    (first, *_) = ladder.rungs(run, 0, 1, cpu=True)
    ladder.climb(first, tmp_path, 1)
    assert first.failed == failed and not first.figures
    done.returncode, done.stderr = 2, "meshlm: error: batch=3 does not divide"
    with pytest.raises(ValueError, match=r"operation by operation.*batch=3 does not divide"):
        ladder.climb(first, tmp_path, 1)


@pytest.mark.slow
def test_rungs_run_and_agree_on_the_loss(run, tmp_path):
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=1))
    save(run, tmp_path / "config.json")
    first, second, *_ = ladder.rungs(run, 0, 2, cpu=True)
    for rung in (first, second):
        ladder.climb(rung, tmp_path, 1)
    assert first.figures["losses"][0] == pytest.approx(second.figures["losses"][0], rel=1e-5)
    assert first.figures["kernels"] > second.figures["kernels"]
    assert set(ladder.summary([first, second])) == {"speed", "memory", "efficiency"}
    json.dumps(dataclasses.asdict(second))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "--steps=0 must be at least 1"),
        ("--batch=100", "--batch=100 must be 1 to the recipe's 8"),
        ("--config.mesh.fsdp=2", "climbed on one device"),
    ],
)
def test_a_wrong_flag_says_what_is_right(flag, message, capsys):
    assert (
        status(ladder, flag, recipe="configs/quickstart.py") == 2
        and message in capsys.readouterr().err
    )
