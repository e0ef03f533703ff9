"""A program run operation by operation gives what it gives compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from costs.eager import Eager
from tests.sharding.tiny import mesh_of


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, slope: (2 * slope,))


def scanned(x):
    def one(carry, row):
        return carry + row, carry * row

    return lax.scan(one, x[0], x, reverse=True)


def looped(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))


def chosen(x):
    return lax.cond(x[0, 0] > 0, jnp.cos, jnp.sin, x)


def derived(x):
    return jax.grad(lambda x: jnp.sum(jax.checkpoint(jnp.tanh)(doubled(x)) ** 2))(x)


@pytest.mark.parametrize("function", [scanned, looped, chosen, derived])
def test_loops_branches_and_derivatives_are_taken_apart(function):
    x = jax.random.normal(jax.random.key(0), (4, 3))
    closed = jax.make_jaxpr(function)(x)
    eager = Eager()
    got = eager(closed, x)
    for a, b in zip(got, jax.tree.leaves(jax.jit(function)(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert eager.count > 1


def test_what_a_shard_map_does_is_done_as_well():
    with jax.set_mesh(mesh_of((1, 1, 1))):
        x = jax.device_put(jnp.arange(6.0), jax.NamedSharding(jax.sharding.get_mesh(), jax.P()))

        def function(x):
            return jax.shard_map(lambda x: x + jnp.sum(x), out_specs=jax.P())(x) * 2

        (got,) = Eager()(jax.make_jaxpr(function)(x), x)
    np.testing.assert_array_equal(got, 2 * (np.arange(6.0) + 15))


def test_nothing_is_kept_longer_than_it_is_needed(monkeypatch):
    held = []
    monkeypatch.setattr(
        Eager,
        "one",
        lambda self, eqn, ins, one=Eager.one: (
            held.append(len(jax.live_arrays())),
            one(self, eqn, ins),
        )[1],
    )

    def chain(x):
        for _ in range(20):
            x = x + 1
        return x

    closed = jax.make_jaxpr(chain)(jnp.ones(8))
    Eager()(closed, jnp.ones(8))
    assert max(held) - min(held) <= 2
