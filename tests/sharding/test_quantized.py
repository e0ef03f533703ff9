"""Rounded operands on a mesh: the values of one device, and int8 where weights are gathered."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from costs.collectives import collectives
from model.config import Head
from model.heads import chunked_loss
from model.matmul import einsum, einsums
from model.precision import BF16, INT8, Passes, Precision
from tests.sharding.tiny import MODEL, init, losses, mesh_of, run_of
from tests.tolerance import assert_same

B, T, D, F = 8, 4, 32, 24
ROUNDED = dataclasses.replace(MODEL, precision=Precision.by_name("int8"))


def feed_forward(sizes, *, apart):
    """y and the gradients of x and of three weights; between matmuls tokens lie `apart`."""
    draw = np.random.default_rng(0)
    shapes = {"x": (B, T, D), "gate": (F, D), "up": (F, D), "down": (D, F), "dy": (B, T, D)}
    mesh, rows, f, t = mesh_of(sizes), ("data", "fsdp"), "fsdp", "tensor"
    home = jax.P(rows, t if apart else None, None)
    where = [home, jax.P(t, f), jax.P(t, f), jax.P(f, t), home]
    arrays = [draw.normal(size=shape).astype(np.float32) for shape in shapes.values()]

    def forward(x, gate, up, down):
        mid = jax.P(rows, None, t)
        gate, up = einsums("BTD,FD->BTF", x, [gate, up], out=mid, passes=INT8)
        h = gate * up
        return einsum("BTF,DF->BTD", h, down, out=home, passes=INT8)

    def step(dy, *arguments):
        y, back = jax.vjp(forward, *arguments)
        return y, *back(dy)

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(arrays, where, strict=True)
        ]
        lowered = jax.jit(step).lower(placed[-1], *placed[:-1])
        compiled = lowered.compile()
        found = jax.device_get(compiled(placed[-1], *placed[:-1]))
        return found, lowered.as_text(), compiled.as_text()


@pytest.fixture(scope="module")
def one():
    return feed_forward((1, 1, 1), apart=False)[0]


def exact_dots(text):
    """Products of int8 matrices with int32 sums, in a program as it is before XLA."""
    return re.findall(r"dot_general .*xi8>, tensor<[0-9x]+xi8>\) -> tensor<[0-9x]+xi32>", text)


@pytest.mark.parametrize(
    ("sizes", "apart"),
    [
        ((2, 2, 2), True),
        *(
            pytest.param(sizes, apart, marks=pytest.mark.slow)
            for sizes, apart in [((2, 2, 2), False), ((1, 8, 1), False), ((2, 1, 4), True)]
        ),
    ],
)
def test_scales_and_so_values_are_those_of_one_device(one, sizes, apart):
    found, before, after = feed_forward(sizes, apart=apart)
    assert_same(found, one)
    assert len(exact_dots(before)) == 3 * 3
    talk = [c for c in collectives(after) if c.group == sizes[1]]
    weight = D * F // sizes[2]
    gathers = [c for c in talk if c.name == "all-gather"]
    moved = [c.bytes for c in gathers if weight in map(math.prod, c.shapes)]
    if sizes[1] > 1:
        # A byte for each number. Of one program XLA gathers each once for both passes.
        assert moved == [weight] * 3
        assert sum(c.name == "reduce-scatter" for c in talk) >= 3


@pytest.mark.slow
def test_a_train_step_rounds_for_every_matmul_of_its_layers():
    with jax.set_mesh(mesh_of((2, 4, 1))):
        program = train.build(run_of((2, 4, 1), model=ROUNDED))
        step = program.jit(train.train_step, donate_argnums=0)
        text = step.lower(program.state, program.batch()).as_text()
    assert len(exact_dots(text)) == 3 * 5  # qkv, out, gate, up and down


@pytest.mark.slow
def test_a_rounded_run_learns_as_an_exact_one_does_on_a_mesh_as_on_one_device():
    start = init(run_of((1, 1, 1)))
    exact, _ = losses(run_of((1, 1, 1)), start)
    rounded, _ = losses(run_of((1, 1, 1), model=ROUNDED), start)
    on_mesh, _ = losses(run_of((2, 2, 2), model=ROUNDED), start)
    learned = exact[0] - exact[-1]
    assert learned > 1
    assert 0 < np.abs(rounded - exact).max() < 0.05 * learned
    # A sum in another order moves some numbers across the border between two that are rounded to.
    assert abs(on_mesh[0] - rounded[0]) < 1e-5
    assert np.abs(on_mesh - rounded).max() < 0.05 * learned


def head_loss(sizes, passes):
    """Loss, and the gradients of hidden states and of a table, of a head over the vocabulary."""
    draw = np.random.default_rng(0)
    V, rows = 64, ("data", "fsdp")
    arrays = [
        draw.normal(size=(B, T, D)).astype(np.float32),
        draw.normal(size=(V, D)).astype(np.float32),
        draw.integers(0, V, (B, T), dtype=np.int32),
        np.full((B, T), 1 / (B * T), np.float32),
    ]
    where = (jax.P(rows, None, None), jax.P("tensor", "fsdp"), jax.P(rows, None), jax.P(rows, None))
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(arrays, where, strict=True)
        ]

        def loss(x, w, *rest):
            return chunked_loss(x, w, *rest, Head(chunk=5), passes)[0]

        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        text = step.lower(*placed).as_text()
        value, (dx, dw) = step(*placed)
        return {"loss": value, "dx": jax.device_get(dx), "dw": jax.device_get(dw)}, text


@pytest.mark.slow
def test_the_head_rounds_too_and_its_loss_is_that_of_one_device():
    passes = Passes("int8", "int8", "int8")
    exact, _ = head_loss((1, 1, 1), BF16)
    one, text = head_loss((1, 1, 1), passes)
    many, _ = head_loss((2, 2, 2), passes)
    assert len(exact_dots(text)) == 3
    for name, most in {"loss": 5e-3, "dx": 0.03, "dw": 0.03}.items():
        error = np.linalg.norm(one[name] - exact[name]) / np.linalg.norm(exact[name])
        assert 1e-5 < error < most
    assert_same([many["loss"], many["dx"]], [one["loss"], one["dx"]])
    # Scales of the table's gradient are of a chunk of one device's tokens.
    error = np.linalg.norm(many["dw"] - one["dw"]) / np.linalg.norm(one["dw"])
    assert error < 0.03
