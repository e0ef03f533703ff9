"""A pipeline: micro-batches on their way through layers that lie on the stages of a mesh.

One engine runs any table (schedule.py), as a scan over its clocks. At a clock the forwards of all
stages are one computation on rows in flight (stages.py), and then their backwards; activations go
one stage on, what comes back goes one stage back. What a backward needs of its forward, the
residuals of `jax.vjp`, waits in the slots that the table lends. Weights are not among them.

The ends of the model, embedding and head, belong to no stage: all devices work on them at each
clock, for the one micro-batch that enters or leaves, and so share the vocabulary and the time.

Shapes: S stages, V chunks of a stage, M micro-batches, B rows of one, T tokens, D embed. Arrays in
flight are [S B, ...].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import stages
from sharding.gather import axes_of
from sharding.schedule import Table, Work

Rows = dict[str, jax.Array]  # of the batch [M, B, T], of a micro-batch [B, T], in flight [S B, T]
Told = dict[str, jax.Array]


@dataclass(frozen=True)
class Cut:
    """A model cut in three: pure functions of weights, activations and a micro-batch's rows."""

    # Of the ends' weights: x_BTD.
    enter: Callable[[Any, Rows], jax.Array]
    # Of a chunk's weights, in flight: x, each stage's part of the loss and what to tell, all [S].
    stage: Callable[[Any, jax.Array, Rows], tuple[jax.Array, jax.Array, Told]]
    # Of the ends' weights: the rest of the loss, and what to tell.
    leave: Callable[[Any, jax.Array, Rows], tuple[jax.Array, Told]]


def loss(cut: Cut, table: Table, layers: Any, ends: Any, rows: Rows) -> tuple[jax.Array, Told]:
    """(loss, what to tell), summed over the micro-batches; `layers` as `stages.deal` returns them.

    Differentiated, the table's forwards and backwards run at once; otherwise its forwards only.
    """

    @jax.custom_vjp
    def total(layers: Any, ends: Any, rows: Rows) -> tuple[jax.Array, Told]:
        return _Engine(cut, table, layers, ends, rows, gradients=False).run()[0]

    def forward(layers: Any, ends: Any, rows: Rows) -> tuple[tuple[jax.Array, Told], Any]:
        return _Engine(cut, table, layers, ends, rows, gradients=True).run()

    def backward(gradients: Any, cotangents: Any) -> tuple[Any, Any, None]:
        g, _ = cotangents

        def times(a: jax.Array) -> jax.Array:
            parts = jax.typeof(a).sharding.spec.unreduced  # of a sum; g is that of all of them
            return (a * jax.reshard(g, jax.P(reduced=parts))).astype(a.dtype)

        return *jax.tree.map(times, gradients), None

    total.defvjp(forward, backward)
    return total(layers, ends, rows)


