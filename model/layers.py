"""The parts that blocks are made of: weights, norms and the embedding table.

Shapes: B rows, T tokens, D embed, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from model import config
from model.kernels.lookup import lookup
from model.matmul import delayed, einsum, einsums
from model.matmul.stored import QArray, lies
from model.precision import BF16, Passes
from sharding import stages
from sharding.gather import axes_of, varying, without
from sharding.layout import Layout


@dataclass(frozen=True)
class Role:
    """What an optimizer asks of a parameter.

    A "matrix" of a hidden layer has `outputs` dims and then, last, `inputs` dims, which are
    contracted with the activations; dims before these number separate matrices, such as layers.
    """

    kind: str = "vector"  # or "matrix", "embedding", "head"
    outputs: int = 0
    inputs: int = 0


def normal(rngs: nnx.Rngs, shape: Sequence[int], spec: jax.P, std: float, dtype: str) -> jax.Array:
    """Gaussian weights; each device draws its own part only."""
    draw = jax.random.normal(rngs.params(), tuple(shape), jnp.float32, out_sharding=spec)
    return (std * draw).astype(dtype)


def aligned(w: jax.Array, x: jax.Array) -> jax.Array:
    """A weight of x's last dims, with the rank of x. For rows in flight it leads with stages."""
    leads = stages.in_flight(x)
    w = stages.for_rows(w, x) if leads else w
    return jnp.expand_dims(w, tuple(range(leads, leads + x.ndim - w.ndim)))


