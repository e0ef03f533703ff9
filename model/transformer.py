"""The Transformer: embed, a scanned stack of blocks, a norm, a head. Read this first.

Shapes: B rows, T tokens, D embed. A stacked weight leads with L, its layers.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model.attention import Context, SelfAttention
from model.cache import Cache, KeysValues, append
from model.config import ModelConfig
from model.heads import make_head
from model.layers import Embedding, Role, make_norm
from model.mlp import make_mlp
from model.moe import MoeMlp
from model.remat import Policy, policy
from model.rope import Rotation, rotation
from sharding import pipeline, stages
from sharding.layout import ACTIVATIONS, Layout, divides
from sharding.schedule import PipelineConfig, Table

Layer = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
# A tree for each place of the pattern, its repetitions stacked; then one for each last layer.
Parts = tuple[Sequence[Any], Sequence[Any]]


def run_layers(
    layers: Sequence[Layer],
    weights: Parts,
    x_BTD: jax.Array,
    context: Any,
    *,
    unroll: int = 1,
    keep: Policy | None = None,
) -> tuple[jax.Array, Parts]:
    """x through every layer, and the extras of each layer, in parts as the weights are.

    Layers are a pattern of p places, repeated: `layers` are p pure functions
    `(weights, x, context) -> (x, extras)`. `weights` holds p trees that lead with the number of
    repetitions, then the single layers that remain when p does not divide the layers.
    One compiled body serves any number of repetitions; `unroll` repeats it in the program. `keep`
    chooses what a layer keeps for its backward pass; without, whatever that asks for.
    """
    stacks, rest = tuple(weights[0]), weights[1]
    repeats = jax.tree.leaves(stacks)[0].shape[0]
    looped = repeats - repeats % unroll if repeats >= 2 * unroll else 0

    def repetition(x_BTD: jax.Array, weights: Sequence[Any], *, loop: bool = False) -> Any:
        extras = []
        for layer, own in zip(layers, weights, strict=False):
            if keep:
                # Outside a loop XLA would find each value again that the forward pass has made,
                # and keep it; inside, a barrier against that would only cost.
                layer = jax.checkpoint(layer, policy=keep, prevent_cse=not loop)
            x_BTD, extra = layer(own, x_BTD, context)
            extras.append(extra)
        return x_BTD, tuple(extras)

    parts = []
    if looped:
        body = functools.partial(repetition, loop=True)
        some = jax.tree.map(lambda a: a[:looped], stacks)
        x_BTD, extras = lax.scan(body, x_BTD, some, unroll=unroll)
        parts.append(extras)
    if repeats - looped == 1:  # a loop of one still moves what goes through it
        x_BTD, extras = repetition(x_BTD, jax.tree.map(lambda a: a[-1], stacks))
        parts.append(jax.tree.map(lambda a: a[None], extras))
    elif repeats > looped:
        some = jax.tree.map(lambda a: a[looped:], stacks)
        x_BTD, extras = lax.scan(repetition, x_BTD, some, unroll=True)
        parts.append(extras)
    extras = jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts[1:] else parts[0]
    x_BTD, last = repetition(x_BTD, rest)
    return x_BTD, (extras, last)


def by_layer(parts: Parts) -> list[Any]:
    """Parts as one tree for each layer, in the layers' order."""
    stacks, rest = parts
    repeats = jax.tree.leaves(stacks[0])[0].shape[0]
    each = [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(repeats) for tree in stacks]
    return each + list(rest)


