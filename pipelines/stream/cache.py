"""A cache of filterbanks in memory, one for all processes of a machine.

It is a file without a name (memfd_create): it is in no folder, so the size of /dev/shm does not
bound it, and it is gone with the last process that has it open, however that one ends. It is read
and written by calls, not mapped, so it does not count as memory of each process.

Each clip has a place of its own, or none where there is no room: nothing is allocated between
processes, and nothing is evicted, since in a shuffled order a clip that made room would be needed
as soon as the one that takes it. The file begins with an int64 for each place, the samples of the
clip plus 1, or 0 while it is empty; the filterbanks follow. A number is written after its
filterbank, and each write takes the lock of the file, which keeps that order for readers on any
processor: a process that is killed leaves a whole filterbank or an empty place. Two processes that
compute one clip at the same time write the same bytes.
"""

import errno
import logging
import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssast.kernels.fbank import FbankSpec, num_frames
from ssast.pipelines.clips.order import Weights

log = logging.getLogger(__name__)

NUMBER = 8  # bytes


class Cache(Protocol):
    """A cache of filterbanks, by the clip's row in the manifest."""

    def ready(self, clip_id: int) -> bool:
        """Return whether a clip is cached; then ``get`` must be called for it once. Thread-safe."""
        ...

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Add clips that were not ready: features [B, T, F] and the number of samples of each."""
        ...

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Return filterbanks [B, T, F] on the CPU and the number of samples of each clip."""
        ...

    def close(self) -> None:
        """Give memory back. The cache cannot be used afterwards."""
        ...


def cached_clips(num_clips: int, spec: FbankSpec, limit_bytes: int) -> int:
    """Return how many of the clips have room in a cache of this size."""
    return min(num_clips, limit_bytes // clip_bytes(spec))


def clip_bytes(spec: FbankSpec) -> int:
    """Return what one clip takes in the cache at most; a short one takes less."""
    return NUMBER + 4 * spec.num_frames * spec.n_mels


class MemoryCache:
    """A cache in memory. Clips without room are not added: with weights the rarest ones.

    Args:
        num_clips: Number of clips of the stream.
        spec: Filterbank settings.
        limit_bytes: Largest size of all filterbanks together.
        weights: Sampling weights of the clips.
        path: ``path`` of the cache of another process of this machine, of the same arguments;
            without it a cache is created.

    Raises:
        OSError: There is no such process, or its cache may not be opened.
    """

    def __init__(
        self,
        num_clips: int,
        spec: FbankSpec,
        limit_bytes: int,
        *,
        weights: Weights | None = None,
        path: str | None = None,
    ) -> None:
        self._spec, self._size = spec, 4 * spec.num_frames * spec.n_mels
        self._places = cached_clips(num_clips, spec, limit_bytes)
        self._place: np.ndarray | None = None  # of each clip; its row if None
        if weights is not None and self._places < num_clips:
            self._place = np.full(num_clips, self._places)
            self._place[weights.most_frequent(self._places)] = np.arange(self._places)
        self._full = False
        if path is None:
            self._file = os.fdopen(os.memfd_create("ssast-filterbanks"), "r+b", buffering=0)
        else:
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  # see close

    @property
    def path(self) -> str:
        """Path under which other processes of this user and machine can open the cache."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def ready(self, clip_id: int) -> bool:
        """Return whether a clip is cached."""
        return self._samples(self._place_of(clip_id)) is not None

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Add new clips that have a place.

        When there is no memory left, no more clips are added and the run goes on.

        Args:
            clip_ids: B clips.
            features: Filterbanks [B, T, F] on any device, 0 behind the end of a clip.
            lengths: Number of samples of each clip.
        """
        if self._full:
            return
        sounds = features.detach().cpu().contiguous().numpy()
        for clip_id, samples, sound in zip(clip_ids, lengths, sounds, strict=True):
            place = self._place_of(clip_id)
            if place >= self._places or self._samples(place) is not None:
                continue
            try:
                self._write(sound[: num_frames(samples, self._spec)].data, self._offset(place))
                number = (samples + 1).to_bytes(NUMBER, "little")
                self._write(memoryview(number), NUMBER * place)
            except OSError as error:
                self._full = True
                log.warning("%s: no more filterbanks are cached in memory", error.strerror)
                return

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Return filterbanks [B, T, F] on the CPU and the number of samples of each clip."""
        features = np.empty((len(clip_ids), self._spec.num_frames, self._spec.n_mels), np.float32)
        lengths = []
        for clip_id, row in zip(clip_ids, features, strict=True):
            place = self._place_of(clip_id)
            samples = self._samples(place)
            assert samples is not None
            count = num_frames(samples, self._spec)
            os.preadv(self._file.fileno(), [row[:count].data], self._offset(place))
            row[count:] = 0
            lengths.append(samples)
        return torch.from_numpy(features), lengths

    def close(self) -> None:
        """Close the file, whose memory is given back when all processes have."""
        self._file.close()

    def _place_of(self, clip_id: int) -> int:
        return clip_id if self._place is None else int(self._place[clip_id])

    def _offset(self, place: int) -> int:
        return NUMBER * self._places + self._size * place

    def _samples(self, place: int) -> int | None:
        """Return the samples of the clip in a place; None if it is empty, or there is no such."""
        if place >= self._places:
            return None
        found = os.pread(self._file.fileno(), NUMBER, NUMBER * place)
        return int.from_bytes(found, "little") - 1 if any(found) else None

    def _write(self, data: memoryview, offset: int) -> None:
        if os.pwrite(self._file.fileno(), data, offset) != data.nbytes:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
