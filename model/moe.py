"""Feed-forward by experts: a router, and a grouped matmul over tokens sorted by expert.

Shapes: B rows, T tokens, N = B T, D embed, F hidden, E experts, A active experts of a token,
M = N A pairs of a token and an expert of its, C = 2 (gate and up); d and f: one device's part.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.layers import Linear
from model.mlp import GATES
from sharding.gather import axes_of
from sharding.layout import Layout

Stats = dict[str, jax.Array]

# [M, K] times [E, N, K], where each expert has its own run of the M rows: [M, N].
BY_EXPERT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


class MoeMlp(nnx.Module):
    """`sum_a weight_a expert_a(x)` over the A experts that the router prefers for each token.

    Each expert is a GatedMlp. Every token reaches all of its experts, however uneven the load.
    """

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        moe = cfg.arch.moe
        linear = functools.partial(
            Linear,
            sizes={"D": cfg.embed, "F": moe.mlp or cfg.mlp, "C": 2, "E": moe.experts},
            axes={"D": "embed", "F": "mlp"},
            layout=layout,
            rngs=rngs,
            dtype=cfg.param_dtype,
        )
        self.router = linear("BTD,ED->BTE")
        self.gate_up = linear("BTD,ECFD->BTECF", batch="EC")
        self.down = linear("BTF,EDF->BTED", std=cfg.residual_std, batch="E")
        self.curve = GATES[cfg.arch.activation]
        self.moe = moe

    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, Stats]:
        """(y_BTD, statistics of the router over the tokens of all rows that are no padding).

        "balance": E sum_e (share of e among choices) (mean probability of e), 1 at best;
        "z": mean of log(Z)^2; "load": choices of each expert, as a multiple of its fair share, [E].
        """
        weights = [linear.weight[...] for linear in (self.router, self.gate_up, self.down)]
        specs = [jax.typeof(weight).sharding.spec for weight in weights]
        where = jax.typeof(x_BTD).sharding.spec
        body = functools.partial(
            self.local,
            rows=axes_of(where[0]) + axes_of(where[1]),
            embed=axes_of(specs[1][3]),
            hidden=axes_of(specs[1][2]),
        )
        over = jax.shard_map(body, out_specs=(where, jax.P()))
        return over(x_BTD, segments_BT, *weights)

    def local(self, x_BTD, segments_BT, router_Ed, gate_up_ECfd, down_Edf, *, rows, embed, hidden):
        """One device's rows through one device's part of every expert."""

        def whole(weight: jax.Array, dim: int) -> jax.Array:
            weight = weight.astype(x_BTD.dtype)
            # Devices talk: D is gathered, in compute precision.
            return lax.all_gather(weight, embed, axis=dim, tiled=True) if embed else weight

        router_ED, down_EDf = whole(router_Ed, 1), whole(down_Edf, 1)
        gate_up_ECfD = whole(gate_up_ECfd, 3)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        weight_NA, expert_NA, stats = self.route(x_ND, segments_BT.reshape(-1) > 0, router_ED, rows)

        A, E = self.moe.active, self.moe.experts
        order_M = jnp.argsort(expert_NA.reshape(-1), stable=True)
        counts_E = jnp.bincount(expert_NA.reshape(-1), length=E).astype(jnp.int32)
        grouped = functools.partial(
            lax.ragged_dot_general, group_sizes=counts_E, ragged_dot_dimension_numbers=BY_EXPERT
        )
        x_MD = x_ND[order_M // A]
        f = gate_up_ECfD.shape[2]
        gate_up_MCf = grouped(x_MD, gate_up_ECfD.reshape(E, 2 * f, -1)).reshape(-1, 2, f)
        gate_up_MCf = checkpoint_name(gate_up_MCf, "up")
        y_MD = grouped(self.curve(gate_up_MCf[:, 0]) * gate_up_MCf[:, 1], down_EDf)
        y_NAD = y_MD[jnp.argsort(order_M)].reshape(-1, A, y_MD.shape[-1])
        y_ND = jnp.einsum("NAD,NA->ND", y_NAD, weight_NA.astype(y_NAD.dtype))
        # Devices talk: F is split over tensor, and the sum over it crosses devices.
        y_ND = lax.psum(y_ND, hidden) if hidden else y_ND
        return y_ND.reshape(x_BTD.shape), stats

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
        # Devices talk: the balance is that of all rows, wherever they are.
        sums = lax.psum(sums, rows) if rows else sums
        tokens = jnp.maximum(sums["tokens"], 1)
        load_E = sums["chosen_E"] * (E / A) / tokens
        stats = {
            "balance": jnp.sum(load_E * sums["p_E"] / tokens),
            "z": sums["z"] / tokens,
            "load": load_E,
        }
        return weight_NA, expert_NA, stats
