"""Small moments and weights in bfloat16: unbiased, the same on every mesh, in hardly any memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from checkpoint import store
from configs.run import check_split
from model.layers import Role
from optim import lean, rounding
from optim.codes import Blocks, narrowed, widened
from optim.config import OptimConfig
from optim.update import make_update
from tests.marks import mostly_slow
from tests.meshes import hybrid
from tests.sharding import tiny
from tests.tolerance import assert_formula, assert_same

CFG = OptimConfig(moments="int8", block=8, lr=0.01, schedule="constant", clip=0.0, b2=0.9)
# A stacked matrix, one of three dims of inputs whose first is split, a table, a norm.
SHAPES = {"w": (2, 3, 24, 32), "out": (2, 16, 4, 2, 8), "table": (40, 32), "scale": (2, 32)}
ROLES = {
    "w": Role("matrix", 1, 1),
    "out": Role("matrix", 1, 3),
    "table": Role("embedding"),
    "scale": Role(),
}
SPECS = {
    "w": (None, None, "tensor", "fsdp"),
    "out": (None, "fsdp", "tensor", None, None),
    "table": ("tensor", "fsdp"),
    "scale": (None, None),
}


def hashed(seed: int, rows: int, columns: int) -> jax.Array:
    """Chances beyond a mesh."""
    places = np.arange(rows * columns, dtype=np.uint32).reshape(rows, columns)
    return rounding.mix(rounding.mix(places) + np.uint32(seed))


@functools.partial(jax.jit, static_argnames="kind")
def through_bytes(x: jax.Array, chances: jax.Array, kind: str) -> tuple[Blocks, jax.Array]:
    """x [rows, columns] kept in blocks of 8, and what is read from them."""
    rows, columns = x.shape
    like = Blocks(jnp.zeros((rows, columns), kind), jnp.zeros((rows, columns // 8)))
    kept = narrowed(x, like, chances)
    return kept, widened(kept)


def drawn(seed: int) -> dict:
    draw = np.random.default_rng(seed)
    return {name: np.float32(draw.normal(size=shape)) for name, shape in SHAPES.items()}


def stepped(cfg, sizes, dtype="float32", steps=3, good=9):
    """(parameters, moments) before each step and after the last, as NumPy, and their places.

    Steps from number `good` on are bad.
    """
    mesh = tiny.mesh_of(sizes)
    with jax.set_mesh(mesh):

        def placed(tree, dtype):
            return {
                name: jax.device_put(jnp.asarray(a, dtype), NamedSharding(mesh, spec_of(name)))
                for name, a in tree.items()
            }

        def spec_of(name):
            axes = (axis if mesh.shape.get(axis, 1) > 1 else None for axis in SPECS[name])
            return jax.P(*axes)

        params = placed(drawn(0), dtype)
        update = make_update(cfg, 100, ROLES, seed=7)
        state = jax.jit(update.init)(params)
        step = jax.jit(update.step)
        found = [jax.device_get((params, state))]
        for n in range(steps):
            params, state = step(jnp.int32(n), n < good, placed(drawn(1 + n), dtype), state, params)
            found.append(jax.device_get((params, state)))
        where = jax.tree.map(lambda a: a.sharding.spec, (params, state))
    return found, where


# ---- rounding ----


def test_the_mean_over_all_chances_is_the_number_itself():
    numbers = np.float32([1.0, -3.14159, 1e-20, 123456.7, -0.999999, 3e-39])
    chances = np.arange(1 << 16, dtype=np.uint32)
    narrow = jax.jit(rounding.to_bfloat16)
    for x in numbers:
        found = np.float64(narrow(np.full(1 << 16, x), chances))
        assert len(set(found)) <= 2
        assert found.mean() == np.float64(x), x
    odd = np.float32([np.inf, -np.inf, np.nan])
    kept = narrow(odd, np.full(3, 0xFFFF, np.uint32))
    np.testing.assert_array_equal(np.float32(kept), odd)


@pytest.mark.parametrize("kind", mostly_slow(["int8", "uint8"], "uint8"))
def test_a_byte_is_unbiased_and_off_by_less_than_its_step(kind):
    draw = np.random.default_rng(0)
    x = np.float32(np.exp(2 * draw.normal(size=32)) * draw.choice([-1, 1], 32))
    x = np.abs(x) if kind == "uint8" else x
    many = 1 << 14
    chances = jax.jit(lambda: hashed(1, many, 32))()
    _, found = through_bytes(np.broadcast_to(x, (many, 32)), chances, kind)
    found = np.float64(found)
    places = np.sqrt(np.abs(x.reshape(4, 8)) / np.abs(x.reshape(4, 8)).max(1, keepdims=True))
    places = 127 * places if kind == "int8" else 255 * np.sqrt(places)
    curve = (lambda n: (n / 127) ** 2) if kind == "int8" else (lambda n: (n / 255) ** 4)
    steps = (curve(np.floor(places) + 1) - curve(np.floor(places))).reshape(32)
    steps = steps * np.repeat(np.abs(x.reshape(4, 8)).max(1), 8)
    assert (np.abs(found - x) <= steps * 1.001).all()
    assert (np.abs(found.mean(0) - x) < 5 * 0.5 * steps / np.sqrt(many) + 1e-5 * np.abs(x)).all()


def test_a_positive_second_moment_never_becomes_zero():
    x = np.float32([[1.0, 1e-3, 1e-12, 1e-25, 0.0, 1e-5, 1e-7, 1e-9]])
    kept, _ = through_bytes(x, np.full((1, 8), 0xFFFFFFFF, np.uint32), "uint8")
    np.testing.assert_array_equal(np.asarray(kept.codes) > 0, x > 0)


def test_chances_are_even_and_differ_between_seeds_steps_and_arrays():
    with jax.set_mesh(tiny.mesh_of((1, 1, 1))):

        @jax.jit
        @functools.partial(jax.shard_map, in_specs=jax.P(), out_specs=jax.P())
        def drawn_by(numbers):
            return rounding.bits(rounding.key(*numbers), (64, 256), jax.P(), 1, 0, 64)

        def chances(*numbers):
            return np.float64(drawn_by(np.uint32(numbers))) / 2**32

        one = chances(0, 0, 0)
        assert abs(one.mean() - 0.5) < 5 * 0.29 / 128
        for other in (chances(1, 0, 0), chances(0, 1, 0), chances(0, 0, 1), np.roll(one, 1, 1),
                      np.roll(one, 1, 0)):  # fmt: skip
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / 128


# ---- the step ----


@pytest.fixture(scope="module")
def whole():
    return stepped(CFG, (1, 1, 1), "bfloat16")[0]


def decoded(kept, shape):
    """Moments in float64, by the curves' own formula."""
    if not isinstance(kept, Blocks):
        return np.float64(kept)
    codes = np.float64(kept.codes).reshape(*kept.scale.shape, -1)
    signed = kept.codes.dtype == np.int8
    values = np.sign(codes) * (codes / 127) ** 2 if signed else (codes / 255) ** 4
    return (kept.scale[..., None] * values).reshape(shape)


