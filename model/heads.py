"""Heads: what is read from the hidden states. The language head's loss comes in chunks: the full
logits never exist in memory.

Shapes: B rows, T tokens, D embed, V vocabulary; N tokens of one device, C of one chunk;
v and d: one device's part of V and D.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from model.config import Head, ModelConfig
from model.layers import Linear, Role, aligned, make_norm, normal
from model.matmul import einsum
from model.matmul.table import Table
from model.mlp import CURVES
from model.precision import BF16, Passes
from sharding.gather import axes_of, varying, without
from sharding.layout import Layout


class LanguageHead(nnx.Module):
    """Hidden states to logits over the vocabulary, and to the cross-entropy of the next token."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        shape, where = (cfg.vocab, cfg.embed), layout.spec("vocab", "embed")
        own = (
            None
            if cfg.arch.head.tied
            else normal(rngs, shape, where, cfg.arch.init.head, cfg.param_dtype)
        )
        self.table = None if own is None else nnx.Param(own, role=Role("head"))
        self.head, self.passes = cfg.arch.head, cfg.precision.head
        self.out = layout.spec("batch", "sequence", "vocab")

    def logits(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        """[B, T, V] float32: for generation, and as the oracle of `loss`."""
        z_BTV = einsum("BTD,VD->BTV", x_BTD, table_VD, out=self.out, passes=self.passes)
        z_BTV = z_BTV.astype(jnp.float32)
        return cap(z_BTV, self.head.softcap)

    def loss(
        self, x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sum over all tokens of weight * (nats + z-loss), and of weight * nats alone.

        Nats is -log softmax(logits)[target]; z-loss, log(Z)^2, keeps logits from drifting.
        Nothing flows back from the second sum, nor to the weights.
        """
        return chunked_loss(x_BTD, table_VD, targets_BT, weights_BT, self.head, self.passes)


def square(cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs) -> Linear:
    """The dense layer, D to D, of a head that is more than one matmul."""
    sizes, axes = {"D": cfg.embed, "E": cfg.embed}, {"D": "embed"}
    how = {"dtype": cfg.param_dtype, "bias": True, "passes": cfg.precision.head}
    return Linear("BTD,ED->BTE", sizes, axes, layout, rngs, **how)


class MaskedHead(LanguageHead):
    """Hidden states to logits of the masked tokens. Devlin et al. 2018, arXiv:1810.04805."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        super().__init__(cfg, layout, rngs)
        self.dense = square(cfg, layout, rngs)
        self.norm = make_norm(cfg.arch.norm, cfg.embed, cfg.param_dtype)
        zeros = jnp.zeros((cfg.vocab,), cfg.param_dtype, out_sharding=layout.spec("vocab"))
        self.bias = nnx.Param(zeros)
        self.curve = CURVES[cfg.arch.activation]

    def logits(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        """[B, T, V] float32."""
        x_BTD = self.norm(self.curve(self.dense(x_BTD)))
        z_BTV = super().logits(x_BTD, table_VD)
        return z_BTV + aligned(self.bias[...].astype(jnp.float32), z_BTV)


class RowHead(nnx.Module):
    """The first token's hidden state, through a dense layer, to a vector or to class logits."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        head = cfg.arch.head
        layout = dataclasses.replace(layout, sequence=None)  # of one token
        self.dense = square(cfg, layout, rngs)
        self.curve = {"tanh": jnp.tanh, "relu": jax.nn.relu}[head.curve]
        sizes, axes = {"D": cfg.embed, "C": head.labels}, {"D": "embed"}
        self.classifier = (
            Linear("BTD,CD->BTC", sizes, axes, layout, rngs, dtype=cfg.param_dtype, bias=True)
            if head.kind == "classifier"
            else None
        )

    def logits(self, x_BTD: jax.Array, _: jax.Array) -> jax.Array:
        """[B, C] float32, or [B, D] without a classifier."""
        first_1T1 = (jnp.arange(x_BTD.shape[1]) == 0)[None, :, None]
        # Devices talk over `sequence`: one of them has the first token, twice the bytes of its D.
        x_BTD = jnp.sum(jnp.where(first_1T1, x_BTD, 0), axis=1, keepdims=True)
        y_BTD = self.curve(self.dense(x_BTD))
        if self.classifier is not None:
            y_BTD = self.classifier(y_BTD)
        return y_BTD.squeeze(1).astype(jnp.float32)


class NoHead(nnx.Module):
    """The hidden states as they are."""

    def logits(self, x_BTD: jax.Array, _: jax.Array) -> jax.Array:
        """[B, T, D] float32."""
        return x_BTD.astype(jnp.float32)


def make_head(cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs) -> nnx.Module:
    """The head that the config asks for; all have `logits(x_BTD, table_VD)`."""
    match cfg.arch.head.kind:
        case "language":
            return LanguageHead(cfg, layout, rngs)
        case "masked":
            return MaskedHead(cfg, layout, rngs)
        case "none":
            return NoHead()
    return RowHead(cfg, layout, rngs)


def cap(z: jax.Array, softcap: float) -> jax.Array:
    """Logits kept within +-softcap; 0: as they are. Gemma 2, arXiv:2408.00118."""
    return softcap * jnp.tanh(z / softcap) if softcap else z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_loss(x_BTD, table_VD, targets_BT, weights_BT, head: Head, passes: Passes = BF16):
    """LanguageHead.loss. Differentiated, the forward pass computes the gradients too.

    Logits of one chunk live at a time and are never computed twice: three matmuls in all, as many
    as with all the logits in memory.
    """
    return over_devices(x_BTD, table_VD, targets_BT, weights_BT, head, passes, gradients=False)[0]


def _chunked_loss_fwd(x_BTD, table_VD, targets_BT, weights_BT, head, passes):
    return over_devices(x_BTD, table_VD, targets_BT, weights_BT, head, passes, gradients=True)


def _chunked_loss_bwd(head, passes, gradients, cotangents):
    g, _ = cotangents
    dx_BTD, dtable_VD = gradients
    parts = jax.typeof(dtable_VD).sharding.spec.unreduced  # of a sum; g is that of all of them
    dtable_VD = (dtable_VD * jax.reshard(g, jax.P(reduced=parts))).astype(dtable_VD.dtype)
    return (dx_BTD * g).astype(dx_BTD.dtype), dtable_VD, None, None


chunked_loss.defvjp(_chunked_loss_fwd, _chunked_loss_bwd)


def over_devices(x_BTD, table_VD, targets_BT, weights_BT, head, passes, *, gradients: bool):
    """((loss, nats), (dx, dtable) or None): each device works through its own rows and its own
    part of the vocabulary."""
    x_spec, table_spec = jax.typeof(x_BTD).sharding.spec, jax.typeof(table_VD).sharding.spec
    vocab, tokens = axes_of(table_spec.partitions[0]), axes_of(x_spec[1])
    apart = tuple(axis for axis in tokens if axis in vocab)  # each part of V meets all tokens
    rows = jax.P(x_spec[0], without(x_spec[1], apart))
    local = functools.partial(
        local_loss,
        head=head,
        passes=passes,
        gradients=gradients,
        rows=axes_of(rows[0]) + axes_of(rows[1]),
        vocab=vocab,
        summed=tuple(axis for axis in vocab if axis not in apart),
        embed=axes_of(table_spec.partitions[1]),
    )

    def body(x_BTD, *others):
        # Devices talk over `apart`: tokens come together, and the parts of their gradient are
        # scattered; the bytes of x_BTD, twice.
        x_BTD = lax.all_gather(x_BTD, apart, axis=1, tiled=True) if apart else x_BTD
        sums, found = local(x_BTD, *others)
        if apart and gradients:
            dx_BTD = lax.psum_scatter(found[0], apart, scatter_dimension=1, tiled=True)
            found = dx_BTD, found[1]
        return sums, found

    targets_BT, weights_BT = (jax.reshard(a, rows) for a in (targets_BT, weights_BT))
    dtable_spec = jax.P(*table_spec.partitions, unreduced=table_spec.reduced)
    out = (jax.P(), jax.P()), ((x_spec, dtable_spec) if gradients else None)
    return jax.shard_map(body, out_specs=out)(x_BTD, table_VD, targets_BT, weights_BT)


def local_loss(
    x_BTD, table_vd, targets_BT, weights_BT, *, head, passes, gradients, rows, vocab, summed, embed
):
    """One device's part of `over_devices`; rows, vocab, embed: the mesh axes that split them, and
    `summed`: those of vocab over which the gradient of x is summed here."""
    D, N = x_BTD.shape[-1], targets_BT.size
    chunks = math.ceil(N / head.chunk)
    C = math.ceil(N / chunks)

    def in_chunks(a: jax.Array, *shape: int) -> jax.Array:
        a = a.reshape(N, *shape)
        return jnp.pad(a, ((0, chunks * C - N), *((0, 0) for _ in shape))).reshape(-1, C, *shape)

    xs, targets, weights = in_chunks(x_BTD, D), in_chunks(targets_BT), in_chunks(weights_BT)
    table = Table.gather(varying(table_vd), x_BTD.dtype, passes, embed, vocab)
    v = len(table_vd)
    first = lax.axis_index(vocab) * v if vocab else 0

    def over_vocab(collective, a):
        return collective(a, vocab) if vocab else a

    def one_chunk(carry, chunk):
        sums, dtable_Dv = carry
        x_CD, target_C, weight_C = chunk
        z_Cv = cap(table.logits(x_CD, head.logits).astype(jnp.float32), head.softcap)
        # Devices talk over `vocab`: softmax needs all of it, three numbers of 4 bytes a token.
        top_C = over_vocab(lax.pmax, jnp.max(z_Cv, axis=-1))
        exp_Cv = jnp.exp(z_Cv - top_C[:, None])
        total_C = over_vocab(lax.psum, jnp.sum(exp_Cv, axis=-1))
        logz_C = jnp.log(total_C) + top_C
        hit_Cv = jnp.arange(v)[None] == (target_C - first)[:, None]
        own_C = (target_C >= first) & (target_C < first + v)
        at_C = jnp.clip(target_C - first, 0, v - 1)
        z_target_C = jnp.take_along_axis(z_Cv, at_C[:, None], axis=1)[:, 0]
        z_target_C = over_vocab(lax.psum, jnp.where(own_C, z_target_C, 0))
        nats = jnp.sum(weight_C * (logz_C - z_target_C))
        z_loss = head.z_loss * jnp.sum(weight_C * logz_C**2)
        sums = (sums[0] + nats + z_loss, sums[1] + nats)
        if not gradients:
            return (sums, None), None
        # d nats / dz = softmax - hit, and d log(Z)^2 / dz = 2 log(Z) softmax
        slope_C = weight_C * (1 + 2 * head.z_loss * logz_C)
        dz_Cv = exp_Cv * (slope_C / total_C)[:, None] - hit_Cv * weight_C[:, None]
        if head.softcap:
            dz_Cv *= 1 - (z_Cv / head.softcap) ** 2
        dz_Cv = dz_Cv.astype(x_CD.dtype)
        dx_CD = table.dgrad(dz_Cv)
        # Devices talk over `summed`: each has its vocabulary's part of dx, twice the bytes of x_CD.
        dx_CD = lax.psum(dx_CD, summed) if summed else dx_CD
        dtable_Dv += table.wgrad(dz_Cv, x_CD)
        return (sums, dtable_Dv), dx_CD

    sums = tuple(
        lax.pcast(jnp.float32(0), rows, to="varying") if rows else jnp.float32(0) for _ in "ab"
    )
    dtable_Dv = None  # D first, so that its parts lie together when they are scattered
    if gradients:
        dtable_Dv = lax.pcast(jnp.zeros((D, v), jnp.float32), (*rows, *vocab), to="varying")
    (sums, dtable_Dv), dxs = lax.scan(
        one_chunk, (sums, dtable_Dv), (xs, targets, weights), unroll=chunks == 1
    )
    # Devices talk over `rows`: the loss is of all, 8 bytes.
    sums = tuple(lax.psum(s, rows) if rows else s for s in sums)
    if not gradients:
        return sums, None
    dx_BTD = dxs.reshape(-1, D)[:N].reshape(x_BTD.shape)
    # Devices talk over `rows`: the table's gradient, scattered to where its slices of D live as it
    # is summed; 4 bytes for each of D v numbers, then twice those of its part.
    parts = tuple(jax.typeof(table_vd).mat.reduced)  # whose sum is for others to make
    copies = tuple(axis for axis in rows if axis not in embed + parts)
    dtable_dv = (
        lax.psum_scatter(dtable_Dv, embed, scatter_dimension=0, tiled=True) if embed else dtable_Dv
    )
    dtable_dv = lax.psum(dtable_dv, copies) if copies else dtable_dv
    dtable_vd = dtable_dv.T.astype(table_vd.dtype)
    return sums, (dx_BTD, lax.pcast(dtable_vd, parts, to="unreduced"))
