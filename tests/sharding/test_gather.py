"""A gather is one all-gather, and its backward pass a reduce-scatter, on every mesh."""

import dataclasses
import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from checkpoint import store
from costs.collectives import collectives
from model.config import REMATS
from model.matmul import einsum
from model.transformer import run_layers
from sharding.gather import gather
from tests.sharding.tiny import (
    MODEL,
    check_reduce_scatters,
    gathered,
    mesh_of,
    results,
    run_of,
)
from tests.tolerance import assert_formula

HYBRID = [(2, 4, 1), (2, 2, 2), (1, 8, 1), (2, 2, 1)]
SPEC = "BTD,FD->BTF"
# Layers outside a loop: there only a barrier keeps XLA from merging forward and backward pass.
FREE = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this XLA drops barriers on CPU")


def on(mesh, array, *spec):
    return jax.device_put(jnp.asarray(array, jnp.float32), NamedSharding(mesh, jax.P(*spec)))


def drawn():
    draw = np.random.default_rng(0)
    return draw.normal(size=(8, 3, 16)), draw.normal(size=(24, 16))


@pytest.mark.parametrize("sizes", HYBRID)
def test_a_gathered_weight_has_the_gradient_of_a_whole_one(sizes):
    x, w = drawn()
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        out = jax.P(("data", "fsdp"), None, "tensor")
        split = on(mesh, x, ("data", "fsdp")), on(mesh, w, "tensor", "fsdp")
        step = jax.jit(jax.grad(lambda x, w: jnp.sin(einsum(SPEC, x, w, out=out)).sum(), (0, 1)))
        compiled = step.lower(*split).compile()
        ours = compiled(*split)
        assert ours[1].sharding.spec == jax.P("tensor", "fsdp")
    y = np.einsum(SPEC, x, w)
    assert_formula(ours[0], np.einsum("BTF,FD->BTD", np.cos(y), w))
    assert_formula(ours[1], np.einsum("BTF,BTD->FD", np.cos(y), x))
    text = compiled.as_text()
    found = Counter(one.name for one in collectives(text))
    assert found["all-gather"] == 1
    assert found["reduce-scatter"] == 1
    whole = (24 // sizes[2], 16)
    assert whole not in results(text, "all-reduce")


@functools.cache
def compiled(sizes, remat, layers, unroll):
    """The program of a train step on a mesh, and its text."""
    model = dataclasses.replace(MODEL, remat=remat, layers=layers, unroll=unroll)
    with jax.set_mesh(mesh_of(sizes)):
        program = train.build(run_of(sizes, model=model))
        return program, program.compile().as_text()


@pytest.mark.parametrize(
    "sizes", [HYBRID[0], *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in HYBRID[1:])]
)
def test_a_train_step_reduce_scatters_each_weights_gradient(sizes):
    program, text = compiled(sizes, "none", 2, 1)
    with jax.set_mesh(mesh_of(sizes)):
        check_reduce_scatters(program, text)


@pytest.mark.parametrize(
    ("remat", "layers", "unroll"),
    [
        ("none", 2, 1),
        *(pytest.param(remat, 2, 1, marks=pytest.mark.slow) for remat in REMATS if remat != "none"),
        *(pytest.param(remat, 3, 2, marks=(pytest.mark.slow, FREE)) for remat in ("none", "full")),
    ],
)
def test_each_layers_weights_are_gathered_once_forward_and_once_backward(remat, layers, unroll):
    sizes = HYBRID[0]
    program, text = compiled(sizes, remat, layers, unroll)
    with jax.set_mesh(mesh_of(sizes)):
        *blocks, head = (dims for _, dims in gathered(program))
    right, found = Counter(), Counter()
    for dims in blocks:
        right[tuple(sorted(dims))] += 2 * layers
    right[tuple(sorted(head))] += 1  # the loss computes its gradient in the forward pass
    for one in collectives(text):
        if one.name == "all-gather":
            found[tuple(sorted(n for n in one.shapes[0] if n > 1))] += one.times
    assert {dims: found[dims] for dims in right} == dict(right)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A weight of two arrays: values, and a scale for each output."""

    values: jax.Array
    scales: jax.Array


def test_a_weight_of_two_arrays_goes_where_one_goes(tmp_path):
    """Through gather, scan, donation, save and restore."""
    layers, rows, D = 3, ("data", "fsdp"), 16
    draw = np.random.default_rng(0)
    values = draw.integers(-127, 128, (layers, D, D), np.int8)
    scales = draw.uniform(0.5, 1, (layers, D, 1)).astype(np.float32) / 300
    x = draw.normal(size=(8, 3, D)).astype(np.float32)

    def layer(weight, x, _):
        whole = gather(weight, rows)
        out = jax.P(rows, None, None)
        y = jnp.einsum("BTD,FD->BTF", x, whole.values, out_sharding=out)
        s = jnp.einsum("BTi,Fi->BTF", jnp.ones_like(x[..., :1]), whole.scales, out_sharding=out)
        return x + y * s, {}

    def step(weight, x):
        y, _ = run_layers([layer], ([weight], []), x, None)
        return jax.tree.map(lambda leaf: -leaf, weight), y

    right = x.astype(np.float64)
    for v, s in zip(values.astype(np.float64), scales, strict=True):
        right = right + right @ (v * s).T

    mesh = mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        where = Int8(*(NamedSharding(mesh, jax.P(None, None, dim)) for dim in ("fsdp", None)))
        weight = jax.device_put(Int8(values, scales), where)
        x_split = jax.device_put(x, NamedSharding(mesh, jax.P(rows)))
        negative, y = jax.jit(step, donate_argnums=0)(weight, x_split)
        assert_formula(y, right)
        assert weight.values.is_deleted()
        assert weight.scales.is_deleted()
        assert negative.values.dtype == jnp.int8
        saves = store.Store(tmp_path)
        saves.save(1, {"blocks": negative}, {}, {})
        saves.wait()
        saves.close()
    mesh = mesh_of((1, 4, 1))
    with jax.set_mesh(mesh):
        other = NamedSharding(mesh, jax.P(None, None, "fsdp")), NamedSharding(mesh, jax.P())
        shapes = jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
            negative,
            Int8(*other),
        )
        back = store.Saved.open(tmp_path).restore({"blocks": shapes})["blocks"]
    assert isinstance(back, Int8)
    np.testing.assert_array_equal(back.values, -values)
    np.testing.assert_array_equal(back.scales, -scales)
    assert back.values.addressable_shards[0].data.shape == (layers, D, D // 4)
    assert math.prod(back.scales.addressable_shards[0].data.shape) == layers * D
