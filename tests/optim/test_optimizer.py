"""Optimizers: updates against float64 NumPy, states where their parameters are."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import train
from configs.run import Run
from data.config import DataConfig
from model import transformer
from model.config import Arch, Attention, ModelConfig
from optim.config import OPTIMIZERS, OptimConfig
from optim.optimizer import make_optimizer
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from tests.tolerance import assert_formula

SMALL = ModelConfig(
    layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=64, dtype="float32"
)
STEPS = 5


@dataclass(frozen=True)
class Role:
    kind: str
    outputs: int = 0
    inputs: int = 0


ROLES = {
    "w": Role("matrix", 1, 1),
    "table": Role("embedding"),
    "head": Role("head"),
    "scale": Role("vector"),
}
SHAPES = {"w": (6, 4), "table": (10, 4), "head": (10, 4), "scale": (4,)}


def draws(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def taken(cfg: OptimConfig, params: dict, gradients: list[dict]) -> dict:
    """The parameters after a step with each of the gradients."""
    optimizer = make_optimizer(cfg, STEPS, ROLES)
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
    return params


def reference(cfg: OptimConfig, params: dict, gradients: list[dict]) -> dict:
    """The same in float64, from the papers' formulas."""
    params = dict(params)
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for t, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        share = min(1, cfg.clip / norm) if cfg.clip else 1
        lr = cfg.lr * (1 - (1 - cfg.final) * t / STEPS)
        for name, g in grads.items():
            g = share * g
            if cfg.name == "adamw":
                m[name] = cfg.b1 * m[name] + (1 - cfg.b1) * g
                v[name] = cfg.b2 * v[name] + (1 - cfg.b2) * g**2
                deviation = np.sqrt(v[name] / (1 - cfg.b2**t)) + 1e-8
                step = m[name] / (1 - cfg.b1**t) / deviation
            elif cfg.name == "sgd":
                m[name] = step = cfg.b1 * m[name] + g
            else:
                step = np.sign(cfg.b1 * m[name] + (1 - cfg.b1) * g)
                m[name] = cfg.b2 * m[name] + (1 - cfg.b2) * g
            if name != "scale":
                step = step + cfg.weight_decay * params[name]
            params[name] = params[name] - lr * step
    return params


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_steps_follow_the_formula(name, clip):
    cfg = OptimConfig(name=name, lr=0.03, schedule="linear", weight_decay=0.2, clip=clip, b1=0.8)
    params, gradients = draws(0), [draws(seed) for seed in range(1, 1 + STEPS)]
    found, wanted = taken(cfg, params, gradients), reference(cfg, params, gradients)
    for key in SHAPES:
        assert_formula(found[key], wanted[key])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_weight_decay_shrinks_matrices_and_tables_but_not_vectors(name):
    cfg = OptimConfig(name=name, lr=0.1, schedule="constant", weight_decay=0.5)
    params, zeros = draws(0), {key: np.zeros(shape) for key, shape in SHAPES.items()}
    found = taken(cfg, params, [zeros])
    for key in SHAPES:
        share = 1 if key == "scale" else 1 - 0.1 * 0.5
        np.testing.assert_allclose(found[key], share * params[key], rtol=1e-6, err_msg=key)


def test_clipping_makes_the_step_independent_of_the_gradients_size():
    cfg = OptimConfig(name="sgd", clip=1.0, weight_decay=0.0)
    params, grads = draws(0), draws(1)
    once = taken(cfg, params, [grads])
    tenfold = taken(cfg, params, [{key: 10 * g for key, g in grads.items()}])
    for key in SHAPES:
        np.testing.assert_allclose(once[key], tenfold[key], rtol=1e-6)


# ---- Muon ----


@pytest.fixture(scope="module")
def one_device():
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def muon_updates(cfg: ModelConfig, optim: OptimConfig) -> tuple[dict, dict]:
    """(gradients, updates) of the first step on random gradients, by path."""
    _, shapes, roles = transformer.abstract(cfg, Layout())
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda s: jnp.float32(rng.standard_normal(s.shape)), shapes)
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = make_optimizer(optim, 10, roles)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)

    def flat(tree):
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="."): np.array(a) for p, a in leaves}

    return flat(grads), flat(updates)


def turned(matrix: np.ndarray) -> np.ndarray:
    """Newton-Schulz drives every singular value towards 1. Jordan et al. 2024."""
    u, sizes, v = np.linalg.svd(np.float64(matrix), full_matrices=False)
    sizes = sizes / np.linalg.norm(sizes)
    for _ in range(5):
        sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
    return (u * sizes) @ v


