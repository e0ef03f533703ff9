"""Layout: which mesh axis splits each logical axis.

The model says what a dimension is; this says where it goes.
"""

import itertools
from dataclasses import dataclass

import jax

MeshAxis = str | tuple[str, ...] | None
# From the slowest network to the fastest: devices along the last axis are neighbours.
AXES = ("dcn", "data", "stage", "fsdp", "expert", "context", "tensor")
BUILT = ("dcn", "data", "fsdp", "expert", "context", "tensor")
SERVING = ("data", "fsdp", "tensor")  # axes that a model can be used on, not only trained


@dataclass(frozen=True)
class Layout:
    """Which mesh axes split each logical axis; None keeps it whole on every device."""

    batch: MeshAxis = ("dcn", "data", "fsdp", "expert")  # rows of a batch
    sequence: MeshAxis = "context"  # tokens of a row
    layers: MeshAxis = "stage"
    experts: MeshAxis = "expert"
    embed: MeshAxis = "fsdp"  # of parameters; gathered layer by layer
    heads: MeshAxis = "tensor"  # kv heads, and the query heads that go with each
    mlp: MeshAxis = "tensor"
    vocab: MeshAxis = "tensor"

    def __post_init__(self):
        split = {
            name: (value,) if isinstance(value, str) else value or ()
            for name, value in vars(self).items()
        }
        for name, axes in split.items():
            for axis in axes:
                if axis not in AXES:
                    raise ValueError(f"{name}={axis!r} is no mesh axis: {', '.join(AXES)}")
                if axes.count(axis) > 1:
                    raise ValueError(f"{name}={','.join(axes)} names {axis} twice")
        pairs = itertools.product(("batch", "sequence"), ("sequence", "heads", "mlp", "vocab"))
        together = [(first, last) for first, last in pairs if first != last]
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
            axes = getattr(self, name) if name else ()
            axes = (axes,) if isinstance(axes, str) else axes or ()
            axes = tuple(axis for axis in axes if sizes.get(axis) != 1)
            return axes[0] if len(axes) == 1 else axes or None

        return jax.P(*map(dim, names))
