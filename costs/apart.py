"""Attention that projects queries, keys and values one by one: the plain twin of one matmul of all
three, for what that is worth."""

import copy
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention import SelfAttention
from model.layers import Linear


class Apart(SelfAttention):
    """SelfAttention with a weight and a matmul for each of the three, of the same values."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        groups = self.qkv.weight[...].shape[1] - 2
        self.queries = part(self.qkv, slice(groups))
        self.keys = part(self.qkv, slice(groups, groups + 1))
        self.values = part(self.qkv, slice(groups + 1, None))
        del self.qkv

    def project(self, x_BTD: jax.Array, *where: Any) -> list[jax.Array]:
        """Queries [B, T, K, G, H], keys and values [B, T, K, 1, H]; `where` splits rows, tokens."""
        linears = (self.queries, self.keys, self.values)
        each = [linear(x_BTD, out=jax.P(*where, *linear.features)) for linear in linears]
        return [checkpoint_name(y_BTKJH, "qkv") for y_BTKJH in each]


def part(whole: Linear, heads: slice) -> Linear:
    """A Linear of some of the heads J of a weight [K, J, H, D]."""
    linear = copy.copy(whole)
    linear.weight = nnx.Param(whole.weight[...][:, heads], role=whole.weight.role)
    if whole.bias is not None:
        linear.bias = nnx.Param(whole.bias[...][:, heads])
    return linear
