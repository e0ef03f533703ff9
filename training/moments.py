"""What each step of a run leaves, to compare runs that differ in placement only."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sharding import offload
from training import shrunk


def output_step(program: Any, state: Any, batch: dict[str, jax.Array]) -> tuple[Any, dict]:
    """train.train_step for a head without a training loss; its metrics hold the outputs.

    The loss is the mean of 1 + sin(y_k + k) over the outputs y of all tokens that are no padding:
    a norm, which would hold any mean square, does not make it constant.
    """
    segments, types = batch["segments"], program.run.model.arch.embeddings.types
    kinds = batch["targets"] % types if types else None

    def score(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(program.graph, params)
        y = model.logits(batch["inputs"], batch["positions"], segments, kinds)
        shift = jnp.arange(y.shape[-1], dtype=y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        waves = jnp.mean(1 + jnp.sin(y + shift), axis=-1)
        real = (segments if waves.ndim == 2 else jnp.max(segments, axis=1)) > 0
        return jnp.sum(waves * real) / jnp.sum(real), y

    (loss, outputs), grads = program.gradient(score, offload.fetch(state.params))
    params = offload.fetch(state.params, after=grads)
    params, opt_state = program.optimizer.step(
        state.step, jnp.bool_(True), grads, state.opt_state, params
    )
    params = offload.put(params, like=state.params)
    metrics = {"loss": loss, "outputs": outputs}
    step = state.step + 1
    return dataclasses.replace(state, step=step, params=params, opt_state=opt_state), metrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moment:
    """What a step leaves: arrays on the mesh, or NumPy's of the one device."""

    loss: Any
    outputs: Any  # of a head without a loss
    grads: Any
    params: Any

    @classmethod
    def of(cls, state: Any, metrics: dict) -> "Moment":
        """The moment after a step. The trace of SGD without momentum is the gradient."""
        grads = optax.tree_utils.tree_get(state.opt_state, "trace")
        return cls(metrics["loss"], metrics.get("outputs", ()), grads, state.params)


def each(program: Any, step: Any, start: Any) -> Iterator[Moment]:
    """Each step's moment, from these parameters; it is gone when the next step begins."""
    where = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
    state = program.begin(jax.device_put(start, where))
    for batch in shrunk.batches(program.run):
        state, metrics = step(state, program.place(batch))
        yield Moment.of(state, metrics)


def distance(ours: Any, right: Any) -> float:
    """Norm of the difference of two trees over the norm of `right`, from the worst copies."""
    apart = whole = 0.0
    for leaf, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        reference = np.asarray(reference, np.float64)
        worst: dict[str, float] = {}
        for shard in leaf.addressable_shards:
            part = np.asarray(shard.data, np.float64) - reference[shard.index]
            square = np.sum(part * part)
            where = str(shard.index)
            worst[where] = float(np.maximum(worst.get(where, 0.0), square))  # max() loses a NaN
        apart += sum(worst.values())
        whole += float(np.sum(reference * reference))
    return math.sqrt(apart) / math.sqrt(whole) if whole else float(apart > 0)
