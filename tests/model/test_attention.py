"""The faster ways of attention against the plain one; what a step must not copy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import cache as caches
from model import transformer
from model.kernels.attention import blocked, cached, plain
from model.matmul import einsum
from tests.marks import mostly_slow
from tests.model.tiny import TINY, WHOLE, random_params
from tests.tolerance import assert_same

ROWS, HEADS, GROUPS, SIZE = 2, 2, 3, 8
KINDS = [{}, {"window": 5}, {"window": 150}, {"softcap": 1.5}]


def drawn(tokens):
    draw = np.random.default_rng(0)
    shapes = (GROUPS, SIZE), (SIZE,), (SIZE,)
    return [jnp.float32(draw.normal(size=(ROWS, tokens, HEADS, *shape))) for shape in shapes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", mostly_slow([3, 128, 300, 600], 3, 300))
def test_blocks_of_queries_attend_as_all_at_once(kind, tokens):
    draw = np.random.default_rng(1)
    segments = jnp.asarray(np.sort(draw.integers(1, 4, (ROWS, tokens))), jnp.int32)
    segments = segments.at[1, tokens // 2 :].set(0)
    args = (*drawn(tokens), segments)
    ours, right = (jax.jit(functools.partial(f, scale=0.3, **kind)) for f in (blocked, plain))
    assert_same(ours(*args), right(*args))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [1, 4])
def test_tokens_after_a_cache_attend_as_the_whole_text(kind, more):
    lengths, size = np.array([7, 200]), 230
    total = int(lengths.max()) + more
    q, k, v = drawn(total)
    right, step = (jax.jit(functools.partial(f, scale=0.3, **kind)) for f in (plain, cached))
    whole = right(q, k, v, jnp.ones((ROWS, total), jnp.int32))
    k_S, v_S = (jnp.pad(a, ((0, 0), (0, size - total), (0, 0), (0, 0))) for a in (k, v))
    held = jnp.moveaxis(k_S, 1, 3), jnp.moveaxis(v_S, 1, 2)
    tail = [jnp.stack([a[b, n : n + more] for b, n in enumerate(lengths)]) for a in (q, k, v)]
    # What lies in the cache after a row's tokens is not for it to see.
    ours = step(*tail, *held, jnp.asarray(lengths))
    assert_same(ours, jnp.stack([whole[b, n : n + more] for b, n in enumerate(lengths)]))


def copies(compiled, shape):
    """How often a program copies, or writes in another order, an array of so many elements."""
    made = re.findall(r"= f32\[([\d,]*)\]\S* (?:copy|transpose)\(", compiled.as_text())
    return sum(np.prod([int(n) for n in dims.split(",") if n]) == np.prod(shape) for dims in made)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("places", [1, 2])
def test_a_step_writes_the_cache_in_place(one_device, places, steps):
    """A copy of it would cost more than all the rest of the attention."""
    windows = (0, 96)[:places]
    attention = TINY.arch.attention.__class__(windows=windows)
    cfg = TINY.__class__(**{**vars(TINY), "arch": TINY.arch.__class__(attention=attention)})
    graph, _, _ = transformer.abstract(cfg, WHOLE)
    cache = caches.empty(cfg, WHOLE, 1, 96)

    def several(params, ids, cache):
        def step(cache, _):
            x, cache = nnx.merge(graph, params).extend(ids, jnp.ones((1,), jnp.int32), cache)
            return cache, x

        return jax.lax.scan(step, cache, None, length=steps, unroll=steps == 1)

    args = random_params(cfg), jnp.zeros((1, 1), jnp.int32), cache
    compiled = jax.jit(several, donate_argnums=2).lower(*args).compile()
    layer = (1, cfg.kv_heads, 96, cfg.head_dim)
    assert copies(compiled, (cfg.layers // places, *layer)) == 0
    if places == cfg.layers:  # else the loop over the layers takes each out of its stack
        assert copies(compiled, layer) == 0


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(
    ("spec", "x", "w"),
    [
        ("BTD,KJHD->BTKJH", (12,), (2, 5, 7, 12)),
        ("BTKGH,DKGH->BTD", (2, 3, 7), (12, 2, 3, 7)),
        ("BTD,CFD->BTCF", (12,), (2, 9, 12)),
        ("BTD,VD->BTV", (12,), (31, 12)),
    ],
)
def test_a_weight_is_read_as_it_lies(one_device, rows, spec, x, w):
    draw = np.random.default_rng(0)
    x, w = (jnp.float32(draw.normal(size=shape)) for shape in ((1, rows, *x), w))
    product = functools.partial(einsum, spec, out=jax.P())
    compiled = jax.jit(product).lower(x, w).compile()
    assert copies(compiled, w.shape) == 0
    assert_same(compiled(x, w), jnp.einsum(spec, x, w))
