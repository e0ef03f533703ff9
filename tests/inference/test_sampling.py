"""Sampling: each setting against NumPy, rows apart, the vocabulary's border, the plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from inference import sampling
from inference.sampling import Sampling, Settings, draw, heaviest, penalize, sample
from model import transformer
from model.config import Arch, Embeddings, ModelConfig
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig

VOCAB, ROOM = 10, 16  # ids, and rows of the table
CFG = ModelConfig(
    layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32, vocab=ROOM, dtype="float32",
    arch=Arch(activation="relu2"),
)  # fmt: skip


def logits(rows=4, vocab=40, scale=3.0):
    return np.float32(scale * np.random.default_rng(0).normal(size=(rows, vocab)))


def softmax(z):
    e = np.exp(np.float64(z) - np.max(z))
    return e / e.sum()


def top_k(z, k):
    return z >= np.sort(z)[-min(k, z.size)] if k else np.full(z.shape, True)


def top_p(z, p):
    order = np.argsort(-z)
    before = np.cumsum(softmax(z)[order]) - softmax(z)[order]  # of the likelier ones
    kept = np.full(z.shape, False)
    kept[order[before < p]] = True
    return kept


def min_p(z, p):
    return softmax(z) >= p * softmax(z).max()


def allowed(z, settings):
    """The ids that a row may draw and their probabilities, from the formulas, one after another."""
    z = np.float64(z) / settings.temperature
    for keep in (
        lambda z: top_k(z, settings.top_k),
        lambda z: top_p(z, settings.top_p),
        lambda z: min_p(z, settings.min_p),
    ):
        z = np.where(keep(z), z, -np.inf)
    return softmax(z)


def drawn(z, settings, draws=4000):
    """How often each id is drawn."""
    rows = Settings.of([settings] * draws)
    keys = rows.keys(jnp.arange(draws))
    ids = draw(jnp.broadcast_to(z[None], (draws, z.size)), keys, rows)
    return np.bincount(ids, minlength=z.size) / draws


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_k=1000),
        Sampling(2.0, top_p=0.7),
        Sampling(1.0, top_p=1e-6),
        Sampling(1.0, min_p=0.2),
        Sampling(1.0, min_p=1.0),
        Sampling(1.5, top_k=8, top_p=0.8, min_p=0.1),
    ],
)
def test_draws_have_the_probabilities_of_the_formulas(settings):
    z = logits(1)[0]
    wanted, found = allowed(z, settings), drawn(z, settings)
    assert not found[wanted == 0].any()
    np.testing.assert_allclose(found, wanted, atol=0.03)  # 3 sigma of 4000


def test_the_fewest_that_weigh_enough_are_found_exactly():
    z = logits(50, 300)
    z[:, 7] = -np.inf
    z[:, 8] = 0.0
    for k in (1, 2, 17, 299, 300):
        kept = heaviest(jnp.asarray(z), jnp.ones(z.shape), jnp.full((50,), float(k)))
        np.testing.assert_array_equal(kept, z >= np.sort(z)[:, -k, None])


def test_ids_that_tie_at_the_border_stay():
    z = jnp.asarray([[1.0, 2.0, 2.0, 3.0]])
    kept = heaviest(z, jnp.ones(z.shape), jnp.asarray([2.0]))
    np.testing.assert_array_equal(kept, [[False, True, True, True]])


def test_a_penalty_divides_what_is_positive_and_multiplies_the_rest():
    z = jnp.asarray([[4.0, -4.0, 4.0, -4.0, 0.0]])
    seen = jnp.asarray([[True, True, False, False, True]])
    np.testing.assert_array_equal(penalize(z, seen, jnp.asarray([2.0])), [[2, -8, 4, -4, 0]])
    np.testing.assert_array_equal(penalize(z, seen, jnp.asarray([1.0])), z)


def test_a_penalty_comes_before_the_choice_greedy_or_drawn():
    z, seen = jnp.asarray([[3.0, 2.0]]), jnp.asarray([[True, False]])
    for temperature in (0.0, 1e-3):
        for penalty, wanted in ((1.0, 0), (2.0, 1)):
            rows = Settings.of([Sampling(temperature, repetition_penalty=penalty)])
            assert draw(z, rows.keys(jnp.arange(1)), rows, seen)[0] == wanted


MIXED = (
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(1.0, seed=3, stream=1),
    Sampling(0.7, top_k=5, seed=1),
    Sampling(1.3, top_p=0.8, min_p=0.05, repetition_penalty=1.5),
)


def test_rows_of_a_batch_draw_what_they_draw_alone():
    z, seen = logits(len(MIXED)), np.random.default_rng(1).random((len(MIXED), 40)) < 0.3
    places = jnp.arange(len(MIXED)) * 7

    def ids(which):
        rows = Settings.of([MIXED[i] for i in which])
        which = np.array(which)
        return draw(jnp.asarray(z[which]), rows.keys(places[which]), rows, seen[which]).tolist()

    together = ids([*range(len(MIXED))])
    assert together == [ids([i])[0] for i in range(len(MIXED))]
    assert together[::-1] == ids([*range(len(MIXED))][::-1])


def test_the_seed_the_stream_and_the_place_each_change_the_draw():
    z = jnp.zeros((1, 1 << 16))

    def one(settings, place):
        rows = Settings.of([settings])
        return int(draw(z, rows.keys(jnp.asarray([place])), rows)[0])

    base = Sampling(1.0, seed=5, stream=2)
    first = one(base, 9)
    assert first == one(base, 9)
    others = [
        one(base, 10),
        one(dataclasses.replace(base, seed=6), 9),
        one(dataclasses.replace(base, stream=3), 9),
        one(Sampling(1.0, seed=2, stream=5), 9),
    ]
    assert len({first, *others}) == 5


def test_other_settings_compile_nothing():
    traced = []

    @jax.jit
    def step(z, place, rows, seen):
        traced.append(1)
        return draw(z, rows.keys(place), rows, seen)

    z, seen = logits(), np.zeros((4, 40), bool)
    for settings in MIXED:
        step(z, np.arange(4), Settings.of([settings] * 4), seen)
    assert len(traced) == 1


def test_a_temperature_near_zero_is_greedy_and_never_nan():
    z = jnp.asarray(1e4 * logits())
    for temperature in (1e-30, 1e-6):
        rows = Settings.of([Sampling(temperature, top_p=0.9)] * 4)
        found = draw(z, rows.keys(jnp.arange(4)), rows)
        np.testing.assert_array_equal(found, z.argmax(-1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0; 0 is greedy"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"min_p": 2.0}, "min_p=2.0 must be 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"seed": -1}, "seed=-1 must be 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 must be 0 to 4294967295"),
    ],
)
def test_an_impossible_setting_says_what_is_right(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        Sampling(0.7, repetition_penalty=1.3),
        Sampling(1.0, top_k=5, repetition_penalty=0.8),
        Sampling(1.3, top_p=0.8),
        Sampling(1.0, min_p=0.1),
        Sampling(0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_what_may_be_drawn_is_what_transformers_leaves(settings):
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    rows, vocab, length = 6, 500, 12
    z = logits(rows, vocab)
    ids = np.random.default_rng(2).integers(0, vocab, (rows, length))
    config = GPT2Config(vocab_size=vocab, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    how = {
        name: getattr(settings, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    generation = GenerationConfig(do_sample=True, **how, eos_token_id=None, pad_token_id=0)
    processors = GPT2LMHeadModel(config)._get_logits_processor(
        generation, length, torch.tensor(ids), None, []
    )
    right = np.asarray(processors(torch.tensor(ids), torch.tensor(z)))
    seen = np.zeros((rows, vocab), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    penalized = penalize(jnp.asarray(z), seen, jnp.full((rows,), settings.repetition_penalty))
    ours = penalized / settings.temperature
    many = Settings.of([settings] * rows)
    ours = sampling.keep_top(ours, many.top_k, many.top_p)
    ours = sampling.keep_likely(ours, many.min_p)
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(right))
    np.testing.assert_allclose(ours, right, rtol=1e-6)


def place(mesh) -> NamedSharding:
    return NamedSharding(mesh, Layout().spec("batch", None))


@pytest.fixture
def one():
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield place(mesh)


def follow(table_VV, ids_BT, positions_BT, segments_BT):
    """Logits of the next id that depend on the last id alone."""
    return table_VV.at[ids_BT].get(out_sharding=Layout().spec("batch", None, None))


def chain(*edges: tuple[int, int]) -> jax.Array:
    table = np.zeros((ROOM, ROOM), np.float32)
    for a, b in edges:
        table[a, b] = 50
    return jnp.asarray(table)


def test_greedy_takes_the_likeliest_step_by_step(one):
    table = chain((1, 2), (2, 5), (5, 3), (3, 1))
    key = jax.random.key(0)
    common = {"tokens": 6, "vocab": VOCAB, "where": one, "key": key}
    assert sample(follow, table, [4, 1], temperature=0, **common) == [2, 5, 3, 1, 2, 5]
    assert sample(follow, table, [4, 1], temperature=1e-3, **common) == [2, 5, 3, 1, 2, 5]


def test_it_stops_at_the_end_and_leaves_the_end_out(one):
    table = chain((1, 2), (2, 5), (5, 9))
    common = {"vocab": VOCAB, "where": one, "key": jax.random.key(0), "temperature": 0}
    assert sample(follow, table, [1], tokens=8, end=9, **common) == [2, 5]
    assert sample(follow, table, [5], tokens=8, end=9, **common) == []
    assert sample(follow, table, [1], tokens=2, end=9, **common) == [2, 5]
    assert sample(follow, table, [9, 1], tokens=2, end=9, **common) == [2, 5]  # in the prompt
    assert sample(follow, table, [1], tokens=0, **common) == []


def test_ids_beyond_the_vocabulary_are_never_drawn(one):
    table = chain(*((a, b) for a in range(ROOM) for b in range(VOCAB, ROOM)))
    common = {"tokens": 40, "vocab": VOCAB, "where": one, "key": jax.random.key(1)}
    for temperature in (0, 1.0, 10.0):
        found = sample(follow, table, [0], temperature=temperature, **common)
        assert len(found) == 40 and max(found) < VOCAB


def test_a_key_decides_and_another_key_differs(one):
    table = jnp.zeros((ROOM, ROOM))
    common = {"tokens": 30, "vocab": VOCAB, "where": one, "temperature": 1.0}
    first, again, other = (
        sample(follow, table, [0], key=jax.random.key(seed), **common) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) > 5  # a draw of its own for every place


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), pytest.param(MeshConfig(fsdp=4, tensor=2), marks=pytest.mark.slow)]
)
def test_a_model_samples_what_its_full_forward_says_on_any_mesh(mesh):
    cfg = dataclasses.replace(
        CFG, arch=dataclasses.replace(CFG.arch, embeddings=Embeddings(scale=True))
    )
    prompt, count, devices = [3, 1, 4], 6, 1 if mesh == MeshConfig() else 8
    made = meshes.make(mesh, jax.devices()[:devices])
    with jax.set_mesh(made):
        graph, shapes, _ = transformer.abstract(cfg, Layout())
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda s: jax.device_put(
                np.float32(rng.standard_normal(s.shape)), NamedSharding(made, s.sharding.spec)
            ),
            shapes,
        )

        def logits(params, *rows):
            return nnx.merge(graph, params).logits(*rows)

        kwargs = {"tokens": count, "vocab": VOCAB, "where": place(made), "key": jax.random.key(0)}
        found = sample(logits, params, prompt, temperature=0, **kwargs)
        # One pass over the whole text must have named each of its ids.
        text = np.tile(np.int32([*prompt, *found]), (8, 1))
        places = np.tile(np.arange(text.shape[1], dtype=np.int32), (8, 1))
        rows = (jax.device_put(a, place(made)) for a in (text, places, np.ones_like(text)))
        z = np.asarray(jax.jit(logits)(params, *rows))[0]
    assert found == z[len(prompt) - 1 : -1, :VOCAB].argmax(-1).tolist()
    assert len(set(found)) > 1
