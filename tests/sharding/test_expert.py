"""Tokens reach their experts on whatever device, and what comes back is theirs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding

from costs import targets
from sharding import expert
from sharding import mesh as meshes
from sharding.expert import Copies, Exchange
from sharding.mesh import MeshConfig
from tests.tolerance import assert_formula

N, A, D = 6, 3, 2  # tokens of a device, choices, width
ROWS = jax.P("expert")


def mesh_of(P, tensor=1):
    sizes = MeshConfig(data=1, expert=P, tensor=tensor)
    return meshes.make(sizes, jax.devices()[: P * tensor])


def choices(P, load):
    """[P N, A]: the devices that each token's experts are on."""
    draw = np.random.default_rng(P)
    return {
        "random": lambda: draw.integers(0, P, (P * N, A)),
        "all to one": lambda: np.full((P * N, A), P - 1),
        "none to one": lambda: draw.integers(1, P, (P * N, A)),
        "to all": lambda: np.arange(P * N * A).reshape(P * N, A) % P,
        "each at home": lambda: np.repeat(np.arange(P), N)[:, None] + np.zeros((1, A)),
    }[load]().astype(np.int32)


LOADS = ["random", "all to one", "none to one", "to all", "each at home"]


def placed(mesh, *arrays):
    return [jax.device_put(jnp.asarray(a), NamedSharding(mesh, ROWS)) for a in arrays]


def drawn(P):
    return np.random.default_rng(1).normal(size=(P * N, D)).astype(np.float32)


def local(x_ND, device_NA):
    """y_n = sum over n's devices p of (p + 1) x_n^2."""
    exchange = Exchange.plan(device_NA, ("expert",))
    x_RD = exchange.send(x_ND)
    y_RD = (lax.axis_index("expert") + 1) * x_RD**2
    # What is in no token's row must reach nobody.
    return exchange.bring(jnp.where(exchange.arrived[:, None], y_RD, jnp.nan))


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def there_and_back(x, device):
    """((sum(sin(y)), y), gradient)."""
    y = jax.shard_map(local, out_specs=ROWS)(x, device)
    return jnp.sum(jnp.sin(y)), y


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("P", [2, 8])
def test_a_token_goes_once_to_each_of_its_devices_and_comes_back(P, load):
    mesh, device, x = mesh_of(P, tensor=8 // P), choices(P, load), drawn(P)
    with jax.set_mesh(mesh):
        (_, y), grad = there_and_back(*placed(mesh, x, device))
    factor = np.array([sum(set(own + 1)) for own in device], np.float64)[:, None]
    assert_formula(y, factor * x**2)
    assert_formula(grad, np.cos(factor * x**2.0) * factor * 2 * x)


@functools.cache
def planned(P):
    """Each device's exchange, and what `_dense` moves there and back."""
    mesh = mesh_of(P)

    def local(x_ND, device_NA):
        plan = Exchange.plan(device_NA, ("expert",))
        rows = expert.spread(x_ND, plan.sent)
        came = expert.move(rows, P * N, plan.there, plan.back, plan.axes)
        home = expert.move(2 * came, len(rows), plan.back, plan.there, plan.axes)
        return rows, came, home, plan.there, plan.back

    return mesh, jax.jit(lambda *args: jax.shard_map(local, out_specs=ROWS)(*args))


def ragged_all_to_all(operands, outputs, start, size, landing, arriving):
    """lax.ragged_all_to_all as its documentation has it; every argument leads with the device."""
    results, written = outputs.copy(), np.zeros(outputs.shape[:2], int)
    np.testing.assert_array_equal(size.T, arriving, "who sends and who receives agree")
    for source, operand in enumerate(operands):
        for to, (a, n, b) in enumerate(
            zip(start[source], size[source], landing[source], strict=True)
        ):
            assert a >= 0 and a + n <= len(operand) and b >= 0 and b + n <= outputs.shape[1]
            results[to, b : b + n] = operand[a : a + n]
            written[to, b : b + n] += 1
    assert written.max(initial=0) <= 1, "no row is written twice"
    return results


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("P", [2, 4])
def test_the_dense_exchange_moves_what_a_ragged_all_to_all_would(P, load):
    mesh, plan = planned(P)
    with jax.set_mesh(mesh):
        moved = plan(*placed(mesh, drawn(P), choices(P, load)))
    rows, came, home, there, back = jax.tree.map(
        lambda a: np.reshape(a, (P, -1, *a.shape[1:])), jax.device_get(moved)
    )
    there, back = ([trip.start, trip.size, trip.landing] for trip in (there, back))
    right = ragged_all_to_all(rows, np.zeros_like(came), *there, back[1])
    np.testing.assert_array_equal(came, right)
    right = ragged_all_to_all(2 * came, np.zeros_like(home), *back, there[1])
    np.testing.assert_array_equal(home, right)
    assert there[1].sum() == sum(len(set(own)) for own in choices(P, load))


def test_spread_and_collect_are_each_others_transpose():
    copies = Copies(jnp.array([2, 0, 2, 3, 1]), jnp.array([[1, 9], [4, 5], [0, 2]]))
    draw = np.random.default_rng(0)
    x, y = (jnp.asarray(draw.normal(size=(n, D)), jnp.float32) for n in (3, 5))
    out, pull = jax.vjp(lambda x: expert.spread(x, copies), x)
    np.testing.assert_array_equal(out, np.concatenate([x, np.zeros((1, D))])[copies.source])
    assert_formula(jnp.vdot(out, y), jnp.vdot(x, expert.collect(y, copies)))
    np.testing.assert_array_equal(pull(y)[0], expert.collect(y, copies))
    _, pull = jax.vjp(lambda y: expert.collect(y, copies), y)
    np.testing.assert_array_equal(pull(x)[0], expert.spread(x, copies))


@pytest.mark.parametrize(("platform", "ragged"), [("cpu", 0), ("cuda", 4), ("tpu", 4)])
def test_tokens_travel_ragged_where_the_platform_can(platform, ragged):
    """Two forward, two backward. Lowered for the platform; no device of it is needed."""
    mesh = mesh_of(2)
    with jax.set_mesh(mesh):
        traced = there_and_back.trace(*placed(mesh, drawn(2), choices(2, "random")))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"@ragged_all_to_all\(", text)) == ragged
    assert (
        len(re.findall(r"all_to_all\"?\(", text.replace("@ragged_all_to_all(", ""))) == 5 - ragged
    )


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e-8", "v5p-8", "h100x8"])
def test_the_ragged_exchange_compiles_for_hardware_that_is_not_here(target):
    try:
        devices = targets.devices_of(target)
    except ValueError as error:
        pytest.skip(str(error))
    mesh = meshes.make(MeshConfig(data=1, expert=8), devices)
    with jax.set_mesh(mesh):
        x, device = (
            jax.ShapeDtypeStruct((8 * 256, n), dtype, sharding=NamedSharding(mesh, ROWS))
            for n, dtype in ((512, jnp.bfloat16), (2, jnp.int32))
        )
        lowered = there_and_back.lower(x, device)
        text = lowered.compile(compiler_options=targets.compiler_options(target)).as_text()
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) == 4
