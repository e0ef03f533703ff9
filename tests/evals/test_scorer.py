"""Scorer: log-probabilities equal the whole softmax, however rows are batched, on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from evals.scorer import TAIL, Row, batches, bucket
from model.config import Arch, Attention, Head
from sharding.mesh import MeshConfig
from tests.evals.tiny import CFG, log_softmax, tiny_scorer
from tests.tolerance import assert_formula, assert_same

DRAW = np.random.default_rng(0)


def some_rows(*sizes):
    """Rows of (ids, scored)."""
    return [Row(DRAW.integers(0, 257, size).tolist(), scored) for size, scored in sizes]


@pytest.fixture(scope="module")
def scorer():
    return tiny_scorer(batch=4)


def right(scorer, row):
    """What the formula gives for a row: (log-probabilities, greedy)."""
    logprobs = log_softmax(scorer, row.ids)[:-1]
    at = np.arange(len(row.ids) - 1 - row.scored, len(row.ids) - 1)
    targets = np.array(row.ids)[-row.scored :]
    return logprobs[at, targets], bool((logprobs[at].argmax(-1) == targets).all())


def test_each_logprob_is_that_of_the_whole_softmax(scorer):
    rows = some_rows((2, 1), (9, 8), (33, 3), (34, 33), (50, 49), (60, 7), (100, 40))
    for row, found in zip(rows, scorer.score(rows), strict=True):
        logprobs, greedy = right(scorer, row)
        assert found.logprobs.shape == (row.scored,)
        assert_formula(found.logprobs, logprobs)
        assert found.greedy == greedy
        assert found.total == pytest.approx(logprobs.sum(), rel=1e-5)


def test_greedy_is_told_of_the_likeliest_continuation_and_of_no_other(scorer):
    ids = DRAW.integers(0, 257, 5).tolist()
    for _ in range(3):
        ids.append(int(log_softmax(scorer, ids)[-1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 257]
    found = scorer.score([Row(ids, 3), Row(other, 3), Row(other[:-1], 2)])
    assert [one.greedy for one in found] == [True, False, True]


def test_a_row_scores_what_it_scores_alone(scorer):
    rows = some_rows(*((DRAW.integers(2, 80), 1) for _ in range(11)), (70, 60), (41, 33))
    together = scorer.score(rows)
    assert_same([one.logprobs for one in together], [scorer.score([r])[0].logprobs for r in rows])
    backwards = scorer.score(rows[::-1])[::-1]
    assert_same([one.logprobs for one in together], [one.logprobs for one in backwards])


def test_chunks_of_logits_change_nothing():
    rows = some_rows((97, 96), (64, 10), (50, 49))
    arch = Arch(head=Head(chunk=13, softcap=5.0), attention=Attention(windows=(0, 8)))
    whole = dataclasses.replace(arch, head=Head(softcap=5.0))
    parts, at_once = (
        tiny_scorer(dataclasses.replace(CFG, arch=kind), batch=4).score(rows)
        for kind in (arch, whole)
    )
    assert_same([one.logprobs for one in parts], [one.logprobs for one in at_once])


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, tensor=2), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_scores_the_same(scorer, mesh):
    rows = some_rows(*((size, min(size - 1, 40)) for size in (3, 20, 35, 47, 64)))
    split = tiny_scorer(mesh=mesh, batch=3)
    assert split.batch % split.model.ways == 0
    assert_same(
        [one.logprobs for one in split.score(rows)], [one.logprobs for one in scorer.score(rows)]
    )


def test_programs_are_compiled_at_most_twice_for_each_bucket():
    scorer = tiny_scorer(batch=2)
    sizes = [2, 3, 31, 32, 33, 34, 48, 49, 50, 64, 65]
    scorer.score(some_rows(*((size, 1) for size in sizes)))
    scorer.score(some_rows(*((size, size - 1) for size in sizes)))
    buckets = {bucket(size - 1) for size in sizes}
    assert buckets == {32, 48, 64}
    compiled = scorer._score._cache_size()
    assert compiled <= 2 * len(buckets)
    scorer.score(some_rows(*((size, min(5, size - 1)) for size in range(2, 65))))
    assert scorer._score._cache_size() == compiled


def test_buckets_grow_by_half_at_most():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= max(32, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes))[:6] == [32, 48, 64, 96, 128, 192]


def test_choices_of_one_token_go_through_the_model_once(scorer):
    context = DRAW.integers(0, 257, 20).tolist()
    rows = [Row([*context, i], 1) for i in range(TAIL + 1)]
    groups = [group for batch in batches(rows, 4) for group in batch]
    assert list(map(len, groups)) == [TAIL, 1]
    wanted = log_softmax(scorer, context)[-1]
    assert_formula([one.total for one in scorer.score(rows)], wanted[: TAIL + 1])


def test_rows_of_the_same_inputs_may_score_different_parts_of_them(scorer):
    ids = DRAW.integers(0, 257, 12).tolist()
    rows = [Row(ids, 3), Row([*ids[:-1], 7], 11), Row(ids, 11)]
    for row, found in zip(rows, scorer.score(rows), strict=True):
        assert_formula(found.logprobs, right(scorer, row)[0])


def test_every_row_is_in_one_batch_longest_first():
    sizes = [(int(n), int(s)) for n, s in zip(DRAW.integers(50, 90, 40), [1, 40] * 20, strict=True)]
    rows = some_rows(*sizes)
    made = list(batches(rows, 4))
    assert sorted(i for batch in made for group in batch for i in group) == list(range(40))
    assert all(len(batch) <= 4 for batch in made)
    for batch in made:
        assert len({rows[i].scored <= TAIL for group in batch for i in group}) == 1
    few = [len(rows[b[0][0]].ids) for b in made if rows[b[0][0]].scored <= TAIL]
    assert few == sorted(few, reverse=True)


def test_whoever_watches_can_stop_between_batches():
    told = []

    def each(done, rows):
        told.append((done, rows))
        if done:
            raise KeyboardInterrupt

    scorer = tiny_scorer(batch=1, each=each)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(some_rows((5, 1), (6, 1), (7, 1)))
    assert told == [(0, 3), (1, 3)]


def test_parameters_can_be_replaced_without_compiling_again(scorer):
    rows = some_rows((20, 19))
    before = scorer.score(rows)[0].total
    compiled = scorer._score._cache_size()
    kept = scorer.params
    scorer.params = jax.tree.map(lambda a: a * 2, kept)
    after = scorer.score(rows)[0].total
    scorer.params = kept
    assert after != before
    assert scorer._score._cache_size() == compiled
    assert scorer.score(rows)[0].total == before


def test_a_document_begins_with_the_prefix_once():
    scorer = tiny_scorer(prefix=(256,))
    assert scorer.document("ab") == [256, 97, 98]
    assert tiny_scorer().document("ab") == [97, 98]
    assert scorer.start == 256
