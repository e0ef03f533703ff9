"""Weights that are stored rounded: values and scales in the place of a parameter's array.

Shapes: the outer dims of a weight, then its contracted ones; G groups of the latter, P bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels import nibbles, weight_only
from model.matmul.plan import Plan
from model.matmul.quantized import Way, every, matrix, summed, together
from model.matmul.rounded import OF_VALUES, Rounded, Rounding, multiplied
from model.precision import Format, Passes
from sharding.gather import axes_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QArray:
    """A weight [..., *inner], contracted over `inner`, as values, less zeros, times scales.

    It goes where an array goes: through `nnx.Param`, scan, jit and its donation, on a mesh and
    into a checkpoint, as the arrays NAME.values, NAME.scales and, of one that has some, NAME.zeros.
    No gradient flows into it.
    """

    values: jax.Array  # int8 or float8 as the weight lies; or [..., P] uint8, `nibbles.packed`
    scales: jax.Array  # float32 [..., G]; of contracted numbers in line, a last group may be short
    inner: tuple[int, ...] = field(metadata={"static": True})
    group: int = field(default=0, metadata={"static": True})  # numbers of a scale; 0: all
    zeros: jax.Array | None = None  # [..., G], the values that stand for 0; None: 0 does

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return (*self.scales.shape[:-1], *self.inner)

    @property
    def ndim(self) -> int:
        """The weight's."""
        return len(self.shape)

    @property
    def packed(self) -> bool:
        """Whether two levels share a byte, and the contracted dims are one."""
        return self.values.dtype == jnp.uint8

    @property
    def spec(self) -> jax.P:
        """Where the weight lies: the entries of its dims."""
        dims = lies(self.values).partitions
        return jax.P(*dims, *[None] * (self.ndim - len(dims)))

    def __getitem__(self, index: Any) -> "QArray":
        """All of it, `...`, or one along the first dim."""
        return self if index is Ellipsis else jax.tree.map(lambda part: part[index], self)

    def matrix(self) -> Rounded:
        """[O, I] or [O, P] of the part that one device has."""
        values = self.values.reshape(math.prod(self.scales.shape[:-1]), -1)
        scales = self.scales.reshape(len(values), -1)
        return Rounded(values, scales if self.group else scales[:, 0], self.group)

    def below(self) -> jax.Array | None:
        """The zeros of `matrix`, shaped as its scales."""
        return None if self.zeros is None else self.zeros.reshape(self.matrix().scales.shape)

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The weight as numbers, where it lies."""
        ways = [math.prod(axis_size(axis) for axis in axes_of(dim)) for dim in self.spec]

        def local(w: QArray) -> jax.Array:
            own = [size // n for size, n in zip(self.shape, ways, strict=True)]
            inputs, (values, scales, group) = math.prod(own[w.ndim - len(w.inner) :]), w.matrix()
            w_OI = weight_only.numbers(values, scales, w.below(), inputs, block=group)
            return w_OI.astype(dtype).reshape(own)

        return jax.shard_map(local, out_specs=self.spec)(self)


def lies(w: Any) -> jax.P:
    """The entries of a weight's dims, stored or not."""
    return w.spec if isinstance(w, QArray) else jax.typeof(w).sharding.spec


