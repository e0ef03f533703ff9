"""Sentence embeddings: an encoder's hidden states, one vector for each text.

Shapes: B rows, T tokens, D embed.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig
from sharding.gather import axes_of
from sharding.layout import Layout
from text.tokenizer import Tokenizer

SHORTEST = 32  # tokens; rows are padded to this times a power of two, so few programs compile


def mean_of(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """[B, D] float32: the mean over each row's tokens, scaled to length one.

    Reimers & Gurevych 2019, arXiv:1908.10084. A row without tokens gives zeros.
    """
    real_BT1 = (segments_BT > 0).astype(jnp.float32)[..., None]
    sum_BD = jnp.sum(x_BTD.astype(jnp.float32) * real_BT1, axis=1)
    mean_BD = sum_BD / jnp.maximum(jnp.sum(real_BT1, axis=1), 1)
    length_B1 = jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)
    return mean_BD / jnp.maximum(length_B1, 1e-12)


class Embedder:
    """Texts to vectors, on the mesh in use."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: Any,
        cfg: ModelConfig,
        layout: Layout,
        tokenizer: Tokenizer,
    ):
        self._params, self._layout, self._tokenizer = params, layout, tokenizer
        learned = cfg.arch.embeddings
        self._longest = learned.positions - learned.first if learned.positions else None

        @jax.jit
        def embed(params: Any, ids_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1])[None], ids_BT.shape)
            positions_BT = jax.reshard(positions_BT, jax.typeof(ids_BT).sharding)
            model = nnx.merge(graph, params)
            return mean_of(model(ids_BT, positions_BT, segments_BT), segments_BT)

        self._embed = embed

    def __call__(self, texts: Sequence[str], *, batch: int = 32) -> np.ndarray:
        """[texts, D] float32, `batch` texts at a time, as near in length as there are.

        ValueError for a text with more tokens than the model has positions.
        """
        ids = [self._tokenizer.prompt(text) for text in texts]
        for text, own in zip(texts, ids, strict=True):
            if self._longest and len(own) > self._longest:
                raise ValueError(
                    f"{text[:40]!r}... has {len(own)} tokens, the model {self._longest} positions"
                )
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: dict[int, np.ndarray] = {}
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            found.update(zip(chosen, self._rows([ids[i] for i in chosen], batch), strict=False))
        return np.stack([found[i] for i in range(len(ids))])

    def _rows(self, ids: list[list[int]], batch: int) -> np.ndarray:
        """[batch, D]; the rows after the last of `ids` mean nothing."""
        mesh, spec = jax.sharding.get_mesh(), self._layout.spec("batch", None)
        ways = math.prod(mesh.shape[axis] for axis in axes_of(spec[0]))
        longest = max(map(len, ids))
        tokens = SHORTEST * 2 ** max(0, math.ceil(math.log2(longest / SHORTEST)))
        tokens = min(tokens, self._longest or tokens)
        rows = np.zeros((2, -(-batch // ways) * ways, tokens), np.int32)
        for row, own in enumerate(ids):
            rows[0, row, : len(own)], rows[1, row, : len(own)] = own, 1
        place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, spec))
        return np.asarray(self._embed(self._params, place(rows[0]), place(rows[1])))
