"""Host memory: what lies there between its uses, fetched to its device and put back.

`Layout.host` names it. A device reaches its host's memory at a sixtieth of the speed of its own (50
GB/s over an H100's link), so what a step reads once or twice belongs there: moments, the embedding
table, activations that wait for the backward pass. Each device keeps its own part: no devices talk
here. Where an array lies is part of its type. In ZeRO-Offload (Ren et al. 2021, arXiv:2101.06840)
the host updates; here the device does, with the moments of one layer at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import lax

HOST = "pinned_host"  # JAX's name for memory of the host that devices copy from and to directly
LAYERS = "blocks"  # the parameters whose first dim numbers layers

Make = Callable[[Any], optax.GradientTransformation]  # of the roles of some parameters


def check(host: Sequence[str], devices: Iterable[jax.Device]) -> None:
    """Raise ValueError unless these devices can keep in their hosts' memory what `host` names."""
    for device in devices if host else ():
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise ValueError(
                f"layout: host={','.join(host)} needs the memory {HOST!r}, which {device.platform} "
                f"device {device.id} ({device.device_kind}) does not have, only "
                f"{', '.join(kinds) or 'none'}; --config.layout.host= keeps all on the device"
            )


def is_hosted(x: jax.Array) -> bool:
    """Whether x lies in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetch(tree: Any, after: Any = None) -> Any:
    """The arrays of `tree` on their devices; those of the host are copied.

    `after`: arrays of a tree like this one. Each copy waits for its own, and none that was made
    before serves in its place, which would have to stay until then.
    """

    def one(x: jax.Array, *after: jax.Array) -> jax.Array:
        if not is_hosted(x):
            return x
        if after:
            x, *_ = lax.optimization_barrier((x, *after))
        return jax.device_put(x, jax.memory.Space.Device)

    return jax.tree.map(one, tree, *([] if after is None else [after]))


def put(tree: Any, like: Any) -> Any:
    """The arrays of `tree`, each in the memory where that of `like` is."""

    def one(x: jax.Array, home: jax.Array) -> jax.Array:
        return jax.device_put(x, jax.memory.Space.Host) if is_hosted(home) else x

    return jax.tree.map(one, tree, like)


def place(host: Sequence[str], params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Shapes of parameters and optimizer state, in the memory that `host` gives them."""

    def home(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(sharding=leaf.sharding.with_memory_kind(HOST))

    if "optimizer" in host:
        moments, rebuild = moments_of(opt_state, params)
        opt_state = rebuild(jax.tree.map(home, moments))
    if "embedding" in host:
        table = jax.tree.map(home, params["embedding"])
        params = {**params, "embedding": table}
    return params, opt_state


def apart(tree: Any) -> tuple[Any, Any]:
    """(`tree` without what lies on the host, that alone); None in place of the rest."""
    return without(tree, tree), jax.tree.map(lambda leaf: leaf if _there(leaf) else None, tree)


def without(opt_state: Any, like: Any) -> Any:
    """An optimizer's state with None for what lies on the host in `like`."""
    return jax.tree.map(lambda home, x: None if _there(home) else x, like, opt_state)


def filled(opt_state: Any, like: Any) -> Any:
    """What `without` left, and zeros on the host, as all moments begin: no device makes them."""

    def one(home: jax.ShapeDtypeStruct, x: jax.Array | None) -> jax.Array:
        if not _there(home):
            return x
        part = np.zeros(home.sharding.shard_shape(home.shape), home.dtype)
        return jax.make_array_from_callback(home.shape, home.sharding, lambda _: part)

    return jax.tree.map(one, like, opt_state)


def _there(home: jax.ShapeDtypeStruct) -> bool:
    return home.sharding.memory_kind == HOST


def moments_of(opt_state: Any, params: dict) -> tuple[list[dict], Callable[[list[dict]], Any]]:
    """The trees in an optax state with an entry for each of `params`, and the state of such trees.

    What else a state holds, such as its count of steps, is a few numbers.
    """

    def is_moments(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == params.keys()

    nodes, treedef = jax.tree.flatten(opt_state, is_leaf=is_moments)
    places = [i for i, node in enumerate(nodes) if is_moments(node)]

    def rebuild(moments: list[dict]) -> Any:
        own = dict(zip(places, moments, strict=True))
        return treedef.unflatten([own.get(i, node) for i, node in enumerate(nodes)])

    return [nodes[i] for i in places], rebuild


def update(
    make: Make,
    roles: dict,
    grads: dict,
    state: Any,
    params: dict,
    good: jax.Array,
) -> tuple[dict, Any]:
    """`make(roles).update(grads, state, params)`, with the moments of one layer on the device.

    For a transformation in which layers do not know of each other. The updates take the memory of
    the gradients. Moments stay what they were unless `good`.
    """

    def of(tree: dict, names: Iterable[str]) -> dict:
        return {name: tree[name] for name in names}

    moments, rebuild = moments_of(state, params)
    rest = [name for name in params if name != LAYERS]
    updates, layers = _layers(
        make({LAYERS: roles[LAYERS]}),
        of(grads, [LAYERS]),
        rebuild([of(tree, [LAYERS]) for tree in moments]),
        of(params, [LAYERS]),
        good,
    )
    own = rebuild([of(tree, rest) for tree in moments])
    # They come when the layers are done: XLA would issue their copies as early as it can.
    updates, own = lax.optimization_barrier((updates, own))
    before = fetch(own)
    others, after = make(of(roles, rest)).update(of(grads, rest), before, of(params, rest))
    state = put(chosen(good, after, before), own)
    merged, rebuild = moments_of(state, of(params, rest))
    return updates | others, rebuild([a | b for a, b in zip(merged, layers, strict=True)])


def _layers(
    turn: optax.GradientTransformation,
    grads: dict,
    state: Any,
    params: dict,
    good: jax.Array,
) -> tuple[dict, list[dict]]:
    """The updates of stacked parameters, and their moments.

    Gradients, which lie on the device, and moments, on the host, are written over in place.
    """
    moments, rebuild = moments_of(state, params)

    def at(tree: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), tree)

    def layer(i: jax.Array, stacks: tuple[dict, list[dict]]) -> tuple[dict, list[dict]]:
        own, there = at(stacks, i)
        before = fetch(there)
        updates, after = turn.update(own, rebuild(before), at(params, i))
        made = updates, put(chosen(good, moments_of(after, params)[0], before), there)
        return jax.tree.map(lambda a, x: lax.dynamic_update_index_in_dim(a, x, i, 0), stacks, made)

    count = jax.tree.leaves(params)[0].shape[0]
    return lax.fori_loop(0, count, layer, (grads, moments))


def chosen(good: jax.Array, after: Any, before: Any) -> Any:
    """`after` if it is good, else `before`."""
    return jax.tree.map(lambda a, b: lax.select(good, a, b), after, before)
