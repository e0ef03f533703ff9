"""The second pass over a batch whose step was not finite: which layer and tensor was the first.

In the order of computing: parameters, embeddings, layers, loss; then back from the loss, gradients.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from checkpoint.store import flatten
from model.config import ModelConfig
from model.transformer import by_layer
from optim import histories
from sharding import offload
from sharding.stages import stage_count

TENSORS = {  # of a layer, in order
    "attention": "what its attention gives",
    "mid": "the states after its attention",
    "mlp": "what its feed-forward gives",
    "out": "the states after its feed-forward",
}


class SecondPass:
    """Looks at a train.Program's steps with a program of its own, which takes a step's memory."""

    def __init__(self, program: Any):
        self.program = program
        self._look = program.jit(looked)

    def first_bad(self, params: Any, batch: dict[str, jax.Array]) -> str:
        """The first layer and tensor that is not finite, "" if all are; `batch` is on the mesh.

        NotImplementedError where layers lie on stages.
        """
        if stage_count() > 1:
            raise NotImplementedError("not looked for over stages; tools.replay does on one device")
        for part in self.program.parts(batch):
            text = tell(self.program.run.model, jax.device_get(self._look(params, part)))
            if text:
                return text
        return ""


def looked(program: Any, params: Any, rows: dict[str, jax.Array]) -> dict[str, Any]:
    """How many values of each tensor are not finite: of stacked parameters [L], else scalars."""
    weights = (rows["segments"] > 0).astype(jnp.float32)
    weights /= jnp.maximum(jnp.sum(weights), 1)
    ids, params = (rows["inputs"], rows["positions"]), offload.fetch(params)
    model = nnx.merge(program.graph, params)
    hidden, extras = model.run(
        *ids, rows["segments"], documents=program.documents, keep=("finite",)
    )

    def loss(params: Any) -> tuple[jax.Array, dict]:
        model = nnx.merge(program.graph, params)
        return model.loss(**rows, weights=weights, documents=program.documents)

    (total, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return {
        "params": of_tree(params),
        "embedding": bad(model.embed(*ids, None)),
        "layers": [extra["finite"] for extra in by_layer(extras)],
        "hidden": bad(hidden),
        "loss": bad(total),
        "gradients": of_tree(histories.weights(grads)),
    }


def bad(a: jax.Array, first: int = 0) -> jax.Array:
    """How many values are not finite, over the dims from `first` on."""
    return jnp.sum(~jnp.isfinite(a), axis=tuple(range(first, a.ndim)), dtype=jnp.int32)


def of_tree(tree: Any) -> dict[str, jax.Array]:
    return {name: bad(a, name.startswith("blocks.")) for name, a in flatten(tree).items()}


def tell(cfg: ModelConfig, found: dict[str, Any]) -> str:
    """The first of what `looked` found, in words."""
    for layer, name, count in in_order(cfg, found["params"]):
        if count:
            return f"{layer}: the parameter {name} has {amount(count)}"
    if found["embedding"]:
        return f"the embeddings have {amount(found['embedding'])}"
    for number, tensors in enumerate(found["layers"]):
        for name, words in TENSORS.items():
            if tensors[name]:
                return f"layer {number}: {words} has {amount(tensors[name])} ({name})"
    for name, words in (("hidden", "the states after the last norm"), ("loss", "the loss")):
        if found[name]:
            return f"{words}: {amount(found[name])}; all layers are finite"
    for layer, name, count in reversed(in_order(cfg, found["gradients"])):
        if count:
            return f"{layer}: the gradient of {name} has {amount(count)}; the loss is finite"
    return ""


def in_order(cfg: ModelConfig, counts: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(layer, parameter, count) from the embedding to the head."""

    def rows() -> Iterable[tuple[int, str, str, int]]:
        repeats = cfg.layers // cfg.places
        for name, count in counts.items():
            group, _, rest = name.partition(".")
            if group in ("blocks", "rest"):
                place, _, own = rest.partition(".")
                own = own.removesuffix(".value")
                first = int(place) if group == "blocks" else repeats * cfg.places + int(place)
                each = count if group == "blocks" else [count]
                for i, one in enumerate(each):
                    layer = first + i * cfg.places
                    yield layer, f"layer {layer}", own, int(one)
            else:
                last = group in ("norm", "head")
                yield cfg.layers if last else -1, group, name, int(count)

    return [row[1:] for row in sorted(rows(), key=lambda row: row[0])]


def amount(count: int) -> str:
    return f"{int(count):,} NaN or infinite"
