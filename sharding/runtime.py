"""What a process asks of the platform that it finds itself on."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import jax

SHARE = "0.93"  # the rest is for CUDA's own context and for libraries
SAME_BITS = (
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_exclude_nondeterministic_ops=true",
    "--xla_gpu_enable_triton_gemm=false",
)
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc


def prepare() -> None:
    """Settle how memory is had, before JAX starts its threads; what the user's shell says stays.

    On a GPU, let JAX take SHARE of its memory, not three quarters. On CPU, keep freed memory in the
    process, in one arena, where the C library is glibc: by default each large buffer of a step is
    mapped and unmapped again, and the kernel clears its pages every time, a quarter of a small
    model's step. Beside a GPU that would only slow down the threads that compile.
    """
    if not alone():
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", SHARE)
        return
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        malloc = ctypes.CDLL("libc.so.6").mallopt
        malloc(M_MMAP_MAX, 0)
        malloc(M_TRIM_THRESHOLD, 2**31 - 1)
        malloc(M_ARENA_MAX, 1)


def alone() -> bool:
    """Whether JAX will find no accelerator, told without starting it."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def once() -> dict | None:
    """Compiler options for a program that runs once: on CPU compiling costs far more than running.

    For `jax.jit(compiler_options=...)`; the initial state of a small model compiles in 2 s, not 8.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None


def compile_quickly() -> None:
    """Have XLA compile for CPU in a third of the time, for programs that hardly run.

    Asked of the whole process, before JAX finds its devices. An XLA that has no other way of making
    code (option `xla_cpu_disable_new_fusion_emitters`) ignores it.
    """
    option, given = "--xla_backend_extra_options=", os.environ.get("XLA_FLAGS", "")
    if option not in given:
        words = (*given.split(), f"{option}xla_cpu_disable_new_fusion_emitters")
        os.environ["XLA_FLAGS"] = " ".join(words)


def deterministic() -> None:
    """Have XLA make programs for GPUs that give the same bits whenever they run.

    Asked of the whole process, before JAX finds its devices. No operation adds in an order that the
    moment decides, the backward of cuDNN's attention included, and no kernel is chosen by timing
    it, which could choose another next time, nor because an earlier process timed it. Matmuls go to
    cuBLAS, which chooses well without timing; Triton takes its first tiles, which are small. NCCL
    leaves its sums to no switch. On CPU the same bits come anyway.
    """
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *SAME_BITS)).strip()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def same_bits() -> bool:
    """Whether XLA was asked for it, by `deterministic` or in the user's shell."""
    option, _, _ = SAME_BITS[0].partition("=")
    words = [word for word in os.environ.get("XLA_FLAGS", "").split() if word.startswith(option)]
    return bool(words) and words[-1] in (option, SAME_BITS[0])


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in `folder` for later processes, unless JAX was told another.

    Apart for each kind of processor: JAX takes programs of any, and one that lacks an instruction
    dies of them. Call it before anything is compiled.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    kind = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), kind)
    name = hashlib.blake2b(kind.encode(), digest_size=8).hexdigest()
    jax.config.update("jax_compilation_cache_dir", str(folder / name))
