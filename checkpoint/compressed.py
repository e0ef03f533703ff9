"""Compressed: the shapes of weights of 8 and 4 bits as a model computes with them: as they lie."""

import math

import jax
import numpy as np

from checkpoint.quantized import Form
from model.matmul.quantized import every
from model.matmul.stored import QArray, axis_size, specs_of


def in_parts(form: Form, leaf: jax.ShapeDtypeStruct) -> QArray | jax.ShapeDtypeStruct:
    """A QArray of the shapes of a weight's parts; `leaf`, the weight's, where one device of the
    mesh in use would have part of a group, or half a byte."""
    spec = getattr(leaf.sharding, "spec", None) or jax.P()
    spec = jax.P(*spec, *[None] * (leaf.ndim - len(spec)))
    inner = leaf.shape[leaf.ndim - form.inputs :]
    ways = math.prod(map(axis_size, every(spec.partitions[leaf.ndim - form.inputs :])))
    packs = form.kind == "int4"
    own = math.prod(inner) // ways
    if ways > 1 and (own % (form.group or 1) or (packs and own % 2)):
        return leaf
    places = specs_of(spec, form.inputs, form.group, packs)

    def part(name: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
        where = leaf.sharding and jax.NamedSharding(leaf.sharding.mesh, places[name])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    parts = {name: part(name, *how) for name, how in form.shapes(leaf.shape).items()}
    return QArray(inner=inner, group=form.group, **parts)