class Linear(nnx.Module):
    """`einsum(spec, x, weight) + bias`. The weight's contracted dims come last.

    `spec` names the dims ("BTD,FD->BTF"), `sizes` and `axes` give each of the weight's letters its
    size and its logical axis, `batch` the letters that number separate matrices (gate and up),
    `passes` what its matmuls round to.
    """

    def __init__(
        self,
        spec: str,
        sizes: dict[str, int],
        axes: dict[str, str | None],
        layout: Layout,
        rngs: nnx.Rngs,
        *,
        dtype: str,
        std: float = 1.0,  # of the outputs, for inputs of unit variance
        bias: bool = False,
        batch: str = "",
        passes: Passes = BF16,
    ):
        x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
        inputs = [letter for letter in w_dims if letter in x_dims]
        shape = [sizes[letter] for letter in w_dims]
        fan_in = math.prod(sizes[letter] for letter in inputs)
        where = layout.spec(*(axes.get(letter) for letter in w_dims))
        role = Role("matrix", len(w_dims) - len(inputs) - len(batch), len(inputs))
        draw = normal(rngs, shape, where, std / math.sqrt(fan_in), dtype)
        self.weight = nnx.Param(draw, role=role)
        # D of the weight may be split over fsdp; D of the residual stream and of a bias is whole.
        features = [None if letter == "D" else axes.get(letter) for letter in y_dims[2:]]
        self.features = layout.spec(*features)
        zeros = jnp.zeros(shape[: -len(inputs)], dtype, out_sharding=self.features)
        self.bias = nnx.Param(zeros) if bias else None
        self.history = nnx.Param(delayed.fresh()) if passes.delayed else None
        self.spec, self.passes = spec, passes

    def __call__(self, x: jax.Array, *, out: jax.P | None = None) -> jax.Array:
        """The result lives where `out` says, or else where x does, but for its features: if one
        axis splits x's tokens and these, the tokens are gathered."""
        out = self.home(x) if out is None else out
        y = einsum(self.spec, x, self.weight[...], out=out, **self.rounding())
        return y if self.bias is None else y + aligned(self.bias[...].astype(y.dtype), y)

    def rounding(self) -> dict[str, Any]:
        """How its matmuls round."""
        seen = None if self.history is None else self.history[...]
        return {"passes": self.passes, "history": seen}

    def home(self, x: jax.Array) -> jax.P:
        """Where the result for x lives if nobody asks for another place."""
        rows, tokens, *_ = jax.typeof(x).sharding.spec
        split = tuple(axis for dim in self.features for axis in axes_of(dim))
        return jax.P(rows, without(tokens, split), *self.features)

    def each(self, x: jax.Array) -> list[jax.Array]:
        """The outputs of each of the matrices that the weight's first letter numbers.

        By a matmul each: the backward pass of one for all would first write their gradients side by
        side, which takes longer than what one larger matmul saves.
        """
        first = self.spec.partition(",")[2][0]
        spec, at = self.spec.replace(first, ""), self.spec.partition("->")[2].index(first)
        out = jax.P(*(axis for i, axis in enumerate(self.home(x)) if i != at))
        dim = int(stages.in_flight(x))  # where the weight leads with the stages, that is next

        def own(a: Any, i: int) -> Any:
            return jax.tree.map(lambda part: lax.index_in_dim(part, i, dim, keepdims=False), a)

        numbers = range(self.weight[...].shape[dim])
        ws = [own(self.weight[...], i) for i in numbers]
        ys = einsums(spec, x, ws, out=out, **self.rounding())
        if self.bias is None:
            return ys
        return [y + aligned(own(self.bias[...], i).astype(y.dtype), y) for i, y in enumerate(ys)]


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), in float32, over the last dims, as many as `shape` has.

    Zhang & Sennrich 2019, arXiv:1910.07467. `spec` splits the scale.
    """

    def __init__(
        self, shape: Sequence[int], norm: config.Norm, dtype: str, *, spec: jax.P | None = None
    ):
        ones = jnp.ones(shape, dtype, out_sharding=spec)
        self.scale = nnx.Param(ones - jnp.asarray(norm.offset, dtype))
        self.eps, self.offset, self.dims = norm.eps, norm.offset, len(shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...].astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        # Devices talk over what splits the scale: the mean is of all dims, 4 bytes a token.
        dims = tuple(range(-self.dims, 0))
        x32 *= lax.rsqrt(jnp.mean(x32 * x32, axis=dims, keepdims=True) + self.eps)
        return (x32 * aligned(self.offset + scale, x)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last dim, in float32. Ba et al. 2016."""

    def __init__(self, size: int, norm: config.Norm, dtype: str):
        self.scale = nnx.Param(jnp.ones((size,), dtype) - jnp.asarray(norm.offset, dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if norm.bias else None
        self.eps, self.offset = norm.eps, norm.offset

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        x32 *= lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        y = x32 * aligned(self.offset + self.scale[...].astype(jnp.float32), x)
        if self.bias is not None:
            y += aligned(self.bias[...].astype(jnp.float32), x)
        return y.astype(x.dtype)


def make_norm(norm: config.Norm, size: int, dtype: str) -> RMSNorm | LayerNorm:
    """The norm that the config asks for, over dims of `size`."""
    if norm.kind == "rms":
        return RMSNorm((size,), norm, dtype)
    return LayerNorm(size, norm, dtype)


class Embedding(nnx.Module):
    """Ids to vectors. The table lies split over D and, if it is the vocabulary's, over its rows."""

    def __init__(
        self,
        size: int,
        embed: int,
        layout: Layout,
        rngs: nnx.Rngs,
        *,
        dtype: str,
        std: float,
        rows: str | None = "vocab",
    ):
        where = layout.spec(rows, "embed")
        draw = normal(rngs, (size, embed), where, std, dtype)
        self.table = nnx.Param(draw, role=Role("embedding"))

    def __call__(self, ids_BT: jax.Array, dtype: str, out: jax.P) -> jax.Array:
        """[B, T, D] in `dtype`, where `out` says.

        In three steps: each fsdp group shares its ids, looks all of them up in its slice
        of D, and trades slices for rows; over tensor the parts of the vocabulary are summed, and
        the sums scattered if `out` wants tokens apart.
        """
        vocab, embed = (axes_of(dim) for dim in lies(self.table[...]).partitions)
        # An axis that splits the vocabulary has all ids until the sum over it is scattered.
        where = jax.P(out[0], without(out[1], vocab))
        apart = tuple(axis for axis in axes_of(out[1]) if axis in vocab)
        summed = tuple(axis for axis in vocab if axis not in apart)

        def local(table_vd: jax.Array | QArray, ids_bT: jax.Array) -> jax.Array:
            # Devices talk over what splits D: each takes the others' ids, 4 bytes a token.
            ids_BT = lax.all_gather(ids_bT, embed, axis=0, tiled=True) if embed else ids_bT
            table_vd = jax.tree.map(varying, table_vd)
            own = ids_BT - lax.axis_index(vocab) * table_vd.shape[0] if vocab else ids_BT
            x_BTd = lookup(table_vd, own, dtype)
            # Devices talk over what splits V: all but one add zeros, the bytes of x_BTd.
            x_BTd = lax.psum(x_BTd, summed) if summed else x_BTd
            if apart:
                x_BTd = lax.psum_scatter(x_BTd, apart, scatter_dimension=1, tiled=True)
            if embed:
                # Devices talk over what splits D: slices of D for rows, the bytes of x_BTd.
                return lax.all_to_all(x_BTd, embed, split_axis=0, concat_axis=2, tiled=True)
            return x_BTd

        ids_BT = jax.reshard(ids_BT, where)
        return jax.shard_map(local, out_specs=out)(self.table[...], ids_BT)
