"""`python -m tools.bubble`: what it makes of times, and what it refuses."""

import re

import pytest

from tests.commands import status
from tools import bubble

TINY = (
    "--config.model.layers=4", "--config.model.embed=16", "--config.model.heads=2",
    "--config.model.kv_heads=2", "--config.model.mlp=16", "--config.model.vocab=64",
    "--config.data.seq=16",
)  # fmt: skip
SPLIT = "--config.mesh.stage=2"


def call(*args):
    return status(bubble, *args, recipe="configs/quickstart.py")


@pytest.mark.parametrize("repeats", [1, 2])
def test_times_of_the_formula_are_on_it_and_what_comes_once_is_over_it(repeats):
    right = {count: 0.01 * (count + 3 / repeats) for count in (4, 8, 16)}
    for count, *cells in bubble.lines(right, 4, repeats):
        _, waits, formula, over = cells
        assert waits == formula == f"{3 / (repeats * int(count) + 3):.1%}"
        assert over == "+0.0%"
    late = {count: took + 0.01 for count, took in right.items()}
    assert bubble.lines(late, 4, repeats)[0][-1] == f"+{1 / (4 + 3 / repeats):.1%}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((SPLIT, "--schedules=zb"), "--schedules=zb: schedule='zb' is none of"),
        ((SPLIT, "--schedules=interleaved:x"), "--schedules=interleaved:x is no name:repeats"),
        ((SPLIT, "--micro_batches=4"), "--micro_batches=4 must be two numbers or more"),
        ((), "mesh.stage=1 has no bubble"),
        ((SPLIT, "--schedules=interleaved:3"), "layers=4 does not divide over stage=2 x repeats=3"),
    ],
)
def test_a_wrong_flag_says_what_is_right(flags, message, capsys):
    assert call(*TINY, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_it_times_each_number_of_micro_batches(capsys):
    assert call(*TINY, SPLIT, "--schedules=1f1b", "--micro_batches=1,3", "--steps=1") == 0
    out = capsys.readouterr().out
    assert re.search(r"\| 1f1b x 1 +\| ms a step", out)
    assert re.search(r"\| 1 +\| [\d.]+ +\| -?[\d.]+% +\| 50.0% ", out)
    assert re.search(r"\| 3 +\| [\d.]+ +\| -?[\d.]+% +\| 25.0% ", out)
