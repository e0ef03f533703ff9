"""Device rates: known names, a sane measurement, and a mesh that stays as it was."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from costs.devices import DATASHEETS, measured_matmul_rate, peak_flops, together


def named(kind, platform="gpu", process=0):
    return SimpleNamespace(device_kind=kind, platform=platform, process_index=process)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA Quadro of 2040", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_known_for_the_exact_name_only(kind, peak):
    assert peak_flops(named(kind)) == peak
    assert peak_flops(named(kind), "float32") is None


def test_every_datasheet_needs_more_than_50_flops_for_each_byte():
    for name, sheet in DATASHEETS.items():  # 100 to 600 in fact: a slip of a unit shows
        assert 50 < sheet.bf16 / sheet.bandwidth < 700, name
        assert 16e9 <= sheet.memory <= 200e9, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measured_rate_is_of_the_size_that_a_smaller_matmul_shows(dtype):
    rate = measured_matmul_rate(dtype)
    size = 512 if jax.default_backend() == "cpu" else 4096
    a = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), jax.local_devices()[0])
    matmul = jax.jit(jnp.matmul)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        matmul(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    assert 0.1 < rate / (2 * size**3 / min(times)) < 30  # a slip of a unit or of a dimension shows


def test_measuring_leaves_the_mesh_in_use_and_works_on_any_device():
    kinds = (AxisType.Explicit,)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=kinds)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        before = jax.sharding.get_abstract_mesh()
        assert measured_matmul_rate("float32", jax.local_devices()[-1]) > 1e8
        assert jax.sharding.get_abstract_mesh() == before


def test_cpu_devices_share_the_cores_of_their_process_and_accelerators_share_nothing():
    assert together(1e9, [named("cpu", "cpu")] * 8) == 1e9
    assert together(1e9, [named("cpu", "cpu", process) for process in (0, 0, 1, 1)]) == 2e9
    assert together(1e9, [named("NVIDIA H200")] * 8) == 8e9


def python(code):
    command = [sys.executable, "-c", code]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_peak_memory_on_a_cpu_grows_with_what_is_held_and_does_not_fall():
    before, held, after = python(
        "from costs.devices import peak_memory\n"
        "print(peak_memory()); block = bytearray(b'x') * 2**29\n"
        "print(peak_memory()); del block; print(peak_memory())"
    )
    slack = 2**22  # the kernel counts pages in batches
    assert before < 2**29 and held > before + 2**28 and after > held - slack


def test_peak_memory_of_a_child_is_not_its_parents():
    child = "import costs.devices; print(costs.devices.peak_memory())"
    arguments = [sys.executable, "-c", child]
    [peak] = python(
        f"x = bytearray(b'x') * 2**30\nimport os; os.execv({arguments[0]!r}, {arguments})"
    )
    assert peak < 2**29
