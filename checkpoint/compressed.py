"""Compressed: the shapes of weights of 8 and 4 bits as a model computes with them: as they lie."""

import jax
import numpy as np

from checkpoint.quantized import Form
from model.matmul.stored import QArray, cut, specs_of


def in_parts(form: Form, leaf: jax.ShapeDtypeStruct) -> QArray | jax.ShapeDtypeStruct:
    """A QArray of the shapes of a weight's parts; `leaf`, the weight's, where one device of the
    mesh in use would have part of a group, or half a byte."""
    spec = getattr(leaf.sharding, "spec", None) or jax.P()
    spec = jax.P(*spec, *[None] * (leaf.ndim - len(spec)))
    inner = leaf.shape[leaf.ndim - form.inputs :]
    packs = form.kind == "int4"
    if cut(inner, spec.partitions[leaf.ndim - form.inputs :], form.group, packs):
        return leaf
    places = specs_of(spec, form.inputs, form.group, packs)

    def part(name: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
        where = leaf.sharding and jax.NamedSharding(leaf.sharding.mesh, places[name])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    parts = {name: part(name, *how) for name, how in form.shapes(leaf.shape).items()}
    return QArray(inner=inner, group=form.group, **parts)