def relay(stage: Callable, layers: Any, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """x through all layers, [B, T, D]: in S clocks, of each of which one stage's work counts.

    The plain way through, which JAX differentiates as it is, for a forward pass now and then.
    `stage` is that of Cut, `layers` are dealt without repeats.
    """
    count = stages.stage_count()
    zero_S = stages.along(np.zeros(count, np.int32))
    first = stages.along(np.arange(count) == 0)
    row = stages.pick(jax.tree.map(lambda a: a[None], rows), zero_S)

    def clock(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return stages.send(stage(layers, x, row)[0], 1, around=True), None

    x = stages.where(first, x_BTD, _zeros(_in_flight(x_BTD)))
    x, _ = lax.scan(clock, x, length=count)
    return stages.take(x, first)


# ---- the engine ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What goes from clock to clock; without gradients only x and the sums."""

    x: jax.Array  # in flight: what came from the stage before
    sums: Told  # of the head
    sums_S: Told  # of the layers, each [S]
    dx: jax.Array | None = None  # in flight: what came back from the stage behind
    stash: Any = None  # residuals, each [slots, ...]
    constants: Any = None  # residuals that are the same for all stages and micro-batches
    waiting: Any = None  # [gaps, B, T, D]: what came back from the head
    dlayers: Any = None
    dends: Any = None


class _Engine:
    """A table at work on a batch."""

    def __init__(
        self, cut: Cut, table: Table, layers: Any, ends: Any, rows: Rows, *, gradients: bool
    ):
        self.cut, self.table = cut, table
        self.layers, self.ends, self.rows = layers, ends, rows
        self.gradients, self.around = gradients, table.line.repeats > 1

    def run(self) -> tuple[tuple[jax.Array, Told], tuple[Any, Any] | None]:
        """((loss, what to tell), gradients of layers and ends, or None)."""
        state = self.begin()
        for start, stop, forward, backward in self.table.segments():
            leaves = self.table.forward.last[start:stop, -1]
            head = "always" if leaves.all() else "sometimes" if leaves.any() else "never"
            backward = backward and self.gradients
            if forward or backward:
                clock = functools.partial(self.clock, forward=forward, head=head, backward=backward)
                state, _ = lax.scan(clock, state, self.clocks(start, stop))
        # Devices talk over `stage`: what each tells of its layers, 4 bytes a number.
        told = state.sums | jax.tree.map(jnp.sum, state.sums_S)
        total = told.pop("loss") + told.pop("loss_S")
        return (total, told), (state.dlayers, state.dends) if self.gradients else None

    def begin(self) -> _State:
        """The state before the first clock."""
        row = self.row(0)
        x = jax.eval_shape(self.cut.enter, self.ends, row)
        zero_S = stages.along(np.zeros(self.table.line.stages, np.int32))
        flight = _in_flight(x)
        _, sums_S, residuals = jax.eval_shape(
            lambda: self.ahead(self.chunk(zero_S), _zeros(flight), stages.pick(self.rows, zero_S))
        )
        sums = jax.eval_shape(lambda: self.head(_zeros(x), row))[0]
        state = _State(_zeros(flight), *jax.tree.map(_zeros, (sums, sums_S)))
        if not self.gradients:
            return state
        stash, constants = residuals
        return replace(
            state,
            dx=_zeros(flight),
            stash=[_zeros(leaf, self.table.slots) for leaf in stash],
            constants=[_zeros(leaf) for leaf in constants],
            waiting=_zeros(x, self.table.gaps),
            dlayers=jax.tree.map(_no_gradient, self.layers),
            dends=jax.tree.map(_no_gradient, self.ends),
        )

    def clocks(self, start: int, stop: int) -> dict[str, Any]:
        """What happens at these clocks, for `lax.scan`."""
        forward, backward = self.table.forward, self.table.backward
        ends = {
            "enter": forward.micro[:, 0],
            "leave": forward.micro[:, -1],
            "leaves": forward.last[:, -1],
            "exit": backward.micro[:, 0],
            "gap": self.table.gap,
            "back": self.table.back,
        }

        def along(work: Work) -> dict[str, jax.Array]:
            return {name: stages.along(a[start:stop]) for name, a in vars(work).items()}

        ends = {name: jnp.asarray(a[start:stop]) for name, a in ends.items()}
        return {"forward": along(forward), "backward": along(backward), **ends}

    def clock(
        self, state: _State, now: dict[str, Any], *, forward: bool, head: str, backward: bool
    ) -> tuple[_State, None]:
        """One clock, of the works that any stage has in this part of the table."""
        if forward:
            state, y = self.forward(state, now)

            def turn(ends: tuple) -> tuple:
                return self.turn(ends, y, now)

            ends = state.sums, state.waiting, state.dends
            if head == "always":
                ends = turn(ends)
            elif head == "sometimes":
                ends = lax.cond(now["leaves"], turn, lambda ends: ends, ends)
            state = replace(state, sums=ends[0], waiting=ends[1], dends=ends[2])
        if backward:
            state = self.backward(state, now)
        return state, None

    def forward(self, state: _State, now: dict[str, Any]) -> tuple[_State, jax.Array]:
        """(state, what the stages made), their work of this clock being done and sent on."""
        own = now["forward"]
        entering = self.cut.enter(self.ends, self.row(now["enter"]))
        x = stages.where(own["first"], entering, state.x)
        layers, row = self.chunk(own["chunk"]), stages.pick(self.rows, own["micro"])
        y, told, (residuals, constants) = self.ahead(layers, x, row)
        sums_S = jax.tree.map(lambda a, b: a + jnp.where(own["on"], b, 0), state.sums_S, told)
        state = replace(state, x=stages.send(y, 1, around=self.around), sums_S=sums_S)
        if self.gradients:
            stash = stages.put(state.stash, residuals, own["slot"])
            state = replace(state, stash=stash, constants=constants)
        return state, y

    def ahead(self, layers: Any, x: jax.Array, row: Rows) -> tuple[jax.Array, Told, tuple]:
        """(y, sums of the stages, residuals): the stages' work on these, all in flight.

        A residual that is an argument, such as a weight, is left out: `backward` has it anyway.
        """

        def stage(layers: Any, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Told]:
            y, loss_S, told = self.cut.stage(layers, x, row)
            return (y, loss_S), told

        if not self.gradients:
            (y, loss_S), told = stage(layers, x)
            return y, {"loss_S": loss_S, **told}, ([], [])
        (y, loss_S), back, told = jax.vjp(stage, layers, x, has_aux=True)
        leaves, self.back_tree = jax.tree.flatten(back)
        given = {id(leaf): n for n, leaf in enumerate(jax.tree.leaves((layers, row)))}
        self.sources = [given[id(a)] if id(a) in given else _kept_in(a) for a in leaves]
        kept = tuple(
            [leaf for leaf, source in zip(leaves, self.sources, strict=True) if source == kind]
            for kind in ("stash", "constants")
        )
        return y, {"loss_S": loss_S, **told}, kept

    def turn(self, ends: tuple, y: jax.Array, now: dict[str, Any]) -> tuple:
        """The head's work on what leaves: (sums, waiting, gradients of the ends)."""
        sums, waiting, dends = ends
        x = stages.take(y, now["forward"]["last"])
        more, gradients = self.head(x, self.row(now["leave"]))
        sums = jax.tree.map(jnp.add, sums, more)
        if self.gradients:
            waiting = lax.dynamic_update_index_in_dim(waiting, gradients[1], now["gap"], 0)
            dends = jax.tree.map(jnp.add, dends, gradients[0])
        return sums, waiting, dends

    def head(self, x: jax.Array, row: Rows) -> tuple[Told, tuple[Any, jax.Array] | None]:
        """(sums, gradients of the ends and of x) of one micro-batch."""

        def leave(ends: Any, x: jax.Array) -> tuple[jax.Array, Told]:
            return self.cut.leave(ends, x, row)

        if not self.gradients:
            loss, told = leave(self.ends, x)
            return {"loss": loss, **told}, None
        (loss, told), gradients = jax.value_and_grad(leave, (0, 1), has_aux=True)(self.ends, x)
        return {"loss": loss, **told}, gradients

    def backward(self, state: _State, now: dict[str, Any]) -> _State:
        """The state, the stages' backwards of this clock being done and sent back."""
        own = now["backward"]
        layers, row = self.chunk(own["chunk"]), stages.pick(self.rows, own["micro"])
        kept = {
            "stash": iter(stages.pick(state.stash, own["slot"])),
            "constants": iter(state.constants),
        }
        given = jax.tree.leaves((layers, row))
        leaves = [given[s] if isinstance(s, int) else next(kept[s]) for s in self.sources]
        back = jax.tree.unflatten(self.back_tree, leaves)
        head = lax.dynamic_index_in_dim(state.waiting, now["back"], keepdims=False)
        dy = stages.where(own["last"], head, state.dx)
        dlayers, dx = back((dy, jnp.ones_like(state.sums_S["loss_S"])))
        row = self.row(now["exit"])
        _, out = jax.vjp(lambda ends: self.cut.enter(ends, row), self.ends)
        (dends,) = out(stages.take(dx, own["first"]))
        return replace(
            state,
            dx=stages.send(dx, -1, around=self.around),
            dlayers=stages.add(state.dlayers, dlayers, own["chunk"], own["on"]),
            dends=jax.tree.map(jnp.add, state.dends, dends),
        )

    def chunk(self, index_S: jax.Array) -> Any:
        """The layers of each stage's chunk."""
        return stages.chunk(self.layers, index_S, self.table.line.repeats)

    def row(self, micro: jax.Array | int) -> Rows:
        """The rows of one micro-batch, for all stages."""
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, micro, keepdims=False), self.rows)


