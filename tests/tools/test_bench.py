"""The bench's figures: from a run, against an earlier one; what it refuses."""

import json

import numpy as np
import pytest

from configs.run import Run
from data.config import DataConfig
from model.config import ModelConfig
from tests.commands import status
from tools import bench, matmuls

TINY = (
    "--config.model.layers=1", "--config.model.embed=16", "--config.model.heads=2",
    "--config.model.kv_heads=2", "--config.model.mlp=16", "--config.model.vocab=64",
    "--config.data.batch=8", "--config.data.seq=32",
)  # fmt: skip


def call(*args):
    return status(bench, *args, recipe="configs/quickstart.py")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "a.json"
    assert call(*TINY, "--steps=2", "--warmup=1", "--documents=3", f"--output={path}") == 0
    return path


@pytest.mark.slow
def test_the_last_line_holds_the_figures(figures):
    found = json.loads(figures.read_text())
    assert found["device"] == "8 x cpu"
    assert len(found["losses"]) == 3
    assert found["losses"][-1] < found["losses"][0]
    rate = 8 * 32 / found["step_s"] / 8
    assert found["tokens_per_s_per_device"] == pytest.approx(rate, rel=0.01, abs=0.1)
    assert found["share_of_rates"] > 0 and found["copy_gb_per_s"] > 0


@pytest.mark.slow
def test_a_comparison_prints_ratios_and_refuses_what_is_no_result(figures, capsys, monkeypatch):
    before = bench.last_object(str(figures))
    bench.compared(bench.Console(width=100), {"step_s": 2 * before["step_s"]}, before)
    assert "2.000" in capsys.readouterr().out
    figures.with_name("b.json").write_text("nothing\n")
    assert call(*TINY, f"--compare={figures.with_name('b.json')}") == 2
    assert "its last line is no JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "must be at least 1"),
        ("--documents=33", "must be 1 to 32"),
        ("--option=xla_cpu_enable_fast_math", "write NAME=VALUE"),
        ("--option=xla_no_such=1", "No such compile option: 'xla_no_such'"),
        ("--option=xla_cpu_enable_fast_math=maybe", "is not a valid bool value"),
    ],
)
def test_a_wrong_flag_says_what_is_right(flag, message, capsys):
    assert call(*TINY, flag) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("documents", [1, 4, 9])
def test_random_rows_hold_so_many_documents_and_no_padding(documents):
    run = Run(model=ModelConfig(vocab=50), data=DataConfig(batch=3, seq=9))
    batch = bench.random_batch(run, documents)
    for segments, positions in zip(batch["segments"], batch["positions"], strict=True):
        assert segments.max() == documents and segments.min() == 1
        for one in range(1, documents + 1):
            own = positions[segments == one]
            np.testing.assert_array_equal(own, np.arange(len(own)))
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.slow
def test_attention_by_three_matmuls_and_an_option_of_xla_change_no_loss(figures, tmp_path):
    """What the ladder holds the fused projection against: the same values."""
    path, args = tmp_path / "b.json", ("--steps=2", "--warmup=1", "--documents=3", "--norates")
    more = ("--nofused_projections", "--option=xla_cpu_enable_fast_math=false")
    assert call(*TINY, *args, *more, f"--output={path}") == 0
    before, apart = bench.last_object(str(figures)), bench.last_object(str(path))
    assert apart["losses"] == pytest.approx(before["losses"], rel=1e-5)
    assert apart["kernels"] != before["kernels"]


@pytest.mark.slow
def test_matmuls_are_timed_in_every_format_and_pass(tmp_path, capsys):
    path = tmp_path / "m.json"
    size = ("--config.model.vocab=64", "--config.model.embed=32", "--config.model.mlp=64")
    heads = ("--config.model.heads=2", "--config.model.kv_heads=2")
    args = ("--tokens=24", f"--output={path}", *size, *heads)
    assert status(matmuls, *args, recipe="configs/quickstart.py") == 0
    found = json.loads(path.read_text())
    assert len(found["many"]) == 5 * 3 * 3
    for row in found["many"]:
        assert row["tflops"] > 0
        least, most = {"bf16": (0, 1e-5), "int8": (1e-3, 0.02), "fp8": (1e-3, 0.09)}[row["format"]]
        assert least <= row["error"] <= most, row
    errors = {(row["tokens"], row["format"]): row["error"] for row in found["few"]}
    for tokens in (1, 16):
        assert errors[tokens, "bf16"] < 1e-5 < errors[tokens, "w8"] < errors[tokens, "w4g64"] < 0.2


def test_a_wrong_number_of_tokens_is_refused(capsys):
    assert status(matmuls, *TINY, "--tokens=-1", recipe="configs/quickstart.py") == 2
    assert "--tokens=-1 must be at least 0" in capsys.readouterr().err
