"""The heap: what it takes in advance, and what it leaves to others."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ssast.kernels import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library's own")

PROGRAM = """
import ctypes, mmap, os, resource, sys
from pathlib import Path
from ssast.kernels.memory import keep_freed_memory
limit, more = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None)
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
if limit:
    size, *_, data, _ = map(int, Path("/proc/self/statm").read_text().split())
    most = (size if limit == resource.RLIMIT_AS else data) * mmap.PAGESIZE + more
    resource.setrlimit(limit, (most, most))
before = libc.sbrk(0)
assert keep_freed_memory()
print(libc.sbrk(0) - before)
mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a file, stacks of threads
assert os.spawnv(os.P_WAIT, "/bin/true", ["true"]) == 0  # forks
heap = Path("/proc/self/smaps").read_text().split("[heap]")[1:]
print(any("VmFlags" in x and " hg" in x.split("VmFlags", 1)[1].split("\\n")[0] for x in heap))
"""
HALF = memory.os.sysconf("SC_PHYS_PAGES") * memory.os.sysconf("SC_PAGE_SIZE") // 2


def run(limit, more):
    """Return by how much the heap grew, and whether huge pages are asked for there."""
    command = [sys.executable, "-c", PROGRAM, str(int(limit)), str(more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, huge = done.stdout.split()
    return int(grown), huge == "True"


def test_the_heap_takes_a_bounded_part_of_the_addresses():
    grown, huge = run(0, 0)
    assert 0 < grown <= min(8 << 30, HALF) + (1 << 20)
    assert huge or not Path("/sys/kernel/mm/transparent_hugepage").exists()


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
@pytest.mark.parametrize("more", [HALF + (1 << 29), 3 << 29])
def test_under_a_limit_others_have_most_of_what_is_left(limit, more):
    """Also where half of the memory would just fit, and no file or thread would after that."""
    grown, _ = run(limit, more)
    assert grown <= more / 4 + (1 << 20)


@pytest.mark.parametrize(("mode", "some"), [("0", True), ("1", True), ("2", False)])
def test_nothing_is_taken_where_addresses_count_as_memory(mode, some, tmp_path, monkeypatch):
    path = tmp_path / "overcommit_memory"
    path.write_text(f"{mode}\n")
    monkeypatch.setattr(memory, "_OVERCOMMIT", path)
    assert (memory._spare_addresses() > 0) == some