class Block(nnx.Module):
    """One layer: attention, then the feed-forward, each added to what came in.

    `Norm.placement` says where the norms stand. A norm's name says its place: norm1 and norm2
    before their branch (or, of "post", after the sum), post1 and post2 after it.
    """

    def __init__(self, cfg: ModelConfig, place: int, layout: Layout, rngs: nnx.Rngs):
        norm = cfg.arch.norm

        def norm_at(*placements: str) -> nnx.Module | None:
            there = norm.placement in placements
            return make_norm(norm, cfg.embed, cfg.param_dtype) if there else None

        self.norm1, self.norm2 = (norm_at("pre", "sandwich", "post") for _ in "12")
        self.post1, self.post2 = (norm_at("output", "sandwich") for _ in "12")
        self.attention = SelfAttention(cfg, cfg.window(place), layout, rngs)
        self.mlp = (MoeMlp if cfg.sparse(place) else make_mlp)(cfg, layout, rngs)
        self.sparse = cfg.sparse(place)
        self.norm_sum = norm.placement == "post"

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: KeysValues | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(x_BTD, extras): the router's statistics, and what `context.keep` asks for."""
        extras = {}

        def seen(name: str, a: jax.Array) -> jax.Array:
            if "finite" in context.keep:
                bad = jnp.sum(~jnp.isfinite(a), dtype=jnp.int32)
                extras["finite"] = {**extras.get("finite", {}), name: bad}
            return a

        def attend(x_BTD: jax.Array) -> jax.Array:
            y_BTD, keys_values = self.attention(x_BTD, context, cache)
            if "cache" in context.keep:
                extras["cache"] = keys_values
            return seen("attention", y_BTD)

        def feed_forward(x_BTD: jax.Array) -> jax.Array:
            if not self.sparse:
                return seen("mlp", self.mlp(x_BTD))
            y_BTD, extras["router"] = self.mlp(x_BTD, context.segments)
            return seen("mlp", y_BTD)

        x_BTD = checkpoint_name(x_BTD, "input")
        x_BTD = self.add(attend, x_BTD, self.norm1, self.post1)
        x_BTD = seen("mid", checkpoint_name(x_BTD, "mid"))
        x_BTD = seen("out", self.add(feed_forward, x_BTD, self.norm2, self.post2))
        if "hidden" in context.keep:
            extras["hidden"] = x_BTD
        return x_BTD, extras

    def add(
        self,
        branch: Callable[[jax.Array], jax.Array],
        x_BTD: jax.Array,
        norm: Callable | None,
        post: Callable | None,
    ) -> jax.Array:
        """x and what the branch makes of it, summed, with the norms in their places."""
        if self.norm_sum:
            return norm(x_BTD + branch(x_BTD))
        y_BTD = branch(norm(x_BTD) if norm else x_BTD)
        return x_BTD + (post(y_BTD) if post else y_BTD)


