"""A cache of filterbanks on disk, shared by epochs, runs and ranks.

Each file holds one clip and is named by a hash of everything that its content depends on: path,
size and mtime of the audio file (or the shard), filterbank settings, and the code that computes
them, so an entry is never stale. Files are written atomically and end with a checksum: a run may be
killed at any time, and any number of processes may share the folder. What killed ones have begun to
write is removed by the next run.
"""

import hashlib
import logging
import os
import shutil
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from ssast.kernels.fbank import FbankSpec, num_frames
from ssast.pipelines.clips.remote import is_url, version
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ClipPath, ClipPaths, ShardClip
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import TEMPORARY, write_atomically

log = logging.getLogger(__name__)

FORMAT = 2  # to be raised when the filterbank of the same clip changes
TAIL = struct.Struct("<QI")  # samples of the clip, checksum of the filterbank
ABANDONED_S = 3600.0  # age of a file that nobody can still be writing
# What stays free, for checkpoints: 5% of the disk, of a large one 2 GiB.
FREE_SHARE, FREE_BYTES = 0.05, 2 << 30


class DiskCache:
    """A cache in a folder, see :class:`~ssast.pipelines.stream.cache.Cache`.

    When the disk is full or fails, no more clips are added and the run goes on.

    Args:
        folder: Folder of the cache; created. It may hold clips of other data sets and settings.
        paths: Paths of the clips.
        spec: Filterbank settings.
        computed_by: Name of the code and of the device that compute the filterbanks.

    Raises:
        DataError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, paths: ClipPaths, spec: FbankSpec, computed_by: str) -> None:
        self._folder, self._paths, self._spec = folder, paths, spec
        self._made_by = repr((FORMAT, spec, computed_by))
        self._missing: dict[int, str] = {}  # file names of clips that are being computed
        self._ready: dict[int, list[tuple[Tensor, int]]] = {}
        self._lock = Lock()
        self._full = False
        try:
            write_atomically(folder / "probe", b"", shared=True)
            with suppress(FileNotFoundError):  # another rank may have removed it
                now = (folder / "probe").stat().st_mtime  # by the clock of the file system
                (folder / "probe").unlink()
                _remove_abandoned(folder, now - ABANDONED_S)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written to: {error.strerror}") from error

    def ready(self, clip_id: int) -> bool:
        """Read a clip if it is cached; then ``get`` must be called for it once. Thread-safe."""
        try:
            name = _identity(self._paths[clip_id], self._made_by)
        except OSError:  # no such clip, which reading it will report
            return False
        found = self._read(self._folder / name[:2] / name)
        with self._lock:
            if found is None:
                # Named before it is read: a file that changes meanwhile must not get the new name.
                self._missing.setdefault(clip_id, name)
            else:
                self._ready.setdefault(clip_id, []).append(found)
        return found is not None

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Write clips that were not cached; the arguments are those of :class:`MemoryCache`'s."""
        for row, (clip_id, samples) in enumerate(zip(clip_ids, lengths, strict=True)):
            with self._lock:
                name = self._missing.pop(clip_id, None)
            if self._full or name is None:
                continue
            sound = features[row, : num_frames(samples, self._spec)].detach().cpu().numpy()
            data = sound.astype("<f4").tobytes()
            try:
                disk = shutil.disk_usage(self._folder)
                needed = min(FREE_SHARE * disk.total, FREE_BYTES)
                if disk.free < needed:
                    raise OSError(0, f"less than {needed / 2**30:.1f} GiB of the disk are free")
                path = self._folder / name[:2] / name
                content = data + TAIL.pack(samples, zlib.crc32(data))
                write_atomically(path, content, shared=True, inside=self._folder)
            except OSError as error:
                self._full = True
                reason = error.strerror or str(error)
                log.warning("%s: %s: no more filterbanks are cached", self._folder, reason)

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Return filterbanks [B, T, F] on the CPU and the samples of clips that are ready."""
        with self._lock:
            found = [self._ready[clip_id].pop() for clip_id in clip_ids]
            for clip_id in {c for c in clip_ids if not self._ready[c]}:
                del self._ready[clip_id]
        features, lengths = zip(*found, strict=True)
        return torch.stack(features), list(lengths)

    def close(self) -> None:
        """Forget the clips that were read and not asked for."""
        self._ready.clear()

    def _read(self, path: Path) -> tuple[Tensor, int] | None:
        """Read a filterbank [T, F] and the samples; None if the file is missing or damaged."""
        try:
            data = memoryview(path.read_bytes())
            samples, checksum = TAIL.unpack(data[-TAIL.size :])
        except (OSError, struct.error):
            return None
        sound = data[: -TAIL.size]
        count = num_frames(samples, self._spec)
        if len(sound) != 4 * count * self._spec.n_mels or zlib.crc32(sound) != checksum:
            return None
        features = torch.zeros(self._spec.num_frames, self._spec.n_mels)
        features[:count] = torch.tensor(np.frombuffer(sound, "<f4")).view(count, self._spec.n_mels)
        return features, samples


def _remove_abandoned(folder: Path, before: float) -> None:
    """Remove files that were begun before this time, in s, and not finished."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # of another user, or removed by another rank
            if path.stat().st_mtime < before:
                path.unlink()


def _identity(path: ClipPath, made_by: str) -> str:
    """Return a hash that changes with the clip, its path, and the code of its filterbank.

    Raises:
        OSError: There is no such file.
    """
    where: tuple[float, ...] = ()
    if isinstance(path, ShardClip):
        where = path.offset, path.size
    elif isinstance(path, Segment):
        where = path.begin_s, path.duration_s
    file = str(path.path if isinstance(path, ShardClip | Segment) else path)
    if is_url(file):
        changed: object = version(file)
    else:
        file = os.path.abspath(file)
        status = os.stat(file)
        changed = status.st_size, status.st_mtime_ns
    parts = (file, changed, where, made_by)
    return hashlib.blake2b(ascii(parts).encode(), digest_size=20).hexdigest()
