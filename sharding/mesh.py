"""The device mesh: its shape, its devices, and what processes share of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each mesh axis; -1, at most once, means all that are left."""

    dcn: int = 1  # slices or groups of hosts, joined by the slow network, each with its own rows
    data: int = -1  # copies of the model, each with its own rows
    stage: int = 1  # layers split; micro-batches go from stage to stage
    fsdp: int = 1  # rows and weights split
    expert: int = 1  # rows and experts split
    context: int = 1  # the tokens of a row split
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


def factorisations(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `devices` as a product of the sizes of so many axes, in order."""
    if axes == 1:
        yield (devices,)
        return
    for size in range(1, devices + 1):
        if devices % size == 0:
            yield from ((size, *rest) for rest in factorisations(devices // size, axes - 1))


def make(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with Explicit axes over `devices` (default: all)."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return Mesh(arrange(sizes, devices), tuple(sizes), (AxisType.Explicit,) * len(sizes))


def arrange(sizes: dict[str, int], devices: list) -> np.ndarray:
    """The devices in the mesh's shape, its inner axes inside a fast network as far as they fit.

    A fast network joins the devices of one slice (`slice_index`: of TPUs a slice, of GPUs a host or
    its NVLink domain) or, where devices have no such number, of one process. The outermost axes go
    over the slow network between these. ValueError if `tensor` would though one of them holds it,
    or if the groups of `dcn` would not be whole networks or parts of one.
    """
    networks: dict[int, list] = {}
    for device in devices:
        number = getattr(device, "slice_index", None)
        networks.setdefault(device.process_index if number is None else number, []).append(device)
    each = math.gcd(*map(len, networks.values()))  # where sizes differ, a network is several
    count = len(devices) // each
    if count > 1 and count % sizes["dcn"] and sizes["dcn"] % count:
        raise ValueError(
            f"dcn={sizes['dcn']} does not fit the {count} slices or hosts of {each} devices: it "
            f"must be 1, a divisor of {count} or a multiple"
        )
    outer, left = {}, count
    for axis, size in sizes.items():
        outer[axis] = math.gcd(size, left)
        left //= outer[axis]
    if outer["tensor"] > 1 and sizes["tensor"] <= each:
        raise ValueError(
            f"tensor={sizes['tensor']} would cross slices or hosts, of {each} devices: a size that "
            f"divides {each} stays inside"
        )
    inner = [size // outer[axis] for axis, size in sizes.items()]
    blocks = np.empty(tuple(outer.values()), object)
    ordered = [device for number in sorted(networks) for device in networks[number]]
    for i, place in enumerate(np.ndindex(blocks.shape)):
        own = ordered[i * each : (i + 1) * each]
        blocks[place] = mesh_utils.create_device_mesh(inner, own, allow_split_physical_axes=True)
    return np.block(blocks.tolist())


def own_rows(where: NamedSharding, rows: int) -> list[int]:
    """The rows of a [rows, ...] array of this sharding that lie on this process' devices."""
    places = where.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (index,) in places for row in range(*index.indices(rows))})


def place(arrays: dict[str, np.ndarray], where: NamedSharding, rows: int) -> dict[str, jax.Array]:
    """Global [rows, ...] arrays out of each process' `own_rows`."""
    own = own_rows(NamedSharding(where.mesh, jax.P(where.spec[0])), rows)

    def placed(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            first = own.index(start)
            return local[first : first + stop - start, *index[1:]]

        with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a step wants
            return jax.make_array_from_callback((rows, *local.shape[1:]), where, part)

    return {name: placed(local) for name, local in arrays.items()}


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """The largest of the processes' values, on all of them; every process must call it."""
    if jax.process_count() == 1:
        return value
    # Devices talk over the whole mesh: 8 bytes of each process.
    return int(np.max(multihost_utils.process_allgather(np.int64(value))))
