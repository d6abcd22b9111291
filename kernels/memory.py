"""Keep the C library from handing large temporaries back to the kernel after every use.

A training step on a CPU allocates and frees the same tensors of 1 to 100 MB over and over. By
default glibc maps each one above a threshold anew, or trims the heap when its top is freed, and
the kernel then zeroes every page once more on first use: up to a tenth of the CPU time of a step.
Of huge pages (2 MiB) the processor finds the addresses of all tensors without a walk through
tables: glibc can ask for them only by a variable that is set before a program starts.
"""

import ctypes
import os
import platform

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MADV_HUGEPAGE = 14  # sys/mman.h
_HUGE_PAGE = 2 << 20


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, ready for the next step; call it once, early.

    The process holds on to its peak, in huge pages where the kernel gives them. Affects every
    thread of the process.

    Returns:
        Whether it took effect: only where the C library is glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)  # -1: never
    if kept:
        _use_huge_pages(libc)
    return bool(kept)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Enlarge the heap by the addresses of half of the memory, and ask for huge pages there.

    Addresses take no memory before they are used; of more than there is memory Linux would refuse
    to fork a process. Where there are not so many, or no huge pages, nothing changes.
    """
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    begin = libc.sbrk(0)
    libc.free(libc.malloc(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2))
    first, end = -(-begin // _HUGE_PAGE) * _HUGE_PAGE, libc.sbrk(0)
    if end > first:
        libc.madvise(first, end - first, _MADV_HUGEPAGE)
