"""The device mesh: its shape, its devices, and the processes that share it."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each mesh axis; -1, at most once, means all that are left."""

    data: int = -1  # copies of the model, each with its own rows
    fsdp: int = 1  # rows and weights split
    tensor: int = 1  # heads, hidden units and vocabulary split

    def __post_init__(self):
        for name, size in vars(self).items():
            if size < 1 and size != -1:
                raise ValueError(f"{name}={size} must be at least 1, or -1 for all that are left")
        if list(vars(self).values()).count(-1) > 1:
            raise ValueError(f"only one mesh axis can be -1, got {vars(self)}")

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis. ValueError if they do not divide."""
        fixed = {name: size for name, size in vars(self).items() if size != -1}
        need = math.prod(fixed.values())
        shape = ", ".join(f"{name}={size}" for name, size in fixed.items() if size > 1) or "1"
        if devices % need or (len(fixed) == len(vars(self)) and devices != need):
            right = f"a multiple of {need}" if len(fixed) < len(vars(self)) else f"{need}, or a -1"
            raise ValueError(f"{devices} devices do not divide into {shape}: that takes {right}")
        return {name: fixed.get(name, devices // need) for name in vars(self)}


def make(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with Explicit axes over `devices` (default: all)."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)
