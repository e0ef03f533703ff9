"""Feed-forward by experts: a router, and a grouped matmul over tokens sorted by expert.

Shapes: B rows, T tokens, N = B T, D embed, F hidden, E experts, A active experts of a token,
M pairs of a token and an expert of its, C = 2 (gate and up); d, e and f: one device's part;
R rows that the devices which share the experts may send here, Q pieces of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.layers import Linear
from model.matmul.experts import grouped
from model.matmul.stored import numbers
from model.mlp import GATES
from model.remat import from_arguments
from sharding import stages
from sharding.expert import Copies, Exchange, collect, spread
from sharding.gather import axes_of, varying, without
from sharding.layout import Layout

Stats = dict[str, jax.Array]


class Split(NamedTuple):
    """The mesh axes that split the rows of x, their tokens beyond that, and the weights."""

    rows: tuple[str, ...]
    apart: tuple[str, ...]  # tokens too, and F: they are gathered before it and scattered after
    experts: tuple[str, ...]
    hidden: tuple[str, ...]
    embed: tuple[str, ...]

    def whole(self, weight: jax.Array, dim: int, rows: tuple[str, ...]) -> jax.Array:
        """A device's part of a weight with D, its `dim`, whole, to meet rows split over `rows`."""
        copies = tuple(axis for axis in rows if axis not in self.embed)
        # Devices talk, backward, over `rows`: gradients are scattered as they are summed, then
        # summed over the copies; the bytes of the weight, then twice those of the part.
        weight = varying(weight, copies)
        # Devices talk over `embed`: D is gathered, the weight's bytes in compute precision.
        return lax.all_gather(weight, self.embed, axis=dim, tiled=True) if self.embed else weight


