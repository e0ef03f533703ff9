"""A schedule's table keeps the order of work, lends memory to one at a time, wastes no clock."""

import numpy as np
import pytest

from sharding.schedule import PipelineConfig, Table, first_fit, ideal_bubble

HOW = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)]
SIZES = [(1, 3), (2, 1), (2, 4), (3, 7), (4, 8), (4, 9)]


@pytest.fixture(params=[(*how, *size) for how in HOW for size in SIZES], ids=str)
def table(request):
    schedule, repeats, stages, micro_batches = request.param
    return Table.make(PipelineConfig(schedule, repeats), stages, micro_batches)


def clocks_of(work, line):
    """{(micro-batch, place): clock}; fails if any work is done twice."""
    found = {}
    for clock, stage in np.argwhere(work.on).tolist():
        key = int(work.micro[clock, stage]), int(work.chunk[clock, stage]) * line.stages + stage
        assert key not in found, key
        found[key] = clock
    return found


def test_every_micro_batch_passes_every_place_and_arrives_when_it_is_wanted(table):
    line = table.line
    forward, backward = clocks_of(table.forward, line), clocks_of(table.backward, line)
    assert set(forward) == set(backward) == set(line.whole())
    for i, q in line.whole():
        if q < line.end:  # what is sent is there at the next clock, and waits nowhere
            assert forward[i, q + 1] == forward[i, q] + 1
            assert backward[i, q] == backward[i, q + 1] + 1
        assert backward[i, q] >= forward[i, q]
    for work, times in ((table.forward, forward), (table.backward, backward)):
        first, last = (
            {clock for (_, q), clock in times.items() if q == end} for end in (0, line.end)
        )
        assert set(np.flatnonzero(work.first.any(axis=1)).tolist()) == first
        assert set(np.flatnonzero(work.last.any(axis=1)).tolist()) == last
        assert not work.first[:, 1:].any() and not work.last[:, :-1].any()


def test_a_slot_is_left_alone_until_its_backward(table):
    line = table.line
    forward, backward = clocks_of(table.forward, line), clocks_of(table.backward, line)
    assert table.forward.slot.max() + 1 <= table.slots
    for (i, q), begin in forward.items():
        end, s = backward[i, q], q % line.stages
        slot = table.forward.slot[begin, s]
        assert slot == table.backward.slot[end, s]
        assert slot not in table.forward.slot[begin + 1 : end + 1, s], "an idle forward writes too"
    for i in range(line.micro_batches):
        begin, end = forward[i, line.end], backward[i, line.end]
        leaves = table.forward.last[begin + 1 : end + 1, -1]
        assert table.gap[begin] == table.back[end] < table.gaps
        assert table.gap[begin] not in table.gap[begin + 1 : end + 1][leaves]


def test_the_bubble_is_that_of_the_formula(table):
    line = table.line
    right = ideal_bubble(line.stages, line.micro_batches, line.repeats)
    for cost in (1.0, 2.0, 3.0):
        if line.repeats == 1 or line.micro_batches % line.stages == 0:
            assert table.bubble(backward=cost) == pytest.approx(right)
        else:  # the last group of micro-batches is not full
            assert table.bubble(backward=cost) > right


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_1f1b_keeps_what_does_not_grow_with_the_micro_batches(stages):
    kept = {}
    for micro_batches in (1, stages, 16, 64):
        for schedule in ("1f1b", "gpipe"):
            table = Table.make(PipelineConfig(schedule), stages, micro_batches)
            kept[schedule, micro_batches] = table.in_flight().tolist()
            assert table.slots <= max(table.in_flight()) + 1
        most = [min(micro_batches, 2 * (stages - s) - 1) for s in range(stages)]
        assert kept["1f1b", micro_batches] == most
        assert kept["gpipe", micro_batches] == [micro_batches] * stages
    assert Table.make(PipelineConfig(), stages, 64).gaps == 1, "the head's answer is taken at once"


def test_first_fit_lends_no_more_than_is_ever_in_use():
    draw = np.random.default_rng(0)
    begins = draw.integers(0, 50, 200)
    lives = list(zip(begins.tolist(), (begins + draw.integers(0, 9, 200)).tolist(), strict=True))
    slots = first_fit(lives)
    use = [sum(begin <= clock <= end for begin, end in lives) for clock in range(60)]
    assert max(slots) + 1 == max(use)
    for clock in range(60):
        there = [slot for slot, (a, b) in zip(slots, lives, strict=True) if a <= clock <= b]
        assert len(set(there)) == len(there)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "zb"}, "schedule='zb' is none of 1f1b, gpipe, interleaved"),
        ({"schedule": "interleaved"}, "repeats=1 must be at least 2 for schedule='interleaved'"),
        ({"repeats": 2}, "repeats=2 must be 1 for schedule='1f1b'; 'interleaved' repeats"),
        ({"repeats": 0}, "repeats=0 must be 1 for"),
    ],
)
def test_a_schedule_that_there_is_not_says_what_there_is(fields, message):
    with pytest.raises(ValueError, match=r"must be|is none of") as caught:
        PipelineConfig(**fields)
    assert message in str(caught.value)