@pytest.mark.parametrize("moments", mostly_slow(["int8", "bfloat16"], "int8"))
def test_each_step_is_adamws_on_the_moments_that_are_kept(moments):
    cfg = dataclasses.replace(CFG, moments=moments, clip=1.0)
    found, _ = stepped(cfg, (1, 1, 1), good=2)
    jax.tree.map(np.testing.assert_array_equal, found[3], found[2])
    for n in range(2):
        params, state = found[n]
        grads = drawn(1 + n)
        share = 1 / np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads.values()))
        for name, p in params.items():
            g = share * grads[name]
            m = cfg.b1 * decoded(state.mu[name], p.shape) + (1 - cfg.b1) * g
            v = cfg.b2 * decoded(state.nu[name], p.shape) + (1 - cfg.b2) * g**2
            way = m / (1 - cfg.b1 ** (n + 1)) / (np.sqrt(v / (1 - cfg.b2 ** (n + 1))) + 1e-8)
            way += 0 if name == "scale" else cfg.weight_decay * p
            assert_formula(found[n + 1][0][name], p - cfg.lr * way)


@pytest.mark.parametrize("sizes", mostly_slow([(2, 2, 2), (1, 4, 2), (8, 1, 1)], (2, 2, 2)))
def test_no_mesh_changes_a_bit_of_weights_or_moments(sizes, whole):
    found, (params, state) = stepped(CFG, sizes, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    for name in ("w", "out", "table"):
        assert state.mu[name].codes == params[name], name
        leads = len(SHAPES[name]) - lean.columns(ROLES[name])
        assert tuple(state.nu[name].scale) == tuple(params[name])[: leads + 1], name


@pytest.mark.slow
def test_pieces_make_what_the_whole_makes(whole, monkeypatch):
    monkeypatch.setattr(lean, "PIECE", 128)
    assert lean.piece(6 * 24, 32) == 4
    found, _ = stepped(CFG, (1, 1, 1), "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_a_step_takes_the_memory_of_some_pieces_beside_the_state(monkeypatch):
    monkeypatch.setattr(lean, "PIECE", 1 << 16)
    cfg = dataclasses.replace(CFG, block=256)
    roles = {"w": ROLES["w"]}
    with jax.set_mesh(tiny.mesh_of((1, 1, 1))):
        params = {"w": jax.ShapeDtypeStruct((16, 1024, 256), jnp.float32)}
        state = jax.eval_shape(lambda: lean.init(cfg, {"w": jnp.zeros((16, 1024, 256))}, roles))

        def step(n, grads, state, params):
            when = lean.When(n, n < 9, jnp.float32(0.1), 0)
            return lean.step(cfg, when, grads, state, params, roles)

        made = jax.jit(step, donate_argnums=(2, 3)).lower(jnp.int32(0), params, state, params)
        memory = made.compile().memory_analysis()
    weights = 16 * 1024 * 256
    assert memory.alias_size_in_bytes == weights * (4 + 2 * (1 + 4 / 256))
    assert memory.temp_size_in_bytes < 12 * 4 * (1 << 16) < 0.2 * 4 * weights


# ---- runs ----


@pytest.mark.slow
def test_weights_in_bfloat16_move_by_chance_under_any_optimizer():
    cfg = OptimConfig(name="sgd", lr=1e-4, schedule="constant", weight_decay=0.0, clip=0.0)
    found, _ = stepped(cfg, (1, 1, 1), "bfloat16", good=2)
    jax.tree.map(np.testing.assert_array_equal, found[3], found[2])
    split, _ = stepped(cfg, (2, 2, 2), "bfloat16", good=2)
    jax.tree.map(np.testing.assert_array_equal, split, found)
    flat = [np.concatenate([np.float64(a).ravel() for a in found[n][0].values()]) for n in (0, 1)]
    grads = [np.float64(jnp.bfloat16(drawn(1)[name])).ravel() for name in found[0][0]]
    way, wanted = flat[1] - flat[0], -cfg.lr * np.concatenate(grads)
    assert 0 < np.mean(way != 0) < 0.3, "to the nearest, only the smallest would move"
    # Their sum along the gradient's signs: in the mean what it should be, within 5 deviations.
    step = np.maximum(2.0**-7 * np.abs(flat[0]), np.abs(wanted))  # of bfloat16, at most
    assert abs(np.sum((way - wanted) * np.sign(wanted))) < 5 * np.sqrt(
        np.sum(step * np.abs(wanted))
    )


@pytest.mark.slow
def test_a_run_of_small_moments_and_weights_learns_alike_on_every_mesh():
    model = dataclasses.replace(tiny.MODEL, param_dtype="bfloat16")
    run = tiny.run_of((1, 1, 1), model=model)
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, moments="int8", block=8))
    start = tiny.init(run)
    right, state = tiny.losses(run, start)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    run = dataclasses.replace(run, mesh=hybrid(2, 2, 2))
    check_split(run, 8)
    found, _ = tiny.losses(run, start)
    # The chances are the same; a gradient summed in another order, off by 1e-7, now and then falls
    # on the other side of one, and a weight then differs by its last bit of eight.
    assert_same(found[:4], right[:4])
    np.testing.assert_allclose(found, right, rtol=2**-9)
    assert right[-1] < 0.8 * right[0]


