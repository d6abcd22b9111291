"""Digests of the contents of files that were read before, on this machine or by this user.

One file of fixed records in the user's cache folder. Processes append whole records under a lock;
each record ends with a checksum of its own, so that a torn one is only forgotten.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from ssast.pipelines.clips.shared import LISTS
from ssast.pipelines.files import cache_folder, write_atomically

WORDS = 5  # key (2), digest (2), checksum: each an uint64
RECORD = 8 * WORDS
LIMIT_RECORDS = 2**23  # 320 MiB; the newer half stays when there are more
FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


class DigestCache:
    """Digests by a key that changes when the file does, see :mod:`ssast.pipelines.clips.digests`.

    A folder that cannot be written to costs only the time of reading files again.
    """

    def __init__(self) -> None:
        self._path = cache_folder(LISTS) / "digests.bin"
        self._known = self._read()
        self._order = np.argsort(self._known[:, 0], kind="stable")

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look files up.

        Args:
            keys: [n, 2] uint64.

        Returns:
            Digests [n, 2] uint64, and which are known, [n] bool.
        """
        found, known = np.zeros_like(keys), np.zeros(len(keys), bool)
        if len(self._known):
            firsts = self._known[self._order, 0]
            # The last record of a key; that two keys share half of their bits does not happen.
            places = np.searchsorted(firsts, keys[:, 0], side="right") - 1
            records = self._known[self._order[np.maximum(places, 0)]]
            known = (places >= 0) & (records[:, :2] == keys).all(1)
            found[known] = records[known, 2:4]
        return found, known

    def add(self, keys: np.ndarray, digests: np.ndarray) -> None:
        """Keep digests [n, 2] uint64 of files for later processes."""
        records = np.empty((len(keys), WORDS), "<u8")
        records[:, :2], records[:, 2:4] = keys, digests
        records[:, 4] = _checksums(records)
        with contextlib.suppress(OSError), self._locked() as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size - size % RECORD)  # of a process that died or a full disk
            file.write(records.tobytes())
            file.truncate()

    def _read(self) -> np.ndarray:
        """Return the whole records, [n, 5] uint64; halve the file when it is too long."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return np.zeros((0, WORDS), "<u8")
        records = np.frombuffer(data[: len(data) - len(data) % RECORD], "<u8").reshape(-1, WORDS)
        records = records[records[:, 4] == _checksums(records)]
        if len(records) > LIMIT_RECORDS:
            records = records[-LIMIT_RECORDS // 2 :]
            with contextlib.suppress(OSError), self._locked():
                write_atomically(self._path, records.tobytes(), shared=True)
        return records

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Open the file for appending, under a lock that ends with the process."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            with open(descriptor, "r+b", buffering=0) as file:
                yield file


def _checksums(records: np.ndarray) -> np.ndarray:
    factors = np.array(FACTORS, np.uint64)
    return (records[:, :4] * factors).sum(1, dtype=np.uint64) ^ factors[0]  # not 0 for zeros
