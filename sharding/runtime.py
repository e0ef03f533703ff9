"""What a process asks of the platform that it finds itself on."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc


def prepare() -> None:
    """On CPU, keep freed memory in the process, in one arena, where the C library is glibc.

    By default each large buffer of a step is mapped and unmapped again, and the kernel clears its
    pages every time: a quarter of a small model's step. Call it before JAX starts its threads.
    Beside a GPU it would only slow down the threads that compile.
    """
    if not alone() or not sys.platform.startswith("linux"):
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
