"""Calibration: a model walked layer by layer over some text, and what comes into each Linear.

One layer's weights and the states between two layers live at a time.

Shapes: B rows, T tokens, D embed; N = B T tokens, I inputs of a Linear.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoint.pretrained import Pretrained, placed, put
from checkpoint.store import flatten
from compressors.quantize import Inputs
from model.attention import Context
from model.config import ModelConfig
from model.layers import Linear
from model.precision import Precision
from model.transformer import Block, Transformer, rotations_of
from sharding.layout import Layout

Weights = dict[str, np.ndarray]  # of a layer, by their dotted names
Seen = dict[str, dict[str, jax.Array]]  # of each Linear, what `sums` gives
LINEARS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.up", "mlp.down")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of text, all [B, T]; in `segments` 1 is a token, 0 padding."""

    ids: jax.Array
    positions: jax.Array
    segments: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], tokens: int) -> "Batch":
        """Rows of at most `tokens` ids each."""
        ids, segments = np.zeros((2, len(rows), tokens), np.int32)
        for row, own in enumerate(rows):
            ids[row, : len(own)], segments[row, : len(own)] = own, 1
        positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), ids.shape) * segments
        return cls(*map(jnp.asarray, (ids, positions, segments)))


class Watched:
    """A Linear that shows somebody its inputs."""

    def __init__(self, linear: Linear, look: Callable[[jax.Array], None]):
        self._linear, self._look = linear, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._linear, name)

    def __call__(self, x: jax.Array, **how: Any) -> jax.Array:
        self._look(x)
        return self._linear(x, **how)

    def each(self, x: jax.Array) -> list[jax.Array]:
        self._look(x)
        return self._linear.each(x)


class Walk:
    """The layers of a model on the mesh in use, whose values are read as they are needed."""

    def __init__(self, source: Pretrained, cfg: ModelConfig, layout: Layout, precision: Precision):
        """`precision`: what `through` rounds inputs to; `observe` rounds nothing."""
        self._source, self._layout = source, layout
        self._cfg = dataclasses.replace(cfg, precision=Precision())
        rounding = dataclasses.replace(cfg, precision=precision)
        self._places = [Place(self._cfg, place, layout) for place in range(cfg.places)]
        self._rounding = [Place(rounding, place, layout) for place in range(cfg.places)]

    def layers(self) -> Iterator[tuple[int, str, int | None]]:
        """Number of each layer, what its arrays' names begin with, its repetition in a stack."""
        places = self._cfg.places
        for layer in range(self._cfg.layers):
            repetition, place = divmod(layer, places)
            stacked = repetition < self._cfg.layers // places
            yield (
                layer,
                f"{'blocks' if stacked else 'rest'}.{place}.",
                repetition if stacked else None,
            )

    def begin(self, batches: Sequence[Batch]) -> list[jax.Array]:
        """What goes into the first layer, [B, T, D] of each batch."""

        def ends() -> Transformer:
            model = Transformer(self._cfg, self._layout, nnx.Rngs(0))
            model.blocks, model.rest = nnx.List([]), nnx.List([])
            model.norm = model.head = None
            return model

        graph, state = nnx.split(jax.eval_shape(ends))
        shapes = nnx.to_pure_dict(state)
        weights = on_devices(shapes, {name: self._source.read(name) for name in flatten(shapes)})

        @jax.jit
        def embed(weights: Any, batch: Batch) -> jax.Array:
            return nnx.merge(graph, weights).embed(batch.ids, batch.positions)

        return [embed(weights, batch) for batch in batches]

    def read(self, prefix: str, index: int | None) -> Weights:
        """A layer's arrays, float32, by what follows the prefix in their names."""
        return {
            name.removeprefix(prefix): self._source.read(name, index).astype(np.float32)
            for name in self._source.arrays
            if name.startswith(prefix)
        }

    def observe(
        self, layer: int, weights: Weights, states: Sequence[jax.Array], batches: Sequence[Batch]
    ) -> dict[str, Inputs]:
        """What comes into each of the layer's Linears."""
        place = self._places[layer % self._cfg.places]
        own, total = on_devices(place.shapes, weights), None
        for x_BTD, batch in zip(states, batches, strict=True):
            seen = place.observe(own, x_BTD, batch)
            total = seen if total is None else merged(total, seen)
        tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
        return {
            name: Inputs(tokens=tokens, **{part: np.asarray(a) for part, a in parts.items()})
            for name, parts in jax.device_get(total).items()
        }

    def as_it_was(self, layer: int, *given: Any) -> list[jax.Array]:
        """What the layer, of these weights, makes of states and batches, with no input rounded."""
        return _run(self._places[layer % self._cfg.places], *given)

    def through(self, layer: int, *given: Any) -> list[jax.Array]:
        """The same with inputs rounded as they will be."""
        return _run(self._rounding[layer % self._cfg.places], *given)


