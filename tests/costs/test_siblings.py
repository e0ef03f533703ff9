"""Which kernels of a GPU run as one, and so read once what they share."""

import jax.numpy as jnp

from costs import kernels, siblings
from tests.costs.test_program import read

KIB = 1024


def reads(function, *shapes):
    """KiB that each kernel of a program reads, by its name, once those that can run as one."""
    plan = kernels.schedule(read(function, *shapes), kernels.Compiler())
    siblings.join(plan)
    return [(kernel.name, sum(kernel.reads.values()) // KIB) for kernel in plan.kernels]


SQUARE = (128, 128)  # 64 KiB


def test_two_results_made_of_the_same_arrays_read_them_once():
    def two(x, y, w):
        return (x * y) @ w, (x + y) @ w

    sizes = [size for name, size in reads(two, *[SQUARE] * 3) if name == "fusion"]
    assert sorted(sizes) == [0, 128]


def test_a_sum_over_what_a_kernel_writes_reads_nothing():
    def written(x, w):
        y = jnp.tanh(x @ w)
        return jnp.sum(y, 1), y @ w

    found = reads(written, SQUARE, SQUARE)
    assert sorted(size for name, size in found if name != "dot_general") == [0, 64]


def test_sums_over_rows_and_over_columns_go_through_the_array_apart():
    def sums(x, w):
        y = x @ w
        return jnp.sum(y, 1), jnp.max(y, 1), jnp.sum(y, 0)

    sizes = [size for name, size in reads(sums, (256, 128), SQUARE) if "reduce" in name]
    assert sorted(sizes) == [0, 128, 128]


def test_what_waits_for_a_sum_reads_again_what_was_summed():
    def normed(x, w):
        y = x @ w
        return jnp.sum(jnp.tanh(y / jnp.sum(y, 1, keepdims=True)) @ w)

    sizes = [
        size for name, size in reads(normed, SQUARE, SQUARE) if name in ("reduce_sum", "fusion")
    ]
    assert sizes[:2] == [64, 64]
