"""Decoding on the device: prompts into a cache, then one id of each row after another.

Shapes: B rows, T tokens, V vocabulary, N steps.
"""

import functools
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from inference.sampling import Settings, draw, keep
from model import cache as caches
from model.cache import Cache
from model.config import ModelConfig
from sharding.gather import axes_of
from sharding.layout import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a step changes."""

    cache: Cache  # of all ids but the last
    last: jax.Array  # [B] int32, the id that each row goes on with
    seen: jax.Array  # [B, V] bool, ids in the text of each row


@dataclass(frozen=True)
class Model:
    """A Transformer without its parameters, on a mesh; `vocab` and above are never drawn."""

    graph: nnx.GraphDef
    cfg: ModelConfig
    layout: Layout
    vocab: int
    mesh: jax.sharding.Mesh

    @property
    def ways(self) -> int:
        """Parts that the mesh splits the rows of a batch into."""
        return math.prod(self.mesh.shape[axis] for axis in axes_of(self.layout.batch))

    def place(self, array: Any) -> jax.Array:
        """A [B, ...] array of the host with its rows where the model wants them."""
        with jax.set_mesh(self.mesh):
            spec = self.layout.spec("batch", *[None] * (array.ndim - 1))
        return jax.device_put(array, jax.NamedSharding(self.mesh, spec))

    def fill(self, size: int, params: Any, ids_BT: jax.Array, counts_B: jax.Array) -> Cache:
        """A cache of `size` tokens, which begins with the first `counts_B` of the ids."""
        cache = caches.empty(self.cfg, self.layout, ids_BT.shape[0], size)
        return nnx.merge(self.graph, params).extend(ids_BT, counts_B, cache, fresh=True)[1]

    def fill_more(self, params: Any, cache: Cache, ids_BT: jax.Array, counts_B: jax.Array) -> Cache:
        """The cache with the first `counts_B` of the ids after what it holds."""
        return nnx.merge(self.graph, params).extend(ids_BT, counts_B, cache)[1]

    def grow(self, size: int, cache: Cache) -> Cache:
        """The same tokens in a larger cache."""
        wide = caches.empty(self.cfg, self.layout, cache.lengths.shape[0], size)

        def put(wide: jax.Array, held: jax.Array) -> jax.Array:
            spec = jax.typeof(wide).sharding.spec
            start = (0,) * wide.ndim
            local = functools.partial(lax.dynamic_update_slice, start_indices=start)
            return jax.shard_map(local, out_specs=spec)(wide, held)

        return jax.tree.map(put, wide, cache)

    def advance(
        self, steps: int, params: Any, state: State, settings: Settings, active_B: jax.Array
    ) -> tuple[State, jax.Array]:
        """`steps` more ids of the rows that are active: (state, ids [N, B], on all devices)."""

        def step(state: State, _: None) -> tuple[State, jax.Array]:
            model = nnx.merge(self.graph, params)
            counts_B = active_B.astype(jnp.int32)
            x_BTD, cache = model.extend(state.last[:, None], counts_B, state.cache)
            z_BTV = model.head.logits(x_BTD, model.table())
            # Devices talk over `vocab`: a row's logits come together, 4 V bytes.
            z_BV = jax.reshard(z_BTV, self.layout.spec("batch", None, None))[:, 0]
            rows, spec = self.layout.spec("batch"), self.layout.spec("batch", None)
            choose = jax.shard_map(self.choose, out_specs=(rows, spec))
            ids_B, seen_BV = choose(z_BV, cache.lengths, settings, state.seen)
            last_B = jnp.where(active_B, ids_B, state.last)
            return State(cache, last_B, seen_BV), ids_B

        state, ids_NB = lax.scan(step, state, None, length=steps, unroll=steps == 1)
        # Devices talk over `batch`: all get the chosen tokens, 4 bytes each.
        return state, jax.reshard(ids_NB, jax.P())

    def choose(
        self, z_BV: jax.Array, lengths_B: jax.Array, settings: Settings, seen_BV: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The next id of each row of one device, and the ids seen with it."""
        numbers_1V = jnp.arange(z_BV.shape[-1], dtype=jnp.int32)[None]
        z_BV = keep(z_BV, numbers_1V < self.vocab)
        ids_B = draw(z_BV, settings.keys(lengths_B), settings, seen_BV)
        return ids_B, seen_BV | (numbers_1V == ids_B[:, None])


class Programs:
    """Compiled programs by name and by the shapes of their arguments."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._compiled: dict[Hashable, Any] = {}
        self.seconds = 0.0  # of compiling

    def get(
        self, function: Callable, *args: Any, static: tuple = (), donate: tuple[int, ...] = ()
    ) -> Callable:
        """`function(*static, *args)` as a program of `args`, which may be shapes.

        It is compiled when their shapes come for the first time. Of donated arguments (numbers
        among `args`) the program takes over the memory.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (function.__name__, static, structure, shapes)
        if key not in self._compiled:
            started = time.perf_counter()
            with jax.set_mesh(self._mesh):
                jitted = jax.jit(functools.partial(function, *static), donate_argnums=donate)
                self._compiled[key] = jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - started
        return self._compiled[key]
