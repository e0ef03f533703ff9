"""Meshes by three sizes, for tests of the axes that every run knows."""

from sharding.mesh import MeshConfig


def hybrid(data: int = 1, fsdp: int = 1, tensor: int = 1) -> MeshConfig:
    """So many devices along data, fsdp and tensor, one along each other axis."""
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