class Place:
    """The layer at one place of the pattern, compiled."""

    def __init__(self, cfg: ModelConfig, place: int, layout: Layout):
        block = jax.eval_shape(lambda: Block(cfg, place, layout, nnx.Rngs(0)))
        graph, state = nnx.split(block)
        self.shapes = nnx.to_pure_dict(state)

        @jax.jit
        def observe(weights: Any, x_BTD: jax.Array, batch: Batch) -> Seen:
            block, seen = nnx.merge(graph, weights), {}

            def look(name: str, x: jax.Array) -> None:
                seen[name] = sums(x, batch.segments)

            for name in linears(cfg.sparse(place), block):
                part, _, own = name.partition(".")
                linear = getattr(getattr(block, part), own)
                setattr(getattr(block, part), own, Watched(linear, partial(look, name)))
            block(x_BTD, Context(batch.segments, rotations_of(cfg, batch.positions)))
            return seen

        @jax.jit
        def run(weights: Any, x_BTD: jax.Array, batch: Batch) -> jax.Array:
            context = Context(batch.segments, rotations_of(cfg, batch.positions))
            return nnx.merge(graph, weights)(x_BTD, context)[0]

        self.observe, self.run = observe, run


def _run(
    place: Place, weights: Weights, states: Sequence[jax.Array], batches: Sequence[Batch]
) -> list[jax.Array]:
    own = on_devices(place.shapes, weights)
    return [place.run(own, *both) for both in zip(states, batches, strict=True)]


def linears(sparse: bool, block: Block) -> list[str]:
    """The Linears of a layer that see every token: not those of experts."""
    names = [name for name in LINEARS if not (sparse and name.startswith("mlp."))]
    return [
        name for name in names if hasattr(getattr(block, name.split(".")[0]), name.split(".")[1])
    ]


def sums(x: jax.Array, segments_BT: jax.Array) -> dict[str, jax.Array]:
    """What Inputs holds of x [B, T, inputs], but for padding; float32."""
    real_N1 = segments_BT.reshape(-1, 1) > 0
    x_NI = jnp.where(real_N1, x.reshape(len(real_N1), -1).astype(jnp.float32), 0)
    return {
        "second_II": jnp.einsum("ni,nj->ij", x_NI, x_NI, precision="highest"),
        "largest_I": jnp.max(jnp.abs(x_NI), axis=0),
        "total_I": jnp.sum(jnp.abs(x_NI), axis=0),
    }


@jax.jit
def merged(a: Seen, b: Seen) -> Seen:
    """Sums over both."""

    def one(path: tuple, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b) if path[-1].key == "largest_I" else a + b

    return jax.tree.map_with_path(one, a, b)


def on_devices(shapes: Any, values: Weights) -> Any:
    """The values in a tree like `shapes`, cast and placed as these say."""
    leaves = flatten(shapes)
    made = [put(values[name].astype(leaf.dtype), placed(leaf)) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), made)


def apart(
    exact: Sequence[jax.Array], rough: Sequence[jax.Array], batches: Sequence[Batch]
) -> float:
    """How far states are from the exact model's, as a share of their length: a mean over tokens.

    Few tokens have states a hundred times as long as all others; sums would be theirs alone.
    """
    shares = [_shares(*each) for each in zip(exact, rough, batches, strict=True)]
    tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
    return float(sum(shares)) / tokens


@jax.jit
def _shares(x_BTD: jax.Array, z_BTD: jax.Array, batch: Batch) -> jax.Array:
    x_BTD, z_BTD = x_BTD.astype(jnp.float32), z_BTD.astype(jnp.float32)
    off_BT, size_BT = (jnp.linalg.norm(a, axis=-1) for a in (z_BTD - x_BTD, x_BTD))
    return jnp.sum(jnp.where(batch.segments > 0, off_BT / jnp.maximum(size_BT, 1e-30), 0))
