"""Layout: which mesh axis splits each logical axis.

The model says what a dimension is; this says where it goes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from sharding.gather import axes_of

MeshAxis = str | tuple[str, ...] | None
# From the slowest network to the fastest: devices along the last axis are neighbours.
AXES = ("dcn", "data", "stage", "fsdp", "expert", "context", "tensor")
BUILT = ("dcn", "data", "stage", "fsdp", "expert", "context", "tensor")
# What a run may keep in its hosts' memory: its moments, the table, and the activations that layers
# name for their backward pass (model/remat.py).
ACTIVATIONS = ("input", "qkv", "attention", "mid", "up")
HOSTED = ("optimizer", "embedding", *ACTIVATIONS)
SERVING = ("data", "fsdp", "tensor")  # axes that a model can be used on, not only trained


@dataclass(frozen=True)
class Layout:
    """Which mesh axes split each logical axis; None keeps it whole on every device."""

    batch: MeshAxis = ("dcn", "data", "fsdp", "expert")  # rows of a batch
    sequence: MeshAxis = "context"  # tokens of a row
    residual: MeshAxis = "tensor"  # tokens between blocks, each part that `sequence` leaves
    layers: MeshAxis = "stage"
    experts: MeshAxis = "expert"
    embed: MeshAxis = "fsdp"  # of parameters; gathered layer by layer
    heads: MeshAxis = "tensor"  # kv heads, and the query heads that go with each
    mlp: MeshAxis = "tensor"
    vocab: MeshAxis = ("stage", "tensor")
    optimizer: MeshAxis = None  # its state, beyond what splits the parameters: ZeRO-1
    host: tuple[str, ...] = ()  # what lies in host memory between its uses: HOSTED

    def __post_init__(self):
        for name in self.host:
            if name not in HOSTED:
                raise ValueError(f"host={name!r} is none of {', '.join(HOSTED)}")
        split = {name: axes_of(value) for name, value in vars(self).items() if name != "host"}
        for name, axes in split.items():
            for axis in axes:
                if axis not in AXES:
                    raise ValueError(f"{name}={axis!r} is no mesh axis: {', '.join(AXES)}")
                if axes.count(axis) > 1:
                    raise ValueError(f"{name}={','.join(axes)} names {axis} twice")
        pairs = itertools.product(("batch", "sequence"), ("sequence", "heads", "mlp", "vocab"))
        together = [(first, last) for first, last in pairs if first != last]
        together += [("batch", "residual"), ("sequence", "residual")]
        for first, last in (*together, ("experts", "embed"), ("experts", "mlp")):
            for axis in split[first]:
                if axis in split[last]:
                    raise ValueError(f"{first} and {last} of one array cannot both be on {axis}")
        for axis in split["embed"]:
            if axis not in split["batch"] + split["sequence"]:
                raise ValueError(
                    f"embed on {axis} needs batch or sequence on {axis} too: weights are split "
                    f"over devices that work on different tokens"
                )

    def spec(self, *names: str | None) -> jax.P:
        """The partition of an array whose dims are these logical axes; None is an unsplit dim.

        Where a mesh is set, axes of one device are left out: what is not split looks unsplit.
        """
        sizes = jax.sharding.get_abstract_mesh().shape

        def dim(name: str | None) -> MeshAxis:
            parts = ("sequence", "residual") if name == "residual" else (name,) if name else ()
            axes = itertools.chain(*(axes_of(getattr(self, part)) for part in parts))
            axes = tuple(axis for axis in axes if sizes.get(axis) != 1)
            return axes[0] if len(axes) == 1 else axes or None

        return jax.P(*map(dim, names))


def divides(shape: Sequence[int], spec: jax.P) -> bool:
    """Whether each dim is a multiple of the devices, of the mesh in use, that split it."""
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = (math.prod(sizes[axis] for axis in axes_of(dim)) for dim in spec)
    return not any(size % n for size, n in zip(shape, ways, strict=False))
