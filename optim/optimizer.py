"""The optimizer of a run, as one optax chain.

A gradient arrives with its parameter's sharding and so does the update; what lies between is
optax, which knows nothing of meshes.
"""

from typing import Any, Protocol

import jax
import optax
from jax.sharding import auto_axes
from optax.contrib import MuonDimensionNumbers, muon

from optim.config import OptimConfig
from optim.schedule import make_schedule
from sharding import offload


class Role(Protocol):
    """What an optimizer asks of a parameter."""

    kind: str  # "matrix" (of a hidden layer), "embedding", "head" or "vector"
    outputs: int  # a matrix' dims of outputs
    inputs: int  # and of inputs, the last ones


def make_optimizer(
    cfg: OptimConfig, steps: int, roles: Any, *, by_layer: bool = False
) -> optax.GradientTransformation:
    """Clip, then the optimizer of `cfg.name` with its schedule and weight decay.

    `roles`: a tree of Role, shaped like the parameters. `by_layer`: the moments lie in host memory,
    and one layer's at a time come to the device.
    """
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    whole = optax.chain(*clip, *make_links(cfg, steps, roles))
    if not by_layer:
        return whole

    def make(roles: Any) -> optax.GradientTransformation:
        return optax.chain(*make_links(cfg, steps, roles))

    def update(
        grads: Any, state: Any, params: Any = None, *, good: jax.Array | None = None
    ) -> tuple[Any, Any]:
        clipped, own = state[: len(clip)], state[len(clip) :]
        if clip:
            grads, clipped = optax.chain(*clip).update(grads, clipped)
        updates, own = offload.update(make, roles, grads, own, params, good)
        return updates, clipped + own

    return optax.GradientTransformationExtraArgs(whole.init, update)


def make_links(cfg: OptimConfig, steps: int, roles: Any) -> list[optax.GradientTransformation]:
    """What comes after the clip; of layers none knows of another, save in adafactor."""
    schedule = make_schedule(cfg, steps)
    if cfg.name == "muon":
        return [make_muon(cfg, steps, roles)]
    decays = jax.tree.map(lambda role: role.kind != "vector", roles)
    decay = optax.add_decayed_weights(cfg.weight_decay, decays)
    return [SCALES[cfg.name](cfg), decay, optax.scale_by_learning_rate(schedule)]


SCALES = {
    # Loshchilov & Hutter 2017, arXiv:1711.05101
    "adamw": lambda cfg: optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2),
    "sgd": lambda cfg: optax.trace(decay=cfg.b1),
    # Chen et al. 2023, arXiv:2302.06675
    "lion": lambda cfg: optax.scale_by_lion(b1=cfg.b1, b2=cfg.b2),
    # Shazeer & Stern 2018, arXiv:1804.04235
    "adafactor": lambda cfg: optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),  # head_dim included
        optax.clip_by_block_rms(1.0),
        optax.ema(cfg.b1),
    ),
}


def make_muon(cfg: OptimConfig, steps: int, roles: Any) -> optax.GradientTransformation:
    """Muon for hidden matrices, Nesterov's Adam, undecayed, for the rest. Jordan et al. 2024.

    Muon's updates have AdamW's usual root mean square (Liu et al. 2025, arXiv:2502.16982), so
    learning rate and weight decay carry over from AdamW.
    """
    rates = {
        "matrix": cfg.lr,
        "embedding": cfg.muon.embed_lr or cfg.lr,
        "head": cfg.muon.head_lr or cfg.lr,
        "vector": cfg.muon.vector_lr or cfg.lr,
    }

    def dims(role: Role) -> MuonDimensionNumbers | None:
        if role.kind != "matrix":
            return None
        inputs = tuple(range(-role.inputs, 0))
        outputs = tuple(range(-role.inputs - role.outputs, -role.inputs))
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    turn = muon(
        1.0,
        ns_steps=cfg.muon.iterations,
        beta=cfg.muon.momentum,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=jax.tree.map(dims, roles),
        consistent_rms=0.2,
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Devices talk over what splits a matrix: products of it with itself, whose bytes XLA
        # sends where it chooses.
        where = jax.tree.map(lambda a: jax.typeof(a).sharding, (updates, state))
        return auto_axes(turn.update, out_sharding=where)(updates, state, params)

    shape = make_schedule(cfg, steps, peak=1.0)
    scale = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, role: rates[role.kind] * u, updates, roles)
    )
    return optax.chain(
        optax.GradientTransformation(turn.init, update), scale, optax.scale_by_schedule(shape)
    )