class MoeMlp(nnx.Module):
    """`sum_a weight_a expert_a(x)` over the A experts that the router prefers for each token.

    Each expert is a GatedMlp. Every token reaches all of its experts, however uneven the load and
    wherever they are.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        moe = cfg.arch.moe
        linear = functools.partial(
            Linear,
            sizes={"D": cfg.embed, "F": moe.mlp or cfg.mlp, "C": 2, "E": moe.experts},
            axes={"D": "embed", "F": "mlp", "E": "experts"},
            layout=layout,
            rngs=rngs,
            dtype=cfg.param_dtype,
        )
        self.router = linear("BTD,ED->BTE", axes={"D": "embed"})  # each token asks of all experts
        self.gate_up = linear("BTD,ECFD->BTECF", batch="EC")
        self.down = linear("BTF,EDF->BTED", std=cfg.residual_std, batch="E")
        self.curve = GATES[cfg.arch.activation]
        self.moe, self.passes = moe, cfg.precision.experts
        self.hidden = axes_of(layout.spec("mlp")[0])

    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, Stats]:
        """(y_BTD, statistics of the router over the tokens of all rows that are no padding).

        "balance": E sum_e (share of e among choices) (mean probability of e), 1 at best;
        "z": mean of log(Z)^2; "load": choices of each expert, as a multiple of its fair share, [E].
        Of rows in flight each leads with the stages.
        """
        linears = self.router, self.gate_up, self.down
        weights = [numbers(linear.weight[...], x_BTD.dtype) for linear in linears]
        where = jax.typeof(x_BTD).sharding.spec
        stage = (stages.STAGE,) * stages.in_flight(x_BTD)  # what weights and statistics lead with
        spec_ECFD = jax.typeof(weights[1]).sharding.spec.partitions[len(stage) :]
        apart = tuple(axis for axis in axes_of(where[1]) if axis in axes_of(spec_ECFD[2]))
        rows = jax.P(where[0], without(where[1], apart))
        split = Split(
            rows=tuple(axis for dim in rows for axis in axes_of(dim) if axis not in stage),
            apart=apart,
            experts=axes_of(spec_ECFD[0]),
            hidden=axes_of(spec_ECFD[2]),
            embed=axes_of(spec_ECFD[3]),
        )

        def body(x_BTD, segments_BT, *weights):
            own = (weight[0] if stage else weight for weight in weights)
            y_BTD, stats = self.local(split, x_BTD, segments_BT, *own)
            return y_BTD, jax.tree.map(lambda a: a[None] if stage else a, stats)

        over = jax.shard_map(body, out_specs=(where, jax.P(*stage)))
        return over(x_BTD, jax.reshard(segments_BT, rows), *weights)

    def local(self, split: Split, x_BTD, segments_BT, router_Ed, gate_up_eCfd, down_edf):
        """One device's rows through the experts, and the parts of experts that it holds."""
        if split.apart:
            # Devices talk over `apart`: each holds a part of F for all tokens, of whom it has some;
            # the bytes of x_BTD.
            x_BTD = lax.all_gather(x_BTD, split.apart, axis=1, tiled=True)
            segments_BT = lax.pcast(segments_BT, split.apart, to="varying")
        x_ND, valid_N = x_BTD.reshape(-1, x_BTD.shape[-1]), segments_BT.reshape(-1) > 0
        rows = split.rows + split.apart  # the latter see each token: that leaves all means the same
        router_ED = split.whole(router_Ed.astype(x_ND.dtype), 1, rows)
        weight_NA, expert_NA, stats = self.route(x_ND, valid_N, router_ED, rows)
        # Devices talk, backward, over `others`: each holds a part of F, and what these ask of x is
        # summed; twice the bytes of x_ND.
        others = tuple(axis for axis in split.hidden if axis not in split.apart)
        x_ND, weight_NA = lax.pcast((x_ND, weight_NA), others, to="varying")
        through = functools.partial(self.through, split)
        if split.experts:  # what holds the rows of other devices is too large to keep
            through = from_arguments(through)
        y_ND = through(x_ND, weight_NA, expert_NA, gate_up_eCfd, down_edf)
        # Devices talk over `hidden`: F is split, and its sum crosses devices; twice the bytes of y,
        # or once where tokens lie apart.
        y_BTD = y_ND.reshape(x_BTD.shape)
        y_BTD = lax.psum(y_BTD, others) if others else y_BTD
        if split.apart:
            y_BTD = lax.psum_scatter(y_BTD, split.apart, scatter_dimension=1, tiled=True)
        return y_BTD, stats

    def through(self, split: Split, x_ND, weight_NA, expert_NA, gate_up_eCfd, down_edf):
        """[N, D]: each token through its experts, wherever they are."""
        others = tuple(axis for axis in split.rows if axis not in split.experts)
        gate_up_eCfD = split.whole(gate_up_eCfd.astype(x_ND.dtype), 3, others)
        down_eDf = split.whole(down_edf.astype(x_ND.dtype), 1, others)
        if not split.experts:
            return self.experts(x_ND, weight_NA, expert_NA, gate_up_eCfD, down_eDf, name="up")
        e, A = len(down_eDf), self.moe.active
        exchange = Exchange.plan(expert_NA // e, split.experts)
        # Experts' numbers are exact in float32, and travel with the weights.
        choices = jnp.concatenate([weight_NA, expert_NA.astype(weight_NA.dtype)], axis=1)
        x_RD, choices = exchange.send(x_ND), exchange.send(choices)
        own_RA = choices[:, A:].astype(jnp.int32) - lax.axis_index(split.experts) * e
        here_RA = exchange.arrived[:, None] & (own_RA >= 0) & (own_RA < e)
        parts = x_RD, choices[:, :A], jnp.where(here_RA, own_RA, e)
        pieces = self.pieces(len(x_RD) // len(x_ND), e)
        parts = jax.tree.map(lambda a: a.reshape(pieces, -1, *a.shape[1:]), parts)
        piece = jax.checkpoint(self.experts)
        y_QRD = lax.map(lambda part: piece(*part, gate_up_eCfD, down_eDf), parts)
        return exchange.bring(y_QRD.reshape(x_RD.shape))

    def pieces(self, senders: int, e: int) -> int:
        """In how many parts a device works through the rows of so many senders.

        A part has room for all of its rows to want as many of the `e` experts here as they may, and
        is as large as it may be with room for twice the pairs of the device's own tokens.
        """
        A = self.moe.active
        together = [n for n in range(1, senders + 1) if senders % n == 0 and n * min(A, e) <= 2 * A]
        return senders // max(together)

    def experts(self, x_ND, weight_NA, expert_NA, gate_up_ECfD, down_EDf, *, name=""):
        """[N, D]: each token through those of its A experts that are here; E or more is none."""
        N, A = expert_NA.shape
        E, M = len(down_EDf), N * min(A, len(down_EDf))
        order = jnp.argsort(expert_NA.reshape(-1), stable=True)
        counts_E = jnp.bincount(expert_NA.reshape(-1), length=E + 1)[:E].astype(jnp.int32)
        pair = jnp.arange(N * A, dtype=jnp.int32)
        here = pair < jnp.sum(counts_E)
        places = jnp.zeros_like(pair).at[order].set(jnp.where(here, pair, M), unique_indices=True)
        rows = Copies(jnp.where(here, order // A, N)[:M], places.reshape(N, A))
        of_M = jnp.where(here, order, N * A)[:M]
        weight_M = weight_NA.reshape(-1).at[of_M].get(mode="fill", fill_value=0)

        times = functools.partial(grouped, counts_E=counts_E, passes=self.passes)
        f = gate_up_ECfD.shape[2]
        x_MD = spread(x_ND, rows)
        gate_up_MCf = times(x_MD, gate_up_ECfD.reshape(E, 2 * f, -1), outer=self.hidden)
        gate_up_MCf = gate_up_MCf.reshape(-1, 2, f)
        gate_up_MCf = checkpoint_name(gate_up_MCf, name) if name else gate_up_MCf
        h_Mf = self.curve(gate_up_MCf[:, 0]) * gate_up_MCf[:, 1]
        # Weighted before `down`, not after: the backward pass then needs no second y_MD.
        h_Mf = h_Mf * weight_M[:, None].astype(h_Mf.dtype)
        y_MD = times(h_Mf, down_EDf, inner=self.hidden)
        return collect(y_MD, rows)

    def route(self, x_ND, valid_N, router_ED, rows):
        """(weights [N, A] float32, experts [N, A], statistics): softmax, then the A largest."""
        A, E = self.moe.active, self.moe.experts
        z_NE = jnp.einsum("ND,ED->NE", x_ND, router_ED, preferred_element_type=jnp.float32)
        p_NE = jax.nn.softmax(z_NE, axis=-1)
        weight_NA, expert_NA = lax.top_k(p_NE, A)
        if self.moe.normalize:
            weight_NA /= jnp.sum(weight_NA, axis=-1, keepdims=True)
        valid_N1 = valid_N[:, None].astype(jnp.float32)
        sums = {
            "tokens": jnp.sum(valid_N1),
            "p_E": jnp.sum(p_NE * valid_N1, axis=0),
            "chosen_E": jnp.sum(jax.nn.one_hot(expert_NA, E).sum(axis=1) * valid_N1, axis=0),
            "z": jnp.sum(jax.nn.logsumexp(z_NE, axis=-1) ** 2 * valid_N1[:, 0]),
        }
        # Devices talk over `rows`: the balance is that of all, 8 E bytes and a few.
        sums = lax.psum(sums, rows) if rows else sums
        tokens = jnp.maximum(sums["tokens"], 1)
        load_E = sums["chosen_E"] * (E / A) / tokens
        stats = {
            "balance": jnp.sum(load_E * sums["p_E"] / tokens),
            "z": sums["z"] / tokens,
            "load": load_E,
        }
        return weight_NA, expert_NA, stats
