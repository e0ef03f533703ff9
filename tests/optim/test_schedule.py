"""Learning rates against their formulas in float64."""

import math

import numpy as np
import pytest

from optim.config import SCHEDULES, OptimConfig
from optim.schedule import make_schedule
from tests.tolerance import assert_formula

PEAK, STEPS, FINAL = 3.0, 50, 0.1


def rates(steps=STEPS, peak=None, **fields):
    schedule = make_schedule(OptimConfig(lr=PEAK, final=FINAL, **fields), steps, peak)
    return np.array([float(schedule(step)) for step in range(steps)])


def expected(name: str, warmup: int, steps: int = STEPS, decay: float = 0.2) -> np.ndarray:
    """Piece by piece; `done` counts the steps of the fall, of which the last ends at `final`."""
    found = []
    for done in range(1, steps + 1):
        if done <= warmup:
            share = done / warmup
        elif name == "constant":
            share = 1.0
        elif name == "cosine":
            turn = math.pi * (done - warmup) / (steps - warmup)
            share = FINAL + (1 - FINAL) * (1 + math.cos(turn)) / 2
        else:
            fall = steps - warmup if name == "linear" else decay * steps
            share = 1 - (1 - FINAL) * max(done - (steps - fall), 0) / fall
        found.append(PEAK * share)
    return np.array(found)


@pytest.mark.parametrize("warmup", [0, 1, 10, 40])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_has_the_rate_of_the_formula(name, warmup):
    found = rates(schedule=name, warmup=warmup)
    assert_formula(found, expected(name, warmup))


def test_where_warmup_and_decay_overlap_the_lower_one_holds():
    found = rates(schedule="wsd", warmup=45)
    rise, fall = expected("constant", 45), expected("wsd", 0)
    assert_formula(found, np.minimum(rise, fall))


@pytest.mark.parametrize("warmup", [STEPS, 2 * STEPS])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_a_warmup_as_long_as_the_run_only_rises(name, warmup):
    found = rates(schedule=name, warmup=warmup)
    assert_formula(found, PEAK * np.arange(1, STEPS + 1) / warmup)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_is_wasted_at_rate_zero_and_the_last_has_the_final_rate(name):
    found = rates(schedule=name)
    assert found[0] > 0.95 * PEAK
    assert found[-1] == pytest.approx(PEAK if name == "constant" else FINAL * PEAK, rel=2e-6)
    assert rates(schedule=name, warmup=7)[6] == pytest.approx(PEAK, rel=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step_has_a_finite_rate(name):
    (rate,) = rates(schedule=name, steps=1)
    assert 0 < rate <= 1.001 * PEAK


def test_steps_past_the_end_keep_the_final_rate():
    schedule = make_schedule(OptimConfig(lr=PEAK, final=FINAL), STEPS)
    assert float(schedule(10 * STEPS)) == pytest.approx(FINAL * PEAK, rel=2e-6)


def test_another_peak_scales_every_rate():
    assert_formula(rates(peak=7 * PEAK, warmup=5), 7 * rates(warmup=5))
