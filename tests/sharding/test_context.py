"""Rows split along their tokens: who has which, who works on what, and the same attention."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import attention, blocks
from sharding import mesh as meshes
from sharding.context import Block, Part, chunks, order, ring_attention, visits
from sharding.mesh import MeshConfig
from tests.tolerance import assert_same

# ---- the plan ------------------------------------------------------------------------------------


def worked(ways, tokens, window, causal):
    """[T, T] int: how often any device works on the pair of a query and a key."""
    held = chunks(ways, causal)
    times = np.zeros((tokens * ways * len(held[0]),) * 2, int)
    for visit in visits(ways, tokens, window, causal):
        for slot in visit.slots:
            for i, pair in enumerate(slot):
                if pair is None:
                    continue
                part, j = pair.part, (i - visit.shift) % ways
                t_T, s_S = np.arange(part.tokens)[:, None], np.arange(part.tokens)[None]
                seen = (s_S <= t_T) | (not part.causal)
                seen &= (t_T - s_S < part.window) | (not part.window)
                first_t = held[i][pair.q] * tokens
                first_s = (held[j][pair.k] + 1) * tokens - part.tokens
                times[first_t + t_T, first_s + s_S] += seen
    return times


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("ways", "tokens"), [(1, 4), (2, 1), (2, 5), (3, 4), (4, 3), (8, 2)])
def test_each_key_that_a_query_sees_is_worked_on_once_and_no_other(ways, tokens, causal):
    total = ways * tokens * (2 if causal else 1)
    segments = jnp.ones((1, total), jnp.int32)
    for window in range(total + 2) if causal else [0]:
        seen = np.asarray(attention.visible(segments, window, causal))[0]
        np.testing.assert_array_equal(worked(ways, tokens, window, causal), seen, f"{window=}")


@pytest.mark.parametrize(("ways", "causal"), [(1, True), (4, True), (4, False)])
def test_every_token_of_a_row_lies_on_one_device(ways, causal):
    places = order(24, ways, causal)
    assert sorted(places) == list(range(24))
    own = places.reshape(ways, -1)
    if causal and ways > 1:
        assert list(own[1]) == [3, 4, 5, 18, 19, 20], "chunks 1 and 2 * 4 - 1 - 1 of 8"
    else:
        assert (places == np.arange(24)).all()


def work_of(visit_or_plan, ways, tokens):
    """Queries times keys that each device must look at."""
    work = [0] * ways
    for visit in visit_or_plan:
        for slot in visit.slots:
            for i, pair in enumerate(slot):
                part = pair.part if pair else Part(0)
                work[i] += part.tokens**2 // (2 if part.causal else 1)
    return work


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_causal_work_is_the_same_on_every_device_and_at_every_visit(ways):
    plan = visits(ways, 4, 0, True)
    assert [visit.shift for visit in plan] == list(range(ways))
    for visit in plan:
        assert len(set(work_of([visit], ways, 4))) == 1
    total = 2 * ways * 4
    assert sum(work_of(plan, ways, 4)) == total**2 / 2, "half of all pairs: none is masked"


def test_a_window_skips_the_chunks_and_the_visits_out_of_its_reach():
    ways, tokens = 8, 64
    plan = visits(ways, tokens, 17, True)
    assert [visit.shift for visit in plan] == [0, 1, 7], "the neighbours' keys only"
    corners = [slot for visit in plan[1:] for slot in visit.slots]
    assert {pair.part.tokens for slot in corners for pair in slot if pair} == {16}
    work = work_of(plan, ways, tokens)
    full = work_of(visits(ways, tokens, 0, True), ways, tokens)
    assert max(work) < 0.15 * max(full)
    assert max(work) - min(work) == 16**2, "the first chunk has none before it"
    alone = visits(ways, tokens, 1, True)
    assert [visit.shift for visit in alone] == [0], "who sees only itself asks nobody"


# ---- the ring against the plain attention --------------------------------------------------------

SCALE = 0.3


def engine(softcap=0.0, told=None):
    """The plain blocks; `told(device)` hears of each that is worked on."""
    how = {"scale": SCALE, "softcap": softcap}

    def forward(*args, **kind):
        if told:
            jax.debug.callback(told, jax.lax.axis_index("context"))
        return blocks.forward(*args, **how, **kind)

    return Block(forward, functools.partial(blocks.backward, **how))


def rows_of(ways, tokens, heads=2, groups=2, size=4):
    """q, k, v, what the gradient of the output is to be, and segments: two documents, padding."""
    draw = np.random.default_rng(0)
    shapes = (groups, size), (size,), (size,), (groups, size)
    arrays = [np.float32(draw.normal(size=(2, tokens, heads, *shape))) for shape in shapes]
    segments = np.sort(draw.integers(1, 3, (2, tokens)), axis=1).astype(np.int32)
    segments[1, tokens - tokens // 5 :] = 0
    return arrays, segments


def on_a_ring(ways, tokens, told=None, *, window=0, softcap=0.0, causal=True, gradients=True):
    """((o, dq, dk, dv) of the ring, the same of plain attention), tokens in the row's order."""
    arrays, segments = rows_of(ways, tokens)
    places = order(tokens, ways, causal)
    mesh = meshes.make(MeshConfig(data=1, context=ways), jax.devices()[:ways])
    with jax.set_mesh(mesh):
        where = jax.NamedSharding(mesh, jax.P(None, "context"))
        q, k, v, w, s = (jax.device_put(a[:, places], where) for a in (*arrays, segments))

        def run(q, k, v):
            block = engine(softcap, told)
            o = ring_attention(q, k, v, s, block=block, window=window, causal=causal)
            return jnp.sum(o * w), o

        (_, o), grads = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
    ours = [np.asarray(a)[:, np.argsort(places)] for a in (o, *grads)]
    *qkv, w = map(jnp.asarray, arrays)
    plain = functools.partial(
        attention.plain, scale=SCALE, window=window, softcap=softcap, causal=causal
    )
    o, pull = jax.vjp(lambda *qkv: plain(*qkv, jnp.asarray(segments)), *qkv)
    return ours, (o, *pull(w))


CASES = {
    "two": (2, {}),
    "two, not causal": (2, {"causal": False}),
    "four": (4, {}),
    "four, not causal, capped": (4, {"causal": False, "softcap": 1.5}),
    "four, window over a border": (4, {"window": 5}),
    "four, window of itself": (4, {"window": 1}),
    "four, window over all": (4, {"window": 23}),
    "eight": (8, {}),
    "eight, window over two borders": (8, {"window": 6, "softcap": 1.5}),
}
QUICK = ("four, window over a border",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_a_ring_gives_values_and_gradients_of_plain_attention(name):
    ways, how = CASES[name]
    assert_same(*on_a_ring(ways, 6 * ways if ways < 8 else 32, **how))


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 5])
def test_each_device_computes_the_blocks_of_the_plan_and_no_others(window):
    ways, tokens, heard = 4, 24, []
    on_a_ring(ways, tokens, told=lambda device: heard.append(int(device)), window=window)
    jax.effects_barrier()
    slots = itertools.chain(*(visit.slots for visit in visits(ways, tokens // 8, window, True)))
    planned = [i for slot in slots for i, pair in enumerate(slot) if pair]
    assert sorted(heard) == sorted(planned)
    if not window:
        assert {heard.count(i) for i in range(ways)} == {2 * ways + 1}, "all devices alike"
