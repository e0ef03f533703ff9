"""A mesh of one device, in use while a test runs."""

import jax
import pytest

from sharding import mesh as meshes


@pytest.fixture(scope="package")
def mesh():
    return meshes.make(meshes.MeshConfig(), jax.devices()[:1])


@pytest.fixture
def one_device(mesh):
    with jax.set_mesh(mesh):
        yield
