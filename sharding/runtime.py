"""What a process asks of its platform before the first device is used."""

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc


def prepare() -> None:
    """Keep freed memory in the process, in one arena, where the C library is glibc.

    By default each large buffer of a step on CPU is mapped and unmapped again, and the kernel
    clears its pages every time: a fifth of a small model's step.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        malloc = ctypes.CDLL("libc.so.6").mallopt
        malloc(M_MMAP_MAX, 0)
        malloc(M_TRIM_THRESHOLD, 2**31 - 1)
        malloc(M_ARENA_MAX, 1)
