"""Several slices or hosts: which devices are neighbours, and what the slow network carries."""

import dataclasses
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from model.matmul import einsum
from sharding import mesh as meshes
from sharding.layout import Layout
from sharding.mesh import MeshConfig
from tests.sharding.tiny import MODEL, check_reduce_scatters, gathered, run_of


@dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "one"


def ids(devices, **sizes):
    """The devices' numbers in the shape of the mesh; axes of one left out."""
    config = MeshConfig(**{"data": 1, **sizes})
    found = meshes.arrange(config.sizes(len(devices)), devices)
    assert found.shape == tuple(config.sizes(len(devices)).values())
    return np.vectorize(lambda device: device.id)(found).squeeze().tolist()


HOSTS = [Device(i, process_index=i // 4) for i in range(8)]  # 2 hosts of 4
SLICES = [
    Device(i, process_index=i // 2, slice_index=i // 4) for i in range(8)
]  # 4 hosts, 2 slices
CARDS = [Device(i, process_index=i, slice_index=i % 2) for i in range(8)]  # a process for each card
LAPTOP = [Device(i, process_index=0) for i in range(8)]
UNEVEN = [Device(i, process_index=i // 8) for i in range(12)]  # hosts of 8 and 4
SIXES = [Device(i, process_index=i // 6) for i in range(12)]


@pytest.mark.parametrize("devices", [HOSTS, SLICES, LAPTOP])
def test_inner_axes_stay_inside_a_host_or_slice(devices):
    assert ids(devices, dcn=2, fsdp=2, tensor=2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert ids(devices, dcn=2, data=2, tensor=2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert ids(devices, data=2, tensor=4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ids(devices, fsdp=8) == list(range(8)), "may cross: one axis has all devices"


def test_neighbours_are_told_by_their_network_and_not_by_their_order():
    assert ids(CARDS, dcn=2, fsdp=2, tensor=2) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert ids(CARDS[::-1], dcn=2, fsdp=4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert ids(CARDS, fsdp=4, tensor=2) == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_a_tensor_axis_larger_than_a_host_crosses_hosts():
    assert ids(HOSTS, tensor=8) == list(range(8))


def test_hosts_of_different_sizes_are_split_in_parts_of_one_size():
    assert ids(UNEVEN, dcn=3, tensor=4) == np.arange(12).reshape(3, 4).tolist()
    assert ids(UNEVEN, data=6, tensor=2) == np.arange(12).reshape(6, 2).tolist()


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (SIXES, {"fsdp": 3, "tensor": 4}, "tensor=4 would cross .* of 6 devices: .* divides 6"),
        (SIXES, {"dcn": 3, "tensor": 2, "data": 2}, "dcn=3 does not fit the 2 .* of 6 devices"),
        (UNEVEN, {"dcn": 2, "fsdp": 6}, "dcn=2 does not fit the 3 .* of 4 devices: it must be 1"),
    ],
)
def test_a_mesh_that_would_cross_hosts_for_nothing_is_refused(devices, sizes, message):
    with pytest.raises(ValueError, match=message):
        ids(devices, **sizes)


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_owns_the_rows_of_its_slice(processes):
    """Of eight devices shared out over so many processes, each a slice."""

    class Part:
        def __init__(self, mesh, own):
            self.where, self.own = NamedSharding(mesh, Layout().spec("batch")), own

        def addressable_devices_indices_map(self, shape):
            places = self.where.devices_indices_map(shape)
            return {device: index for device, index in places.items() if device.id in self.own}

    each = 8 // processes
    mesh = meshes.make(MeshConfig(dcn=processes, data=1, fsdp=each))
    for process in range(processes):
        own = range(process * each, (process + 1) * each)
        rows = meshes.own_rows(Part(mesh, own), 16)
        assert rows == list(range(16 // processes * process, 16 // processes * (process + 1)))


COLLECTIVE = re.compile(
    r"= (.*?) ([a-z\-]+?)(?:-start)?\(.*replica_groups=(\{\{.*?\}\}|\S+ \{.*?\})"
)


def crossing(text, slices):
    """(kind, dims of each result) of the collectives in which devices of two slices meet."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match and any(len({i // (8 // slices) for i in own}) > 1 for own in members(match[3])):
            shapes = re.findall(r"\w\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(map(int, filter(None, dims.split(","))))) for dims in shapes]
    return found


def members(groups):
    """The devices of each group of {{0,1},{2,3}} or mesh['a'=4,'b'=2] {'a'}."""
    if groups.startswith("{{"):
        return [list(map(int, own.split(","))) for own in groups.strip("{}").split("},{")]
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", groups)}
    assert "device_ids" not in groups
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", groups.split("{")[1])]
    devices = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
    devices = np.moveaxis(devices, along, range(len(along)))
    return devices.reshape(int(np.prod([devices.shape[i] for i in range(len(along))])), -1).T


@pytest.mark.parametrize("sizes", [{"dcn": 2, "fsdp": 4}, {"dcn": 2, "fsdp": 2, "tensor": 2}])
def test_only_the_reduce_scattered_part_of_a_gradient_crosses_the_slow_network(sizes):
    config = MeshConfig(data=1, **sizes)
    mesh = meshes.make(config)
    B, T, D, F = 8, 3, 16, 24
    with jax.set_mesh(mesh):
        layout = Layout()
        out = layout.spec("batch", None, "mlp")
        x, w = (
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for shape, spec in (
                ((B, T, D), layout.spec("batch", None, None)),
                ((F, D), layout.spec("mlp", "embed")),
            )
        )
        step = jax.grad(lambda w, x: jnp.sin(einsum("BTD,FD->BTF", x, w, out=out)).sum())
        text = jax.jit(step).lower(w, x).compile().as_text()
    assert crossing(text, 2) == [("all-reduce", w.sharding.shard_shape(w.shape))]


@pytest.mark.slow
def test_a_train_step_sends_only_parts_of_matrices_over_the_slow_network():
    run = run_of((1, 1, 1), model=dataclasses.replace(MODEL, remat="dots"))
    run = dataclasses.replace(run, mesh=MeshConfig(dcn=2, data=1, fsdp=4))
    with jax.set_mesh(meshes.make(run.mesh)):
        program = train.build(run)
        text = program.compile().as_text()
        check_reduce_scatters(program, text)
        parts = [sorted(part) for part, _ in gathered(program)]
    found = crossing(text, 2)
    assert {kind for kind, _ in found} == {"all-reduce"}, "weights are gathered inside a slice"
    matrices = [sorted(n for n in dims if n > 1) for _, dims in found if np.prod(dims) > 256]
    matrices.remove(sorted((MODEL.vocab, MODEL.embed // 4)))  # of the embedding
    assert sorted(matrices) == sorted([n for n in part if n > 1] for part in parts)
