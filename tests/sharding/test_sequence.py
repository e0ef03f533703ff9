"""Sequence parallelism: tokens lie apart between blocks; no sum over tensor is an all-reduce."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import train
from costs.collectives import collectives
from model import cache, transformer
from model.matmul import einsum
from sharding.layout import Layout
from tests.sharding.tiny import MODEL, ROWS, TOKENS, mesh_of, run_of
from tests.tolerance import assert_formula

WHOLE = Layout(residual=None)
D = MODEL.embed


def counted(text):
    """How often each kind of collective runs."""
    found = Counter()
    for one in collectives(text):
        found[one.name] += one.times
    return found


@functools.cache
def compiled(layout, sizes=(1, 1, 4), remat="dots"):
    """A train step, compiled."""
    with jax.set_mesh(mesh_of(sizes)):
        model = dataclasses.replace(MODEL, remat=remat)
        return train.build(run_of(sizes, layout, model=model)).compile()


def test_two_matmuls_between_tokens_that_lie_apart():
    """Gathered before the first, scattered after the second; backward the same, turned round."""
    draw = np.random.default_rng(0)
    x, up, down = (draw.normal(size=shape) for shape in ((4, 6, 8), (12, 8), (8, 12)))

    def block(x, up, down):
        h = jnp.sin(einsum("BTD,FD->BTF", x, up, out=jax.P("fsdp", None, "tensor")))
        return jnp.sin(einsum("BTF,DF->BTD", h, down, out=jax.P("fsdp", "tensor", None))).sum()

    mesh = mesh_of((1, 2, 2))
    with jax.set_mesh(mesh):
        specs = jax.P("fsdp", "tensor"), jax.P("tensor", "fsdp"), jax.P("fsdp", "tensor")
        arrays = [
            jax.device_put(a.astype(np.float32), NamedSharding(mesh, spec))
            for a, spec in zip((x, up, down), specs, strict=True)
        ]
        step = jax.jit(jax.grad(block, (0, 1, 2))).lower(*arrays).compile()
        dx, dup, ddown = step(*arrays)
    z = np.einsum("BTD,FD->BTF", x, up)
    dy = np.cos(np.einsum("BTF,DF->BTD", np.sin(z), down))
    dz = np.einsum("BTD,DF->BTF", dy, down) * np.cos(z)
    assert_formula(dx, np.einsum("BTF,FD->BTD", dz, up))
    assert_formula(dup, np.einsum("BTF,BTD->FD", dz, x))
    assert_formula(ddown, np.einsum("BTD,BTF->DF", dy, np.sin(z)))
    assert dx.addressable_shards[0].data.shape == (2, 3, 8)
    # Two weights, x, and the gradient of y; two gradients of weights, y, and the gradient of x.
    assert counted(step.as_text()) == {"all-gather": 4, "reduce-scatter": 4}


@pytest.mark.slow
def test_a_train_step_sums_no_activation_in_an_all_reduce():
    tokens, found = (ROWS, TOKENS, D), collectives(compiled(Layout()).as_text())
    gathers, scatters = ([one for one in found if one.name == kind] for kind in KINDS)
    # A layer: both branches forward, both backward, and again what "dots" does not keep; then the
    # head, and backward the embedding.
    assert sum(one.times for one in gathers if tokens in one.shapes) == 6 * MODEL.layers + 2
    part = (ROWS, TOKENS // 4, D)
    assert sum(one.times for one in scatters if part in one.shapes) == 4 * MODEL.layers + 2
    sums = [dims for one in found if one.name == "all-reduce" for dims in one.shapes]
    assert max(map(np.prod, sums)) < np.prod(part)


KINDS = ("all-gather", "reduce-scatter")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_lies_apart_takes_less_memory(remat):
    apart, whole = (
        compiled(layout, remat=remat).memory_analysis().temp_size_in_bytes
        for layout in (Layout(), WHOLE)
    )
    assert not {*KINDS} & {*counted(compiled(WHOLE, remat=remat).as_text())}
    kept = MODEL.layers * 4 * ROWS * TOKENS * D  # the residual stream, float32
    assert whole - apart > kept / 2


def lowered(layout, ids, cached):
    """The text of a model's loss, or of a step of decoding, on tensor=2."""
    with jax.set_mesh(mesh_of((1, 1, 2))):
        graph, params, _ = transformer.abstract(MODEL, layout)

        def loss(params, ids_BT):
            rows = {"positions": ids_BT, "segments": ids_BT, "weights": ids_BT.astype("float32")}
            return nnx.merge(graph, params).loss(ids_BT, ids_BT, **rows)[0]

        def step(params, ids_BT):
            held = cache.empty(MODEL, layout, len(ids_BT), 16)
            counts_B = jnp.full(len(ids_BT), ids_BT.shape[1], jnp.int32)
            return nnx.merge(graph, params).extend(ids_BT, counts_B, held)

        ids = jax.ShapeDtypeStruct(
            ids, jnp.int32, sharding=NamedSharding(jax.sharding.get_mesh(), jax.P())
        )
        return jax.jit(step if cached else loss).lower(params, ids).as_text()


@pytest.mark.parametrize("tokens", [1, 4])
def test_decoding_does_not_know_of_it(tokens):
    shape = (ROWS, tokens)
    assert lowered(Layout(), shape, cached=True) == lowered(WHOLE, shape, cached=True)


def test_tokens_that_do_not_divide_stay_together():
    assert lowered(Layout(), (ROWS, 6), cached=False) != lowered(WHOLE, (ROWS, 6), cached=False)
    assert lowered(Layout(), (ROWS, 7), cached=False) == lowered(WHOLE, (ROWS, 7), cached=False)
