"""What a token may see, by gradient; packed rows give each document what it gets alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import transformer
from model.config import Arch, Attention
from tests.model.tiny import TINY, WHOLE, decoder, random_params
from tests.tolerance import SAME, assert_same

T = 12


def windowed(*windows):
    return dataclasses.replace(TINY, arch=Arch(attention=Attention(windows=windows)))


def row(*lengths, tokens=T):
    """(positions, segments) [1, T] of documents of these lengths, then padding."""
    pad = tokens - sum(lengths)
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(pad)])
    segments = np.pad(np.repeat(np.arange(len(lengths)) + 1, lengths), (0, pad))
    return jnp.asarray(positions, jnp.int32)[None], jnp.asarray(segments, jnp.int32)[None]


def influence(cfg, positions, segments):
    """[T, T] bool: does the hidden state of token t (row) depend on token s (column)?"""
    ids = jnp.arange(T)[None]  # each token has an id, so a row of the table, of its own

    @jax.jit
    @jax.jacrev
    def slopes(table, params):
        model = decoder(cfg, params | {"embedding": {"table": table}})
        return model(ids, positions, segments)[0].sum(axis=-1)

    params = random_params(cfg)
    slopes_TVD = np.asarray(slopes(params["embedding"]["table"], params))
    return np.abs(slopes_TVD).sum(axis=-1)[:, :T] > 0


def test_a_token_sees_itself_and_what_came_before(one_device):
    np.testing.assert_array_equal(influence(TINY, *row(T)), np.tri(T, dtype=bool))


def test_a_token_sees_no_neighbour_document_and_no_padding(one_device):
    positions, segments = row(3, 5, 1)
    same = np.equal.outer(segments[0], segments[0])
    np.testing.assert_array_equal(influence(TINY, positions, segments), np.tri(T) * same > 0)


@pytest.mark.parametrize(("windows", "reach"), [((3,), 4), ((2, 4), 4)])
def test_windows_reach_as_far_as_the_layers_pass_them_on(one_device, windows, reach):
    back = np.subtract.outer(np.arange(T), np.arange(T))
    seen = influence(windowed(*windows), *row(T))
    np.testing.assert_array_equal(seen, (back >= 0) & (back <= reach))


@pytest.mark.parametrize("windows", [(0,), (3, 0)])
def test_a_packed_document_gets_the_logits_it_gets_alone(one_device, windows):
    lengths = (4, 1, 5)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab, (1, T)))
    logits = jax.jit(decoder(windowed(*windows)).logits)
    packed, start = np.asarray(logits(ids, *row(*lengths))), 0
    for length in lengths:
        own = jnp.asarray(np.asarray(ids)[:, start : start + length])
        alone = logits(own, *row(length, tokens=length))
        assert_same(alone, packed[:, start : start + length])
        start += length


def test_only_the_distance_of_positions_counts(one_device):
    logits, ids = jax.jit(decoder(TINY).logits), jnp.arange(T)[None]
    positions, segments = row(6, 6)
    restarted = logits(ids, positions, segments)
    assert_same(logits(ids, row(T)[0], segments), restarted)
    other = logits(ids, jnp.asarray(2 * np.asarray(positions)), segments)
    assert np.abs(np.subtract(other, restarted)).max() > 1000 * SAME


def test_padding_changes_neither_loss_nor_gradients(one_device):
    graph, _, _ = transformer.abstract(TINY, WHOLE)
    params = random_params(TINY)
    ids, targets = np.random.default_rng(0).integers(0, TINY.vocab, (2, 1, 9))

    @jax.jit
    @jax.value_and_grad
    def step(params, inputs, targets, positions, segments):
        weights = (segments > 0).astype(jnp.float32)
        model = nnx.merge(graph, params)
        return model.loss(inputs, targets, positions, segments, weights)[0]

    def padded(tokens, fill):
        pad = ((0, 0), (0, tokens - 9))
        inputs, wanted = (np.pad(a, pad, constant_values=fill) for a in (ids, targets))
        return step(params, jnp.asarray(inputs), jnp.asarray(wanted), *row(4, 5, tokens=tokens))

    assert_same(padded(12, 0), padded(9, 0))
    jax.tree.map(np.testing.assert_array_equal, padded(12, 0), padded(12, 31))