def _kept_in(residual: jax.Array) -> str:
    """Where one waits for its backward: one of stages has other values for each micro-batch."""
    spec = _spec(residual)
    assert not spec.reduced, f"{spec}: a gathered weight would be kept for each micro-batch"
    return "stash" if stages.STAGE in sum(map(axes_of, spec), ()) else "constants"


def _in_flight(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of rows in flight, from that of a micro-batch's."""
    spec = stages.flight_spec(_spec(x))
    shape = (stages.stage_count() * x.shape[0], *x.shape[1:])
    where = jax.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)


def _spec(x: Any) -> jax.P:
    """The partition of an array or of its shape."""
    sharding = (x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)).sharding
    return jax.P() if sharding is None else sharding.spec


def _zeros(shape: Any, *lead: int) -> jax.Array:
    """Zeros of this shape, where it lies; more dims may lead."""
    spec = jax.P(*[None] * len(lead), *_spec(shape))
    return jnp.zeros((*lead, *shape.shape), shape.dtype, out_sharding=spec)


def _no_gradient(weight: jax.Array) -> jax.Array:
    """Zeros that gradients of a weight are added to: of one that is `reduced`, parts of a sum."""
    spec = jax.typeof(weight).sharding.spec
    spec = jax.P(*spec.partitions, unreduced=spec.reduced)
    return jax.shard_map(jnp.zeros_like, out_specs=spec, check_vma=False)(weight)
