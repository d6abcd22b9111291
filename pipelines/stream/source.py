"""Feed encoded clips to DALI: read ahead in threads, replace bad files by silence."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.encoded import read_clip, silence
from ssast.pipelines.clips.mix import is_remote
from ssast.pipelines.clips.order import Weights, clips_at, crop_position, rank_positions
from ssast.pipelines.clips.retry import Retry
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.errors import DataError, StorageError
from ssast.pipelines.stream.cache import Cache

INVALID, READ, CACHED = 0, 1, 2
REQUESTS = 32  # in parallel: at 50 ms each, several hundred clips per second
Loaded = tuple[np.ndarray, int]  # an encoded file, and one of these


class BatchInfo(Protocol):
    """DALI's argument to an external source."""

    iteration: int


class ClipSource:
    """The callback of a DALI external source: the encoded clips of batch ``iteration``.

    The result depends on the start position and the iteration alone; the only state is the batches
    read ahead. A clip that cannot be read is replaced by silence and marked invalid; ``reasons``
    holds the error message. While storage fails, no clip is to blame: reading is tried again.

    Args:
        paths: Paths of the clips, in the order of the manifest.
        spec: Filterbank settings.
        batch_size: Batch size of this rank.
        seed: Seed of the shuffling.
        rank: Rank of this process.
        world_size: Number of ranks.
        start: First position of the stream, over all ranks.
        epochs: Number of passes in manifest order; None for the endless shuffled stream.
        num_threads: Threads that read and convert clips; at least :data:`REQUESTS` for URLs.
        read_ahead: Number of batches to read ahead.
        weights: Sampling weights of the endless stream, see :mod:`ssast.pipelines.clips.order`.
        random_crop: Whether to take a different crop of a longer recording in each epoch, instead
            of its start.
        retry_s: Time in s for which a clip is tried again while storage fails.
        cache: Cache of filterbanks; cached clips are not read, and silence stands in for them.
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
        retry_s: float = 300.0,
        cache: Cache | None = None,
    ) -> None:
        self.cache = cache
        self.weights, self.random_crop = weights, random_crop
        self.paths, self.spec = paths, spec
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.start, self.epochs, self.read_ahead = seed, start, epochs, read_ahead
        self.reasons: dict[int, str] = {}  # clip id -> why it was replaced
        self._to_verify: set[int] = set()
        self._verify_all = False
        self._retry = Retry(retry_s)
        self._ahead: dict[int, list[Future[Loaded]]] = {}
        self._silence = silence(spec)
        if is_remote(paths):
            num_threads = max(num_threads, REQUESTS)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="ssast-read")

    def clips(self, iteration: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the clips of a batch.

        Args:
            iteration: Number of batches since the start position.

        Returns:
            Rows of the manifest and epochs, [B] int64, and a mask [B] that is False past the end of
            a finite stream.
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

    def verify(self, clip_ids: Iterable[int]) -> None:
        """Decode these clips with libsndfile from now on, before DALI does."""
        self._to_verify.update(clip_ids)

    def verify_all(self) -> None:
        """Decode every clip with libsndfile from now on."""
        self._verify_all = True

    def restart(self, start: int) -> None:
        """Drop the batches read ahead and count iterations from another start position."""
        self._cancel()
        self.start = start

    def __call__(self, info: BatchInfo) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return one batch.

        Args:
            info: ``iteration`` is the number of batches since the start position.

        Returns:
            B audio files [n] uint8, and B labels [3] int64: clip id, epoch, and INVALID, READ or
            CACHED.

        Raises:
            StorageError: Storage kept failing.
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
        """Stop the threads. The source cannot be used afterwards."""
        self._retry.stop()
        self._cancel()
        self._threads.shutdown(wait=True)

    def _cancel(self) -> None:
        for futures in self._ahead.values():
            for future in futures:
                future.cancel()
        self._ahead.clear()

    def _submit(self, iteration: int) -> list["Future[Loaded]"]:
        clip_ids, epochs, present = self.clips(iteration)
        padding: Future[Loaded] = Future()
        padding.set_result((self._silence, INVALID))
        return [
            self._threads.submit(self._load, int(clip_id), int(epoch)) if is_present else padding
            for clip_id, epoch, is_present in zip(clip_ids, epochs, present, strict=True)
        ]

    def _load(self, clip_id: int, epoch: int) -> Loaded:
        """Read a clip; return silence, and keep the reason, if it cannot be read."""
        if clip_id in self.reasons:
            return self._silence, INVALID
        if self.cache is not None and self.cache.ready(clip_id):
            return self._silence, CACHED
        verify = self._verify_all or clip_id in self._to_verify
        crop = crop_position(self.seed, clip_id, epoch) if self.random_crop else 0.0
        try:
            data = read_clip(
                self.paths[clip_id], self.spec, verify=verify, crop=crop, retry=self._retry
            )
            return data, READ
        except StorageError:
            raise
        except DataError as error:
            self.reasons[clip_id] = str(error)
            return self._silence, INVALID
