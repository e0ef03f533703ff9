"""The update of a run's parameters: gradients in, parameters and optimizer state out.

Moments in float32 come from optax; smaller ones from lean.py, which updates in place. Parameters in
bfloat16 are updated in float32 and rounded by chance, whatever the optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optim import histories, lean, rounding
from optim.config import OptimConfig
from optim.optimizer import make_optimizer
from optim.schedule import make_schedule
from optim.zero import split_over
from sharding import offload
from sharding.gather import Axes


class Update(NamedTuple):
    """How parameters change. A step has a number, from 0, and changes nothing unless it is good."""

    init: Callable[[Any], Any]  # of the parameters; the optimizer's state
    # (step's number, whether it is good, gradients, state, parameters) to (parameters, state)
    step: Callable[[jax.Array, jax.Array, Any, Any, Any], tuple[Any, Any]]


def make_update(
    cfg: OptimConfig, steps: int, roles: Any, seed: int, axes: Axes = (), *, by_layer: bool = False
) -> Update:
    """The update that `cfg` asks for, of histories what they are for; `roles` and `by_layer` as of
    make_optimizer, `seed` of the rounding.

    `axes` split a state in float32 further than the parameters.
    """
    own = _of_weights(cfg, steps, histories.weights(roles), seed, axes, by_layer=by_layer)

    def step(
        number: jax.Array, good: jax.Array, grads: Any, state: Any, params: Any
    ) -> tuple[Any, Any]:
        made, state = own.step(
            number, good, histories.weights(grads), state, histories.weights(params)
        )
        return histories.joined(made, histories.rolled(good, grads, params)), state

    return Update(lambda params: own.init(histories.weights(params)), step)


def _of_weights(
    cfg: OptimConfig, steps: int, roles: Any, seed: int, axes: Axes, *, by_layer: bool
) -> Update:
    """`make_update` where there are no histories."""
    if cfg.moments != "float32":
        rate = make_schedule(cfg, steps)

        def step(
            number: jax.Array, good: jax.Array, grads: Any, state: Any, params: Any
        ) -> tuple[Any, Any]:
            when = lean.When(number, good, rate(number), seed)
            return lean.step(cfg, when, grads, state, params, roles)

        return Update(lambda params: lean.init(cfg, params, roles), step)
    chain = split_over(make_optimizer(cfg, steps, roles, by_layer=by_layer), axes)
    chain = optax.with_extra_args_support(chain)

    def chained(
        number: jax.Array, good: jax.Array, grads: Any, state: Any, params: Any
    ) -> tuple[Any, Any]:
        updates, after = chain.update(wide(grads), state, wide(params), good=good)
        whole, tree = jax.tree.flatten(params)
        found = [
            rounded(p, p.astype(jnp.float32) + u, rounding.key(seed, number, i))
            if p.dtype == jnp.bfloat16
            else optax.apply_updates(p, u)
            for i, (p, u) in enumerate(zip(whole, tree.flatten_up_to(updates), strict=True))
        ]
        return taken(good, (tree.unflatten(found), after), (params, state))

    return Update(lambda params: chain.init(wide(params)), chained)


def taken(good: jax.Array, after: Any, before: Any) -> Any:
    """`after` if the step is good, else `before`, bit by bit; it costs what a comparison does.

    Of moments in host memory that was asked while they were on the device (offload.update).
    """

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return a if offload.is_hosted(a) else lax.select(good, a, b)

    return jax.tree.map(one, after, before)


def wide(tree: Any) -> Any:
    """A tree of arrays as float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def rounded(p: jax.Array, p32: jax.Array, key: jax.Array) -> jax.Array:
    """p32 as bfloat16; each device rounds its own part."""
    spec = jax.typeof(p).sharding.spec

    def local(p32: jax.Array, key: jax.Array) -> jax.Array:
        size = p32.shape[-1]
        chance = rounding.bits(key, p.shape, spec, 1, 0, p32.size // size)
        return rounding.to_bfloat16(p32.reshape(-1, size), chance).reshape(p32.shape)

    return jax.shard_map(local, in_specs=(spec, jax.P()), out_specs=spec)(p32, key)
