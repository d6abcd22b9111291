"""Feeds DALI with the clips' bytes: reads ahead in threads, never raises for a bad file."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.encoded import read_clip, silence
from ssast.pipelines.clips.mix import is_remote
from ssast.pipelines.clips.order import Weights, clips_at, crop_place, rank_positions
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.cache import Cache

INVALID, READ, CACHED = 0, 1, 2
REQUESTS = 32  # at once, of a storage that answers after some 50 ms: a few hundred clips a second
Loaded = tuple[np.ndarray, int]  # a file, and one of these


class BatchInfo(Protocol):
    """What DALI tells an external source: which batch it wants."""

    iteration: int


class ClipSource:
    """Callback of an external source: the encoded clips of batch ``iteration``.

    What it returns depends on the start position and the iteration alone; all else it keeps is a
    cache of batches read ahead. A clip that cannot be read becomes silence, is marked invalid and
    is noted, with the reason, in ``reasons``.

    Args:
        paths: The clips of the manifest.
        spec: Filterbank settings.
        batch_size: Clips per batch of this rank.
        seed: Of the order of the clips.
        rank: Of this process, from 0.
        world_size: Number of ranks.
        start: First position of the stream, over all ranks.
        epochs: Passes over the manifest in its order; None for the endless shuffled stream.
        num_threads: Threads that read (and convert what needs it); more of them wait for clips
            that lie behind a URL.
        read_ahead: Batches to read ahead.
        weights: Of the clips in the endless stream, see :mod:`ssast.pipelines.clips.order`.
        random_crop: Of a recording that is longer than ``spec``, take another part in each epoch
            instead of its beginning.
        cache: Of clips that need not be read: silence stands for them.
    """

    def __init__(
        self,
        paths: ClipPaths,
        spec: FbankSpec,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        epochs: int | None = None,
        num_threads: int = 2,
        read_ahead: int = 3,
        weights: Weights | None = None,
        random_crop: bool = False,
        cache: Cache | None = None,
    ) -> None:
        self.cache = cache
        self.weights, self.random_crop = weights, random_crop
        self.paths, self.spec = paths, spec
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.start, self.epochs, self.read_ahead = seed, start, epochs, read_ahead
        self.reasons: dict[int, str] = {}  # clip id -> why it was replaced
        self._doubted: set[int] = set()
        self._doubt_all = False
        self._ahead: dict[int, list[Future[Loaded]]] = {}
        self._silence = silence(spec)
        if is_remote(paths):
            num_threads = max(num_threads, REQUESTS)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="ssast-read")

    def clips(self, iteration: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which clips make up a batch.

        Args:
            iteration: Batches since the start position.

        Returns:
            clip_ids: [B] int64, rows of the manifest.
            epochs: [B] int64, pass over the manifest.
            present: [B] bool, False past the end of a finite stream.
        """
        positions = rank_positions(
            self.start, iteration, self.batch_size, self.rank, self.world_size
        )
        count = len(self.paths)
        if self.epochs is None:
            clip_ids, epochs = clips_at(positions, count, self.seed, self.weights)
            return clip_ids, epochs, np.ones(len(positions), bool)
        epochs, clip_ids = np.divmod(positions, count)
        return clip_ids, epochs, epochs < self.epochs

    def doubt(self, clip_ids: Iterable[int]) -> None:
        """Decode these clips here from now on, before DALI sees them."""
        self._doubted.update(clip_ids)

    def doubt_all(self) -> None:
        """Decode every clip here from now on."""
        self._doubt_all = True

    def restart(self, start: int) -> None:
        """Forget what was read ahead and count iterations from another start position."""
        self._cancel()
        self.start = start

    def __call__(self, info: BatchInfo) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """One batch.

        Args:
            info: Its ``iteration`` counts the batches since the start position.

        Returns:
            encoded: B arrays [n] uint8, audio files.
            labels: B arrays [3] int64: clip id, epoch, and whether it is valid: INVALID, READ, or
                CACHED.
        """
        iteration = info.iteration
        for later in range(iteration, iteration + 1 + self.read_ahead):
            if later not in self._ahead:
                self._ahead[later] = self._submit(later)
        clip_ids, epochs, _ = self.clips(iteration)
        encoded, labels = [], []
        for clip_id, epoch, future in zip(
            clip_ids, epochs, self._ahead.pop(iteration), strict=True
        ):
            data, state = future.result()
            encoded.append(data)
            labels.append(np.array([clip_id, epoch, state], np.int64))
        return encoded, labels

    def close(self) -> None:
        """End the threads. The source cannot be used after this."""
        self._cancel()
        self._threads.shutdown(wait=True)

    def _cancel(self) -> None:
        for futures in self._ahead.values():
            for future in futures:
                future.cancel()
        self._ahead.clear()

    def _submit(self, iteration: int) -> list["Future[Loaded]"]:
        clip_ids, epochs, present = self.clips(iteration)
        nothing: Future[Loaded] = Future()
        nothing.set_result((self._silence, INVALID))
        return [
            self._threads.submit(self._load, int(clip_id), int(epoch)) if here else nothing
            for clip_id, epoch, here in zip(clip_ids, epochs, present, strict=True)
        ]

    def _load(self, clip_id: int, epoch: int) -> Loaded:
        """The bytes of a clip; silence, and a note, if it cannot be read."""
        if clip_id in self.reasons:
            return self._silence, INVALID
        if self.cache is not None and self.cache.ready(clip_id):
            return self._silence, CACHED
        trust = not (self._doubt_all or clip_id in self._doubted)
        place = crop_place(self.seed, clip_id, epoch) if self.random_crop else 0.0
        try:
            return read_clip(self.paths[clip_id], self.spec, trust=trust, place=place), READ
        except DataError as error:
            self.reasons[clip_id] = str(error)
            return self._silence, INVALID
