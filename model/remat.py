"""Remat: what a layer keeps of its forward pass for its backward pass; the rest is made again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import Offloadable

from model.kernels import cudnn
from sharding.offload import HOST

Policy = Callable[..., Any]  # of a primitive, its operands' types and its parameters

# The names, in the model, of what each kind of remat keeps, from least compute to least memory.
REMAT = {
    "dots": ("qkv", "attention", "mid", "up"),  # recomputes norms, rotations and curves
    "mlp": ("qkv", "attention", "mid"),  # and the matmul into the hidden units
    "attention": ("attention",),  # and all matmuls, but not attention
    "full": (),  # keeps the layer's input only
}
# What comes from other devices and what stands around it in sharding/gather.py: kept, the weights
# of all layers would lie whole on every device. A transpose elsewhere is as cheap to make again.
GATHERS = ("all_gather", "preduced", "transpose")
MOVES = ("convert_element_type", "slice", "squeeze", "split", "reshape", "broadcast_in_dim")


def policy(remat: str, host: Sequence[str] = (), *, in_flight: bool = False) -> Policy:
    """For `jax.checkpoint`. "none" keeps all but what was gathered, which is gathered again.

    The names in `host` wait for the backward pass in host memory, whatever `remat` says of them:
    those of REMAT, and "input", what a layer begins with.

    In a pipeline it keeps nothing that was only cast or moved, as weights are: a stage would keep
    a copy of its own for each micro-batch that is on its way.
    """
    kept = on_device(remat, in_flight=in_flight)
    if not host:
        return kept
    there = Offloadable(src="device", dst=HOST)

    def where(primitive: Any, *args: Any, **params: Any) -> Any:
        fused = primitive.name.startswith(cudnn.PRIMITIVE) and "attention" in host
        if fused or (primitive.name == "name" and params["name"] in host):
            return there
        return kept(primitive, *args, **params)

    return where


def on_device(remat: str, *, in_flight: bool) -> Policy:
    """What each kind of remat keeps, all of it on the device."""
    if remat == "none":
        return computed if in_flight else own
    named = jax.checkpoint_policies.save_only_these_names(*REMAT[remat])
    if "attention" not in REMAT[remat]:
        return named

    def with_attention(primitive: Any, *args: Any, **params: Any) -> bool:
        """cuDNN hands its output and log-sum-exp to the backward pass where no name reaches."""
        return primitive.name.startswith(cudnn.PRIMITIVE) or named(primitive, *args, **params)

    return with_attention


def own(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a primitive's result is none that was gathered."""
    return not primitive.name.startswith(GATHERS)


def from_arguments(f: Callable) -> Callable:
    """`f`, of which the backward pass keeps the arguments and makes the rest again.

    As `jax.checkpoint` without a policy, but also inside a layer whose own policy keeps more: that
    would look into a checkpoint of `f` as well.
    """

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return f(*args)

    def backward(args: Any, cotangents: Any) -> Any:
        # XLA would see that all of this has been done, and keep it from the forward pass. One
        # barrier each: a joint one would take a copy on each device for values of its own.
        args = jax.tree.map(jax.lax.optimization_barrier, args)
        return jax.vjp(f, *args)[1](cotangents)

    call.defvjp(lambda *args: (f(*args), args), backward)
    return call


def computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a primitive does arithmetic."""
    return own(primitive) and primitive.name not in MOVES