@pytest.mark.slow
def test_moments_in_bytes_are_restored_to_the_bit_on_another_mesh(tmp_path):
    made = []
    for sizes in ((1, 4, 2), (2, 2, 2)):
        with jax.set_mesh(tiny.mesh_of(sizes)):
            model = dataclasses.replace(tiny.MODEL, param_dtype="bfloat16")
            run = tiny.run_of(sizes, model=model)
            made.append(train.build(dataclasses.replace(run, optim=CFG)))
    draw = np.random.default_rng(0)

    def random(leaf):
        values = 100 * draw.random(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(random, made[0].state)
    saves = store.Store(tmp_path)
    saves.save(1, state, {}, {})
    saves.wait()
    saves.close()
    found = store.locate(str(tmp_path)).restore(made[1].state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(
        lambda a: a.sharding, made[1].state
    )


# ---- what a user can get wrong ----


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"moments": "int4"}, "moments='int4' is none of float32, bfloat16, int8"),
        ({"moments": "int8", "name": "muon"}, "moments=int8 needs name=adamw, not muon"),
        ({"block": 4}, "block=4 must be at least 8"),
    ],
)
def test_a_wrong_field_is_told(fields, told):
    with pytest.raises(ValueError, match=told):
        OptimConfig(**fields)


def test_small_moments_are_not_split_further_than_their_weights():
    run = dataclasses.replace(tiny.run_of((8, 1, 1)), optim=CFG)
    run = dataclasses.replace(run, layout=dataclasses.replace(run.layout, optimizer="data"))
    with pytest.raises(ValueError, match=r"optimizer=data splits moments in float32"):
        check_split(run, 8)


def test_a_block_that_would_lie_on_two_devices_is_refused():
    run = dataclasses.replace(tiny.run_of((1, 8, 1)), optim=CFG)
    told = r"moments=int8 of embed=32 does not divide over fsdp=8 x block=8: .* multiple of 64$"
    with pytest.raises(ValueError, match=told):
        check_split(run, 8)
    run = dataclasses.replace(run, optim=dataclasses.replace(CFG, block=16), mesh=hybrid(4, 2, 1))
    check_split(run, 8)
    run = dataclasses.replace(run, optim=dataclasses.replace(CFG, block=32))
    with pytest.raises(ValueError, match=r"multiple of 64, or --config.optim.block=16"):
        check_split(run, 8)
