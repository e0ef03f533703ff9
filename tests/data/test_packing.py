import time

import numpy as np
import pytest

from data import packing

SEQ = 64
draw = np.random.default_rng(0)
LENGTHS = {
    "six tenths of a row": np.full(3000, int(0.6 * SEQ)),
    "one token": np.ones(20_000, int),
    "a row and one": np.full(400, SEQ + 1),
    "just over half a row": np.full(1000, SEQ // 2 + 1),
    "a row": np.full(300, SEQ),
    "one long": np.array([300 * SEQ + 17]),
    "uniform": draw.integers(1, 4 * SEQ, 500),
    "lognormal": np.maximum(draw.lognormal(4, 2, 800), 1).astype(int),
    "mostly a row less one": np.concatenate([np.full(500, SEQ - 1), np.full(3, 2)]),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_every_input_is_in_exactly_one_piece_and_no_row_overflows(kind):
    plan = packing.plan(LENGTHS[kind], SEQ)
    begin = np.cumsum(LENGTHS[kind]) - LENGTHS[kind]
    seen = np.zeros(LENGTHS[kind].sum(), int)
    for document, first, length in zip(plan.document, plan.first, plan.length, strict=True):
        assert first >= 0 and first + length <= LENGTHS[kind][document]
        seen[begin[document] + first : begin[document] + first + length] += 1
    assert (seen == 1).all()
    filled = np.add.reduceat(plan.length, plan.starts[:-1])
    assert filled.min() > 0 and filled.max() <= SEQ


@pytest.mark.parametrize("kind", LENGTHS)
def test_padding_is_under_two_per_cent(kind):
    plan = packing.plan(LENGTHS[kind], SEQ)
    assert 1 - LENGTHS[kind].sum() / (plan.rows * SEQ) < 0.02


def test_documents_are_split_only_where_padding_would_be_over_the_limit():
    lengths = LENGTHS["lognormal"]
    assert len(packing.plan(lengths, SEQ).length) == (-(-lengths // SEQ)).sum()
    assert len(packing.plan(LENGTHS["six tenths of a row"], SEQ).length) > 3000


def test_a_plan_of_100_000_documents_takes_under_a_second_or_so():
    lengths = np.random.default_rng(1).integers(1, 4096, 100_000)
    start = time.process_time()
    plan = packing.plan(lengths, 4096)
    assert time.process_time() - start < 2
    assert 1 - lengths.sum() / (plan.rows * 4096) < 0.02


def test_rows_hold_what_the_plan_says():
    lengths = np.array([3, 5, 11, 1, 2])
    sequences = [np.arange(100 * i, 100 * i + n + 1) for i, n in enumerate(lengths)]
    plan = packing.plan(lengths, 8)
    made = packing.fill(plan, [*range(plan.rows), -1], sequences.__getitem__, 8)
    for row in range(plan.rows):
        at = 0
        own = plan.pieces(row)
        for k, i in enumerate(range(own.start, own.stop)):
            n, first = plan.length[i], plan.first[i]
            ids = sequences[plan.document[i]][first : first + n + 1]
            here = slice(at, at + n)
            np.testing.assert_array_equal(made["inputs"][row, here], ids[:-1])
            np.testing.assert_array_equal(made["targets"][row, here], ids[1:])
            np.testing.assert_array_equal(made["positions"][row, here], np.arange(n))
            assert (made["segments"][row, here] == k + 1).all()
            at += n
        assert (made["segments"][row, at:] == 0).all()
    assert all(array.dtype == np.int32 for array in made.values())
    assert not any(array[-1].any() for array in made.values())


@pytest.mark.parametrize("kind", LENGTHS)
def test_a_bound_of_documents_holds_for_every_row_and_loses_none(kind):
    free, bound = (packing.plan(LENGTHS[kind], SEQ, most) for most in (0, 3))
    counts = np.diff(bound.starts)
    assert counts.min() >= 1 and counts.max() <= 3
    pieces = [
        sorted(zip(plan.document, plan.first, plan.length, strict=True)) for plan in (free, bound)
    ]
    assert pieces[0] == pieces[1]


def test_across_documents_a_row_is_one_segment_with_places_of_its_own():
    lengths = np.array([3, 5])
    sequences = [np.arange(100 * i, 100 * i + n + 1) for i, n in enumerate(lengths)]
    plan = packing.plan(lengths, 10)
    apart, one = (
        packing.fill(plan, [0, -1], sequences.__getitem__, 10, across=a) for a in (False, True)
    )
    assert apart["segments"][0].tolist() in (
        [1] * 3 + [2] * 5 + [0] * 2,
        [1] * 5 + [2] * 3 + [0] * 2,
    )
    assert one["segments"].tolist() == [[1] * 8 + [0] * 2, [0] * 10]
    assert one["positions"].tolist() == [[*range(8), 0, 0], [0] * 10]
    for name in ("inputs", "targets"):
        np.testing.assert_array_equal(apart[name], one[name])
        assert one[name].dtype == np.int32
    assert one["segments"].dtype == one["positions"].dtype == np.int32
