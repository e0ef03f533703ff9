"""Goodput: the parts of a run's time add up to it, whoever ended the processes."""

import json

import pytest

from monitor import goodput
from monitor.goodput import PARTS, Goodput


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass."""
    at = [1000.0]

    def clock(seconds: float) -> None:
        at[0] += seconds

    monkeypatch.setattr(goodput.time, "time", lambda: 1e9 + at[0])
    monkeypatch.setattr(goodput.time, "monotonic", lambda: at[0])
    return clock


def spent(told: Goodput) -> dict[str, float]:
    """The parts that took any time."""
    figures = told.figures()
    parts = {name: figures[f"spent_{name}_s"] for name in PARTS}
    return {name: seconds for name, seconds in parts.items() if seconds}


def steps(run: Goodput, clock, seconds: float) -> None:
    with run.part("steps"):
        clock(seconds)


def test_a_moment_belongs_to_the_innermost_part(clock):
    run = Goodput()
    clock(1)
    with run.part("steps"):
        clock(10)
        with run.part("save"):
            clock(2)
            with pytest.raises(KeyError), run.part("eval"):
                clock(3)
                raise KeyError
        clock(20)
    clock(4)
    assert spent(run) == {"other": 5, "steps": 30, "save": 2, "eval": 3}
    assert run.figures()["goodput"] == pytest.approx(30 / 40)


def test_after_a_kill_steps_since_the_save_are_lost_and_the_parts_add_up(clock, tmp_path):
    first = Goodput()
    first.open(tmp_path, None)
    steps(first, clock, 10)
    first.saved(4)
    steps(first, clock, 7)
    first.write()
    clock(3)  # killed in here
    clock(50)
    second = Goodput()
    clock(2)
    second.open(tmp_path, 4)
    assert spent(second) == {"steps": 10, "lost": 7, "down": 53, "other": 2}
    steps(second, clock, 8)
    assert sum(spent(second).values()) == pytest.approx(80)
    assert second.told() == (
        "22.5% of 80.0 s in useful steps; down 53.0 s, lost 7.0 s, other 2.0 s"
    )


@pytest.mark.parametrize("step", [None, 3])
def test_without_a_save_all_steps_are_lost(clock, tmp_path, step):
    first = Goodput()
    first.open(tmp_path, None)
    steps(first, clock, 10)
    first.saved(4)  # which never reached the disk
    first.write()
    second = Goodput()
    second.open(tmp_path, step)
    steps(second, clock, 1)
    assert spent(second) == {"steps": 1, "lost": 10}


def test_a_rewind_loses_the_steps_since_once(clock, tmp_path):
    run = Goodput()
    run.open(tmp_path, None)
    steps(run, clock, 10)
    run.saved(5)
    steps(run, clock, 6)
    run.back_to(5)
    steps(run, clock, 4)
    run.saved(12)
    run.back_to(12)
    assert spent(run) == {"steps": 14, "lost": 6}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"seen": 1}', '{"seen": 1, "spent": {}, "saved": {}}', "\0" * 40]
)
def test_damaged_sums_cost_the_sums_and_not_the_run(clock, tmp_path, content):
    (tmp_path / "goodput.json").write_text(content)
    run = Goodput()
    run.open(tmp_path, 4)
    steps(run, clock, 2)
    run.write()
    assert spent(run) == {"steps": 2}
    assert json.loads((tmp_path / "goodput.json").read_text())["spent"]["steps"] == 2


def test_a_folder_that_cannot_be_written_costs_no_more_than_the_sums(clock, tmp_path):
    run = Goodput()
    run.open(tmp_path / "absent", None)
    steps(run, clock, 2)
    run.write()
    assert spent(run) == {"steps": 2} and not (tmp_path / "absent").exists()
