"""The Transformer: embed, a scanned stack of blocks, a norm, a head. Read this first.

Shapes: B rows, T tokens, D embed. A stacked weight leads with L, its layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.attention import Context, SelfAttention
from model.config import ModelConfig
from model.heads import LanguageHead
from model.layers import Embedding, Role, make_norm
from model.mlp import make_mlp
from model.rope import rotation
from sharding.layout import Layout

Layer = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]

# What a layer keeps for its backward pass, from least compute to least memory. "none" keeps all.
REMAT = {
    "dots": ("qkv", "attention", "mid", "up"),  # recomputes norms, rotations and curves
    "attention": ("attention",),  # and all matmuls, but not attention
    "full": (),  # keeps the layer's input only
}


def run_layers(
    layers: Sequence[Layer],
    weights: tuple[Sequence[Any], Sequence[Any]],
    x_BTD: jax.Array,
    context: Any,
    *,
    unroll: int = 1,
) -> tuple[jax.Array, Any]:
    """x through every layer; the extras of each layer stacked, one tree for each place.

    Layers are a pattern of p places, repeated: `layers` are p pure functions
    `(weights, x, context) -> (x, extras)`. `weights` holds p trees that lead with the number of
    repetitions, then the single layers that remain when p does not divide the layers.
    One compiled body serves any number of repetitions; `unroll` repeats it in the program.
    """
    stacks, rest = weights

    def repetition(x_BTD: jax.Array, weights: Sequence[Any]) -> tuple[jax.Array, Any]:
        extras = []
        for layer, own in zip(layers, weights, strict=False):
            x_BTD, extra = layer(own, x_BTD, context)
            extras.append(extra)
        return x_BTD, tuple(extras)

    x_BTD, extras = lax.scan(repetition, x_BTD, tuple(stacks), unroll=unroll)
    if rest:
        x_BTD, last = repetition(x_BTD, rest)
        extras = (
            tuple(
                jax.tree.map(lambda all_, one: jnp.concatenate([all_, one[None]]), extra, own)
                for extra, own in zip(extras, last, strict=False)
            )
            + extras[len(last) :]
        )
    return x_BTD, extras


class Block(nnx.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg: ModelConfig, window: int, layout: Layout, rngs: nnx.Rngs):
        self.norm1 = make_norm(cfg.arch.norm, cfg.embed, cfg.param_dtype)
        self.attention = SelfAttention(cfg, window, layout, rngs)
        self.norm2 = make_norm(cfg.arch.norm, cfg.embed, cfg.param_dtype)
        self.mlp = make_mlp(cfg, layout, rngs)

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, dict]:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), context)
        x_BTD = checkpoint_name(x_BTD, "mid")
        return x_BTD + self.mlp(self.norm2(x_BTD)), {}


class Transformer(nnx.Module):
    """A decoder. Call it for the hidden states; `head` turns them into logits or a loss."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        assert cfg.vocab, "vocab is resolved from the tokenizer before the model is made"
        windows = cfg.arch.attention.windows[: cfg.layers]
        repeats, rest = divmod(cfg.layers, len(windows))

        def stack(window: int) -> Block:
            """A Block whose weights lead with L."""
            keys = jax.random.split(rngs.params(), repeats)
            return jax.vmap(lambda key: Block(cfg, window, layout, nnx.Rngs(key)))(keys)

        self.embedding = Embedding(
            cfg.vocab, cfg.embed, layout, rngs, dtype=cfg.param_dtype, std=cfg.arch.init.embed
        )
        self.blocks = nnx.List([stack(window) for window in windows])
        self.rest = nnx.List([Block(cfg, window, layout, rngs) for window in windows[:rest]])
        self.norm = make_norm(cfg.arch.norm, cfg.embed, cfg.param_dtype)
        self.head = LanguageHead(cfg, layout, rngs)
        self.cfg = cfg

    def __call__(
        self, ids_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> jax.Array:
        """Hidden states [B, T, D] after the last norm, in the compute dtype."""
        cfg, rope = self.cfg, self.cfg.arch.rope
        x_BTD = self.embedding(ids_BT, cfg.dtype)
        if cfg.arch.embed_scale:
            x_BTD *= jnp.asarray(cfg.embed**0.5, x_BTD.dtype)
        thetas = {rope.theta, rope.local_theta or rope.theta}
        context = Context(
            segments_BT, {theta: rotation(positions_BT, cfg.head_dim, theta) for theta in thetas}
        )
        graphs, stacks = zip(*(nnx.split(block) for block in self.blocks), strict=True)
        rest = [nnx.state(block) for block in self.rest]
        layers = [remat(pure(graph), cfg) for graph in graphs]
        x_BTD, _ = run_layers(layers, (stacks, rest), x_BTD, context, unroll=cfg.unroll)
        return self.norm(x_BTD)

    def table(self) -> jax.Array:
        """The weight of the head, [V, D]: its own, or the embedding's."""
        return self.embedding.table[...] if self.head.table is None else self.head.table[...]

    def loss(
        self,
        inputs: jax.Array,
        targets: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        weights: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """(loss, nats) of predicting `targets`, as LanguageHead.loss sums them; all [B, T]."""
        x_BTD = self(inputs, positions, segments)
        return self.head.loss(x_BTD, self.table(), targets, weights)

    def logits(
        self, ids_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> jax.Array:
        """[B, T, V] float32."""
        return self.head.logits(self(ids_BT, positions_BT, segments_BT), self.table())


def pure(graph: nnx.GraphDef) -> Layer:
    """A block as a function of its weights."""
    return lambda weights, x_BTD, context: nnx.merge(graph, weights)(x_BTD, context)


def remat(layer: Layer, cfg: ModelConfig) -> Layer:
    """The same layer, keeping only what `cfg.remat` names for its backward pass."""
    if cfg.remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*REMAT[cfg.remat])
    in_loop = cfg.unroll < cfg.layers // len(cfg.arch.attention.windows)
    return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)


def abstract(cfg: ModelConfig, layout: Layout) -> tuple[nnx.GraphDef, Any, Any]:
    """The model without its arrays: (graph, shapes, roles), the last two as trees of parameters.

    `nnx.merge(graph, params)` is a Transformer. Call it where the mesh is set; shapes carry their
    sharding.
    """
    graph, state = nnx.split(jax.eval_shape(lambda: Transformer(cfg, layout, nnx.Rngs(0))))
    roles = jax.tree.map(
        lambda variable: variable.get_metadata().get("role", Role()),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(roles)


def init(cfg: ModelConfig, layout: Layout, key: jax.Array) -> Any:
    """Fresh parameters, a tree. Under jit no device ever holds more than its part."""
    return nnx.to_pure_dict(nnx.state(Transformer(cfg, layout, nnx.Rngs(key))))
