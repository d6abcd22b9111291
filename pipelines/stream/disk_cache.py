"""Filterbanks kept in a folder, for later epochs, later runs and other ranks.

A file holds one clip. It is named by a hash of all that its numbers depend on: place, size and time
of change of the file (or the shard) that the clip is read from, filterbank settings, and the code
that computes them. So what is found is never out of date. It appears in one move and ends with a
checksum: whatever kills a run, and however many share the folder, a file is whole or not used.
"""

import hashlib
import logging
import os
import shutil
import struct
import zlib
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from ssast.kernels.fbank import FbankSpec, num_frames
from ssast.pipelines.clips.remote import is_url, version
from ssast.pipelines.clips.shards import ClipPath, ClipPaths, ShardClip
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the filterbank of the same clip comes out differently
TAIL = struct.Struct("<QI")  # samples of the clip, checksum of the filterbank
FREE_SHARE = 0.05  # of the disk that is left to others: checkpoints must fit as well


class DiskCache:
    """Filterbanks in a folder; used as :class:`~ssast.pipelines.stream.cache.FbankCache`.

    Where the disk is full, or fails, clips are computed as if there were no cache.

    Args:
        folder: Is created; may hold clips of other data sets and settings.
        paths: The clips.
        spec: Filterbank settings.
        computed_by: Names the code and the device that compute the filterbanks.

    Raises:
        DataError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, paths: ClipPaths, spec: FbankSpec, computed_by: str) -> None:
        self._folder, self._paths, self._spec = folder, paths, spec
        self._made_by = repr((FORMAT, spec, computed_by))
        self._missing: dict[int, str] = {}  # names of clips that are being computed
        self._ready: dict[int, list[tuple[Tensor, int]]] = {}
        self._lock = Lock()
        self._full = False
        try:
            write_atomically(folder / "probe", b"", shared=True)
            (folder / "probe").unlink(missing_ok=True)  # another rank may have been faster
        except OSError as error:
            raise DataError(f"{folder}: cannot be written to: {error.strerror}") from error

    def ready(self, clip_id: int) -> bool:
        """Read a clip, if it is kept; each time, ``get`` must ask for it once. In any thread."""
        try:
            name = _identity(self._paths[clip_id], self._made_by)
        except OSError:  # the clip itself is not there: who reads it will say so
            return False
        found = self._read(self._folder / name[:2] / name)
        with self._lock:
            if found is None:
                # What it was before it was read: it may change before it is computed.
                self._missing.setdefault(clip_id, name)
            else:
                self._ready.setdefault(clip_id, []).append(found)
        return found is not None

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Keep clips that were not; the arguments are those of the cache in memory."""
        for row, (clip_id, samples) in enumerate(zip(clip_ids, lengths, strict=True)):
            with self._lock:
                name = self._missing.pop(clip_id, None)
            if self._full or name is None:
                continue
            sound = features[row, : num_frames(samples, self._spec)].detach().cpu().numpy()
            data = sound.astype("<f4").tobytes()
            try:
                disk = shutil.disk_usage(self._folder)
                if disk.free < FREE_SHARE * disk.total:
                    raise OSError(0, f"less than {FREE_SHARE:.0%} of the disk is free")
                path = self._folder / name[:2] / name
                content = data + TAIL.pack(samples, zlib.crc32(data))
                write_atomically(path, content, shared=True)
            except OSError as error:
                self._full = True
                why = error.strerror or str(error)
                log.warning("%s: %s: no more filterbanks are kept there", self._folder, why)

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Filterbanks [B, T, F] on the CPU and samples of clips that are ready."""
        with self._lock:
            found = [self._ready[clip_id].pop() for clip_id in clip_ids]
            for clip_id in {c for c in clip_ids if not self._ready[c]}:
                del self._ready[clip_id]
        features, lengths = zip(*found, strict=True)
        return torch.stack(features), list(lengths)

    def _read(self, path: Path) -> tuple[Tensor, int] | None:
        """Filterbank [T, F] and samples; None if the file is not there, or not whole."""
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


def _identity(path: ClipPath, made_by: str) -> str:
    """Changes when the clip, its place or what computes its filterbank does.

    Raises:
        OSError: There is no such file.
    """
    where = (path.offset, path.size) if isinstance(path, ShardClip) else ()
    file = str(path.path if isinstance(path, ShardClip) else path)
    if is_url(file):
        changed: object = version(file)
    else:
        file = os.path.abspath(file)
        status = os.stat(file)
        changed = status.st_size, status.st_mtime_ns
    parts = (file, changed, where, made_by)
    return hashlib.blake2b(ascii(parts).encode(), digest_size=20).hexdigest()
