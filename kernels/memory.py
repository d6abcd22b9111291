"""Keep the C library from handing large temporaries back to the kernel after every use.

A training step on a CPU allocates and frees the same tensors of 1 to 100 MB over and over. By
default glibc maps each one above a threshold anew, or trims the heap when its top is freed, and
the kernel then zeroes every page once more on first use: up to a tenth of the CPU time of a step.
"""

import ctypes
import platform

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, ready for the next step; call it once, early.

    The process holds on to its peak. Affects every thread of the process.

    Returns:
        Whether it took effect: only where the C library is glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never
