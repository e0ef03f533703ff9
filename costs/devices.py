"""What the devices can do by their datasheets, by a measurement, and what memory they have used."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding


@dataclass(frozen=True)
class Datasheet:
    """One jax device: dense bfloat16 FLOP/s (float32 sums), bytes and bytes/s of its memory."""

    bf16: float
    memory: float
    bandwidth: float
    link: float = 0.0  # bytes/s, one way, to the devices of its host or, of a TPU, its slice
    near: int = 0  # devices that `link` joins; 0: all
    far: float = 0.0  # bytes/s, one way, to any other
    int8: float = 0.0  # FLOP/s; 0: not faster than bf16
    fp8: float = 0.0

    def peak(self, dtype: str) -> float:
        """FLOP/s of matmuls with operands of this dtype or preset of precision; of all but 8-bit
        ones, and where those are not faster, bf16's."""
        eight = {"int8": self.int8, "fp8": self.fp8, "float8": self.fp8}
        return eight.get(dtype.partition("_")[0], 0.0) or self.bf16


# Sources: NVIDIA H100, H200, A100, L4 and L40S datasheets, H100 and Ada architecture whitepapers,
# HGX B200 datasheet; tensor-core rates printed "with sparsity" are halved.
# Google: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; a jax device is a chip, of tpu7x half.
# Networks: NVLink 4, 900 GB/s both ways; one 400 Gb/s adapter a GPU (DGX H100 datasheet). A TPU's
# ring along one axis of its torus has two of its links, of 50 (v4, v5e) or 100 GB/s (v5p, v6e) each
# way; its data-center network as on those pages.
H100 = Datasheet(989.4e12, 80e9, 3.35e12, 450e9, 8, 50e9, int8=1979e12, fp8=1979e12)
H200 = Datasheet(989.4e12, 141e9, 4.8e12, 450e9, 8, 50e9, int8=1979e12, fp8=1979e12)
V4 = Datasheet(275e12, 32e9, 1228e9, 100e9, 0, 3.1e9)
V5E = Datasheet(197e12, 16e9, 819e9, 100e9, 0, 3.1e9, int8=393e12)
V5P = Datasheet(459e12, 95e9, 2765e9, 200e9, 0, 6.25e9, int8=918e12)
V6E = Datasheet(918e12, 32e9, 1640e9, 200e9, 0, 12.5e9, int8=1836e12)

# Exact names, so that a slice ("... MIG 1g.10gb") or a sibling never gets the full card's peak.
DATASHEETS = {
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H100 PCIe": Datasheet(756e12, 80e9, 2.0e12),
    "NVIDIA H100 NVL": Datasheet(835.5e12, 94e9, 3.9e12),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": Datasheet(835.5e12, 141e9, 4.8e12),
    "NVIDIA B200": Datasheet(2250e12, 180e9, 7.7e12),
    "NVIDIA A100-SXM4-40GB": Datasheet(312e12, 40e9, 1555e9),
    "NVIDIA A100-SXM4-80GB": Datasheet(312e12, 80e9, 2039e9),
    "NVIDIA A100-PCIE-40GB": Datasheet(312e12, 40e9, 1555e9),
    "NVIDIA A100 80GB PCIe": Datasheet(312e12, 80e9, 1935e9),
    "NVIDIA L4": Datasheet(121e12, 24e9, 300e9),
    "NVIDIA L40S": Datasheet(362e12, 48e9, 864e9),
    "NVIDIA GeForce RTX 4090": Datasheet(165.2e12, 24e9, 1008e9),
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": Datasheet(2307e12 / 2, 192e9 / 2, 7.38e12 / 2),
}


def peak_flops(device: jax.Device, dtype: str = "bfloat16") -> float | None:
    """Datasheet FLOP/s of one device; None where none is known (a CPU, another dtype)."""
    sheet = DATASHEETS.get(device.device_kind)
    return sheet.bf16 if sheet and jnp.dtype(dtype) == jnp.bfloat16 else None


def measured_matmul_rate(dtype: str = "bfloat16", device: jax.Device | None = None) -> float:
    """FLOP/s that one device keeps up in a large square matmul of random numbers.

    A CPU's rate is that of all its cores, however many devices they pretend to be. Takes half a
    second on an idle CPU. Leaves the mesh in use as it is.
    """
    device = device or jax.local_devices()[0]
    cpu = device.platform == "cpu"
    size, burst = (1024, 1) if cpu else (8192, 8)  # a burst hides the launch of the next
    mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        # Random, because a GPU draws less power for zeros and runs faster than on real values. One
        # tile from the host, because compiling a generator takes longer than all the rest.
        tile = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
        tile = jax.device_put(tile.astype(jnp.dtype(dtype)), NamedSharding(mesh, jax.P()))
        a = jax.jit(lambda tile: jnp.tile(tile, (size // 1024, size // 1024)))(tile)
        matmul = jax.jit(jnp.matmul)
        matmul(a, a).block_until_ready()
        seconds, end = [], time.perf_counter() + (0.25 if cpu else 0.5)
        while time.perf_counter() < end:
            start = time.perf_counter()
            for _ in range(burst):
                c = matmul(a, a)
            c.block_until_ready()
            seconds.append(time.perf_counter() - start)
    # On a CPU other programs disturb, so the best. An H100 runs 780 TFLOP/s for 50 ms and then, at
    # its power limit, the 690 that a long step can have: the median.
    return 2 * size**3 * burst / (min(seconds) if cpu else median(seconds))


def together(rate: float, devices: Sequence[jax.Device]) -> float:
    """FLOP/s of all `devices` if one does `rate`. Those of a process on CPU share its cores."""
    if devices[0].platform == "cpu":
        return rate * len({device.process_index for device in devices})
    return rate * len(devices)


def peak_memory() -> int:
    """The most bytes that a local device has held; on CPU the most that the process has held."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else _resident_peak()


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # ru_maxrss second: a child inherits its parent's peak through fork and exec.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
