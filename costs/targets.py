"""Hardware that is not here, to count for and to compile for, by libtpu or the CUDA plug-in."""

import importlib.util
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from costs.devices import DATASHEETS, Datasheet
from sharding import runtime

# Devices of a slice -> how they are wired: a TPU v5e or v6e in two dims, a v4 or v5p in three.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
        512: "8x8x8", 1024: "8x8x16"}  # fmt: skip
TPUS = {"v4": DEEP, "v5e": FLAT, "v5p": DEEP, "v6e": FLAT}
KINDS = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
}
HOST = 8  # GPUs of one
# GiB that a device has: as seen on GPUs, and as libtpu says of a program that is too large.
MEMORY = {"h100": 78, "h200": 139, "v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}

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


@dataclass(frozen=True)
class Target:
    """Devices of one kind."""

    name: str  # as the user wrote it
    platform: str  # "gpu", "tpu" or "cpu"
    count: int
    kind: str = ""  # of DATASHEETS; "" for a CPU
    usable: int = 0  # bytes of a device that a run can have

    @property
    def sheet(self) -> Datasheet | None:
        """None of a CPU, whose rates are measured."""
        return DATASHEETS.get(self.kind)


def known() -> str:
    """The targets, in words."""
    tpus = (f"{name}-N (N {', '.join(map(str, wired))})" for name, wired in TPUS.items())
    gpus = (f"{name}xN (N 1 to {HOST}, or whole hosts of {HOST})" for name in ("h100", "h200"))
    return f"{', '.join(tpus)}, {', '.join(gpus)}, cpuxN"


def parse(name: str) -> Target:
    """The target of this name; ValueError lists those that there are."""
    match = re.fullmatch(r"([a-z]\w*?)(?:(-|x)(\d+))?", name)
    kind, sign, digits = match.groups() if match else ("", "", "")
    count = int(digits or 1)
    if kind == "cpu" and sign != "-" and 1 <= count <= 1024:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Target(name, "cpu", count, usable=memory // count)
    memory = int(MEMORY.get(kind, 0) * 2**30)
    if sign == "-" and count in TPUS.get(kind, ()):
        return Target(name, "tpu", count, KINDS[kind], memory)
    gpu = sign == "x" and kind in ("h100", "h200")
    if gpu and count and (count <= HOST or count % HOST == 0) and count <= 4096:
        return Target(name, "gpu", count, KINDS[kind], int(memory * float(runtime.SHARE)))
    raise ValueError(f"{name!r} is no target; there are {known()}")


def missing(target: Target) -> str:
    """What the target's compiler lacks here, and what to do; "" if nothing."""
    if target.name.startswith("v4"):
        return f"{target.name} can only be counted: libtpu shows each half of its chips"
    if target.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return f"{target.name} needs libtpu to compile for: pip install --no-deps libtpu"
    if target.platform == "gpu":
        plugins = importlib.util.find_spec("jax_plugins")
        if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
            right = "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
            return f"{target.name} needs the CUDA plug-in to compile for: {right}, of jax's version"
    return ""


def devices_of(name: str) -> list[jax.Device]:
    """The devices of "v5e-8" or "h100x8", to make a mesh of and compile for.

    ValueError for a target that is unknown, or whose compiler is not installed.
    """
    target = parse(name)
    if lacks := missing(target):
        raise ValueError(lacks)
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.count]
    if target.platform == "tpu":
        return _tpus(target)
    config = HOPPER.format(
        name=target.kind, bandwidth=target.sheet.bandwidth, memory=target.sheet.memory
    )
    hosts, each = divmod(target.count, HOST) if target.count > HOST else (1, target.count)
    return _found(
        target, platform="cuda", target_config=config, topology=f"1x{hosts}x{each or HOST}"
    )


def compiler_options(name: str) -> dict | None:
    """For `compile(compiler_options=...)`: what a compiler without the hardware must not try."""
    if parse(name).platform != "gpu":
        return None
    # Nothing can be timed here; and matmuls go to cuBLAS, which is where most of those that are
    # timed go, because some small ones have no Triton kernel that is good untimed.
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def _tpus(target: Target) -> list[jax.Device]:
    # There is no TPU host whose metadata could be asked for, and no TPU that one process must keep
    # to itself.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    kind = target.name.partition("-")[0]
    wired = TPUS[kind][target.count]
    # By default a host has four chips.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if target.count == 1 else {}
    return _found(target, f"{kind}:{wired}", platform="tpu", **alone)


def _found(target: Target, topology_name: str = "", **how: object) -> list[jax.Device]:
    found = topologies.get_topology_desc(topology_name=topology_name, **how).devices
    assert len(found) == target.count, f"{target.name} has {len(found)} devices"
    return list(found)