def rows_of(table: Any, at: jax.Array) -> jax.Array:
    """[..., D] float32: rows of a device's table, stored or not; zeros where it has none."""

    def get(part: jax.Array) -> jax.Array:
        return part.at[at].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    if not isinstance(table, QArray):
        return get(table.astype(jnp.float32))
    assert not (table.packed or table.group), "tables have a scale for each row"
    return get(table.values).astype(jnp.float32) * get(table.scales)


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use."""
    return jax.sharding.get_abstract_mesh().shape[axis]


def store(w: jax.Array, inputs: int, form: Format) -> QArray:
    """A weight, rounded to the nearest with a scale for each output and group.

    ValueError where a group does not divide what a device has of the contracted dims.
    """
    spec = jax.typeof(w).sharding.spec.partitions
    inner = spec[w.ndim - inputs :]
    packs = form.kind == "w4"
    if reason := cut(w.shape[w.ndim - inputs :], inner, form.group, packs):
        raise ValueError(reason)

    def local(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        w_OI, own = matrix(w, inputs), w.shape[: w.ndim - inputs]
        rounding = Rounding(OF_VALUES[form.kind], form.group, every(inner))
        values, scales, _ = rounding.by_row(w_OI)
        values = nibbles.packed(values).reshape(*own, -1) if packs else values.reshape(w.shape)
        return values, scales.reshape(*own, -1)

    specs = specs_of(jax.P(*spec), inputs, form.group, packs)
    values, scales = jax.shard_map(local, out_specs=(specs["values"], specs["scales"]))(w)
    return QArray(values, scales, w.shape[w.ndim - inputs :], form.group)


def cut(inner: Sequence[int], dims: tuple, group: int, packs: bool) -> str:
    """Why a device would have part of a group, or half a byte, of contracted dims of these sizes
    that lie as `dims` says; "" if none has."""
    ways = math.prod(map(axis_size, every(dims)))
    own = math.prod(inner) // ways
    if ways > 1 and (own % (group or 1) or (packs and own % 2)):
        return f"groups of {group} do not divide the {own} inputs that one of {ways} devices has"
    return ""


def specs_of(spec: jax.P, inputs: int, group: int, packs: bool) -> dict[str, jax.P]:
    """Where the parts lie of a weight that lies as `spec` says."""
    outer, inner = spec.partitions[: len(spec) - inputs], spec.partitions[len(spec) - inputs :]
    line = every(inner) or None
    scales = jax.P(*outer, line if group else None)
    return {"values": jax.P(*outer, line) if packs else spec, "scales": scales, "zeros": scales}


def store_all(params: Any, roles: Any, form: Format) -> Any:
    """Parameters with the weights of hidden layers stored, routers aside; `roles` and the tree as
    the model's `abstract` has them."""

    def one(path: tuple, w: jax.Array, role: Any) -> Any:
        routes = any(getattr(key, "key", None) == "router" for key in path)
        return store(w, role.inputs, form) if role.kind == "matrix" and not routes else w

    return jax.tree.map_with_path(one, params, roles)


def numbers(w: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A weight as an array, stored or not."""
    return w.astype(dtype) if isinstance(w, QArray) else w


def einsums(
    spec: str, x: jax.Array, ws: Sequence[QArray], plan: Plan, passes: Passes
) -> list[jax.Array]:
    """`matmul.einsums` of stored weights. x is rounded where `passes.forward` rounds activations to
    what the weights are; otherwise they are multiplied in x's dtype."""
    way = Way.make(spec, ws[0].spec, plan, passes)
    local = functools.partial(_forward, way)
    return list(jax.shard_map(local, out_specs=(way.out,) * len(ws))(x, *ws))


def _forward(way: Way, x: jax.Array, *ws: QArray) -> tuple[jax.Array, ...]:
    """The parts of the results."""
    x, form, ys = together(x, way.plan.gathers), Format.parse(way.passes.forward), []
    x_RI = matrix(x, way.inputs)
    for w in ws:
        outer = way.w[: len(way.w) - way.inputs]
        # Devices talk over the plan's `rows`: weights are gathered, the bytes that they lie in.
        line = every(way.inner)
        dims = (*outer, line) if w.packed else way.w, (*outer, line if w.group else None)
        values, *scaled = (
            None if part is None else way.whole(part, dims[i > 0])
            for i, part in enumerate((w.values, w.scales, w.zeros))
        )
        w = dataclasses.replace(w, values=values, scales=scaled[0], zeros=scaled[1])
        w_OI = w.matrix()
        if not (form.exact or form.weights_only) and w_OI.values.dtype == OF_VALUES[form.kind]:
            rounding = Rounding(OF_VALUES[form.kind], w.group, way.left(way.inner))
            y_RO = multiplied(rounding.by_row(x_RI), w_OI, x.dtype)
        else:
            y_RO = weight_only.matmul(x_RI, w_OI.values, w_OI.scales, w.below(), block=w.group)
        y = y_RO.reshape(*x.shape[: x.ndim - way.inputs], *w.scales.shape[way.batch : -1])
        ys.append(summed(y, way.left(way.inner), way.plan.scatters))
    return tuple(ys)
