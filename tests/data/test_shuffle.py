from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from data.shuffle import permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 700, 4097, 100_000])
def test_it_is_a_permutation_readable_at_any_place(size):
    whole = permute(np.arange(size), size, "key", 0)
    np.testing.assert_array_equal(np.sort(whole), np.arange(size))
    some = np.random.default_rng(0).integers(0, size, 10)
    np.testing.assert_array_equal(permute(some, size, "key", 0), whole[some])


def test_every_order_of_three_is_as_likely():
    found = Counter(tuple(permute(np.arange(3), 3, seed).tolist()) for seed in range(3000))
    assert set(found) == set(permutations(range(3)))
    assert max(abs(count - 500) for count in found.values()) < 100


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01


def test_the_order_of_a_key_never_changes():
    assert permute(np.arange(8), 8, "documents", 0, 0, 0).tolist() == [0, 7, 4, 2, 1, 5, 6, 3]
