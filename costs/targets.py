"""Hardware that is not here, to compile for: TPUs by libtpu, GPUs by the CUDA plug-in."""

import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from costs.devices import H100, H200

# Devices -> how they are wired; of a TPU v5e or v6e in two dims, of a v4 or v5p in three.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
TPUS = {"v4": DEEP, "v5e": FLAT, "v5p": DEEP, "v6e": FLAT}
GPUS = {"h100": ("NVIDIA H100 80GB HBM3", H100), "h200": ("NVIDIA H200", H200)}
MOST_GPUS = 8  # of one host

# What XLA asks of a Hopper card: CUDA C++ Programming Guide, table of compute capability 9.0.
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""


def known() -> str:
    """The targets, in words."""
    tpus = ", ".join(f"{name}-N ({', '.join(map(str, wired))})" for name, wired in TPUS.items())
    return f"{tpus}, {', '.join(f'{name}xN (1 to {MOST_GPUS})' for name in GPUS)}"


def devices_of(target: str) -> list[jax.Device]:
    """The devices of "v5e-8" or "h100x8", to make a mesh of and compile for.

    ValueError for a target that is unknown, or whose compiler is not installed.
    """
    match = re.fullmatch(r"(\w+?)(-|x)(\d+)", target)
    name, sign, count = (match[1], match[2], int(match[3])) if match else ("", "", 0)
    if sign == "-" and count in TPUS.get(name, ()):
        return _tpus(target, f"{name}:{TPUS[name][count]}", count)
    if sign == "x" and name in GPUS and 1 <= count <= MOST_GPUS:
        return _gpus(target, name, count)
    raise ValueError(f"{target!r} is no target; there are {known()}")


def compiler_options(target: str) -> dict | None:
    """For `jax.jit(compiler_options=...)`: what a compiler without the hardware must not try."""
    return {"xla_gpu_autotune_level": 0} if target.partition("x")[0] in GPUS else None


def _tpus(target: str, topology: str, count: int) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"{target} needs libtpu to compile for: pip install --no-deps libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU host's metadata to ask for
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert len(found) == count, f"{topology} has {len(found)} devices"
    return list(found)


def _gpus(target: str, name: str, count: int) -> list[jax.Device]:
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        right = "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
        raise ValueError(
            f"{target} needs the CUDA plug-in to compile for: {right}, of jax's version"
        )
    kind, sheet = GPUS[name]
    config = HOPPER.format(name=kind, bandwidth=sheet.bandwidth, memory=sheet.memory)
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology=f"1x1x{count}"
    ).devices
    assert len(found) == math.prod((1, 1, count))
    return list(found)