class Transformer(nnx.Module):
    """A decoder or an encoder. Call it for the hidden states; `head` makes something of them."""

    def __init__(self, cfg: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        assert cfg.vocab, "vocab is resolved from the tokenizer before the model is made"
        arch, extra = cfg.arch, cfg.arch.embeddings
        repeats, rest = divmod(cfg.layers, cfg.places)

        def stack(place: int) -> Block:
            """A Block whose weights lead with L; a stage draws its own layers only."""
            keys = jax.random.split(rngs.params(), repeats)
            keys = jax.reshard(keys, layout.spec("layers"))
            return jax.vmap(lambda key: Block(cfg, place, layout, nnx.Rngs(key)))(keys)

        table = functools.partial(
            Embedding, layout=layout, rngs=rngs, dtype=cfg.param_dtype, std=arch.init.embed
        )
        norm = functools.partial(make_norm, arch.norm, cfg.embed, cfg.param_dtype)
        self.whole, self.apart = (
            layout.spec("batch", tokens, None) for tokens in ("sequence", "residual")
        )
        self.embedding = table(cfg.vocab, cfg.embed)
        self.positions = table(extra.positions, cfg.embed, rows=None) if extra.positions else None
        self.types = table(extra.types, cfg.embed, rows=None) if extra.types else None
        self.embedding_norm = norm() if extra.norm else None
        self.blocks = nnx.List([stack(place) for place in range(cfg.places)])
        self.rest = nnx.List([Block(cfg, place, layout, rngs) for place in range(rest)])
        self.norm = None if arch.norm.placement == "post" else norm()
        self.head = make_head(cfg, layout, rngs)
        self.cfg = cfg
        self.host = tuple(name for name in layout.host if name in ACTIVATIONS)

    def __call__(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        types_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] after the last norm, in the compute dtype."""
        return self.run(ids_BT, positions_BT, segments_BT, types_BT)[0]

    def embed(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        types_BT: jax.Array | None = None,
        *,
        apart: bool = False,
    ) -> jax.Array:
        """What goes into the first layer, [B, T, D]; all the way to the head it lives where it
        lives here: `apart`, with tokens split over tensor too, if there are enough of them."""
        cfg, extra = self.cfg, self.cfg.arch.embeddings
        apart = apart and divides(ids_BT.shape, self.apart)
        out = self.apart if apart else self.whole
        x_BTD = self.embedding(ids_BT, cfg.dtype, out)
        if extra.scale:
            x_BTD *= jnp.asarray(cfg.embed**0.5, x_BTD.dtype)
        if self.positions is not None:
            x_BTD += self.positions(positions_BT + extra.first, cfg.dtype, out)
        if self.types is not None:
            types_BT = jnp.zeros_like(ids_BT) if types_BT is None else types_BT
            x_BTD += self.types(types_BT, cfg.dtype, out)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def run(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        types_BT: jax.Array | None = None,
        *,
        documents: int = 0,
        keep: tuple[str, ...] = (),
        cache: Cache | None = None,
        apart: bool = False,
    ) -> tuple[jax.Array, Parts]:
        """(hidden states after the last norm, extras of the layers).

        `documents` and `keep` say what Context does. With a cache the rows go on from what it
        holds. `apart`: as `embed`, for training.
        """
        cfg = self.cfg
        x_BTD = self.embed(ids_BT, positions_BT, types_BT, apart=apart)
        if stages.stage_count() > 1:
            assert cache is None and not keep, "only whole rows go through stages"
            cut, layers, _ = self.cut(documents=documents)
            weights_BT = (segments_BT > 0).astype(jnp.float32)
            rows = {"positions": positions_BT, "segments": segments_BT, "weights": weights_BT}
            x_BTD = pipeline.relay(cut.stage, layers, x_BTD, rows)
            return x_BTD if self.norm is None else self.norm(x_BTD), ((), ())
        held = None if cache is None else cache.lengths
        rotations = rotations_of(cfg, positions_BT)
        context = Context(segments_BT, rotations, documents, held, keep)
        graphs, stacks = zip(*(nnx.split(block) for block in self.blocks), strict=True)
        rest = [nnx.state(block) for block in self.rest]
        if cache is None:
            layers, weights, keep = map(pure, graphs), (stacks, rest), policy(cfg.remat, self.host)
        else:
            layers, keep = map(pure_cached, graphs), None
            weights = tuple(
                tuple(zip(own, held, strict=True))
                for own, held in ((stacks, cache.layers), (rest, cache.rest))
            )
        x_BTD, extras = run_layers(
            tuple(layers), weights, x_BTD, context, unroll=cfg.unroll, keep=keep
        )
        return x_BTD if self.norm is None else self.norm(x_BTD), extras

    def extend(
        self, ids_BT: jax.Array, counts_B: jax.Array, cache: Cache, *, fresh: bool = False
    ) -> tuple[jax.Array, Cache]:
        """Row b goes on with the first `counts_B[b]` of its ids: (hidden states [B, T, D], cache).

        Hidden states past a row's count mean nothing. `fresh` promises an empty cache, which costs
        no attention to it.
        """
        steps_T = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
        positions_BT = cache.lengths[:, None] + steps_T[None]
        segments_BT = (steps_T[None] < counts_B[:, None]).astype(jnp.int32)
        x_BTD, extras = self.run(
            ids_BT, positions_BT, segments_BT, keep=("cache",), cache=None if fresh else cache
        )
        more = tuple(tuple(extra["cache"] for extra in part) for part in extras)
        if not fresh:
            more = after(x_BTD, more)
        return x_BTD, append(cache, *more, counts_B, fresh=fresh)

    def table(self) -> jax.Array:
        """The weight over the vocabulary, [V, D]: the head's own, or the embedding's."""
        own = getattr(self.head, "table", None)
        return self.embedding.table[...] if own is None else own[...]

    def loss(
        self,
        inputs: jax.Array,
        targets: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        weights: jax.Array,
        *,
        documents: int = 0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of predicting `targets`, as LanguageHead.loss sums it; all [B, T].

        `documents` is the most that a row has; 0: any number. With the loss what to tell of it:
        "nats" without any auxiliary loss, and `of_routers`.
        """
        assert stages.stage_count() == 1, "staged_loss goes through stages"
        x_BTD, extras = self.run(inputs, positions, segments, documents=documents, apart=True)
        loss, nats = self.head.loss(x_BTD, self.table(), targets, weights)
        more, told = of_routers(self.cfg, extras, jnp.sum(weights))
        return loss + more, {"nats": nats, **told}

    def staged_loss(
        self, rows: dict[str, jax.Array], how: PipelineConfig, *, documents: int = 0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`loss` of micro-batches, summed: its arguments, each [M, B, T], through the stages."""
        table = Table.make(how, stages.stage_count(), len(rows["inputs"]))
        cut, layers, ends = self.cut(how.repeats, documents=documents)
        return pipeline.loss(cut, table, layers, ends, rows)

    def cut(self, repeats: int = 1, *, documents: int = 0) -> tuple[pipeline.Cut, Any, Any]:
        """(the model in parts, its layers as a pipeline takes them, the weights of its ends)."""
        cfg, keep = self.cfg, policy(self.cfg.remat, in_flight=True)
        graphs, stacks = zip(*(nnx.split(block) for block in self.blocks), strict=True)
        remat = functools.partial(jax.checkpoint, policy=keep, prevent_cse=False)
        blocks = [remat(pure(graph)) for graph in graphs]
        bare = copy.copy(self)
        bare.blocks = nnx.List([])
        graph, ends = nnx.split(bare)

        def enter(ends: Any, row: pipeline.Rows) -> jax.Array:
            return nnx.merge(graph, ends).embed(row["inputs"], row["positions"], apart=True)

        def stage(
            layers: Any, x_BTD: jax.Array, row: pipeline.Rows
        ) -> tuple[jax.Array, jax.Array, pipeline.Told]:
            context = Context(row["segments"], rotations_of(cfg, row["positions"]), documents)

            def repetition(x_BTD: jax.Array, weights: Sequence[Any]) -> tuple[jax.Array, tuple]:
                extras = []
                for block, own in zip(blocks, weights, strict=True):
                    x_BTD, extra = block(own, x_BTD, context)
                    extras.append(extra)
                return x_BTD, tuple(extras)

            # A loop, even of one: so each weight that its backward pass needs is an argument.
            x_BTD, extras = lax.scan(repetition, x_BTD, layers, unroll=cfg.unroll)
            share_S = jnp.sum(stages.apart(row["weights"]), axis=(1, 2))
            return x_BTD, *of_routers(cfg, (extras, ()), share_S)

        def leave(
            ends: Any, x_BTD: jax.Array, row: pipeline.Rows
        ) -> tuple[jax.Array, pipeline.Told]:
            model = nnx.merge(graph, ends)
            x_BTD = x_BTD if model.norm is None else model.norm(x_BTD)
            loss, nats = model.head.loss(x_BTD, model.table(), row["targets"], row["weights"])
            return loss, {"nats": nats}

        layers = jax.tree.map(functools.partial(stages.deal, repeats=repeats), stacks)
        return pipeline.Cut(enter, stage, leave), layers, ends

    def logits(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        types_BT: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads from the hidden states, float32: [B, T, V] of a language head."""
        x_BTD = self(ids_BT, positions_BT, segments_BT, types_BT)
        return self.head.logits(x_BTD, self.table())


def rotations_of(cfg: ModelConfig, positions_BT: jax.Array) -> dict[str, Rotation]:
    """RoPE's of these tokens, for layers with and without a window."""
    rope = cfg.arch.rope
    turn = functools.partial(rotation, positions_BT, cfg.head_dim)
    rotations = {"global": turn(rope.theta, rope.scaling)} if rope.theta else {}
    if rope.local_theta:
        rotations["local"] = turn(rope.local_theta)
    return rotations


def of_routers(cfg: ModelConfig, extras: Parts, share: jax.Array) -> tuple[jax.Array, dict]:
    """(what routers add to the loss, what to tell of them), from the extras of some layers.

    Told are means over all layers with experts of the balance, of log(Z)^2 and of the largest load
    (MoeMlp), times `share`, the sum of the rows' weights, so that sums over micro-batches and over
    stages are means over the batch.
    """
    routers = [extra["router"] for extra in extras[0] if "router" in extra] + [
        jax.tree.map(lambda one: one[None], extra["router"])
        for extra in extras[1]
        if "router" in extra
    ]
    if not routers:
        return jnp.zeros_like(share), {}
    moe, count = cfg.arch.moe, sum(map(cfg.sparse, range(cfg.layers)))

    def mean(name: str, of: Callable[[jax.Array], jax.Array] = lambda a: a) -> jax.Array:
        return share / count * sum(jnp.sum(of(router[name]), axis=0) for router in routers)

    told = {
        "router_balance": mean("balance"),
        "router_z": mean("z"),
        "router_load": mean("load", lambda load: jnp.max(load, axis=-1)),
    }
    return moe.balance * told["router_balance"] + moe.z_loss * told["router_z"], told


def after(x_BTD: jax.Array, keys_values: Any) -> Any:
    """The same keys and values, of which XLA knows that x comes before them.

    Only if each write of a cache comes after all that reads it can it be done in place; so every
    step would copy the cache. A row whose hidden states are NaN gets a cache of NaN.
    """
    broken_B = jnp.isnan(x_BTD[:, 0, 0])

    def mark(a: jax.Array) -> jax.Array:
        broken = jnp.expand_dims(broken_B, (*range(a.ndim - 4), *range(a.ndim - 3, a.ndim)))
        return jnp.where(broken, jnp.asarray(jnp.nan, a.dtype), a)

    return jax.tree.map(mark, keys_values)


def pure(graph: nnx.GraphDef) -> Layer:
    """A block as a function of its weights."""
    return lambda weights, x_BTD, context: nnx.merge(graph, weights)(x_BTD, context)


def pure_cached(graph: nnx.GraphDef) -> Layer:
    """A block as a function of its weights and its part of a cache."""
    return lambda own, x_BTD, context: nnx.merge(graph, own[0])(x_BTD, context, own[1])


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
