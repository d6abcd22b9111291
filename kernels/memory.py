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
import resource
from pathlib import Path

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MADV_HUGEPAGE = 14  # sys/mman.h
_HUGE_PAGE = 2 << 20
_MOST = 8 << 30  # bytes of addresses: more than a step of base with 8 clips needs
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


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
    """Enlarge the heap by addresses that take no memory yet, and ask for huge pages there.

    Where there are no such addresses, or no huge pages, nothing changes.
    """
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    begin = libc.sbrk(0)
    libc.free(libc.malloc(_spare_addresses()))
    first, end = -(-begin // _HUGE_PAGE) * _HUGE_PAGE, libc.sbrk(0)
    if end > first:
        libc.madvise(first, end - first, _MADV_HUGEPAGE)


def _spare_addresses() -> int:
    """Return how many bytes of addresses the heap may take in advance.

    Files, threads and other processes need some as well: a quarter of what ``ulimit -v`` and
    ``-d`` leave, half of the memory, as Linux refuses to fork a process that has more addresses
    than there is memory, and none where each address counts as memory (vm.overcommit_memory 2).
    """
    if not _OVERCOMMIT.exists() or _OVERCOMMIT.read_text().strip() == "2":
        return 0
    page = os.sysconf("SC_PAGE_SIZE")
    size, *_, data, _ = (page * int(n) for n in Path("/proc/self/statm").read_text().split())
    spare = min(_MOST, os.sysconf("SC_PHYS_PAGES") * page // 2)
    for limit, used in ((resource.RLIMIT_AS, size), (resource.RLIMIT_DATA, data)):
        allowed, _ = resource.getrlimit(limit)
        if allowed != resource.RLIM_INFINITY:
            spare = min(spare, max(0, allowed - used) // 4)
    return spare
