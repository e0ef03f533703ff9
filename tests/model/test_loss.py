"""The chunked loss: the plain loss of the full logits, which never exist."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Arch, Head
from model.heads import cap, chunked_loss
from tests.model import reference
from tests.model.tiny import TINY, decoder, random_params
from tests.tolerance import assert_formula, assert_same

B, T, D, V = 2, 12, 8, 40


def drawn():
    draw = np.random.default_rng(0)
    x, table = draw.normal(size=(B, T, D)), draw.normal(size=(V, D))
    targets, weights = draw.integers(0, V, (B, T)), draw.uniform(0, 2, (B, T))
    weights[0, 3] = weights[1, 7] = 0
    return jnp.float32(x), jnp.float32(table), jnp.asarray(targets), jnp.float32(weights)


def plain_loss(x_BTD, table_VD, targets_BT, weights_BT, head):
    """The slow, obvious twin: all logits at once, differentiated by jax."""
    z_BTV = cap(jnp.einsum("BTD,VD->BTV", x_BTD, table_VD), head.softcap)
    logz_BT = jax.nn.logsumexp(z_BTV, axis=-1)
    target_BT = jnp.take_along_axis(z_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nats = jnp.sum(weights_BT * (logz_BT - target_BT))
    return nats + head.z_loss * jnp.sum(weights_BT * logz_BT**2), nats


plain_gradients = jax.jit(
    jax.value_and_grad(plain_loss, argnums=(0, 1), has_aux=True), static_argnums=4
)


def gradients(head, times=1.0):
    """((loss, nats), (dx, dtable)) of these arrays."""

    def loss(*arrays):
        total, nats = chunked_loss(*arrays, head)
        return times * total, nats

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


HEADS = [Head(), Head(z_loss=0.1), Head(softcap=2.0), Head(softcap=3.0, z_loss=0.05)]
CASES = [(HEADS[-1], chunk) for chunk in (1, 7, 4096)] + [(head, 7) for head in HEADS[:-1]]
CASES += [pytest.param(HEADS[-1], chunk, marks=pytest.mark.slow) for chunk in (5, 12, 23, 24)]


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_has_its_formula(one_device, head):
    x, table, targets, weights = drawn()
    z = np.einsum("BTD,VD->BTV", *(np.asarray(a, np.float64) for a in (x, table)))
    z = head.softcap * np.tanh(z / head.softcap) if head.softcap else z
    flat = (np.asarray(a).reshape(B * T, *a.shape[2:]) for a in (z, targets, weights))
    right = reference.loss(*flat, head.z_loss)
    ours = jax.jit(chunked_loss, static_argnums=4)(x, table, targets, weights, head)
    assert_formula(ours, right)


@pytest.mark.parametrize(("head", "chunk"), CASES)
def test_chunked_loss_and_gradients_are_those_of_the_full_logits(one_device, head, chunk):
    x, table, targets, weights = drawn()
    right = plain_gradients(x, table, targets, weights, head)
    head = dataclasses.replace(head, chunk=chunk)
    ours = gradients(head)(x, table, targets, weights)
    assert_same(ours, right)
    alone = jax.jit(chunked_loss, static_argnums=4)(x, table, targets, weights, head)
    assert_same(alone, ours[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoders_loss_is_that_of_its_logits(one_device, tied):
    head = Head(tied=tied, chunk=5, softcap=3.0, z_loss=0.01)
    cfg = dataclasses.replace(TINY, arch=Arch(head=head))
    ids, targets, positions = np.random.default_rng(0).integers(0, 12, (3, B, T))
    weights = np.random.default_rng(1).uniform(size=(B, T))
    rows = [jnp.asarray(a) for a in (ids, targets, positions, np.ones((B, T), int))]
    weights = jnp.asarray(weights, jnp.float32)

    def chunked(params):
        loss, told = decoder(cfg, params).loss(*rows, weights)
        return loss, told["nats"]

    def plain(params):
        logits = decoder(cfg, params).logits(rows[0], *rows[2:])
        flat = jnp.eye(cfg.vocab)  # logits as x and the identity as table: the loss of logits
        return plain_loss(logits, flat, rows[1], weights, dataclasses.replace(head, softcap=0.0))

    params = random_params(cfg)
    ours, right = (jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (chunked, plain))
    assert_same(ours, right)


def test_a_scaled_loss_has_scaled_gradients(one_device):
    _, once = gradients(Head(chunk=5))(*drawn())
    _, thrice = gradients(Head(chunk=5), times=3.0)(*drawn())
    assert_same(jax.tree.map(lambda slope: 3 * np.asarray(slope), once), thrice)


def test_large_logits_do_not_overflow(one_device):
    x, *rest = drawn()
    for sign in 1, -1:
        values = gradients(Head(z_loss=1e-4))(sign * 1e4 * x, *rest)
        assert all(jnp.isfinite(value).all() for value in jax.tree.leaves(values))


def test_a_token_without_weight_changes_nothing(one_device):
    x, *rest = drawn()
    step = gradients(Head(chunk=5))
    loss, (dx, dtable) = step(x, *rest)
    assert not dx[0, 3].any()
    assert not dx[1, 7].any()
    other, (_, other_dtable) = step(x.at[0, 3].set(9.0), *rest)
    assert loss == other
    np.testing.assert_array_equal(dtable, other_dtable)


def test_a_bfloat16_table_gets_a_gradient_of_its_dtype_summed_in_float32(one_device):
    x, table, *rest = drawn()
    arrays = (x.astype(jnp.bfloat16), table.astype(jnp.bfloat16), *rest)
    (_, one_by_one), (_, at_once) = (gradients(Head(chunk=chunk))(*arrays) for chunk in (1, 4096))
    assert [g.dtype for g in one_by_one] == [jnp.bfloat16, jnp.bfloat16]
    # One rounding apart; sums of 24 in bfloat16 would be several.
    np.testing.assert_allclose(*(np.float32(g[1]) for g in (one_by_one, at_once)), rtol=2**-7)


@pytest.mark.parametrize("differentiated", [False, True])
def test_the_full_logits_never_exist(one_device, differentiated):
    rows, tokens, embed, vocab, chunk = 2, 64, 8, 1024, 16
    loss = functools.partial(chunked_loss, head=Head(chunk=chunk, softcap=5.0, z_loss=0.1))
    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True) if differentiated else loss
    arrays = (
        jnp.ones((rows, tokens, embed)),
        jnp.ones((vocab, embed)),
        jnp.ones((rows, tokens), jnp.int32),
        jnp.ones((rows, tokens)),
    )
    compiled = jax.jit(step).lower(*arrays).compile()
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}
    assert chunk * vocab in sizes, "the text does hold a chunk's logits"
    assert max(sizes) == chunk * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * tokens * vocab


def test_the_gradient_computes_logits_once(one_device):
    """Three matmuls a chunk, as many as with all logits in memory: z, dx and dtable."""
    assert str(jax.make_jaxpr(gradients(Head(chunk=8)))(*drawn())).count("dot_general[") == 3
