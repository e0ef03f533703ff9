"""Rows of a table by their numbers, with a gradient that can be the same bits whenever it runs.

What autodiff makes of a lookup adds to the table in any order on a GPU, which is the fastest. What
XLA puts in its place on request (`--xla_gpu_deterministic_ops`) sorts all N x D numbers of the
gradient. Here the tokens of a chunk that have one number are summed by a matmul first, so that no
row of the table is added to twice at once.

Shapes: V rows of the table, D their width, N tokens, C those of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels.engine import platform
from model.matmul.stored import QArray, rows_of
from sharding import runtime

CHUNK = 4096  # its matmul takes 4,096 multiplications a number: little beside a layer's


def lookup(table_VD: jax.Array | QArray, ids_BT: jax.Array, dtype: str) -> jax.Array:
    """table_VD[ids_BT] in `dtype`, [B, T, D]; 0 for numbers that are no row's. In a shard_map.

    The gradient is float32 and sums all rows of a token: in bfloat16 a sum of hundreds would stop
    growing.
    """
    if platform() != "gpu" or not runtime.same_bits() or isinstance(table_VD, QArray):
        return plain(table_VD, ids_BT, dtype)
    # Devices talk, backward, over what splits the ids: the table's gradient, 4 bytes a number.
    apart = jax.typeof(ids_BT).mat.varying - jax.typeof(table_VD).mat.varying
    table_VD = lax.pcast(table_VD.astype(jnp.float32), tuple(sorted(apart)), to="varying")
    return in_order(table_VD, ids_BT, dtype)


def plain(table_VD: jax.Array | QArray, ids_BT: jax.Array, dtype: str) -> jax.Array:
    """`lookup`, whose gradient adds to the rows one by one."""
    return rows_of(table_VD, ids_BT).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def in_order(table_VD: jax.Array, ids_BT: jax.Array, dtype: str) -> jax.Array:
    """`lookup`, of a float32 table that varies along all axes that the ids do."""
    return plain(table_VD, ids_BT, dtype)


def _forward(table_VD: jax.Array, ids_BT: jax.Array, dtype: str) -> tuple:
    return plain(table_VD, ids_BT, dtype), (table_VD[:, :0], ids_BT)


def _backward(dtype: str, kept: tuple, dx_BTD: jax.Array) -> tuple[jax.Array, None]:
    (V, _), ids_BT, D = kept[0].shape, kept[1], dx_BTD.shape[-1]
    N = ids_BT.size
    chunks = math.ceil(N / CHUNK)
    C = math.ceil(N / chunks)
    c_C = jnp.arange(C)
    ids = jnp.pad(ids_BT.reshape(N), (0, chunks * C - N), constant_values=V).reshape(-1, C)
    dxs = jnp.pad(dx_BTD.reshape(N, D), ((0, chunks * C - N), (0, 0))).reshape(-1, C, D)

    def add(dtable_VD: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        ids_C, dx_CD = chunk
        same_CC = ids_C[:, None] == ids_C[None]
        # Products with 1 are exact, and sums are float32, whatever dx is in.
        sums_CD = jnp.einsum(
            "CK,KD->CD", same_CC.astype(dx_CD.dtype), dx_CD,
            preferred_element_type=jnp.float32, precision="highest",
        )  # fmt: skip
        first_C = ~jnp.any(same_CC & (c_C[None] < c_C[:, None]), axis=1)
        there_C = first_C & (ids_C >= 0) & (ids_C < V)
        place_C = jnp.where(there_C, ids_C, V + c_C)  # those from V on are no row
        dtable_VD = dtable_VD.at[place_C].add(sums_CD, mode="drop", unique_indices=True)
        return dtable_VD, None

    none_VD = jnp.zeros((V, D), jnp.float32)
    none_VD = lax.pcast(none_VD, tuple(jax.typeof(dx_BTD).mat.varying), to="varying")
    return lax.scan(add, none_VD, (ids, dxs))[0], None


in_order.defvjp(_forward, _backward)
