"""Shuffles that can be read at any place: permutations of any size that take no memory.

A Feistel network on the smallest even number of bits that holds the size; values past the size go
through it again. grain's `index_shuffle` does the same on 16 bits at least, and takes a millisecond
an index for ten documents. The permutation of a key never changes: saved data positions rely on it.
"""

import hashlib

import numpy as np

ROUNDS = 6


def permute(indices: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Where `indices`, int [n] in [0, size), lie in the permutation that `key` names; int64 [n]."""
    if size == 1:  # a lone document is asked for very often
        return np.zeros(len(indices), np.int64)
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    low = np.uint64((1 << half) - 1)
    shift, fold = np.uint64(half), np.uint64(64 - half)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    rounds = np.frombuffer(digest, "<u8")
    values = np.asarray(indices).astype(np.uint64)
    result = np.empty(len(values), np.int64)
    places = np.arange(len(values))
    while len(places):
        left, right = values >> shift, values & low
        for secret in rounds:
            left, right = right, left ^ (_mix(right + secret) >> fold)
        values = (left << shift) | right
        inside = values < size
        result[places[inside]] = values[inside]
        values, places = values[~inside], places[~inside]
    return result


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of uint64 `x` moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
