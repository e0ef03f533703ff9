"""Meshes of any product of axes; each process' rows; layouts and their messages."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from sharding import mesh as meshes
from sharding.layout import AXES, Layout
from sharding.mesh import MeshConfig
from tests.meshes import hybrid


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 4, 1)),
        (MeshConfig(fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(data=2, fsdp=-1, tensor=3), 24, (2, 4, 3)),
        (MeshConfig(data=1, fsdp=1, tensor=-1), 6, (1, 1, 6)),
        (MeshConfig(data=3, fsdp=2, tensor=1), 6, (3, 2, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(config, devices, sizes):
    found = config.sizes(devices)
    assert tuple(found) == AXES
    assert tuple(found[axis] for axis in ("data", "fsdp", "tensor")) == sizes
    assert np.prod(list(found.values())) == devices


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(fsdp=4), 6, "6 devices do not divide into fsdp=4: that takes a multiple of 4"),
        (hybrid(2, 2, 2), 16, "16 devices .* data=2, fsdp=2, tensor=2: that takes 8, or a -1"),
        (MeshConfig(data=4, fsdp=1), 6, "6 devices do not divide into data=4: that takes 4"),
        (hybrid(1, 1, 1), 2, "2 devices do not divide into 1: that takes 1, or a -1"),
        (MeshConfig(tensor=16), 8, "8 devices .* tensor=16: that takes a multiple of 16"),
    ],
)
def test_devices_that_do_not_divide_are_refused(config, devices, message):
    with pytest.raises(ValueError, match=message):
        config.sizes(devices)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MeshConfig(data=0), "data=0 must be at least 1, or -1"),
        (lambda: MeshConfig(tensor=-2), "tensor=-2 must be at least 1, or -1"),
        (lambda: MeshConfig(fsdp=-1), "only one mesh axis can be -1"),
        (lambda: Layout(embed="model"), "embed='model' is no mesh axis: dcn, data, .*, tensor"),
        (lambda: Layout(batch=("data", "data")), "batch=data,data names data twice"),
        (lambda: Layout(heads="fsdp"), "batch and heads of one array cannot both be on fsdp"),
        (lambda: Layout(vocab=("tensor", "data")), "batch and vocab .* both be on data"),
        (lambda: Layout(experts="fsdp"), "experts and embed of one array cannot both be on fsdp"),
        (lambda: Layout(experts="tensor"), "experts and mlp of one array .* both be on tensor"),
        (lambda: Layout(batch="data"), "embed on fsdp needs batch or sequence on fsdp too"),
        (lambda: Layout(batch=None, embed="data"), "embed on data needs batch or sequence on data"),
        (lambda: Layout(sequence="data"), "batch and sequence of one array .* both be on data"),
        (lambda: Layout(sequence="tensor"), "sequence and heads .* both be on tensor"),
    ],
)
def test_what_cannot_be_split_says_why(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_process_that_is_alone_agrees_with_itself():
    assert meshes.is_main()
    assert meshes.agree(7) == 7


def test_a_mesh_has_explicit_axes_and_every_device_once():
    mesh = meshes.make(MeshConfig(fsdp=2, tensor=2))
    assert mesh.axis_types == (AxisType.Explicit,) * len(AXES)
    assert dict(mesh.shape) == {**dict.fromkeys(AXES, 1), "data": 2, "fsdp": 2, "tensor": 2}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_a_layout_names_the_mesh_axes_of_each_dim():
    layout = Layout()
    rows = ("dcn", "data", "fsdp", "expert")
    assert tuple(layout.spec("batch", "sequence", "vocab")) == (
        rows,
        "context",
        ("stage", "tensor"),
    )
    assert tuple(layout.spec("embed", "heads", None)) == ("fsdp", "tensor", None)
    assert tuple(Layout(mlp=None).spec("mlp", "embed")) == (None, "fsdp")
    assert tuple(layout.spec()) == ()
    assert hash(layout) == hash(Layout())
    with jax.set_mesh(meshes.make(hybrid(1, 4, 2))):
        assert tuple(layout.spec("batch", "sequence", "vocab")) == ("fsdp", None, "tensor")


MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize("sizes", MESHES)
def test_rows_lie_in_order_each_on_its_devices(sizes):
    mesh = meshes.make(hybrid(*sizes))
    where = NamedSharding(mesh, Layout().spec("batch", None))
    rows = {"a": np.arange(48).reshape(16, 3), "b": np.arange(16 * 5).reshape(16, 5)}
    placed = meshes.place(rows, where, 16)
    ways = sizes[0] * sizes[1]
    for name, array in placed.items():
        np.testing.assert_array_equal(array, rows[name])
        assert array.sharding == where
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {16 // ways}


@pytest.mark.parametrize("sizes", MESHES)
def test_one_process_owns_all_rows(sizes):
    mesh = meshes.make(hybrid(*sizes))
    assert meshes.own_rows(NamedSharding(mesh, Layout().spec("batch")), 16) == list(range(16))


def test_a_process_owns_the_rows_of_its_devices():
    """Processes 0 and 1 of a mesh whose devices alternate between them."""

    class Half:
        def __init__(self, mesh, keep):
            self.where, self.keep = NamedSharding(mesh, jax.P(("data", "fsdp"))), keep

        def addressable_devices_indices_map(self, shape):
            places = self.where.devices_indices_map(shape)
            return {device: index for device, index in places.items() if self.keep(device.id)}

    mesh = meshes.make(MeshConfig(fsdp=2, tensor=2))  # device = 4 data + 2 fsdp + tensor
    assert meshes.own_rows(Half(mesh, lambda i: i < 4), 8) == [0, 1, 2, 3]
    assert meshes.own_rows(Half(mesh, lambda i: i >= 4), 8) == [4, 5, 6, 7]
    assert meshes.own_rows(Half(mesh, lambda i: i & 2), 8) == [2, 3, 6, 7]
    assert meshes.own_rows(Half(mesh, lambda i: i & 1), 8) == list(range(8))
