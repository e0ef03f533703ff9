"""AdamW with small moments, whose step needs hardly any memory beside what it changes.

A step goes through each weight in pieces of PIECE numbers: moments and weights exist in float32 of
one piece at a time, and the next ones are written where the old ones lay. Each device works on its
own part, so nothing is sent.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optim import rounding
from optim.codes import Blocks, Kept, narrowed, widened
from optim.config import OptimConfig

PIECE = 1 << 24  # numbers: 64 MiB in float32
EPS = 1e-8  # beside the root of the second moment, as in optax


class Lean(NamedTuple):
    """Both moments; each a tree like the parameters, of what codes.py keeps."""

    mu: Any
    nu: Any


def init(cfg: OptimConfig, params: Any, roles: Any) -> Lean:
    """Moments of zero, placed like their parameters. Those of vectors, a few, stay float32."""

    def zeros(p: jax.Array, role: Any, code: Any) -> Kept:
        where = jax.typeof(p).sharding.spec
        kept = functools.partial(jnp.zeros, out_sharding=where)
        if role.kind == "vector":
            return kept(p.shape, jnp.float32)
        if cfg.moments == "bfloat16":
            return kept(p.shape, jnp.bfloat16)
        leads = p.ndim - columns(role)
        blocks = math.prod(p.shape[leads:]) // cfg.block
        scale = jnp.zeros((*p.shape[:leads], blocks), out_sharding=jax.P(*where[: leads + 1]))
        return Blocks(kept(p.shape, code), scale)

    return Lean(
        jax.tree.map(lambda p, role: zeros(p, role, jnp.int8), params, roles),
        jax.tree.map(lambda p, role: zeros(p, role, jnp.uint8), params, roles),
    )


def columns(role: Any) -> int:
    """The last dims, as many as make a row: blocks lie in it. At most its first dim is split."""
    return max(role.inputs, 1)


class When(NamedTuple):
    """Which step it is."""

    number: jax.Array  # from 0
    good: jax.Array  # else it changes nothing
    rate: jax.Array  # of learning
    seed: int


def step(
    cfg: OptimConfig, when: When, grads: Any, state: Lean, params: Any, roles: Any
) -> tuple[Any, Lean]:
    """(parameters, moments) after the step."""
    done = when.number.astype(jnp.float32) + 1
    share = jnp.float32(1)
    if cfg.clip:
        # Devices talk over the whole mesh: the norm is of all gradients, a number's bytes of each.
        share = cfg.clip / jnp.maximum(norm(grads), cfg.clip)
    whole, tree = jax.tree.flatten(params)
    split = tree.flatten_up_to
    found = []
    for i, leaf in enumerate(
        zip(whole, split(grads), split(state.mu), split(state.nu), split(roles), strict=True)
    ):
        scalars = {
            "key": rounding.key(when.seed, when.number, i),
            "share": share,
            "good": when.good,
            "rate": when.rate,
            "decay": when.rate * (0.0 if leaf[-1].kind == "vector" else cfg.weight_decay),
            "bias1": 1 - cfg.b1**done,
            "bias2": 1 - cfg.b2**done,
        }
        found.append(one(cfg, scalars, *leaf))
    params, mu, nu = (tree.unflatten(part) for part in zip(*found, strict=True))
    return params, Lean(mu, nu)


def norm(grads: Any) -> jax.Array:
    """The global norm, whose squares are float32 whatever the gradients are."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def one(
    cfg: OptimConfig, scalars: Any, p: jax.Array, g: jax.Array, m: Kept, v: Kept, role: Any
) -> tuple[jax.Array, Kept, Kept]:
    """One parameter and its moments after the step; each device its own part of them."""
    shape, spec, inputs = p.shape, jax.typeof(p).sharding.spec, columns(role)

    def local(p: jax.Array, g: jax.Array, m: Kept, v: Kept, scalars: Any) -> Any:
        rows = math.prod(p.shape[: p.ndim - inputs])
        whole_own = (p, m, v)
        p, m, v, g = jax.tree.map(lambda a: a.reshape(rows, -1), (p, m, v, g))
        count = piece(rows, p.shape[1])

        def cut(held: Any, i: Any) -> Any:
            take = functools.partial(lax.dynamic_slice_in_dim, start_index=i * count)
            return jax.tree.map(lambda a: take(a, slice_size=count), (*held, g))

        def some(i: Any, carried: tuple[Any, Any]) -> tuple[Any, Any]:
            held, now = carried
            chance = rounding.bits(scalars["key"], shape, spec, inputs, i * count, count)
            made = adamw(cfg, scalars, *now, chance)
            # Here and not afterwards, for which all old arrays would have to be kept.
            made = jax.tree.map(lambda a, b: lax.select(scalars["good"], a, b), made, now[:-1])
            write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * count)
            held = jax.tree.map(lambda a, new: write(a, new, axis=0), held, made)
            return held, cut(held, i + 1)

        # A piece is read one turn before it is written. Read in the same turn, it would be read
        # again for each array that is made of it, while the first of these is written in its
        # place, and XLA would keep a copy of each old array.
        first = cut((p, m, v), 0)
        held, _ = lax.fori_loop(0, rows // count, some, ((p, m, v), first))
        return jax.tree.map(lambda a, own: a.reshape(own.shape), held, whole_own)

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (p, g, m, v))
    scalar = jax.tree.map(lambda _: jax.P(), scalars)
    out = (specs[0], *specs[2:])
    return jax.shard_map(local, in_specs=(*specs, scalar), out_specs=out)(p, g, m, v, scalars)


def piece(rows: int, columns: int) -> int:
    """Rows of a piece: the largest divisor of `rows` that makes at most PIECE numbers."""
    most = max(PIECE // columns, 1)
    return next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)


def adamw(
    cfg: OptimConfig, scalars: Any, p: jax.Array, m: Kept, v: Kept, g: jax.Array, bits: jax.Array
) -> tuple[jax.Array, Kept, Kept]:
    """The formula, on [rows, columns]. Loshchilov & Hutter 2017, arXiv:1711.05101.

    The step takes the moments before they are narrowed, as Dettmers et al. do.
    """
    g32, p32 = scalars["share"] * g.astype(jnp.float32), p.astype(jnp.float32)
    m32 = cfg.b1 * widened(m) + (1 - cfg.b1) * g32
    v32 = cfg.b2 * widened(v) + (1 - cfg.b2) * g32 * g32
    way = (m32 / scalars["bias1"]) / (jnp.sqrt(v32 / scalars["bias2"]) + EPS)
    p32 -= scalars["rate"] * way + scalars["decay"] * p32
    more = rounding.mix(bits)
    p = rounding.to_bfloat16(p32, bits) if p.dtype == jnp.bfloat16 else p32
    return p, narrowed(m32, m, more), narrowed(v32, v, rounding.mix(more + jnp.uint32(1)))