def test_muon_turns_each_matrix_of_a_model_by_itself(one_device):
    optim = OptimConfig(name="muon", lr=0.5, schedule="constant", clip=0.0, weight_decay=0.0)
    grads, updates = muon_updates(SMALL, optim)
    # From the weights' einsums: which dims number the matrices, and each matrix' outputs.
    cases = {
        "blocks.0.attention.qkv.weight": (2 * 2 * 4, (8, 32)),  # L K J, of H x D
        "blocks.0.attention.out.weight": (2, (32, 32)),  # L, of D x KGH
        "blocks.0.mlp.gate_up.weight": (4, (48, 32)),  # L and gate or up, of F x D
        "blocks.0.mlp.down.weight": (2, (32, 48)),  # L, of D x F
    }
    for name, (count, shape) in cases.items():
        assert grads[name].size == count * np.prod(shape), name
        found = -updates[name].reshape(-1, *shape) / 0.5 / (0.2 * np.sqrt(max(shape)))
        given = grads[name].reshape(-1, *shape)
        assert len(found) == count
        for matrix, gradient in zip(found, given, strict=True):
            assert_formula(matrix, turned(gradient))
            sizes = np.linalg.svd(matrix, compute_uv=False)
            assert np.median(sizes) > 0.65 and sizes.max() < 1.25, name


def test_muon_leaves_tables_and_norms_to_adam_at_their_own_rates(one_device):
    muon = dataclasses.replace(OptimConfig().muon, embed_lr=0.25, vector_lr=0.125)
    optim = OptimConfig(name="muon", lr=0.5, schedule="constant", clip=0.0, muon=muon)
    grads, updates = muon_updates(SMALL, optim)
    for name, rate in (
        ("embedding.table", 0.25),
        ("head.table", 0.5),  # 0 means lr
        ("norm.scale", 0.125),
        ("blocks.0.norm1.scale", 0.125),
    ):  # Adam's first step is the gradient's sign; Nesterov's look ahead (Dozat 2016) adds to it
        ahead = 1 + optim.b1 / (1 + optim.b1)
        np.testing.assert_allclose(updates[name], -rate * ahead * np.sign(grads[name]), rtol=1e-4)


# ---- states on a mesh ----


def program(name: str, mesh: jax.sharding.Mesh, model: ModelConfig = SMALL) -> "train.Program":
    run = Run(model=model, data=DataConfig(batch=8, seq=16), optim=OptimConfig(name=name))
    with jax.set_mesh(mesh):
        return train.build(run)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_where_their_parameters_lie(name):
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    state = program(name, mesh).state
    params = {jax.tree_util.keystr(p): s for p, s in jax.tree.leaves_with_path(state.params)}
    moments = 0
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        path = jax.tree_util.keystr(path)
        owner = next((p for key, p in params.items() if path.endswith(key)), None)
        if owner is not None and owner.shape == leaf.shape:
            moments += 1
            assert leaf.sharding.is_equivalent_to(owner.sharding, leaf.ndim), path
    assert moments >= len(params)


def test_the_second_moments_of_adafactor_are_rows_and_columns():
    big = ModelConfig(layers=4, embed=256, heads=4, kv_heads=4, head_dim=64, mlp=512, vocab=512)
    state = program("adafactor", meshes.make(MeshConfig()), big).state
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    (factored,) = (
        leaf
        for leaf in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "v_row"))
        if hasattr(leaf, "v_row")
    )
    second = sum(leaf.size for leaf in jax.tree.leaves((factored.v_row, factored.v_col)))
    assert second + sum(leaf.size for leaf in jax.tree.leaves(factored.v)) < 0.03 * weights


@pytest.fixture(scope="module")
def lesson(one_device):
    """A small model's roles, first parameters, and the gradient of its loss on one batch."""
    arch = Arch(activation="relu2", attention=Attention(qk_norm="head"))
    cfg = dataclasses.replace(SMALL, layers=1, arch=arch)
    graph, shapes, roles = transformer.abstract(cfg, Layout())
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (4, 17)).astype(np.int32)
    ones = np.ones((4, 16), np.int32)
    rows = ids[:, :-1], ids[:, 1:], np.int32(ones.cumsum(1) - 1), ones, np.float32(ones / 64)
    where = NamedSharding(one_device, Layout().spec("batch", None))
    rows = [jax.device_put(array, where) for array in rows]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: 0.2 * jnp.float32(rng.standard_normal(s.shape)), shapes)
    loss = jax.value_and_grad(lambda params: nnx.merge(graph, params).loss(*rows)[0])
    return roles, params, jax.jit(loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_of_a_model(name, lesson):
    roles, params, gradient = lesson
    lr = {"sgd": 0.5, "lion": 0.01, "muon": 0.02}.get(name, 0.01)
    optimizer = make_optimizer(OptimConfig(name=name, lr=lr, weight_decay=0.0), 40, roles)

    @jax.jit
    def learn(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, losses = jax.jit(optimizer.init)(params), []
    for _ in range(40):
        loss, grads = gradient(params)
        losses.append(float(loss))
        params, state = learn(params, state, grads)
    assert losses[-1] < 0.7 * losses[0]
